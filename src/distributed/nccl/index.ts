/** A process as a rank of a group that NCCL connects. */
import type { CudaBackend } from '../../backends/cuda/backend.ts';
import { CudaPlace } from '../cuda-place.ts';
import { type ProcessOptions, settleProcess } from '../process-options.ts';
import { loadNccl, NCCL_ID_BYTES, type NcclApi } from './api.ts';
import { NcclTransport, newNcclId } from './transport.ts';

export { loadNccl } from './api.ts';
export { newNcclId } from './transport.ts';

/** @param load tests put another library in NCCL's place */
export async function connectProcess(
  backend: CudaBackend,
  given: ProcessOptions,
  load: () => Promise<NcclApi> = loadNccl,
): Promise<NcclTransport> {
  const { localRank, ...options } = settleProcess(given, NCCL_ID_BYTES);
  const cuda = await backend.cuda();
  // A launcher may let each process see only its own device.
  const device = cuda.device(given.device ?? (cuda.deviceCount === 1 ? 0 : localRank));
  const api = await load();
  const own = options.size === 1 && options.id === undefined && options.address === undefined;
  return NcclTransport.connect(api, new CudaPlace(backend, device), own ? { ...options, id: newNcclId(api) } : options);
}
