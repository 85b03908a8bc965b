/**
 * Gradients on a software GPU: tests that together use each statement of the kernels, whose compilation is what takes time. The whole
 * table runs on a card (`test/webgpu`).
 */
import { afterAll, beforeAll, describe, expect, vi } from 'vitest';
import { setBackend } from '../../src/backends/registry.ts';
import {
  createWebgpuBackend,
  downloadTensor,
  gpuTensor,
  uploadTensor,
  type WebgpuBackend,
} from '../../src/backends/webgpu/index.ts';
import { sageattnTrainable } from '../../src/index.ts';
import { elementCount, tensor } from '../../src/tensor/tensor.ts';
import { Random, runSeed } from '../support/random.ts';
import { itNeeds } from '../support/requirement.ts';
import { sampled } from '../support/sample.ts';
import { backwardTests } from './backward-suite.ts';
import { WEBGPU_BACKWARD_KINDS, WEBGPU_BACKWARD_TARGET } from './backward-webgpu-target.ts';

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
  const tests = backwardTests(WEBGPU_BACKWARD_TARGET, seed).filter(({ name }) =>
    chosen.some((text) => name.includes(text)),
  );
  for (const { name, run } of sampled(tests, seed, { byHand: 0.1, otherwise: 0.5 })) test(name, run);

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
