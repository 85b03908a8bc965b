/**
 * Calls as threads over one memory find them: a ring of records in that memory, which this thread fills and workers take in
 * order; worker-source.ts has their side. Workers that have just computed sleep on its first word, so that the next call costs
 * them a wake-up and no message.
 *
 * A thread touches a call only between joining and leaving it. Whoever finds no unit left closes the call, so that threads that
 * come later stay out; it is done when it is closed and nobody is inside. Between stages threads wait until all units of the
 * stage are done, not for each other: one that never came, or left, is not missed.
 */
import { JOB_ABORT, JOB_UNIT_COUNT } from './generated/fields.ts';
import type { KernelExports } from './modules.ts';

export const ENTRIES = ['prepare', 'attend', 'exact', 'prepareBackward', 'backward', 'storeGradients', 'pool'] as const;

/** A kernel to run over a job's units. Stages of a call run one after another. */
export interface Stage {
  readonly entry: (typeof ENTRIES)[number];
  /** Address of the job record. */
  readonly job: number;
}

/** Records of calls, a power of two. A call keeps its own until it is done, however many come and go in that time. */
export const SLOTS = 4;
const MOST_STAGES = 4;
/** Of a gate: nobody may join. The bits below count who is inside. */
export const CLOSED = 2 ** 30;
/** Of a barrier: nobody waits, whatever is left. */
export const OPENED = 2 ** 30;

/** Words of a record, all but the stages. */
export const GATE = 0;
/** Workers that may still join. */
export const LIMIT = 1;
/** Nonzero: a thread failed. */
export const FAILED = 2;
/** Nonzero: the last to leave says so by message. */
export const AWAITED = 3;
export const ID = 4;
export const STAGE_COUNT = 5;
export const FIRST_STAGE = 6;
/** Of a stage: index of its kernel, its job, address of the word that counts units done where others wait for them or 0, its units. */
export const STAGE_WORDS = 4;
/** Then a word for each thread: its scratch. */
export const SCRATCH = FIRST_STAGE + MOST_STAGES * STAGE_WORDS;

/** Milliseconds that a worker sleeps on the ring before it listens to messages again. */
export const LINGER_MS = 20;
/** And that this thread looks whether the others are done before it sleeps, and at least waits for them before it turns to something else. */
const SPIN_MS = 0.02;
const LEAST_PATIENCE_MS = 0.2;

/** Whether this thread may sleep on a word; a page's main thread may not, and looks again and again. */
let maySleep: boolean | undefined;
function sleeps(): boolean {
  if (maySleep === undefined) {
    try {
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 0);
      maySleep = true;
    } catch {
      maySleep = false;
    }
  }
  return maySleep;
}

/** Of a worker's word: it gets a message that there are calls. It sets the others, 0 and 1: it listens to messages, or on the ring. */
const WOKEN = 2;

export interface RingCall {
  readonly id: number;
  readonly stages: readonly Stage[];
  /** Address of a zeroed word for each stage, where there are several. */
  readonly barriers: number;
  /** Of this thread, then of each worker. */
  readonly scratch: readonly number[];
  /** Workers that may join. */
  readonly workers: number;
  /** Whether this thread joins, see {@link CallRing.compute}. */
  readonly joined: boolean;
}

/** This thread's part in a call. */
interface Part {
  /** When it leaves at the latest. */
  readonly end: number;
  /** Milliseconds that it waits for others. */
  patience: number;
}

/** Waits for a word that others change, and wake sleepers of, for at most so many milliseconds. */
function waitFor(words: Int32Array, at: number, isDone: (value: number) => boolean, ms: number): boolean {
  const start = performance.now();
  for (;;) {
    const value = Atomics.load(words, at);
    if (isDone(value)) return true;
    const waited = performance.now() - start;
    if (waited > ms) return false;
    if (waited > SPIN_MS && sleeps()) Atomics.wait(words, at, value, ms - waited);
  }
}

export class CallRing {
  readonly address: number;
  readonly #workers: number;
  readonly #memory: WebAssembly.Memory;
  #view: Int32Array;

  /** @param address of {@link bytesFor} zeroed bytes */
  constructor(memory: WebAssembly.Memory, address: number, workers: number) {
    this.address = address;
    this.#memory = memory;
    this.#workers = workers;
    this.#view = new Int32Array(memory.buffer);
  }

  /** The count of calls, on which workers sleep; for each worker whether it listens there; records. */
  static bytesFor = (workers: number): number => 4 * (1 + workers + SLOTS * (SCRATCH + workers + 1));

  #words(): Int32Array {
    // Memory that has grown is another buffer, or a longer one of the same bytes.
    if (this.#view.buffer !== this.#memory.buffer) this.#view = new Int32Array(this.#memory.buffer);
    return this.#view;
  }

