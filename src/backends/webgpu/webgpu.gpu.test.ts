/** What the conformance suite cannot see: GPU tensors, encoding, splitting, the weaker code paths, loss and errors. */
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { itNeeds } from '../../../test/support/requirement.ts';
import type { AttentionOptions } from '../../attention/options.ts';
import { createProblem } from '../../attention/problem.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { type Tensor, type TensorView, tensor } from '../../tensor/tensor.ts';
import type { AttentionOutputs } from '../backend.ts';
import { chooseOptions } from '../choice.ts';
import { createWebgpuBackendOn } from './backend.ts';
import type { Capabilities } from './capabilities.ts';
import {
  createWebgpuBackend,
  downloadTensor,
  emptyGpuTensor,
  findGpu,
  gpuTensor,
  uploadTensor,
  type WebgpuBackend,
  type WebgpuBackendOptions,
  type WebgpuPlan,
} from './index.ts';

const it = itNeeds(process.env.SAGEATTENTION_SOFTWARE_GPU_MISSING);
const seed = runSeed();

/** What INT8 QK with FP16 PV loses on normal inputs, and a half more. */
const BOUND = 0.02;

const normals = (random: Random, shape: readonly number[]): Tensor =>
  tensor(random.normals(shape.reduce((a, b) => a * b, 1)), shape);

interface Inputs {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
}

const operands = (random: Random, heads = 2, lq = 70, lk = 150, d = 32): Inputs => ({
  q: normals(random, [1, heads, lq, d]),
  k: normals(random, [1, heads, lk, d]),
  v: normals(random, [1, heads, lk, d]),
});

async function planOn(
  backend: WebgpuBackend,
  inputs: { readonly q: TensorView; readonly k: TensorView; readonly v: TensorView },
  options: AttentionOptions = {},
): Promise<WebgpuPlan> {
  return backend.createPlan(inputs, options);
}

function expectExact({ output, lse }: AttentionOutputs, inputs: Inputs, options: AttentionOptions = {}): void {
  const exact = attentionExact(createProblem(inputs.q, inputs.k, inputs.v, options), inputs);
  expect(compare(toFloat32(output as Tensor), exact.output).relativeL1).toBeLessThan(BOUND);
  if (lse !== undefined) {
    for (const [i, value] of toFloat32(lse as Tensor).entries()) {
      expect(Math.abs(value - (exact.lse[i] as number))).toBeLessThan(0.07);
    }
  }
}

