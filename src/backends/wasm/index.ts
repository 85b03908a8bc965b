/// <reference lib="esnext.disposable" preserve="true" />
/**
 * `sageattention/wasm`: a WASM backend with chosen threads and SIMD.
 *
 * @module sageattention/wasm
 */
export { createWasmBackend, type WasmBackend, type WasmBackendOptions } from './backend.ts';