  #slotOf(call: number): number {
    return this.address / 4 + 1 + this.#workers + (call & (SLOTS - 1)) * (SCRATCH + this.#workers + 1);
  }

  /** Whether a worker will see a call that is published now. */
  listens(worker: number): boolean {
    return Atomics.load(this.#words(), this.address / 4 + 1 + worker) !== 0;
  }

  /** Whether it needs a message for that, which the caller sends. */
  claim(worker: number): boolean {
    return Atomics.compareExchange(this.#words(), this.address / 4 + 1 + worker, 0, WOKEN) === 0;
  }

  /** What a worker that starts is told; one before it may have ended in its sleep. */
  introduce(worker: number): object {
    Atomics.store(this.#words(), this.address / 4 + 1 + worker, 0);
    const calls = Atomics.load(this.#words(), this.address / 4);
    return { ring: { address: this.address, workers: this.#workers, index: worker }, calls };
  }

  /** Which record the next call gets, of {@link SLOTS}. */
  get next(): number {
    return (this.#words()[this.address / 4] as number) & (SLOTS - 1);
  }

  /** Writes a call into the next record, which must be free. @returns the record */
  publish({ id, stages, barriers, scratch, workers, joined }: RingCall): number {
    const words = this.#words();
    const latest = this.address / 4;
    const slot = this.#slotOf(words[latest] as number);
    words[slot + LIMIT] = workers;
    words[slot + FAILED] = 0;
    words[slot + AWAITED] = joined ? 0 : 1;
    words[slot + ID] = id;
    words[slot + STAGE_COUNT] = stages.length;
    for (const [i, { entry, job }] of stages.entries()) {
      const stage = slot + FIRST_STAGE + i * STAGE_WORDS;
      words[stage] = ENTRIES.indexOf(entry);
      words[stage + 1] = job;
      words[stage + 2] = i + 1 < stages.length ? barriers + 4 * i : 0;
      words[stage + 3] = words[(job + JOB_UNIT_COUNT) >>> 2] as number;
    }
    words.set(scratch, slot + SCRATCH);
    Atomics.store(words, slot + GATE, joined ? 1 : 0);
    Atomics.add(words, latest, 1);
    Atomics.notify(words, latest, workers);
    return slot;
  }

  /** Lets nobody wait for units that will not come. */
  stop(stages: readonly Stage[], barriers: number): void {
    const words = this.#words();
    for (const [i, { job }] of stages.entries()) {
      Atomics.store(words, (job + JOB_ABORT) >>> 2, 1);
      if (i + 1 === stages.length) continue;
      Atomics.or(words, (barriers + 4 * i) >>> 2, OPENED);
      Atomics.notify(words, (barriers + 4 * i) >>> 2);
    }
  }

  /**
   * Takes this thread's part in a call that it joined, for at most about so long: whatever is left then is the workers'.
   *
   * @returns whether all of it is done; where not, the last worker says so by message; and what a kernel threw
   */
  compute(
    slot: number,
    { stages, barriers, scratch }: RingCall,
    kernels: KernelExports,
    mostMs: number,
  ): { readonly ended: boolean; readonly error?: unknown } {
    let thrown: { error?: unknown } = {};
    const part: Part = { end: performance.now() + mostMs, patience: LEAST_PATIENCE_MS };
    let close = true;
    try {
      close = this.#stages(slot, stages, barriers, kernels, scratch[0] as number, part);
    } catch (error) {
      thrown = { error };
      Atomics.store(this.#words(), slot + FAILED, 1);
      this.stop(stages, barriers);
    }
    if (close) Atomics.or(this.#words(), slot + GATE, CLOSED);
    Atomics.sub(this.#words(), slot + GATE, 1);
    return { ended: this.#ended(slot, part.patience), ...thrown };
  }

  /** @returns whether no unit is left to take; false: this thread leaves early */
  #stages(
    slot: number,
    stages: readonly Stage[],
    barriers: number,
    kernels: KernelExports,
    scratch: number,
    part: Part,
  ): boolean {
    let now = performance.now();
    for (const [i, { entry, job }] of stages.entries()) {
      let done = 0;
      let late = false;
      while (!late && kernels[entry](job, scratch) !== 0) {
        const start = now;
        now = performance.now();
        // Another thread may have begun a unit as long as this one's when this one found none left.
        part.patience = Math.max(part.patience, 2 * (now - start));
        done++;
        late = now > part.end;
      }
      if (i + 1 === stages.length) return !late;
      const words = this.#words();
      const barrier = (barriers + 4 * i) >>> 2;
      const units = words[slot + FIRST_STAGE + i * STAGE_WORDS + 3] as number;
      if (done > 0 && Atomics.add(words, barrier, done) + done >= units) Atomics.notify(words, barrier);
      if (late || !waitFor(words, barrier, (count) => count >= units, part.patience)) return false;
      now = performance.now();
    }
    return true;
  }

  #ended(slot: number, patience: number): boolean {
    const words = this.#words();
    if (waitFor(words, slot + GATE, (gate) => gate === CLOSED, patience)) return true;
    // The last to leave may have looked just before, and leave no message.
    Atomics.store(words, slot + AWAITED, 1);
    return Atomics.load(words, slot + GATE) === CLOSED;
  }

  /** Whether a thread failed in a call that is done; its message says how. */
  failed(slot: number): boolean {
    return Atomics.load(this.#words(), slot + FAILED) !== 0;
  }
}
