import { ExecutionError } from '../../../errors.ts';
import { CUDA_ERROR_OUT_OF_MEMORY, type CudaApi } from './api.ts';

/** A call of the driver that did not succeed. */
export class CudaError extends ExecutionError {
  /** CUresult. */
  readonly status: number;
  /** The driver's name for it: `CUDA_ERROR_ILLEGAL_ADDRESS`. */
  readonly statusName: string;
  /** The function that returned it. */
  readonly call: string;

  constructor(
    code: 'device-lost' | 'out-of-memory' | 'execution-failed',
    message: string,
    status: number,
    statusName: string,
    call: string,
  ) {
    super(code, message);
    this.status = status;
    this.statusName = statusName;
    this.call = call;
  }
}

/**
 * Statuses after which the context is unusable: the fault happened on the device, earlier and asynchronously, and every
 * later call in this process returns the same (`cuda.h` on each: "the context cannot be used, so it must be
 * destroyed").
 */
const CONTEXT_LOST: ReadonlySet<number> = new Set([
  214, // CUDA_ERROR_ECC_UNCORRECTABLE
  220, // CUDA_ERROR_NVLINK_UNCORRECTABLE
  226, // CUDA_ERROR_CONTAINED
  700, // CUDA_ERROR_ILLEGAL_ADDRESS
  702, // CUDA_ERROR_LAUNCH_TIMEOUT
  709, // CUDA_ERROR_CONTEXT_IS_DESTROYED
  710, // CUDA_ERROR_ASSERT
  714, // CUDA_ERROR_HARDWARE_STACK_ERROR
  715, // CUDA_ERROR_ILLEGAL_INSTRUCTION
  716, // CUDA_ERROR_MISALIGNED_ADDRESS
  717, // CUDA_ERROR_INVALID_ADDRESS_SPACE
  718, // CUDA_ERROR_INVALID_PC
  719, // CUDA_ERROR_LAUNCH_FAILED
  721, // CUDA_ERROR_TENSOR_MEMORY_LEAK
  999, // CUDA_ERROR_UNKNOWN
]);

/** What to do about statuses whose text does not say it. */
const REMEDIES: Readonly<Record<number, string>> = {
  34: "; the library that was found is the toolkit's stub, not the driver",
  222: '; the driver is too old for this kernel: install a newer one',
  803: '; the driver was updated while it was loaded: restart the machine',
};

/** True for a fault of something that ran earlier, not of the call that reported it. */
export const losesContext = (status: number): boolean => CONTEXT_LOST.has(status);

/** The driver's own name and text of a status. */
export function describeStatus(api: CudaApi, status: number): { name: string; text: string } {
  const address = new BigUint64Array(1);
  const read = (call: 'cuGetErrorName' | 'cuGetErrorString', fallback: string) =>
    api[call](status, address) === 0 && address[0] !== 0n ? api.textAt(address[0] as bigint) : fallback;
  return {
    name: read('cuGetErrorName', `CUresult ${status}`),
    text: read('cuGetErrorString', 'a status that this driver does not know'),
  };
}

/**
 * The error for a failed call.
 *
 * @param what what was being done, and on what: `allocating 1024 bytes on device 0`
 * @param suspects kernels that may have caused a fault found now, newest last
 */
export function cudaError(
  api: CudaApi,
  status: number,
  call: string,
  what: string,
  suspects: readonly string[] = [],
): CudaError {
  const { name, text } = describeStatus(api, status);
  const lost = losesContext(status);
  const cause = !lost
    ? ''
    : suspects.length === 0
      ? '; no kernel of this library was under way'
      : suspects.length === 1
        ? `; kernel '${suspects[0]}' was under way`
        : `; one of the kernels under way caused it: ${suspects.map((kernel) => `'${kernel}'`).join(', ')} (with CUDA_LAUNCH_BLOCKING=1 in the environment the driver reports the fault at the launch itself)`;
  const code = status === CUDA_ERROR_OUT_OF_MEMORY ? 'out-of-memory' : lost ? 'device-lost' : 'execution-failed';
  return new CudaError(
    code,
    `${what}: ${name} (${text}) from ${call}${cause}${REMEDIES[status] ?? ''}`,
    status,
    name,
    call,
  );
}
