/**
 * Gradients on a software GPU: tests that together use each statement of the kernels, whose compilation is what takes time. The whole
 * table runs on a card (`test/webgpu`).
 */
import { afterAll, beforeAll, describe, expect, vi } from 'vitest';
import { createProblem } from '../../src/attention/problem.ts';
import { setBackend } from '../../src/backends/registry.ts';
import {
  createWebgpuBackend,
  downloadTensor,
  gpuTensor,
  uploadTensor,
  type WebgpuBackend,
} from '../../src/backends/webgpu/index.ts';
import { sageattnTrainable } from '../../src/index.ts';
import { backwardExact } from '../../src/reference/backward.ts';
import { relativeL2 } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { elementCount, type Tensor, tensor } from '../../src/tensor/tensor.ts';
import { Random, runSeed } from '../support/random.ts';
import { itNeeds } from '../support/requirement.ts';
import { sampled } from '../support/sample.ts';
import { type BackwardTarget, backwardTests } from './backward-suite.ts';
import {
  WEBGPU_BACKWARD_KINDS,
  WEBGPU_BACKWARD_TARGET,
  WEBGPU_INT8_BACKWARD_TARGET,
} from './backward-webgpu-target.ts';

const DRIVER = process.env.SAGEATTENTION_SOFTWARE_GPU ?? 'the GPU of this machine';
vi.setConfig({ testTimeout: 300_000 });
const seed = runSeed();
const test = itNeeds(process.env.SAGEATTENTION_SOFTWARE_GPU_MISSING);

/** lavapipe takes most of a minute to compile the two gradient kernels of one configuration: one of the small ones. */
const chosen = DRIVER === 'lavapipe' ? ['a NaN in dO'] : WEBGPU_BACKWARD_KINDS;

describe(`WebGPU gradients on ${DRIVER} (SAGEATTENTION_SEED=${seed})`, () => {
  let backend: WebgpuBackend | undefined;
  beforeAll(async () => {
    if (process.env.SAGEATTENTION_SOFTWARE_GPU_MISSING !== undefined) return;
    backend = createWebgpuBackend();
    await setBackend(backend);
  });
  afterAll(() => backend?.dispose());
  const kindsOf = (target: BackwardTarget, prefix = '') =>
    backwardTests(target, seed)
      .filter(({ name }) => chosen.some((text) => name.includes(text)))
      .map(({ name, run }) => ({ name: `${prefix}${name}`, run }));
  const tests = [...kindsOf(WEBGPU_BACKWARD_TARGET), ...kindsOf(WEBGPU_INT8_BACKWARD_TARGET, 'INT8: ')];
  for (const { name, run } of sampled(tests, seed, { byHand: 0.05, otherwise: 0.25 })) test(name, run);

  test('INT8: rows lose nothing by large tokens that they do not see', async () => {
    if (DRIVER === 'lavapipe') return;
    // Causal, so that rows before the large token do not see it, and keys behind it are not seen by it. All lie in one block.
    const [tokens, large, dim] = [60, 40, 32];
    const random = new Random(seed);
    const size = 10 ** random.uniform(1, 6);
    const normal = (factor: number) =>
      tensor(
        random.normals(tokens * dim).map((x, i) => (Math.floor(i / dim) === large ? factor * x : x)),
        [1, 1, tokens, dim],
      );
    const errorsOf = async (queries: number, keys: number) => {
      const [q, k, v, dOutput] = [normal(queries), normal(keys), normal(keys), normal(queries)];
      const options = { isCausal: true, backend: 'webgpu', backwardPrecision: 'int8' } as const;
      const gradients = await (await sageattnTrainable(q, k, v, options)).backward(dOutput);
      const exact = backwardExact(createProblem(q, k, v, { isCausal: true }), { q, k, v, dOutput });
      return (name: 'dq' | 'dk' | 'dv', from: number, to: number) =>
        relativeL2(
          toFloat32(gradients[name] as Tensor).subarray(from * dim, to * dim),
          exact[name].subarray(from * dim, to * dim),
        );
    };
    expect((await errorsOf(1, size))('dq', 0, large), `keys of ${size}`).toBeLessThan(0.05);
    const ofQueries = await errorsOf(size, 1);
    expect(ofQueries('dk', large + 1, tokens), `queries of ${size}`).toBeLessThan(0.05);
    expect(ofQueries('dv', large + 1, tokens), `queries of ${size}`).toBeLessThan(0.05);
  });

  test('calls: tensors of the device give gradients on the device, the same bits', async () => {
    if (DRIVER === 'lavapipe') return;
    const random = new Random(seed);
    const normal = (...shape: number[]) => tensor(random.normals(elementCount(shape)), shape);
    // Of the packed operands with 3 rows that are not theirs before them.
    const packed = normal(43, 2, 32);
    const view = { ...packed, shape: [1, 40, 2, 32], strides: [0, 64, 32, 1], offset: 3 * 64 };
    const [k, v, dOutput] = [normal(1, 40, 1, 32), normal(1, 40, 1, 16), normal(1, 40, 2, 16)];
    const options = { backend: 'webgpu', tensorLayout: 'NHD', isCausal: true } as const;
    const onCpu = await (await sageattnTrainable(view, k, v, options)).backward(dOutput);
    const { device } = await (backend as WebgpuBackend).context();
    const { buffer } = uploadTensor(device, packed);
    const q = gpuTensor(buffer, 'float32', view.shape, view);
    const attention = await sageattnTrainable(q, uploadTensor(device, k), uploadTensor(device, v), options);
    const gradients = await attention.backward(uploadTensor(device, dOutput));
    for (const name of ['dq', 'dk', 'dv'] as const) {
      expect(gradients[name].location).toBe('webgpu');
      expect((await downloadTensor(device, gradients[name])).data).toEqual(onCpu[name].data);
    }
  });

  test('calls: what there is not is refused', async () => {
    const x = tensor(new Float32Array(16), [1, 1, 4, 4]);
    const call = sageattnTrainable(x, x, x, { backend: 'webgpu', backwardPrecision: 'fp8' });
    await expect(call).rejects.toMatchObject({ code: 'unsupported-option' });
    const wide = tensor(new Float32Array(4 * 300), [1, 1, 4, 300]);
    const refused = sageattnTrainable(wide, wide, wide, { backend: 'webgpu' });
    await expect(refused).rejects.toMatchObject({ code: 'unsupported-option' });
  });
});
