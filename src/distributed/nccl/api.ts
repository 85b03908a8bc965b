/** The part of NCCL that ranks of several processes use, as data; see `nccl.h`. */
import {
  type BoundLibrary,
  bindLibrary,
  type FunctionTable,
  importKoffi,
  type Koffi,
} from '../../backends/cuda/driver/bind.ts';
import { BackendUnavailableError, messageOf } from '../../errors.ts';

/** All return ncclResult_t. Available since NCCL 2.14, which brought communicators that do not block. */
export const NCCL_FUNCTIONS = {
  ncclGetVersion: { symbol: 'ncclGetVersion', parameters: ['memory'] },
  ncclGetUniqueId: { symbol: 'ncclGetUniqueId', parameters: ['memory'] },
  ncclCommInitRankConfig: {
    symbol: 'ncclCommInitRankConfig',
    parameters: ['memory', 's32', 'bytes128', 's32', 'memory'],
  },
  ncclCommGetAsyncError: { symbol: 'ncclCommGetAsyncError', parameters: ['u64', 'memory'] },
  ncclCommFinalize: { symbol: 'ncclCommFinalize', parameters: ['u64'] },
  ncclCommDestroy: { symbol: 'ncclCommDestroy', parameters: ['u64'] },
  ncclCommAbort: { symbol: 'ncclCommAbort', parameters: ['u64'] },
  ncclGroupStart: { symbol: 'ncclGroupStart', parameters: [] },
  ncclGroupEnd: { symbol: 'ncclGroupEnd', parameters: [] },
  /** Address, number of elements, type, peer, communicator, stream. */
  ncclSend: { symbol: 'ncclSend', parameters: ['u64', 'u64', 's32', 's32', 'u64', 'u64'] },
  ncclRecv: { symbol: 'ncclRecv', parameters: ['u64', 'u64', 's32', 's32', 'u64', 'u64'] },
} as const satisfies FunctionTable;

export type NcclApi = BoundLibrary<typeof NCCL_FUNCTIONS>;

export const NCCL_SUCCESS = 0;
export const NCCL_IN_PROGRESS = 7;
export const NCCL_UINT8 = 1;
/** Bytes of `ncclUniqueId`. */
export const NCCL_ID_BYTES = 128;

/** `ncclResult_t`, in its order. */
export const NCCL_RESULTS = [
  'ncclSuccess',
  'ncclUnhandledCudaError',
  'ncclSystemError',
  'ncclInternalError',
  'ncclInvalidArgument',
  'ncclInvalidUsage',
  'ncclRemoteError',
  'ncclInProgress',
] as const;

/**
 * `ncclConfig_t` as NCCL 2.14 knew it (later versions fill in what a shorter one lacks): size, magic, version, and blocking = 0, so
 * that no call of a rank waits for another one.
 */
export function nonBlockingConfig(): DataView<ArrayBuffer> {
  const config = new DataView(new ArrayBuffer(24));
  config.setBigUint64(0, 24n, true);
  config.setUint32(8, 0xcafebeef, true);
  config.setUint32(12, 21400, true);
  config.setInt32(16, 0, true);
  return config;
}

/** Binds NCCL's functions to a library. */
export const bindNccl = (koffi: Koffi, path: string): NcclApi =>
  bindLibrary(koffi, path, NCCL_FUNCTIONS, (symbol) => new Error(`NCCL does not export ${symbol}`));

let loaded: Promise<NcclApi> | undefined;

/**
 * Loads NCCL: `SAGEATTENTION_NCCL` in the environment names the library, else the loader finds it.
 *
 * @throws {BackendUnavailableError} there is none, or one older than 2.14
 * @throws {MissingPackageError} koffi
 */
export function loadNccl(): Promise<NcclApi> {
  loaded ??= load();
  loaded.catch(() => {
    loaded = undefined;
  });
  return loaded;
}

async function load(): Promise<NcclApi> {
  const name = process.env.SAGEATTENTION_NCCL ?? 'libnccl.so.2';
  const koffi = await importKoffi();
  try {
    return bindNccl(koffi, name);
  } catch (error) {
    throw new BackendUnavailableError(
      'cuda',
      `NCCL could not be loaded from ${name} (${messageOf(error)})`,
      'Install NCCL 2.14 or later, or name its library in the environment variable SAGEATTENTION_NCCL',
      error,
    );
  }
}
