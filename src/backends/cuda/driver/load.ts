/** Finds the driver library and binds it. */
import { BackendUnavailableError, messageOf } from '../../../errors.ts';
import { type CudaApi, DRIVER_FUNCTIONS } from './api.ts';
import { bindLibrary, importKoffi, type Koffi } from './bind.ts';

/** WSL keeps the library outside the loader's path. */
const LIBRARIES: Readonly<Record<string, readonly string[]>> = {
  linux: ['libcuda.so.1', '/usr/lib/wsl/lib/libcuda.so.1'],
  win32: ['nvcuda.dll'],
};

/** Binds the driver's functions to a library. Exported for tests, which bind a library of their own. */
export const bindDriver = (koffi: Koffi, path: string): CudaApi =>
  bindLibrary(
    koffi,
    path,
    DRIVER_FUNCTIONS,
    (symbol) =>
      new BackendUnavailableError('cuda', `the driver does not export ${symbol}`, 'Install a newer NVIDIA driver'),
  );

/**
 * Loads the NVIDIA driver of this machine.
 *
 * @throws {BackendUnavailableError} which says what is missing: Node, a 64-bit platform, or the driver
 * @throws {MissingPackageError} koffi
 */
export async function loadDriver(): Promise<CudaApi> {
  const process = (globalThis as { process?: NodeJS.Process }).process;
  const names = process === undefined ? undefined : LIBRARIES[process.platform];
  if (process?.versions?.node === undefined || names === undefined) {
    throw new BackendUnavailableError(
      'cuda',
      `CUDA runs in Node on Linux and Windows, not on ${process?.platform ?? 'this platform'}`,
      "Use backend 'webgpu' or 'wasm'",
    );
  }
  if (process.arch !== 'x64' && process.arch !== 'arm64') {
    throw new BackendUnavailableError(
      'cuda',
      `the driver is 64-bit and this process is ${process.arch}`,
      'Use a 64-bit Node',
    );
  }
  const koffi = await importKoffi();
  const failures: string[] = [];
  let cause: unknown;
  for (const name of names) {
    try {
      return bindDriver(koffi, name);
    } catch (error) {
      cause ??= error;
      failures.push(messageOf(error));
    }
  }
  throw new BackendUnavailableError(
    'cuda',
    `the NVIDIA driver library ${names[0]} could not be loaded (${failures[0]})`,
    'Install the NVIDIA driver; in a container, start it with GPU access (docker run --gpus all)',
    cause,
  );
}
