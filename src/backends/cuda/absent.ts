/**
 * What bundlers for browsers put in the place of backend.ts (`browser` in package.json): no browser reaches an NVIDIA
 * driver, and its kernels would be the largest part of a bundle.
 */
import { BackendUnavailableError } from '../../errors.ts';

export class CudaBackend {
  constructor() {
    throw new BackendUnavailableError(
      'cuda',
      'a browser reaches no NVIDIA driver',
      "Use the backend 'webgpu' or 'wasm'",
    );
  }
}

export const createCudaBackend = (): CudaBackend => new CudaBackend();
