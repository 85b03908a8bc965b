/** Caches of a Hopper kernel whose single tokens another family attends to. Kernels run in the simulator. */
import { expect, test } from 'vitest';
import { Random, runSeed } from '../../../../test/support/random.ts';
import { place } from '../../../../test/support/tensors.ts';
import { createProblem } from '../../../attention/problem.ts';
import { type AttentionOptions, prepareKeyValue } from '../../../index.ts';
import { attentionExact } from '../../../reference/exact.ts';
import { compare } from '../../../reference/metrics.ts';
import { toFloat32 } from '../../../tensor/access.ts';
import { elementCount, slice, type Tensor } from '../../../tensor/tensor.ts';
import { chooseOptions } from '../../choice.ts';
import { setBackend } from '../../registry.ts';
import { descriptorOf } from '../kernel-table.ts';
import { createSimulatedBackend } from '../testing/simulator/backend.ts';
import { planAttend } from './plan.ts';

const seed = runSeed();
const KERNEL = 'qk-int8-pv-fp16-cuda-sm90';

test(`one token over a cache of ${KERNEL} that grows is right, as are two (SAGEATTENTION_SEED=${seed})`, async () => {
  const random = new Random(seed);
  const backend = createSimulatedBackend(90);
  await setBackend(backend);
  const [kvHeads, dim] = [random.integer(1, 2), random.pick([32, 40, 64])];
  const heads = kvHeads * random.pick([2, 4, 8]);
  const [held, more] = [random.integer(1, 300), random.integer(1, 70)];
  const make = (shape: readonly number[]): Tensor => place(random.normals(elementCount(shape)), shape, 'float16');
  const [k, v] = [make([1, kvHeads, held + more, dim]), make([1, kvHeads, held + more, dim])];
  const cache = await prepareKeyValue(slice(k, 2, 0, held), slice(v, 2, 0, held), { backend: 'cuda', kernel: KERNEL });
  await cache.append(slice(k, 2, held, held + more), slice(v, 2, held, held + more));
  const options: AttentionOptions = random.pick([
    {},
    { isCausal: true, causalAlignment: 'bottom-right' },
    { windowSize: [random.integer(1, held + more), 0], causalAlignment: 'bottom-right' },
  ]);
  for (const queries of [1, 2]) {
    const q = make([1, heads, queries, dim]);
    const problem = createProblem(q, k, v, options);
    const choice = chooseOptions(descriptorOf(KERNEL), problem, {});
    const entries = planAttend(problem, choice, { target: 'sm_90a', multiprocessors: 1 }).launches.map(
      ({ entry }) => entry,
    );
    expect(entries).toEqual([queries === 1 ? 'attention' : 'wgmmaAttention']);
    const output = toFloat32((await cache.attend(q, options)) as Tensor);
    expect(compare(output, attentionExact(problem, { q, k, v }).output).relativeL1).toBeLessThan(0.03);
  }
  cache.dispose();
  await backend.dispose();
});
