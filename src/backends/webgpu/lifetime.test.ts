/**
 * Memory on the device and when inputs are read, on Dawn's null device: it validates everything and computes nothing.
 */
import { beforeEach, describe, expect, it } from 'vitest';
import { create } from 'webgpu';
import { createProblem } from '../../attention/problem.ts';
import { type Tensor, tensor } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import { createWebgpuBackend, type WebgpuBackend } from './index.ts';

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
