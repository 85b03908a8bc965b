/**
 * The program of a worker thread, as text: it needs no file of its own, so it works under bundlers, in Node, Deno and
 * Bun alike. Plain JavaScript.
 *
 * Messages in: `{ init: { module, memory | pages, limit } }`, then `{ id, stages, scratch, participants }` for a call,
 * and where the memory is the worker's own `{ write, address }`, `{ id, read, address }`, `{ grow }`, `{ copy, from, to
 * }`, `{ abort }`. Out: `{ id, error?, bytes? }`.
 */
export const WORKER_SOURCE = `
'use strict';
const node = globalThis.process?.getBuiltinModule?.('node:worker_threads');
const port = node?.parentPort ?? globalThis;
let memory, kernels, shared;

// Every call of a kernel does one unit. Over a memory of its own the worker must listen between units: an abort is a
// message.
const BREATH_MS = 10;
const pause = () => new Promise((resolve) => setTimeout(resolve));

async function runStage({ entry, job, barrier }, scratch, participants) {
  let error;
  try {
    let since = performance.now();
    while (kernels[entry](job, scratch)) {
      if (!shared && performance.now() - since > BREATH_MS) {
        await pause();
        since = performance.now();
      }
    }
  } catch (caught) {
    error = caught;
  }
  if (barrier && participants > 1) {
    // The last thread to finish the stage wakes the others; a failed one counts too, or they would wait forever.
    const words = new Int32Array(memory.buffer);
    const at = barrier >>> 2;
    if (Atomics.add(words, at, 1) + 1 === participants) Atomics.notify(words, at);
    else for (let n; (n = Atomics.load(words, at)) < participants; ) Atomics.wait(words, at, n);
  }
  if (error) throw error;
}

async function handle(message) {
  const { id } = message;
  try {
    if (message.init) {
      const { module, pages, limit } = message.init;
      shared = message.init.memory !== undefined;
      memory = message.init.memory ?? new WebAssembly.Memory({ initial: pages, maximum: limit, shared: true });
      kernels = (await WebAssembly.instantiate(module, { env: { memory } })).exports;
    } else if (message.stages) {
      for (const stage of message.stages) await runStage(stage, message.scratch, message.participants);
    } else if (message.write) {
      new Uint8Array(memory.buffer, message.address, message.write.length).set(message.write);
      return;
    } else if (message.copy) {
      new Uint8Array(memory.buffer).copyWithin(message.to, message.from, message.from + message.copy);
      return;
    } else if (message.read) {
      const bytes = new Uint8Array(message.read);
      bytes.set(new Uint8Array(memory.buffer, message.address, message.read));
      port.postMessage({ id, bytes }, [bytes.buffer]);
      return;
    } else if (message.grow) {
      memory.grow(message.grow);
    } else if (message.abort) {
      new Int32Array(memory.buffer)[message.abort >>> 2] = 1;
      return;
    }
    port.postMessage({ id });
  } catch (error) {
    port.postMessage({ id, error: String(error?.stack ?? error) });
  }
}

// Messages wait for the module: it is instantiated asynchronously. A call in progress must not hold back an abort.
let ready = Promise.resolve();
function receive(message) {
  if (message.init) ready = handle(message);
  else if (shared) ready = ready.then(() => handle(message));
  else ready.then(() => handle(message));
}
if (port.on) port.on('message', receive);
else port.onmessage = (event) => receive(event.data);
`;
