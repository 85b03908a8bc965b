/** What bridges to engines with tensors of their own share. */

import { sageattnOn } from '../api/sageattn.ts';
import { type AttentionOptions, optionNamesBut, validateOptions } from '../attention/options.ts';
import type { WebgpuBackend } from '../backends/webgpu/index.ts';
import type { GpuTensor } from '../backends/webgpu/tensor.ts';

/** Options of `sageattn` that say something about an engine's tensors: where they live says which backend runs. */
export type BridgeOptions = Omit<
  AttentionOptions,
  'attnMask' | 'sinks' | 'blockMask' | 'sparsity' | 'returnLse' | 'stream' | 'backend'
>;

const TAKEN = optionNamesBut('sinks', 'blockMask', 'sparsity', 'returnLse', 'stream', 'out', 'backend');

/** @throws {InvalidArgumentError} an unknown option or a wrong value */
export function validateBridgeOptions(options: BridgeOptions & { readonly attnMask?: object }): void {
  validateOptions(options as AttentionOptions, TAKEN);
}

/** One backend for each device, so that calls and sessions share pipelines. */
const backends = new WeakMap<GPUDevice, Promise<WebgpuBackend>>();

/** @internal */
export function backendOn(device: GPUDevice): Promise<WebgpuBackend> {
  let backend = backends.get(device);
  if (backend === undefined) {
    backend = import('../backends/webgpu/index.ts').then((module) => module.createWebgpuBackend({ device }));
    backends.set(device, backend);
  }
  return backend;
}

/**
 * Attention on an engine's device. The caller disposes of the output.
 *
 * @internal
 */
export async function attendOnDevice(
  device: GPUDevice,
  q: GpuTensor,
  k: GpuTensor,
  v: GpuTensor,
  options: AttentionOptions & { readonly returnLse?: false },
): Promise<GpuTensor> {
  return sageattnOn(await backendOn(device), q, k, v, options);
}
