/**
 * Node's event loop while onnxruntime-web loads. Its WebAssembly is compiled by threads of V8, which no handle of the event loop stands
 * for. A loop without handles is over for Node, which then waits until V8 has no task left before it looks again; what continues
 * meanwhile (the session, its first run) continues inside that wait, and V8's optimization of the WebAssembly, half a minute of two
 * threads, is among the tasks. Timers, and pipelines that Dawn compiles, are not heard of before it has ended.
 */

/** Longer than anything loads, and no longer than a timer may wait. */
const NEVER_MS = 2 ** 31 - 1;

/** Does the work while the event loop has a handle. */
export async function holdingEventLoop<T>(work: () => Promise<T>): Promise<T> {
  if (globalThis.process?.versions?.node === undefined) return work();
  const handle = setInterval(() => {}, NEVER_MS);
  try {
    return await work();
  } finally {
    clearInterval(handle);
  }
}
