/** Sequence parallelism on real devices: virtual ranks on one, and on two where there are two. */

import { createProblem } from '../../src/attention/problem.ts';
import type { Cuda, CudaBackend } from '../../src/backends/cuda/index.ts';
import { CudaPlace } from '../../src/distributed/cuda-place.ts';
import {
  createDeviceGroup,
  type ShardedOptions,
  sageattnSharded,
  sageattnShardedBackward,
} from '../../src/distributed/index.ts';
import { sageattn } from '../../src/index.ts';
import { backwardExact } from '../../src/reference/backward.ts';
import { attentionExact } from '../../src/reference/exact.ts';
import { compare } from '../../src/reference/metrics.ts';
import { fromFloat32, toFloat32 } from '../../src/tensor/access.ts';
import { blockByBlock } from '../support/block-by-block.ts';
import { Random } from '../support/random.ts';
import type { Check } from './checks.ts';

/** Partial outputs are rounded once more than one device's. */
const MERGE_SLACK = 1.1;
const TOKENS = 700;

/** Checks of every way to divide the work over the devices given. */
export function distributedChecks(backend: CudaBackend, cuda: Cuda, seed: number): Check[] {
  const random = new Random(seed);
  const make = (heads: number, dim: number) =>
    fromFloat32(random.normals(heads * TOKENS * dim), [1, heads, TOKENS, dim], 'bfloat16');
  const [q, k, v] = [make(8, 128), make(4, 128), make(4, 128)];
  // Keys and values of several ranks are quantized; alone, at this length, the default kernel may be exact.
  const kernelOf = async () => (await backend.defaultKernel(createProblem(q, k, v, {}), { quantized: true })).name;
  const sharded = async (devices: readonly number[], options: ShardedOptions) => {
    const group = await createDeviceGroup({ devices, backend });
    const parts = await Promise.all([q, k, v].map((x) => group.shard(x, { order: 'zigzag' })));
    const [sq, sk, sv] = parts as [never, never, never];
    const { output, lse } = await sageattnSharded(sq, sk, sv, { ...options, returnLse: true });
    const gathered = { output: toFloat32(await group.gather(output)), lse: toFloat32(await group.gather(lse)) };
    for (const each of [...parts, output, lse]) each.dispose();
    group.dispose();
    return gathered;
  };
  /** The same blocks one after another on the first device, by whoever the ranks are. */
  const oneAfterAnother = async (ranks: number, { ulysses = 1, ...options }: ShardedOptions) => {
    const place = new CudaPlace(backend, cuda.device(0));
    const topology = { ulysses, ring: ranks / ulysses };
    const made = await blockByBlock(place, { q, k, v }, 'zigzag', { ...options, ...topology });
    place.dispose();
    return made;
  };
  const others = cuda.deviceCount > 1 ? [1] : [];
  const ways = [
    { name: 'a ring of three ranks on one device', devices: [0, 0, 0], options: {} },
    { name: 'heads divided among four ranks on one device', devices: [0, 0, 0, 0], options: { ulysses: 4 } },
    { name: 'two rows of two ranks on one device', devices: [0, 0, 0, 0], options: { ulysses: 2 } },
    ...others.flatMap((other) => [
      { name: 'a ring of two devices', devices: [0, other], options: {} },
      { name: 'heads divided between two devices', devices: [0, other], options: { ulysses: 2 } },
      { name: 'rows of two devices', devices: [0, other, other, 0], options: { ulysses: 2 } },
    ]),
  ];
  const kernel = 'qk-int8-pv-fp16-cuda' as const;
  /** Relative L1 of the gradients of causal attention, the worst of the three, by ranks on these devices. */
  const gradients = async (devices: readonly number[], options: ShardedOptions): Promise<number> => {
    const dOutput = fromFloat32(new Random(seed + 1).normals(8 * TOKENS * 128), [1, 8, TOKENS, 128], 'bfloat16');
    const group = await createDeviceGroup({ devices, backend });
    const parts = await Promise.all([q, k, v, dOutput].map((x) => group.shard(x, { order: 'zigzag' })));
    const [sq, sk, sv, sd] = parts as [never, never, never, never];
    const own = { ...options, kernel, isCausal: true } as const;
    const { output, lse } = await sageattnSharded(sq, sk, sv, { ...own, returnLse: true });
    const made = await sageattnShardedBackward({ q: sq, k: sk, v: sv, output, lse, dOutput: sd }, own);
    const exact = backwardExact(createProblem(q, k, v, { isCausal: true }), { q, k, v, dOutput });
    let worst = 0;
    for (const gradient of ['dq', 'dk', 'dv'] as const) {
      const whole = toFloat32(await group.gather(made[gradient]));
      worst = Math.max(worst, compare(whole, exact[gradient]).relativeL1);
      made[gradient].dispose();
    }
    for (const each of [...parts, output, lse]) each.dispose();
    group.dispose();
    return worst;
  };
  const gradientChecks = ways.map(
    ({ name, devices, options }): Check => ({
      name: `gradients of ${name}`,
      async run() {
        const [alone, together] = [await gradients([0], {}), await gradients(devices, options)];
        // As in the tests on a CPU: each rank rounds its sums once.
        if (!(together <= Math.max(0.02, 1.6 * alone))) throw new Error(`relative L1 ${together}, one device ${alone}`);
        return `relative L1 ${together.toFixed(4)}, one device ${alone.toFixed(4)}`;
      },
    }),
  );
  const checks = ways.flatMap(({ name, devices, options }) =>
    [false, true].map((isCausal) => ({
      name: `${name}${isCausal ? ', causal' : ''}`,
      async run() {
        const exact = attentionExact(createProblem(q, k, v, { isCausal }), { q, k, v }).output;
        const one = toFloat32(
          await sageattn(q, k, v, { isCausal, backend: 'cuda', kernel: await kernelOf(), returnLse: false }),
        );
        const actual = await sharded(devices, { ...options, isCausal });
        const [alone, together] = [one, actual.output].map((values) => compare(values, exact).relativeL1) as [
          number,
          number,
        ];
        if (!(together <= MERGE_SLACK * alone)) throw new Error(`relative L1 ${together}, one device ${alone}`);
        const expected = await oneAfterAnother(devices.length, { ...options, isCausal });
        for (const name of ['output', 'lse'] as const) {
          const at = expected[name].findIndex((value, i) => !Object.is(value, actual[name][i]));
          if (at >= 0) throw new Error(`value ${at} of ${name} is not that of the blocks one after another`);
        }
        return `the bits of its blocks; relative L1 ${together.toFixed(4)}, one device ${alone.toFixed(4)}`;
      },
    })),
  );
  return [...checks, ...gradientChecks];
}
