import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { BackendName } from '../attention/options.ts';
import type { Backend } from '../backends/backend.ts';
import { getBackend, setBackend } from '../backends/registry.ts';
import { BackendUnavailableError } from '../errors.ts';
import type { TensorView } from '../tensor/tensor.ts';
import { sageattn } from './sageattn.ts';
import {
  CUDA,
  type FakeBackend,
  fakeBackend,
  install,
  installFakes,
  PORTABLE,
  restoreBackends,
  t,
} from './testing/fake-backend.ts';

const call = (length: number, options = {}) =>
  sageattn(t(1, 2, length, 8), t(1, 2, length, 8), t(1, 2, length, 8), { backend: 'wasm', ...options });

let wasm: FakeBackend;
let cuda: FakeBackend;

beforeEach(async () => {
  ({ wasm, cuda } = await installFakes());
});
afterEach(restoreBackends);

describe('choice of backend', () => {
  it('sends CPU tensors to the accelerated backend that is preferred', async () => {
    await call(3, { backend: 'auto' });
    expect([cuda.plans.length, wasm.plans.length]).toEqual([1, 0]);
  });

  it('sends them to WASM when nothing is accelerated', async () => {
    await install(fakeBackend('cuda', [CUDA], { accelerated: false }));
    await call(3, { backend: 'auto' });
    expect(wasm.plans).toHaveLength(1);
  });

  it('says so when no backend has the kernel', async () => {
    const error = await call(3, { backend: 'auto', kernel: 'qk-int8-pv-fp8-cuda' }).catch((e) => e);
    expect(error).toBeInstanceOf(BackendUnavailableError);
  });

  it('takes only backends', async () => {
    await expect(setBackend({} as Backend)).rejects.toMatchObject({ code: 'invalid-option', argument: 'backend' });
    await expect(getBackend('toString' as BackendName)).rejects.toMatchObject({ code: 'backend-unavailable' });
  });

  it('looks for a backend that has the kernel asked for', async () => {
    await install(fakeBackend('wasm', [{ ...PORTABLE, name: 'qk-int8-pv-int8' }]));
    await expect(call(3, { backend: 'auto', kernel: 'qk-int8-pv-int8' })).resolves.toBeDefined();
    expect(cuda.plans).toHaveLength(0);
  });

  it('says which backend is missing when none can run', async () => {
    const no = { available: false, reason: 'no driver', remedy: 'Install it' };
    const blocked = { available: false, reason: 'it is forbidden here', remedy: 'Allow it' };
    await install(fakeBackend('cuda', [CUDA], no), fakeBackend('wasm', [PORTABLE], blocked));
    const error = await call(3, { backend: 'auto' }).catch((e) => e);
    expect(error).toBeInstanceOf(BackendUnavailableError);
    expect(error).toMatchObject({ code: 'backend-unavailable', backend: 'wasm' });
    expect(error.message).toBe("backend 'wasm' is not available: it is forbidden here. Allow it");
  });

  it('refuses a backend that cannot run here, with the remedy', async () => {
    const error = await call(3, { backend: 'webgpu' }).catch((e) => e);
    expect(error).toMatchObject({ code: 'backend-unavailable', received: 'no adapter', expected: 'Get one' });
  });

  it('runs where the tensors are, and refuses another backend for them', async () => {
    const on = (view: TensorView): TensorView => ({ ...view, location: 'cuda' });
    const [q, k, v] = [on(t(1, 1, 2, 8)), on(t(1, 1, 2, 8)), on(t(1, 1, 2, 8))];
    await sageattn(q, k, v);
    expect(cuda.plans).toHaveLength(1);
    await expect(sageattn(q, k, v, { backend: 'wasm' })).rejects.toMatchObject({ code: 'mixed-locations' });
  });

  it('refuses a stream where there are none', async () => {
    const stream = { handle: 1n, device: 0 };
    await expect(call(3, { stream })).rejects.toMatchObject({ code: 'invalid-option', argument: 'options.stream' });
    await expect(call(3, { stream, backend: 'cuda' })).resolves.toBeDefined();
  });
});
