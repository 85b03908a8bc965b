/** Finds the driver library and binds it through koffi. */
import { BackendUnavailableError, MissingPackageError } from '../../../errors.ts';
import { importOptional } from '../../../optional-package.ts';
import { type CudaApi, DRIVER_FUNCTIONS, type DriverFunctionName, type ParameterKind } from './api.ts';

/** What this file uses of koffi; the package is an optional peer, so its own types are not imported. */
export interface Koffi {
  load(path: string): {
    func(symbol: string, result: string, parameters: readonly string[]): (...values: unknown[]) => number;
    unload(): void;
  };
  address(value: ArrayBuffer | ArrayBufferView): bigint;
  readonly decode: { string(address: bigint): string };
}

const KOFFI_TYPES: Readonly<Record<ParameterKind, string>> = {
  u8: 'uint8_t',
  u32: 'uint32_t',
  s32: 'int32_t',
  u64: 'uint64_t',
  memory: 'void *',
};

/** WSL keeps the library outside the loader's path. */
const LIBRARIES: Readonly<Record<string, readonly string[]>> = {
  linux: ['libcuda.so.1', '/usr/lib/wsl/lib/libcuda.so.1'],
  win32: ['nvcuda.dll'],
};

/** Binds every function of the table to a library. Exported for tests, which bind a library of their own. */
export function bindDriver(koffi: Koffi, path: string): CudaApi {
  const library = koffi.load(path);
  const bound: Record<string, unknown> = {};
  const missing = new Set<string>();
  for (const [name, entry] of Object.entries(DRIVER_FUNCTIONS)) {
    const parameters = entry.parameters.map((kind) => KOFFI_TYPES[kind]);
    try {
      bound[name] = library.func(entry.symbol, 'int32_t', parameters);
    } catch (error) {
      if (!('optional' in entry)) throw error;
      missing.add(name);
      bound[name] = () => {
        throw new BackendUnavailableError(
          'cuda',
          `the driver does not export ${entry.symbol}`,
          'Install a newer NVIDIA driver',
        );
      };
    }
  }
  return {
    ...(bound as unknown as Pick<CudaApi, DriverFunctionName>),
    library: path,
    has: (name) => !missing.has(name),
    addressOf: (buffer) => koffi.address(buffer),
    textAt: (address) => koffi.decode.string(address),
  };
}

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
      failures.push(error instanceof Error ? error.message : String(error));
    }
  }
  throw new BackendUnavailableError(
    'cuda',
    `the NVIDIA driver library ${names[0]} could not be loaded (${failures[0]})`,
    'Install the NVIDIA driver; in a container, start it with GPU access (docker run --gpus all)',
    cause,
  );
}

async function importKoffi(): Promise<Koffi> {
  try {
    const module = (await importOptional('koffi')) as Koffi & { readonly default?: Koffi };
    return module.default ?? module;
  } catch (error) {
    throw new MissingPackageError('koffi', "backend 'cuda'", error);
  }
}
