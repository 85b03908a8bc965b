/** Code of backends is loaded when it is first needed, and it is said why where it cannot be. */
import type { BackendName } from '../attention/options.ts';
import { BackendUnavailableError, messageOf, SageAttentionError } from '../errors.ts';
import type { Availability } from './backend.ts';

/** What to import instead where `import()` is not allowed. */
const STATIC: Partial<Record<BackendName, string>> = {
  wasm: "createWasmBackend of 'sageattention/wasm/embedded'",
  webgpu: "createWebgpuBackend of 'sageattention/webgpu'",
};

const inServiceWorker = (): boolean => {
  const { ServiceWorkerGlobalScope: Scope } = globalThis as { ServiceWorkerGlobalScope?: unknown };
  return typeof Scope === 'function' && globalThis instanceof (Scope as new () => object);
};

/**
 * @param load an `import()` of code of this package
 * @throws {BackendUnavailableError} the code did not come: service workers (an extension's background is one) may not use
 *     `import()`, and elsewhere a file may be missing on the host
 */
export async function loadCode<T>(backend: BackendName, load: () => Promise<T>): Promise<T> {
  try {
    return await load();
  } catch (error) {
    if (error instanceof SageAttentionError) throw error;
    if (inServiceWorker()) {
      throw new BackendUnavailableError(
        backend,
        'its code comes by import(), which a service worker may not use',
        `Bundle into one file, or pass what ${STATIC[backend] ?? 'its module'} gives to setBackend`,
        error,
      );
    }
    throw new BackendUnavailableError(
      backend,
      `its code was not loaded (${messageOf(error)})`,
      'Serve every file that the bundler wrote, or that the package has',
      error,
    );
  }
}

/** The report of a backend that cannot run because of an error. */
export function unavailable(error: unknown): Availability {
  const absent = { available: false, accelerated: false, details: {} };
  if (!(error instanceof BackendUnavailableError)) {
    return { ...absent, reason: messageOf(error) };
  }
  const { received, expected } = error;
  return { ...absent, reason: received ?? error.message, ...(expected === undefined ? {} : { remedy: expected }) };
}
