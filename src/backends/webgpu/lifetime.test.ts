/**
 * Memory on the device and when inputs are read, on Dawn's null device: it validates everything and computes nothing.
 */
import { beforeEach, describe, expect, it } from 'vitest';
import { create } from 'webgpu';
import { createProblem } from '../../attention/problem.ts';
import { DISPOSE } from '../../dispose.ts';
import { slice, type Tensor, tensor, transpose } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import {
  createWebgpuBackend,
  downloadTensor,
  emptyGpuTensor,
  type GpuTensor,
  gpuTensor,
  uploadTensor,
  type WebgpuBackend,
} from './index.ts';

const gpu = create(['backend=null', 'enable-dawn-features=allow_unsafe_apis']);
const zeros = (tokens: number): Tensor => tensor(new Float32Array(2 * tokens * 32), [1, 2, tokens, 32]);

describe('memory on the device', () => {
  let backend: WebgpuBackend;
  let device: GPUDevice;
  /** Bytes of the buffers that live. */
  const live = new Map<GPUBuffer, number>();
  const bytes = () => [...live.values()].reduce((sum, size) => sum + size, 0);

  beforeEach(async () => {
    const adapter = await gpu.requestAdapter();
    if (adapter === null) throw new Error('Dawn has no null adapter');
    device = await adapter.requestDevice();
    live.clear();
    const make = device.createBuffer.bind(device);
    device.createBuffer = (descriptor) => {
      const buffer = make(descriptor);
      const destroy = buffer.destroy.bind(buffer);
      live.set(buffer, descriptor.size);
      buffer.destroy = () => {
        live.delete(buffer);
        return destroy();
      };
      return buffer;
    };
    backend = createWebgpuBackend({ device, gpu });
  });

  const planOf = (tokens: number) => backend.createPlan({ q: zeros(1), k: zeros(tokens), v: zeros(tokens) });
  const run = (plan: Awaited<ReturnType<typeof planOf>>, tokens: number) =>
    plan.run({ q: zeros(1), k: zeros(tokens), v: zeros(tokens) });

  it('is that of one plan, however many there are', async () => {
    const first = await planOf(400);
    await run(first, 400);
    const one = bytes();
    for (let tokens = 401; tokens < 431; tokens++) await run(await planOf(tokens), tokens);
    expect(bytes()).toBeLessThan(4 * one);
    await run(first, 400);
  });

  it('is freed with the backend, also on the device of another', async () => {
    const plan = await planOf(100);
    await run(plan, 100);
    const tokens = zeros(60);
    const problem = createProblem(tokens, tokens, tokens, {});
    const cache = await backend.prepareKeyValue(
      problem,
      chooseOptions(await backend.defaultKernel(), problem, {}),
      tokens,
      tokens,
      {},
    );
    expect(live.size).toBeGreaterThan(3);
    const pending = run(plan, 100);
    await backend.dispose();
    expect(live.size).toBe(0);
    expect((await pending).output.shape).toEqual([1, 2, 1, 32]);
    cache.dispose();
    // The plan starts anew, and so does the backend.
    expect((await run(plan, 100)).output.shape).toEqual([1, 2, 1, 32]);
    await backend.dispose();
    expect(live.size).toBe(0);
  });

  it('is kept for the runs of a plan that is disposed meanwhile', async () => {
    const plan = await planOf(50);
    const pending = run(plan, 50);
    plan.dispose();
    expect((await pending).output.shape).toEqual([1, 2, 1, 32]);
    await expect(run(plan, 50)).rejects.toMatchObject({ code: 'disposed' });
  });

  it('is given back before a run that found too little is tried again', async () => {
    await run(await planOf(2000), 2000);
    const plan = await planOf(100);
    const large = bytes();
    const { popErrorScope } = device;
    // Copies of the inputs open three scopes; the run's own first scope is the one for memory.
    let scopes = 0;
    device.popErrorScope = async function (this: GPUDevice) {
      const error = await popErrorScope.call(device);
      return ++scopes === 4 ? ({ message: 'no memory' } as GPUError) : error;
    };
    expect((await run(plan, 100)).output.shape).toEqual([1, 2, 1, 32]);
    device.popErrorScope = popErrorScope;
    expect(bytes()).toBeLessThan(large / 2);
  });

  it('of a cache holds tokens as they came only while their mean is not settled', async () => {
    const tokens = (n: number) => createProblem(zeros(n), zeros(n), zeros(n), {});
    const choice = chooseOptions(await backend.defaultKernel(), tokens(5), {});
    const cache = await backend.prepareKeyValue(tokens(5), choice, zeros(5), zeros(5), {});
    const raw = () => [...live.keys()].filter(({ label }) => label.includes('raw')).length;
    expect(raw()).toBe(2);
    await cache.append(zeros(100), zeros(100), tokens(100), {});
    expect(raw()).toBe(2);
    await cache.append(zeros(500), zeros(500), tokens(500), {});
    expect(raw()).toBe(0);
    await cache.append(zeros(3), zeros(3), tokens(3), {});
    expect(cache.length).toBe(608);
    cache.dispose();
    const whole = await backend.prepareKeyValue(tokens(600), choice, zeros(600), zeros(600), {});
    expect(raw()).toBe(0);
    whole.dispose();
  });
});

