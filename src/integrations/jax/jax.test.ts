import { init, jit, numpy } from '@jax-js/jax';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { createProblem } from '../../attention/problem.ts';
import { disposeBackends } from '../../backends/registry.ts';
import { backwardExact } from '../../reference/backward.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare, relativeL2 } from '../../reference/metrics.ts';
import { tensor } from '../../tensor/tensor.ts';
import { sageattn, sageattnTrainable } from './index.ts';

const seed = runSeed();
beforeAll(async () => {
  console.info(`seed ${seed}`);
  await init('cpu', 'wasm');
});
afterAll(disposeBackends);

it('attends over jax-js arrays in the memory of this process, and consumes them', async () => {
  const random = new Random(seed);
  const [batch, heads, length, dim] = [1, 2, 65, 24] as const;
  const [q, k, v] = [0, 1, 2].map(() =>
    tensor(random.normals(batch * heads * length * dim), [batch, heads, length, dim]),
  ) as [ReturnType<typeof tensor>, ReturnType<typeof tensor>, ReturnType<typeof tensor>];
  const toJax = (value: typeof q) =>
    numpy.array(value.data as Float32Array<ArrayBuffer>, { shape: [...value.shape], device: 'cpu' });
  const kept = toJax(q);
  const output = await sageattn(kept.ref, toJax(k), toJax(v), { isCausal: true });
  expect(output.shape).toEqual([batch, heads, length, dim]);
  const exact = attentionExact(createProblem(q, k, v, { isCausal: true }), { q, k, v }).output;
  expect(compare((await output.data()) as Float32Array, exact).cosineSimilarity).toBeGreaterThan(0.999);
  expect(kept.refCount).toBe(1);
  kept.dispose();
});

it('gives gradients of arrays, and consumes what it is given', async () => {
  const random = new Random(seed);
  const [shape, keys] = [
    [1, 4, 33, 16],
    [1, 2, 70, 16],
  ] as const;
  const normal = (of: readonly number[]) => tensor(random.normals(of.reduce((a, b) => a * b)), of);
  const [q, k, v, dOutput] = [normal(shape), normal(keys), normal(keys), normal(shape)];
  const toJax = (value: typeof q) =>
    numpy.array(value.data as Float32Array<ArrayBuffer>, { shape: [...value.shape], device: 'cpu' });
  const [mine, incoming] = [toJax(q), toJax(dOutput)];
  const attention = await sageattnTrainable(mine.ref, toJax(k), toJax(v), { windowSize: [20, 30] });
  expect(attention.output.shape).toEqual(shape);
  const gradients = await attention.backward(incoming.ref);
  const exact = backwardExact(createProblem(q, k, v, { windowSize: [20, 30] }), { q, k, v, dOutput });
  for (const name of ['dq', 'dk', 'dv'] as const) {
    expect(gradients[name].shape).toEqual(name === 'dq' ? shape : keys);
    expect(relativeL2((await gradients[name].data()) as Float32Array, exact[name])).toBeLessThan(0.02);
  }
  await expect(attention.backward(numpy.ones([1, 4, 33, 15], { device: 'cpu' }))).rejects.toMatchObject({
    argument: 'dOutput',
  });
  expect([mine.refCount, incoming.refCount]).toEqual([1, 1]);
  attention.dispose();
  await expect(attention.backward(incoming)).rejects.toMatchObject({ code: 'disposed' });
  expect(incoming.refCount).toBe(0);
  mine.dispose();
  attention.output.dispose();
});

describe.each(['cpu', 'wasm'] as const)('on the device %s', (device) => {
  const ones = (...shape: number[]) => numpy.ones(shape, { device });

  it('answers there', async () => {
    const output = await sageattn(ones(1, 1, 2, 4), ones(1, 1, 3, 4), ones(1, 1, 3, 4), {
      attnMask: numpy.zeros([2, 3], { device }),
    });
    expect(output.device).toBe(device);
    expect(output.shape).toEqual([1, 1, 2, 4]);
    for (const value of await output.data()) expect(value).toBeCloseTo(1, 3);
  });

  it.each<[string, string, (q: numpy.Array, other: numpy.Array) => Promise<unknown>]>([
    ['integers', 'k', (q, other) => sageattn(q, other.astype(numpy.int32), q.ref)],
    [
      'a mask of booleans',
      'options.attnMask',
      (q, other) => sageattn(q, q.ref, q.ref, { attnMask: other.astype(numpy.bool) }),
    ],
    [
      'a name that is no option',
      'options.isCasual',
      (q, other) => sageattn(q, other, q.ref, { isCasual: true } as never),
    ],
    ['a backend', 'options.backend', (q, other) => sageattn(q, other, q.ref, { backend: 'wasm' } as never)],
    ['keys of another shape', 'k', (q, other) => sageattn(q, other.reshape([2, 4]), q.ref)],
    ['no array', 'k', (q, other) => sageattn(q, undefined as never, other)],
  ])('refuses %s, and consumes its arguments all the same', async (_, argument, call) => {
    const [q, other] = [ones(1, 1, 2, 4), ones(1, 1, 2, 4)];
    await expect(call(q, other)).rejects.toMatchObject({
      name: 'InvalidArgumentError',
      argument: expect.stringMatching(`^${argument}`),
    });
    expect(q.refCount).toBe(0);
    expect(other.refCount).toBe(0);
  });

  it('reads its arguments before the call returns', async () => {
    const source = Float32Array.from({ length: 8 }, () => 1);
    const v = numpy.array(source, { shape: [1, 1, 2, 4], device });
    const pending = sageattn(ones(1, 1, 2, 4), ones(1, 1, 2, 4), v);
    source.fill(7);
    for (const value of await (await pending).data()) expect(value).toBeCloseTo(1, 3);
  });

  it('refuses to be traced, by name', async () => {
    let pending: Promise<unknown> | undefined;
    const traced = jit((q: numpy.Array) => {
      pending = sageattn(q.ref, q.ref, q.ref);
      return q;
    });
    traced(ones(1, 1, 2, 4)).dispose();
    await expect(pending).rejects.toMatchObject({ name: 'InvalidArgumentError', argument: 'q' });
  });
});
