import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { type Tensor, tensor } from '../tensor/tensor.ts';
import { prepareKeyValue } from './key-value-cache.ts';
import { type FakeBackend, installFakes, restoreBackends, t } from './testing/fake-backend.ts';

let wasm: FakeBackend;

beforeEach(async () => {
  ({ wasm } = await installFakes());
});
afterEach(restoreBackends);

describe('prepareKeyValue', () => {
  const kv = (length: number) => [t(1, 2, length, 8), t(1, 2, length, 8)] as const;

  it('appends and attends in the order of the calls', async () => {
    const cache = await prepareKeyValue(...kv(3), { backend: 'wasm' });
    let open = () => {};
    wasm.gates.push(
      new Promise<void>((resolve) => {
        open = resolve;
      }),
    );
    const appended = cache.append(...kv(2));
    const attended = cache.attend(t(1, 4, 1, 8), { isCausal: true, causalAlignment: 'bottom-right' });
    expect(cache.length).toBe(3);
    open();
    await Promise.all([appended, attended]);
    expect(cache.length).toBe(5);
    expect(wasm.plans[0]?.problem).toMatchObject({ queryHeads: 4, keyLength: 5, band: { upper: 0, align: 1 } });
    cache[Symbol.dispose]();
    await expect(cache.attend(t(1, 4, 1, 8))).rejects.toMatchObject({ code: 'disposed' });
    await expect(cache.append(...kv(1))).rejects.toMatchObject({ code: 'disposed' });
  });

  it('copies its inputs only where something must be waited for', async () => {
    const given: unknown[] = [];
    const { backend } = wasm;
    const prepare = backend.prepareKeyValue.bind(backend);
    backend.prepareKeyValue = (problem, kernel, k, v, context) => {
      given.push((k as Tensor).data.buffer, (v as Tensor).data.buffer, (context.keyMask as Tensor).data.buffer);
      return prepare(problem, kernel, k, v, context);
    };
    const [k, v] = kv(3);
    const keyMask = tensor(Uint8Array.of(1, 1, 0), [1, 3]);
    const own = [k.data.buffer, v.data.buffer, keyMask.data.buffer];
    const kernel = 'qk-int8-pv-fp16';
    // Whether the backend is there is not known yet.
    await prepareKeyValue(k, v, { backend: 'wasm', kernel, keyMask });
    await prepareKeyValue(k, v, { backend: 'wasm', kernel, keyMask });
    // The fake tells its default kernel later.
    await prepareKeyValue(k, v, { backend: 'wasm', keyMask });
    expect(given.map((buffer) => own.includes(buffer as ArrayBuffer))).toEqual([
      ...[false, false, false],
      ...[true, true, true],
      ...[false, false, false],
    ]);
  });

  it('refuses what does not continue the tensors held', async () => {
    const cache = await prepareKeyValue(...kv(3), { backend: 'wasm' });
    const wrong = { code: 'invalid-shape', argument: 'k' };
    await expect(cache.append(t(1, 4, 2, 8), t(1, 4, 2, 8))).rejects.toMatchObject(wrong);
    await expect(cache.append(t(1, 2, 2, 16), t(1, 2, 2, 8))).rejects.toMatchObject(wrong);
    await expect(cache.append(...kv(1), { tag: 1 } as object)).rejects.toMatchObject({ code: 'unknown-option' });
    await expect(cache.attend(t(1, 3, 1, 8))).rejects.toMatchObject({ argument: 'q' });
    await expect(cache.attend(t(1, 4, 1, 8), { smoothK: false } as object)).rejects.toMatchObject({
      code: 'unknown-option',
    });
    expect(cache.length).toBe(3);
  });
});

describe('the format of a cache', () => {
  it.each([
    [{ format: 'nvfp4', kernel: 'qk-int8-pv-fp16' }, "'int8' with kernel 'qk-int8-pv-fp16'"],
    [{ format: 'int8', kernel: 'qk-fp4-pv-fp4' }, "'nvfp4' with kernel 'qk-fp4-pv-fp4'"],
    [{ format: 'fp8' as never }, "'int8', 'nvfp4'"],
  ] as const)('%j is refused', async (options, expected) => {
    const prepared = prepareKeyValue(t(1, 2, 3, 8), t(1, 2, 3, 8), { backend: 'wasm', ...options });
    await expect(prepared).rejects.toMatchObject({ argument: 'options.format', expected });
  });

  it('names a kernel, which a backend may lack', async () => {
    const prepared = prepareKeyValue(t(1, 2, 3, 8), t(1, 2, 3, 8), { backend: 'wasm', format: 'nvfp4' });
    await expect(prepared).rejects.toMatchObject({ code: 'unsupported-option', argument: 'options.kernel' });
  });
});
