/// <reference lib="esnext.disposable" preserve="true" />
/**
 * `sageattention/wasm/embedded`: a WASM backend whose kernels are imported with it, for service workers (and
 * extensions, whose background is one), where `import()` is not allowed.
 *
 * @module sageattention/wasm/embedded
 */
import { createWasmBackendOn, type WasmBackend, type WasmBackendOptions } from './backend.ts';
import * as relaxed from './generated/relaxed.ts';
import * as simd128 from './generated/simd128.ts';

export type { WasmBackend, WasmBackendOptions } from './backend.ts';

/**
 * As `createWasmBackend` of `sageattention/wasm`. `await setBackend(createWasmBackend())` makes `sageattn` use it.
 *
 * @throws {InvalidArgumentError} `invalid-option` or `unknown-option`
 */
export function createWasmBackend(options: WasmBackendOptions = {}): WasmBackend {
  return createWasmBackendOn(options, { sources: { simd128: async () => simd128, relaxed: async () => relaxed } });
}
