/** Runs once before vitest's tests, whichever part of them is asked for. */
import { ensureWasmKernels } from '../../scripts/wasm-kernels.ts';

export function setup(): void {
  ensureWasmKernels();
}
