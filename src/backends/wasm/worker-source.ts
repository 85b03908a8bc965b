/**
 * The program of a worker thread, as text: it needs no file of its own, so it works under bundlers, in Node, Deno and
 * Bun alike. Plain JavaScript.
 *
 * Messages in: `{ init: { module, memory, ring, workers, index, calls } }` where the memory is shared, and `{ wake }`: calls are in the
 * memory, see call-ring.ts. Where it is the worker's own `{ init: { module, pages, limit } }`, then `{ id, stages, scratch }` for a call,
 * `{ write, address }`, `{ id, read, address }`, `{ grow }`, `{ copy, from, to }`, `{ abort }`. Out: `{ id, error?, bytes? }`.
 */
import * as ring from './call-ring.ts';
import { JOB_ABORT } from './generated/fields.ts';

export const WORKER_SOURCE = `
'use strict';
const node = globalThis.process?.getBuiltinModule?.('node:worker_threads');
const port = node?.parentPort ?? globalThis;
let memory, kernels;

const BREATH_MS = 10;
const pause = () => new Promise((resolve) => setTimeout(resolve));

// A call in a memory of its own. Every call of a kernel does one unit; an abort is a message, so it must listen between them.
async function compute({ stages, scratch }) {
  let since = performance.now();
  for (const { entry, job } of stages) {
    while (kernels[entry](job, scratch)) {
      if (performance.now() - since <= BREATH_MS) continue;
      await pause();
      since = performance.now();
    }
  }
}

// Where calls are, how many of them this worker has seen, and which one it is.
let ring, seen;
let words;
const ENTRIES = ${JSON.stringify(ring.ENTRIES)};
const slotOf = (call) => ring.address / 4 + 1 + ring.workers + (call & ${ring.SLOTS - 1}) * (${ring.SCRATCH + 1} + ring.workers);

function join(slot) {
  let gate;
  do {
    gate = Atomics.load(words, slot + ${ring.GATE});
    if (gate & ${ring.CLOSED}) return false;
  } while (Atomics.compareExchange(words, slot + ${ring.GATE}, gate, gate + 1) !== gate);
  if (Atomics.sub(words, slot + ${ring.LIMIT}, 1) > 0) return true;
  leave(slot);
  return false;
}

function leave(slot) {
  const id = words[slot + ${ring.ID}];
  const last = Atomics.sub(words, slot + ${ring.GATE}, 1) - 1 === ${ring.CLOSED};
  if (!last) return;
  Atomics.notify(words, slot + ${ring.GATE});
  if (Atomics.load(words, slot + ${ring.AWAITED})) port.postMessage({ id });
}

function takePart(slot) {
  if (!join(slot)) return;
  words = new Int32Array(memory.buffer);
  const count = words[slot + ${ring.STAGE_COUNT}];
  const stageOf = (i) => words.subarray(slot + ${ring.FIRST_STAGE} + i * ${ring.STAGE_WORDS}, slot + ${ring.FIRST_STAGE} + (i + 1) * ${ring.STAGE_WORDS});
  try {
    const scratch = words[slot + ${ring.SCRATCH} + 1 + ring.index];
    for (let i = 0; i < count; i++) {
      const [entry, job, barrier, units] = stageOf(i);
      let done = 0;
      while (kernels[ENTRIES[entry]](job, scratch)) done++;
      if (barrier === 0) continue;
      const at = barrier >>> 2;
      let n = Atomics.add(words, at, done) + done;
      if (n >= units) Atomics.notify(words, at);
      for (; n < units; n = Atomics.load(words, at)) Atomics.wait(words, at, n);
    }
  } catch (error) {
    // Nobody may wait for units that will not come.
    Atomics.store(words, slot + ${ring.FAILED}, 1);
    for (let i = 0; i < count; i++) {
      const [, job, barrier] = stageOf(i);
      Atomics.store(words, (job + ${JOB_ABORT}) >>> 2, 1);
      if (barrier === 0) continue;
      Atomics.or(words, barrier >>> 2, ${ring.OPENED});
      Atomics.notify(words, barrier >>> 2);
    }
    port.postMessage({ id: words[slot + ${ring.ID}], error: String(error?.stack ?? error), unfinished: true });
  }
  Atomics.or(words, slot + ${ring.GATE}, ${ring.CLOSED});
  leave(slot);
}

// Takes part in calls until none has come for a while.
function listen() {
  const latest = ring.address / 4;
  const listening = latest + 1 + ring.index;
  Atomics.store(words, listening, 1);
  for (;;) {
    const calls = Atomics.load(words, latest);
    if (calls !== seen) {
      // Records of calls longer ago are others' by now, and those calls are done.
      if (((calls - seen) | 0) > ${ring.SLOTS}) seen = (calls - ${ring.SLOTS}) | 0;
      takePart(slotOf(seen));
      seen = (seen + 1) | 0;
    } else if (Atomics.wait(words, latest, calls, ${ring.LINGER_MS}) === 'timed-out') {
      Atomics.store(words, listening, 0);
      if (Atomics.load(words, latest) === seen) return;
      Atomics.store(words, listening, 1);
    }
  }
}

async function handle(message) {
  const { id } = message;
  try {
    if (message.init) {
      const { module, pages, limit } = message.init;
      memory = message.init.memory ?? new WebAssembly.Memory({ initial: pages, maximum: limit, shared: true });
      kernels = (await WebAssembly.instantiate(module, { env: { memory } })).exports;
      if (message.init.ring) {
        ({ ring, calls: seen } = message.init);
        words = new Int32Array(memory.buffer);
      }
    } else if (message.wake) {
      listen();
      return;
    } else if (message.stages) {
      await compute(message);
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
  else ready.then(() => handle(message));
}
if (port.on) port.on('message', receive);
else port.onmessage = (event) => receive(event.data);
`;