describe(`WebGPU backend (SAGEATTENTION_SEED=${seed})`, () => {
  let backend: WebgpuBackend;
  let random: Random;
  beforeAll(() => {
    backend = createWebgpuBackend();
    random = new Random(seed);
  });
  afterAll(() => backend.dispose());

  it("records into a caller's encoder, GPU in and GPU out, and reuses the plan for other inputs", async () => {
    const { device } = await backend.context();
    const encoder = device.createCommandEncoder();
    const runs = [operands(random), operands(random)];
    const gpu = runs.map(({ q, k, v }) => ({
      q: uploadTensor(device, q),
      k: uploadTensor(device, k),
      v: uploadTensor(device, v),
    }));
    const options = { isCausal: true, causalAlignment: 'bottom-right', returnLse: true } as const;
    const plan = await planOn(backend, gpu[0] as NonNullable<(typeof gpu)[0]>, options);
    const outputs = gpu.map((inputs) => {
      const output = emptyGpuTensor(device, 'float32', inputs.q.shape);
      return plan.encode(encoder, inputs, { output, lse: emptyGpuTensor(device, 'float32', [1, 2, 70]) });
    });
    device.queue.submit([encoder.finish()]);
    for (const [i, { output, lse }] of outputs.entries()) {
      expectExact(
        {
          output: await downloadTensor(device, output),
          ...(lse === undefined ? {} : { lse: await downloadTensor(device, lse) }),
        },
        runs[i] as Inputs,
        options,
      );
    }
    expect(plan.details).toMatchObject({
      launches: ['statistics', 'prepare', expect.any(String)],
    });
    plan.dispose();
    expect(() => plan.encode(encoder, gpu[0] as NonNullable<(typeof gpu)[0]>)).toThrow(/disposed/);
  });

  it("takes the caller's device and leaves it alive", async () => {
    const gpu = await findGpu();
    const adapter = await gpu.requestAdapter();
    if (adapter === null) throw new Error('no adapter');
    const device = await adapter.requestDevice();
    const own = createWebgpuBackend({ device, gpu });
    const inputs = operands(random);
    // A device with the core limits and no features gets the family that needs none.
    const plan = await planOn(own, inputs);
    expect(plan.details.family).toBe('base');
    expectExact(await plan.run(inputs), inputs);
    await own.dispose();
    await device.queue.onSubmittedWorkDone();
    device.destroy();
    await device.lost;
    await expect(planOn(createWebgpuBackend({ device, gpu }), inputs)).rejects.toMatchObject({ code: 'device-lost' });
  });

  const limited: readonly [string, Partial<Capabilities>, WebgpuBackendOptions?][] = [
    ['bindings of 12 KiB', { bindingBytes: 12288 }],
    ['bindings of 16 KiB and 2 workgroups a dimension', { bindingBytes: 16384, dispatch: 2 }],
    ['no dot4I8Packed', { packedDot: false }, { family: 'base' }],
    ['16 KiB of workgroup memory', { workgroupBytes: 16384, isSoftware: false }, { family: 'base' }],
  ];
  for (const [name, capabilities, options] of limited) {
    it(`computes the same with ${name}`, async () => {
      const own = createWebgpuBackend({ ...options, capabilities });
      const inputs = operands(random, 2, 40, 200);
      const mask = tensor(
        Uint8Array.from({ length: 40 * 200 }, () => (random.uniform() < 0.7 ? 1 : 0)),
        [40, 200],
      );
      const asked = { attnMask: mask, returnLse: true } as const;
      const plan = await planOn(own, inputs, asked);
      const exact = attentionExact(createProblem(inputs.q, inputs.k, inputs.v, asked), { ...inputs, attnMask: mask });
      const { output } = await plan.run({ ...inputs, attnMask: mask });
      expect(compare(toFloat32(output as Tensor), exact.output).relativeL1).toBeLessThan(BOUND);
      if (capabilities.bindingBytes !== undefined) expect(plan.details.launches.length).toBeGreaterThan(8);
      await own.dispose();
    });
  }

  it('splits the keys of a short query among workgroups', async () => {
    const inputs = operands(random, 1, 1, 1500);
    const plan = await planOn(backend, inputs, { returnLse: true });
    expect(plan.details.keySplits).toBeGreaterThan(1);
    expectExact(await plan.run(inputs), inputs, { returnLse: true });
    plan.dispose();
  });

  it('rejects what was pending when the device is lost, and runs again on the next device', async () => {
    const own = createWebgpuBackend();
    const inputs = operands(random);
    const plan = await planOn(own, inputs);
    const { device } = await own.context();
    const pending = plan.run(inputs);
    const lost = expect(pending).rejects.toMatchObject({ name: 'ExecutionError', code: 'device-lost' });
    await Promise.resolve();
    device.destroy();
    await lost;
    expectExact(await plan.run(inputs), inputs);
    expect((await own.context()).device).not.toBe(device);
    await own.dispose();
  });

  it('refuses to attend over keys that went with a lost device', async () => {
    const own = createWebgpuBackend();
    const { q, k, v } = operands(random);
    const problem = createProblem(k, k, v, {});
    const choice = chooseOptions(await own.defaultKernel(), problem, {});
    const cache = await own.prepareKeyValue(problem, choice, k, v, {});
    (await own.context()).device.destroy();
    await (await own.context()).device.queue.onSubmittedWorkDone();
    await expect(cache.attend(q, createProblem(q, k, v, {}), {}, {})).rejects.toMatchObject({
      code: 'device-lost',
    });
    cache.dispose();
    await own.dispose();
  });

  it('turns validation errors of a run into errors, not outputs', async () => {
    const { device } = await backend.context();
    const { q, k, v } = operands(random);
    const gpu = { q: uploadTensor(device, q), k: uploadTensor(device, k), v: uploadTensor(device, v) };
    const plan = await planOn(backend, gpu);
    gpu.k.buffer.destroy();
    await expect(plan.run(gpu)).rejects.toMatchObject({ name: 'ExecutionError', code: 'execution-failed' });
    plan.dispose();
  });

  it('names a buffer that is too small', async () => {
    const { device } = await backend.context();
    const buffer = device.createBuffer({ size: 64, usage: GPU_STORAGE });
    expect(() => gpuTensor(buffer, 'float32', [1, 1, 2, 32])).toThrow(/at least 64 float32 elements/);
    expect(() => gpuTensor(buffer, 'float16', [1, 1, 1, 33])).toThrow(/at least 33 float16 elements/);
    buffer.destroy();
  });

  it("refuses scratch beyond the device's largest buffer by name", async () => {
    const own = createWebgpuBackend({ capabilities: { bufferBytes: 4096 } });
    await expect(planOn(own, operands(random))).rejects.toMatchObject({ code: 'unsupported-size' });
    await own.dispose();
  });

  it('names what a forced family or variant lacks', async () => {
    const inputs = operands(random);
    const family = createWebgpuBackend({ family: 'matrix' });
    await expect(planOn(family, inputs)).rejects.toMatchObject({
      code: 'unsupported-option',
      argument: 'options.family',
    });
    const variant = createWebgpuBackendOn({ variant: 'none' });
    await expect(planOn(variant, inputs)).rejects.toMatchObject({
      code: 'unsupported-option',
      argument: 'options.variant',
    });
    await family.dispose();
    await variant.dispose();
  });
});

const GPU_STORAGE = 0x80;
