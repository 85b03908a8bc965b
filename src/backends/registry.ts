/** Which backends there are, and the instance of each that `sageattn` uses. */
import type { BackendName } from '../attention/options.ts';
import { BackendUnavailableError, InvalidArgumentError, reading, textOf } from '../errors.ts';
import type { Availability, Backend } from './backend.ts';
import { loadCode, unavailable } from './load-code.ts';

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
/** Those that have loaded, for calls that must not wait. */
const loaded = new Map<BackendName, Backend>();

function keep(name: BackendName, instance: Promise<Backend>): void {
  instances.set(name, instance);
  loaded.delete(name);
  instance.then(
    (backend) => {
      if (instances.get(name) === instance) loaded.set(name, backend);
    },
    // A failed load may succeed later, when the missing package has been installed.
    () => {
      if (instances.get(name) === instance) instances.delete(name);
    },
  );
}

/** The instance of a backend if it has loaded; null: this build does not contain it. */
export function loadedBackend(name: BackendName): Backend | null | undefined {
  return loaded.get(name) ?? (LOADERS[name] === undefined && !instances.has(name) ? null : undefined);
}

/** What was last found of each backend. Calls on CPU tensors look for backends that are absent only once. */
const found = new WeakMap<Backend, Availability>();

/** Asks a backend for its availability, and remembers it for {@link knownAvailability}. */
export async function askAvailability(backend: Backend): Promise<Availability> {
  const availability = await backend.availability();
  found.set(backend, availability);
  return availability;
}

/** What a backend last found, if nothing failed on it since. */
export const knownAvailability = (backend: Backend): Availability | undefined => found.get(backend);

/** After a failure: the backend is asked anew by the next call. */
export const forgetAvailability = (backend: Backend): void => {
  found.delete(backend);
};

/**
 * The backend instance that `sageattn` uses; it is created on first use.
 *
 * @throws {BackendUnavailableError} when this build does not contain the backend
 */
export async function getBackend(name: BackendName): Promise<Backend> {
  let instance = typeof name === 'string' ? instances.get(name) : undefined;
  if (instance === undefined) {
    const load = typeof name === 'string' && Object.hasOwn(LOADERS, name) ? LOADERS[name] : undefined;
    if (load === undefined) {
      throw new BackendUnavailableError(textOf(name), 'this version does not contain it', 'Use another backend');
    }
    instance = loadCode(name, load);
    keep(name, instance);
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
  const isBackend = () => BACKEND_PREFERENCE.includes(backend?.name) && typeof backend.plan === 'function';
  if (!reading('backend', isBackend, 'invalid-option')) {
    throw new InvalidArgumentError('invalid-option', 'backend', 'a backend', textOf(backend));
  }
  const previous = await instances.get(backend.name)?.catch(() => undefined);
  keep(backend.name, Promise.resolve(backend));
  loaded.set(backend.name, backend);
  return previous;
}

/**
 * Every backend that this build contains, in order of preference, with what was found of it.
 *
 * @param only backends to look for; the others are not loaded
 * @throws {InvalidArgumentError} `invalid-option`: no array; nothing else
 */
export async function listBackends(
  only: readonly BackendName[] = BACKEND_PREFERENCE,
): Promise<{ name: BackendName; availability: Availability }[]> {
  if (!Array.isArray(only)) {
    throw new InvalidArgumentError('invalid-option', 'only', 'an array of names of backends', textOf(only));
  }
  const contained = BACKEND_PREFERENCE.filter((name) => LOADERS[name] !== undefined || instances.has(name));
  return Promise.all(
    contained
      .filter((name) => only.includes(name))
      .map(async (name) => {
        try {
          return { name, availability: await askAvailability(await getBackend(name)) };
        } catch (error) {
          return { name, availability: unavailable(error) };
        }
      }),
  );
}

/** Frees every backend: workers, devices, memory. The next call starts them again. */
export async function disposeBackends(): Promise<void> {
  const running = [...instances.values()];
  instances.clear();
  for (const backend of loaded.values()) found.delete(backend);
  loaded.clear();
  const settled = await Promise.allSettled(running);
  await Promise.all(settled.map((result) => (result.status === 'fulfilled' ? result.value.dispose() : undefined)));
}
