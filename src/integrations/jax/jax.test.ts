import { init, numpy } from '@jax-js/jax';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { createProblem } from '../../attention/problem.ts';
import { disposeBackends } from '../../backends/registry.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { tensor } from '../../tensor/tensor.ts';
import { sageattn } from './index.ts';

const seed = runSeed();
beforeAll(async () => {
  console.info(`seed ${seed}`);
  await init('cpu');
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
