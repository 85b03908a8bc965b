import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { KernelName } from '../attention/kernels.ts';
import { UnsupportedOptionError } from '../errors.ts';
import { kernelFunction, sageattn } from './sageattn.ts';
import { type FakeBackend, installFakes, PORTABLE, restoreBackends, t } from './testing/fake-backend.ts';

const call = (length: number, options = {}) =>
  sageattn(t(1, 2, length, 8), t(1, 2, length, 8), t(1, 2, length, 8), { backend: 'wasm', ...options });

let wasm: FakeBackend;
let cuda: FakeBackend;

beforeEach(async () => {
  ({ wasm, cuda } = await installFakes());
});
afterEach(restoreBackends);

describe('options against the kernel', () => {
  const refused = async (options: object, argument: string) => {
    const error = await call(3, options).catch((e) => e);
    expect(error).toBeInstanceOf(UnsupportedOptionError);
    expect(error).toMatchObject({ code: 'unsupported-option', argument });
  };

  it('refuses what the kernel does not honour', async () => {
    await refused({ qkQuantGran: 'per-thread' }, 'options.qkQuantGran');
    await refused({ pvAccumDtype: 'fp16' }, 'options.pvAccumDtype');
    await refused({ smoothV: true }, 'options.smoothV');
    await refused({ smoothQ: true }, 'options.smoothQ');
    await refused({ backend: 'cuda', smoothQ: false }, 'options.smoothQ');
    await expect(call(3, { kernel: 'qk-int8-pv-int8' })).rejects.toMatchObject({
      code: 'unsupported-option',
      argument: 'options.kernel',
      expected: "one of backend 'wasm': 'qk-int8-pv-fp16'",
    });
    const wide = t(1, 1, 2, 65);
    const error = await sageattn(wide, wide, wide, { backend: 'wasm' }).catch((e) => e);
    expect(error).toMatchObject({ code: 'unsupported-option', argument: 'q', received: '65' });
  });

  it('settles what the caller left open', async () => {
    await call(3);
    await call(3, { backend: 'cuda', pvAccumDtype: 'fp32+fp16', smoothV: true });
    expect(wasm.plans[0]?.choice).toEqual({
      descriptor: PORTABLE,
      qkQuantGran: 'per-block',
      pvAccumDtype: 'fp32',
      smoothK: true,
      smoothV: false,
      smoothQ: false,
    });
    expect(cuda.plans[0]?.choice).toMatchObject({ pvAccumDtype: 'fp32+fp16', smoothV: true, smoothQ: 'block' });
  });

  it('fixes the kernel in its own function', async () => {
    const kernel: KernelName = 'qk-int8-pv-fp16';
    const [q, k, v] = [t(1, 1, 2, 8), t(1, 1, 2, 8), t(1, 1, 2, 8)];
    await kernelFunction(kernel)(q, k, v, { backend: 'cuda' });
    expect(cuda.plans[0]?.choice.descriptor.name).toBe(kernel);
  });
});