describe('inputs', () => {
  it('are taken when the call is made: their memory may go to a worker then', async () => {
    const backend = createWebgpuBackend({ gpu });
    const [q, k, v] = [zeros(3), zeros(9), zeros(9)];
    const plan = await backend.createPlan({ q, k, v });
    const pending = plan.run({ q, k, v });
    for (const { data } of [q, k, v]) structuredClone(data.buffer, { transfer: [data.buffer as ArrayBuffer] });
    expect((await pending).output.shape).toEqual([1, 2, 3, 32]);
    await expect(plan.run({ q, k, v })).rejects.toMatchObject({ name: 'InvalidArgumentError' });
    await backend.dispose();
  });
});

describe('dispose of a tensor', () => {
  let backend: WebgpuBackend;
  let device: GPUDevice;
  const destroyed = new Set<GPUBuffer>();

  beforeEach(async () => {
    backend = createWebgpuBackend({ gpu });
    ({ device } = await backend.context());
    const make = device.createBuffer.bind(device);
    device.createBuffer = (descriptor) => {
      const buffer = make(descriptor);
      const destroy = buffer.destroy.bind(buffer);
      buffer.destroy = () => {
        destroyed.add(buffer);
        return destroy();
      };
      return buffer;
    };
  });

  it('destroys what this package allocated, by any view and as `using` calls it', async () => {
    const x = () => uploadTensor(device, zeros(4));
    const inputs = { q: x(), k: x(), v: x() };
    const plan = await backend.createPlan(inputs, { returnLse: true });
    const { output, lse } = (await plan.run(inputs)) as { output: GpuTensor; lse: GpuTensor };
    const made: readonly [string, GpuTensor, (made: GpuTensor) => void][] = [
      ['an upload', inputs.q, (made) => made.dispose()],
      ['an upload, by a transposed view', inputs.k, (made) => transpose(made, [0, 2, 1, 3]).dispose()],
      ['an upload, by a slice', inputs.v, (made) => slice(made, 2, 1, 3).dispose()],
      ['an output', output, (made) => made[DISPOSE]()],
      ['a logsumexp', lse, (made) => made.dispose()],
      ['an empty tensor', emptyGpuTensor(device, 'float16', [3, 0]), ({ dispose }) => dispose()],
    ];
    for (const [name, one, dispose] of made) {
      expect(destroyed.has(one.buffer), name).toBe(false);
      dispose(one);
      expect(destroyed.has(one.buffer), name).toBe(true);
      expect(() => dispose(one), name).not.toThrow();
    }
    await backend.dispose();
  });

  it('gives the buffers of outputs to later ones with `reuseOutputs`, each to one, and destroys the rest', async () => {
    await backend.dispose();
    backend = createWebgpuBackend({ gpu, reuseOutputs: true });
    const context = await backend.context();
    const [q, kv] = [zeros(4), zeros(6)];
    const plan = await backend.createPlan({ q, k: q, v: q });
    const onDevice = (x: Tensor) => uploadTensor(context.device, x);
    const inputs = { q: onDevice(q), k: onDevice(kv), v: onDevice(kv) };
    const own = await backend.createPlan(inputs);
    const run = async () => (await own.run(inputs)).output as GpuTensor;
    const first = await run();
    first.dispose();
    first.dispose();
    const [second, third] = [await run(), await run()];
    expect(second.buffer).toBe(first.buffer);
    expect(third.buffer).not.toBe(first.buffer);
    // Of another size.
    await plan.run({ q, k: q, v: q });
    for (const made of [second, third]) made.dispose();
    expect(await downloadTensor(context.device, await run())).toMatchObject({ shape: [1, 2, 4, 32] });
    // Many outputs: no more than a few are kept.
    const many = await Promise.all(Array.from({ length: 12 }, run));
    let freed = 0;
    for (const { buffer } of many) {
      const destroy = buffer.destroy.bind(buffer);
      buffer.destroy = () => {
        freed++;
        return destroy();
      };
    }
    for (const made of many) made.dispose();
    expect(freed).toBeGreaterThanOrEqual(4);
    await backend.dispose();
    expect(freed).toBe(12);
  });

  it('leaves a buffer that was wrapped to whoever made it', () => {
    const buffer = device.createBuffer({ size: 1024, usage: 0x80 });
    const wrapped = gpuTensor(buffer, 'float32', [1, 2, 4, 32]);
    wrapped.dispose();
    wrapped[DISPOSE]();
    expect(destroyed.has(buffer)).toBe(false);
    expect(gpuTensor(buffer, 'float32', [256]).buffer).toBe(buffer);
  });

  it('ends every use of it, of views too, with an error that names it', async () => {
    const x = () => uploadTensor(device, zeros(4));
    const mask = uploadTensor(device, tensor(new Float32Array(16), [4, 4]));
    const inputs = { q: x(), k: x(), v: x(), attnMask: mask };
    const plan = await backend.createPlan(inputs);
    const gone = (name: string) => ({ code: 'disposed', message: expect.stringContaining(`${name}: this tensor`) });
    for (const name of ['q', 'k', 'v'] as const) {
      const bad = x();
      const view = slice(bad, 2, 0, 4);
      bad.dispose();
      await expect(plan.run({ ...inputs, [name]: view }), name).rejects.toMatchObject(gone(name));
      const encoder = device.createCommandEncoder();
      expect(() => plan.encode(encoder, { ...inputs, [name]: bad }), name).toThrow(
        expect.objectContaining({ code: 'disposed' }),
      );
    }
    const output = emptyGpuTensor(device, 'float32', [1, 2, 4, 32]);
    output.dispose();
    expect(() => plan.encode(device.createCommandEncoder(), inputs, { output })).toThrow(
      expect.objectContaining(gone('outputs.output')),
    );
    await expect(downloadTensor(device, output)).rejects.toMatchObject(gone('tensor'));
    mask.dispose();
    await expect(plan.run(inputs)).rejects.toMatchObject(gone('mask'));
    const [q, k] = [x(), x()];
    const problem = createProblem(q, k, k, {});
    const choice = chooseOptions(await backend.defaultKernel(), problem, {});
    k.dispose();
    await expect(backend.prepareKeyValue(problem, choice, k, k, {})).rejects.toMatchObject(gone('k'));
    await backend.dispose();
  });
});
