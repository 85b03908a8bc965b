/** A process as a rank of a group whose processes share the memory of one machine's devices. */
import type { CudaBackend } from '../../backends/cuda/backend.ts';
import { InvalidArgumentError } from '../../errors.ts';
import { CudaPlace } from '../cuda-place.ts';
import { type ProcessOptions, settleProcess } from '../process-options.ts';
import { IpcTransport } from './transport.ts';

export async function connectSharing(backend: CudaBackend, given: ProcessOptions): Promise<IpcTransport> {
  if (given.id !== undefined) {
    const expected = "an address: an id is for transport 'nccl'";
    throw new InvalidArgumentError('invalid-option', 'options.id', expected, 'an id');
  }
  const { localRank, ...options } = settleProcess(given);
  const cuda = await backend.cuda();
  const device = cuda.device(given.device ?? localRank % Math.max(1, cuda.deviceCount));
  return IpcTransport.connect(new CudaPlace(backend, device), options);
}
