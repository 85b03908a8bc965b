/** Ranks on simulated devices: kernels, copies between devices and the order of their streams. */
import { describe, expect, it } from 'vitest';
import { blockByBlock } from '../../test/support/block-by-block.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { createProblem } from '../attention/problem.ts';
import { type CudaBackend, createCudaBackend } from '../backends/cuda/backend.ts';
import { Cuda } from '../backends/cuda/driver/device.ts';
import { FakeCuda } from '../backends/cuda/testing/fake-cuda.ts';
import { createSimulatedBackend } from '../backends/cuda/testing/simulator/backend.ts';
import { attentionExact } from '../reference/exact.ts';
import { compare } from '../reference/metrics.ts';
import { toFloat32 } from '../tensor/access.ts';
import { type Tensor, tensor, transpose } from '../tensor/tensor.ts';
import { CudaPlace } from './cuda-place.ts';
import { createDeviceGroup } from './group.ts';
import { type ShardedOptions, sageattnSharded } from './sharded.ts';

const seed = runSeed();

describe(`ranks on CUDA devices (SAGEATTENTION_SEED=${seed})`, () => {
  const random = new Random(seed);
  const make = (heads: number, tokens: number, dim: number): Tensor =>
    tensor(random.normals(heads * tokens * dim), [1, heads, tokens, dim]);
  const [q, k, v] = [make(2, 30, 16), make(1, 30, 16), make(1, 30, 24)];

  const outputOf = async (backend: CudaBackend, devices: readonly number[], options: ShardedOptions, nhd: boolean) => {
    const group = await createDeviceGroup({ devices, backend });
    const given = (x: Tensor) => (nhd ? transpose(x, [0, 2, 1, 3]) : x);
    const sharding = { order: 'zigzag', tensorLayout: nhd ? 'NHD' : 'HND' } as const;
    const [sq, sk, sv] = await Promise.all([q, k, v].map((x) => group.shard(given(x), sharding)));
    const { output, lse } = await sageattnSharded(sq as never, sk as never, sv as never, {
      isCausal: true,
      ...options,
      returnLse: true,
    });
    const [values, sums] = [toFloat32(given(await group.gather(output))), toFloat32(await group.gather(lse))];
    for (const each of [output, lse]) each.dispose();
    group.dispose();
    await backend.dispose();
    return { values, sums };
  };

  for (const { capability, ulysses, ring, nhd } of [
    { capability: 80, ulysses: 1, ring: 3, nhd: false },
    { capability: 80, ulysses: 2, ring: 2, nhd: true },
    { capability: 90, ulysses: 2, ring: 1, nhd: false },
  ]) {
    it(`${ring} x ${ulysses} ranks on sm_${capability} give the bits of their blocks one after another, on one device and on two`, async () => {
      const backend = createSimulatedBackend(capability, 2);
      const place = new CudaPlace(backend, (await backend.cuda()).device(0));
      const expected = await blockByBlock(place, { q, k, v }, 'zigzag', { ulysses, ring, isCausal: true });
      place.dispose();
      await backend.dispose();
      const ranks = Array.from({ length: ulysses * ring }, (_, rank) => rank);
      for (const devices of [ranks.map(() => 0), ranks.map((rank) => rank % 2)]) {
        const { values, sums } = await outputOf(createSimulatedBackend(capability, 2), devices, { ulysses }, nhd);
        expect(values).toEqual(expected.output);
        expect(sums).toEqual(expected.lse);
      }
      const exact = attentionExact(createProblem(q, k, v, { isCausal: true }), { q, k, v });
      expect(compare(expected.output, exact.output).relativeL1).toBeLessThan(0.03);
      exact.lse.forEach((sum, i) => {
        expect(Math.abs((expected.lse[i] as number) - sum)).toBeLessThan(0.05);
      });
    });
  }

  it('take a mask and joint tokens, which lie in this process, to whichever device they work on', async () => {
    const backend = createSimulatedBackend(80, 2);
    const joint = { k: make(1, 5, 16), v: make(1, 5, 24), where: 'front' } as const;
    const seen = tensor(
      Uint8Array.from({ length: 30 * 30 }, () => (random.uniform() < 0.7 ? 1 : 0)),
      [30, 30],
    );
    const group = await createDeviceGroup({ devices: [1, 0], backend });
    const [sq, sk, sv] = await Promise.all([q, k, v].map((x) => group.shard(x)));
    const output = await sageattnSharded(sq as never, sk as never, sv as never, { joint, attnMask: seen });
    const values = toFloat32(await group.gather(output));
    for (const each of [sq, sk, sv, output]) each?.dispose();
    group.dispose();
    await backend.dispose();
    const behind = (head: Tensor, tail: Tensor) => {
      const [, , first, dim] = head.shape as [number, number, number, number];
      const all = new Float32Array((first + 30) * dim);
      all.set(toFloat32(head));
      all.set(toFloat32(tail), first * dim);
      return tensor(all, [1, 1, first + 30, dim]);
    };
    const whole = { q, k: behind(joint.k, k), v: behind(joint.v, v) };
    const bits = seen.data as Uint8Array;
    const attnMask = tensor(
      Uint8Array.from({ length: 30 * 35 }, (_, i) =>
        i % 35 < 5 ? 1 : (bits[Math.floor(i / 35) * 30 + (i % 35) - 5] as number),
      ),
      [1, 1, 30, 35],
    );
    const exact = attentionExact(createProblem(q, whole.k, whole.v, { attnMask }), { ...whole, attnMask });
    expect(compare(values, exact.output).relativeL1).toBeLessThan(0.03);
  });

  it('uses its slots again, round by round and call by call', async () => {
    const backend = createSimulatedBackend(80, 4);
    const group = await createDeviceGroup({ devices: [0, 1, 2, 3], backend });
    for (let call = 0; call < 2; call++) {
      const [x, y] = [make(1, 20, 16), make(1, 20, 16)];
      const [sx, sy] = await Promise.all([x, y].map((each) => group.shard(each)));
      const output = await sageattnSharded(sx as never, sy as never, sx as never);
      const values = toFloat32(await group.gather(output));
      const expected = attentionExact(createProblem(x, y, x, {}), { q: x, k: y, v: x }).output;
      expect(compare(values, expected).relativeL1).toBeLessThan(0.03);
      for (const each of [sx, sy, output]) each?.dispose();
    }
    group.dispose();
    await backend.dispose();
  });

  it('holds no memory once it is disposed, not even after a copy that failed', async () => {
    const fake = new FakeCuda({ devices: [90, 90], memoryBytes: 2 ** 32 });
    const cuda = new Cuda(fake.api);
    const backend = createCudaBackend({ open: async () => cuda });
    const group = await createDeviceGroup({ devices: [0, 1], backend });
    const x = await group.shard(tensor(new Float32Array(2 * 300 * 64), [1, 2, 300, 64]));
    for (const options of [{}, { ulysses: 2 }]) {
      (await sageattnSharded(x, x, x, options)).dispose();
      fake.failNext('cuMemcpyPeerAsync', 1);
      await expect(sageattnSharded(x, x, x, options)).rejects.toMatchObject({ code: 'execution-failed' });
      (await sageattnSharded(x, x, x, options)).dispose();
    }
    x.dispose();
    group.dispose();
    await new Promise(setImmediate);
    for (const ordinal of [0, 1]) cuda.device(ordinal).trimMemory();
    expect(fake.liveAllocations).toBe(0);
    expect(fake.liveHandles).toMatchObject({ graphs: 0 });
    await backend.dispose();
  });
});
