/** A backend's tuning: the record of its device, and measurements while nothing else runs. */
import type { GpuContext } from '../device.ts';
import { DEFAULT_SHAPES, measureShape, shapeOfKind, type TuningShape } from './measure.ts';
import {
  entryFor,
  joined,
  kindOf,
  parseTuning,
  type TunedProblem,
  type Tuning,
  tuningOf,
  tuningText,
} from './record.ts';
import { engineName, readTuning, writeTuning } from './store.ts';

export const TUNE: readonly string[] = ['auto', 'off', 'now'];

/** Milliseconds without a run after which a device counts as idle. */
const IDLE_FOR = 200;
/** Attempts at a measurement that runs of others disturbed. */
const ATTEMPTS = 3;

const nameOf = ({ capabilities }: GpuContext) => `${capabilities.adapter}, ${engineName()}`;

/** The record of a device; undefined where none of this version is kept. */
async function recordOf(context: GpuContext): Promise<Tuning | undefined> {
  const text = await readTuning(nameOf(context));
  return parseTuning(text, context.capabilities.adapter, engineName());
}

/** Measures shapes, prefers what was found from then on, and keeps it beside what was known of other kinds. */
export async function measureAndKeep(context: GpuContext, shapes: readonly TuningShape[]): Promise<Tuning> {
  const entries = [];
  for (const shape of shapes) entries.push(await measureShape(context, shape));
  const known = (await recordOf(context))?.entries ?? context.capabilities.tuning ?? [];
  const tuning = tuningOf(context.capabilities.adapter, engineName(), joined(known, entries));
  context.prefer(tuning.entries);
  await writeTuning(nameOf(context), JSON.stringify(tuning));
  return tuning;
}

/** Resolves once nothing has run on the device for a while; false where it is gone. */
async function idle(context: GpuContext): Promise<boolean> {
  for (let quiet = false; !quiet; ) {
    quiet = context.idle;
    await new Promise<void>((resolve) => {
      const timer: unknown = setTimeout(resolve, IDLE_FOR);
      // A program that is done ends without it.
      (timer as { unref?: () => void }).unref?.();
    });
    if (!context.usable) return false;
    quiet &&= context.idle;
  }
  return true;
}

export class Tuner {
  readonly #mode: string;
  /** Kinds that were asked for, measured or not, of each device. */
  readonly #asked = new WeakMap<GpuContext, Set<string>>();
  #measuring: Promise<unknown> = Promise.resolve();

  constructor(mode: string) {
    this.#mode = mode;
  }

  /** A device was opened. A measurement that fails leaves the tables. */
  async opened(context: GpuContext): Promise<void> {
    // A software driver gains nothing from other tiles, and takes minutes to time them.
    if (this.#mode === 'off' || context.capabilities.isSoftware) return;
    if (this.#mode === 'now') {
      await measureAndKeep(context, DEFAULT_SHAPES).catch(() => {});
      return;
    }
    context.prefer((await recordOf(context))?.entries ?? []);
  }

  /** A plan for a problem is made: where its kind was not measured it will be, once nothing runs. */
  asked(context: GpuContext | undefined, problem: TunedProblem): void {
    if (this.#mode !== 'auto' || context === undefined || context.capabilities.isSoftware) return;
    if (Math.min(problem.headDim, problem.queryLength) === 0) return;
    if (entryFor(context.capabilities.tuning ?? [], problem) !== undefined) return;
    const kinds = this.#asked.get(context) ?? new Set();
    this.#asked.set(context, kinds);
    const kind = Object.values(kindOf(problem)).join();
    if (kinds.has(kind)) return;
    kinds.add(kind);
    const next = this.#measuring.then(() => this.#measureIdle(context, shapeOfKind(problem)));
    this.#measuring = next.catch(() => {});
  }

  async #measureIdle(context: GpuContext, shape: TuningShape): Promise<void> {
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      if (!(await idle(context))) return;
      const before = context.runCount;
      const entry = await context.during(measureShape(context, shape));
      // What ran beside it took its share of the time.
      if (context.runCount > before + 1) continue;
      const known = (await recordOf(context))?.entries ?? context.capabilities.tuning ?? [];
      const tuning = tuningOf(context.capabilities.adapter, engineName(), joined(known, [entry]));
      context.prefer(tuning.entries);
      await writeTuning(nameOf(context), JSON.stringify(tuning));
      return;
    }
  }

  /** For `doctor`: what was chosen, by which measurement. */
  async text(context: GpuContext): Promise<string> {
    const { tuning = [] } = context.capabilities;
    const record = await recordOf(context);
    if (tuning.length > 0) return tuningText({ date: record?.date ?? '', entries: tuning });
    if (this.#mode !== 'off') return 'nothing measured yet';
    return record === undefined
      ? "off (createWebgpuBackend({ tune: 'auto' }))"
      : `off, although there is a record:\n${tuningText(record)}`;
  }
}
