/** Which backends there are, and the instance of each that `sageattn` uses. */
import type { BackendName } from '../attention/options.ts';
import { BackendUnavailableError, InvalidArgumentError } from '../errors.ts';
import type { Availability, Backend } from './backend.ts';

/** Each backend is loaded when it is first asked for, so that a bundle carries only what runs. */
const LOADERS: Partial<Record<BackendName, () => Promise<Backend>>> = {
  // Only Node reaches the NVIDIA driver; a browser need not load the code to learn that.
  ...(globalThis.process?.versions?.node === undefined
    ? {}
    : { cuda: async () => (await import('./cuda/backend.ts')).createCudaBackend() }),
  wasm: async () => (await import('./wasm/index.ts')).createWasmBackend(),
  webgpu: async () => (await import('./webgpu/index.ts')).createWebgpuBackend(),
};

/** CPU tensors go to the first of these that is available and accelerated, else to the last. */
export const BACKEND_PREFERENCE: readonly BackendName[] = ['cuda', 'webgpu', 'wasm'];

const instances = new Map<BackendName, Promise<Backend>>();

/**
 * The backend instance that `sageattn` uses; it is created on first use.
 *
 * @throws {BackendUnavailableError} when this build does not contain the backend
 */
export async function getBackend(name: BackendName): Promise<Backend> {
  let instance = instances.get(name);
  if (instance === undefined) {
    const load = Object.hasOwn(LOADERS, name) ? LOADERS[name] : undefined;
    if (load === undefined) {
      throw new BackendUnavailableError(name, 'this version does not contain it', 'Use another backend');
    }
    instance = load();
    // A failed load may succeed later, when the missing package has been installed.
    instance.catch(() => instances.delete(name));
    instances.set(name, instance);
  }
  return instance;
}

/**
 * Makes `sageattn` use this instance for its name: a WebGPU backend on the caller's device, a WASM backend with a
 * chosen number of threads. The instance used before is returned, not disposed.
 *
 * @throws {InvalidArgumentError} `invalid-option`: no backend
 */
export async function setBackend(backend: Backend): Promise<Backend | undefined> {
  if (!BACKEND_PREFERENCE.includes(backend?.name) || typeof backend.plan !== 'function') {
    throw new InvalidArgumentError('invalid-option', 'backend', 'a backend', String(backend?.name ?? backend));
  }
  const previous = await instances.get(backend.name)?.catch(() => undefined);
  instances.set(backend.name, Promise.resolve(backend));
  return previous;
}

/**
 * Every backend that this build contains, in order of preference, with what was found of it. Never rejects.
 *
 * @param only backends to look for; the others are not loaded
 */
export async function listBackends(
  only: readonly BackendName[] = BACKEND_PREFERENCE,
): Promise<{ name: BackendName; availability: Availability }[]> {
  const contained = BACKEND_PREFERENCE.filter((name) => LOADERS[name] !== undefined || instances.has(name));
  return Promise.all(
    contained
      .filter((name) => only.includes(name))
      .map(async (name) => {
        try {
          return { name, availability: await (await getBackend(name)).availability() };
        } catch (error) {
          const reason = error instanceof Error ? error.message : String(error);
          return { name, availability: { available: false, accelerated: false, reason, details: {} } };
        }
      }),
  );
}

/** Frees every backend: workers, devices, memory. The next call starts them again. */
export async function disposeBackends(): Promise<void> {
  const running = [...instances.values()];
  instances.clear();
  const loaded = await Promise.allSettled(running);
  await Promise.all(loaded.map((result) => (result.status === 'fulfilled' ? result.value.dispose() : undefined)));
}
