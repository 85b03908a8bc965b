import { afterAll, describe, expect, it } from 'vitest';
import { Random, runSeed } from '../../test/support/random.ts';
import { createProblem } from '../attention/problem.ts';
import { createSimulatedBackend } from '../backends/cuda/testing/simulator/backend.ts';
import { createWasmBackend } from '../backends/wasm/index.ts';
import { backwardExact } from '../reference/backward.ts';
import { compare } from '../reference/metrics.ts';
import { toFloat32 } from '../tensor/access.ts';
import { type Tensor, tensor, transpose } from '../tensor/tensor.ts';
import { type ShardedBackwardOptions, sageattnShardedBackward } from './backward.ts';
import { createDeviceGroup, type DeviceGroup } from './group.ts';
import { sageattnSharded } from './sharded.ts';

const seed = runSeed();

describe(`sageattnShardedBackward (SAGEATTENTION_SEED=${seed})`, () => {
  const random = new Random(seed);
  const wasm = createWasmBackend();
  afterAll(() => wasm.dispose());

  /** Largest relative L1 of dq, dk and dv, or of those named, against exact gradients. */
  async function errorOf(
    group: DeviceGroup,
    options: ShardedBackwardOptions,
    { lengths: [lq, lk] = [37, 37], heads: [hq, hk] = [4, 2], nhd = false, dim = 16, magnitude = 1 } = {},
    names: readonly ('dq' | 'dk' | 'dv')[] = ['dq', 'dk', 'dv'],
  ): Promise<number> {
    const make = (heads: number, tokens: number, size = 1) =>
      tensor(random.normals(heads * tokens * dim, size), [1, heads, tokens, dim]);
    const [q, k, v, dOutput] = [
      make(hq as number, lq as number, magnitude),
      make(hk as number, lk as number, magnitude),
      make(hk as number, lk as number),
      make(hq as number, lq as number),
    ];
    const given = (x: Tensor) => (nhd ? transpose(x, [0, 2, 1, 3]) : x);
    const sharding = { order: 'zigzag', tensorLayout: nhd ? 'NHD' : 'HND' } as const;
    const shard = (x: Tensor) => group.shard(given(x), sharding);
    const [sq, sk, sv, sd] = [await shard(q), await shard(k), await shard(v), await shard(dOutput)];
    const { backwardPrecision: _, gradientDtype: __, ...forward } = options;
    const { output, lse } = await sageattnSharded(sq, sk, sv, { ...forward, returnLse: true });
    const made = await sageattnShardedBackward({ q: sq, k: sk, v: sv, output, lse, dOutput: sd }, options);
    const { isCausal = false } = options;
    const exact = backwardExact(createProblem(q, k, v, { isCausal }), { q, k, v, dOutput });
    let worst = 0;
    for (const name of names) {
      const whole = given(await group.gather(made[name]));
      worst = Math.max(worst, compare(toFloat32(whole), exact[name]).relativeL1);
    }
    for (const gradient of Object.values(made)) gradient.dispose();
    for (const each of [sq, sk, sv, sd, output, lse]) each.dispose();
    return worst;
  }

  it.each([
    ['a ring of three', 3, {}, {}],
    ['a causal ring of three', 3, { isCausal: true }, {}],
    ['heads among two', 2, { ulysses: 2, isCausal: true }, { nhd: true }],
    ['more columns than heads of K', 4, { ulysses: 4 }, { heads: [4, 2] }],
    ['rows of two, lengths that differ', 4, { ulysses: 2 }, { lengths: [11, 26] }],
    ['more ranks than tokens', 5, { isCausal: true }, { lengths: [3, 3] }],
  ] as const)('adds up what one device gives: %s', async (_, ranks, options, shape) => {
    const kernel = 'qk-int8-pv-fp16';
    const [one, divided] = [
      await createDeviceGroup({ ranks: 1, backend: wasm }),
      await createDeviceGroup({ ranks, backend: wasm }),
    ];
    const alone = await errorOf(one, { kernel, ...(options as object), ulysses: 1 }, shape as never);
    const together = await errorOf(divided, { kernel, ...options }, shape as never);
    expect(alone).toBeLessThan(0.08);
    expect(together).toBeLessThan(Math.max(0.02, 1.6 * alone));
  });

  // Their softmax is made anew: each rank knows its own keys only, most of which have no weight among all.
  it('gives rows of large scores the weights of all ranks', async () => {
    const large = { magnitude: 100, lengths: [40, 40] as [number, number] };
    const group = await createDeviceGroup({ ranks: 3, backend: wasm });
    expect(await errorOf(group, { kernel: 'qk-int8-pv-fp16' }, large, ['dv'])).toBeLessThan(0.4);
    const backend = createSimulatedBackend(80, 2);
    const devices = await createDeviceGroup({ devices: [0, 1], backend });
    expect(await errorOf(devices, { kernel: 'qk-int8-pv-fp16-cuda' }, large, ['dv'])).toBeLessThan(0.4);
    devices.dispose();
    await backend.dispose();
  });

  it('runs on devices, which add in kernels', async () => {
    const backend = createSimulatedBackend(80, 2);
    const group = await createDeviceGroup({ devices: [0, 1], backend });
    const options = { kernel: 'qk-int8-pv-fp16-cuda', isCausal: true } as const;
    for (const ulysses of [1, 2]) {
      expect(await errorOf(group, { ...options, ulysses }, { lengths: [20, 20], heads: [2, 2] })).toBeLessThan(0.08);
    }
    group.dispose();
    await backend.dispose();
  });

  it('names the argument that is wrong', async () => {
    const group = await createDeviceGroup({ ranks: 2, backend: wasm });
    const x = await group.shard(tensor(new Float32Array(2 * 8 * 16), [1, 2, 8, 16]));
    const { output, lse } = await sageattnSharded(x, x, x, { returnLse: true });
    const good = { q: x, k: x, v: x, output, lse, dOutput: x };
    const zigzag = await group.shard(tensor(new Float32Array(2 * 8 * 16), [1, 2, 8, 16]), { order: 'zigzag' });
    await expect(sageattnShardedBackward({ ...good, dOutput: zigzag })).rejects.toMatchObject({ argument: 'dOutput' });
    await expect(sageattnShardedBackward({ ...good, lse: output })).rejects.toMatchObject({ argument: 'lse' });
    await expect(sageattnShardedBackward(good, { kernel: 'qk-int8-pv-int8' })).rejects.toMatchObject({
      argument: 'options.kernel',
    });
    await expect(sageattnShardedBackward(good, { joint: {} } as never)).rejects.toMatchObject({
      code: 'unknown-option',
    });
  });
});
