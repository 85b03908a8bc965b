/** Where a backend's tensors lie best: there a kernel is timed without the copies from and to the CPU. */
import type { CudaBackend } from '../backends/cuda/index.ts';
import type { WebgpuBackend } from '../backends/webgpu/index.ts';
import type { Backend, Tensor, TensorView } from './library.ts';

export interface Place {
  /** The device and what of it is used. */
  readonly device: string;
  /** It is no memory of the CPU: tensors are copied there. */
  readonly isRemote: boolean;
  put(tensor: Tensor): TensorView;
  /** Waits until all calls have ended. */
  settle(): Promise<void>;
}

/** Frees a tensor's memory on the device; one on the CPU has none. */
export const release = (view: TensorView): void => (view as { dispose?: () => void }).dispose?.();

export async function placeOf(backend: Backend): Promise<Place> {
  const { details } = await backend.availability();
  if (backend.name === 'cuda') {
    const { upload } = await import('../backends/cuda/index.ts');
    const device = await (backend as CudaBackend).device({ location: 'cpu', device: 0 });
    return {
      device: device.toString(),
      isRemote: true,
      put: (tensor) => upload(tensor, device),
      settle: async () => device.stream.synchronize(),
    };
  }
  if (backend.name === 'webgpu') {
    const { uploadTensor } = await import('../backends/webgpu/index.ts');
    const { device } = await (backend as WebgpuBackend).context();
    return {
      device: `${details.adapter}; ${details.family}`,
      isRemote: true,
      put: (tensor) => uploadTensor(device, tensor),
      settle: () => device.queue.onSubmittedWorkDone().then(() => undefined),
    };
  }
  const { threads, simd } = details;
  const device = [threads, simd].filter(Boolean).join(', ');
  return { device, isRemote: false, put: (tensor) => tensor, settle: async () => undefined };
}
