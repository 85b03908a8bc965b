/**
 * Whether short attention on a GPU is worth a cut: decided by the times of a model's first runs, not by a length. A run takes about the larger of
 * what the processor needs to record it and what the GPU needs to do it. Cuts cost the processor; a faster kernel gains the GPU's time alone, so
 * where a run in one piece waits for the processor nothing can be gained, and pieces are not tried.
 */
import { type InputShape, keyOf } from './whole-shapes.ts';

/** Of one run, from its call. */
export interface RunTime {
  /** Milliseconds until all was recorded. */
  readonly recorded: number;
  /** Milliseconds until the GPU had done it. */
  readonly done: number;
}

/**
 * Processor time of a cut, less that of the dispatches that go: 0.55 ms for a session's run and our launches, 0.1 for one or two dispatches of an attention
 * operator, on an H200's host. Processors differ less than twofold, and what is let through by mistake is timed.
 */
const CUT_MILLISECONDS = 0.45;

/** False where a run with `attentions` cuts could not be faster even if the GPU took no time at all. */
export const mayGain = ({ recorded, done }: RunTime, attentions: number): boolean =>
  recorded + attentions * CUT_MILLISECONDS < done;

/** Timed runs of each way; the faster counts, since anything else that runs makes one slower. */
const TIMED = 2;

/** What the next run with some shapes is for. */
export type Way = 'whole' | 'pieces';

export interface Trial {
  readonly way: Way;
  /** Undefined: the run is not timed. The first of each way compiles and allocates. */
  readonly tell: ((time: RunTime) => void) | undefined;
}

interface State {
  runs: Record<Way, number>;
  best: Record<Way, RunTime | undefined>;
  decided: { readonly way: Way; readonly reason: string } | undefined;
}

/** Input shapes that are remembered: more than a program uses at a time, unless each run has its own, which is never decided. */
const REMEMBERED = 64;

export class CutTrials {
  readonly #states = new Map<string, State>();
  readonly #attentions: number;

  /** @param attentions that a run in pieces would replace */
  constructor(attentions: number) {
    this.#attentions = attentions;
  }

  /** How to run the model with these shapes, whose attentions are all short. */
  next(shape: InputShape): Trial {
    const key = keyOf(shape);
    const state = this.#states.get(key) ?? {
      runs: { whole: 0, pieces: 0 },
      best: { whole: undefined, pieces: undefined },
      decided: undefined,
    };
    this.#states.delete(key);
    this.#states.set(key, state);
    if (this.#states.size > REMEMBERED) this.#states.delete(this.#states.keys().next().value as string);
    if (state.decided !== undefined) return { way: state.decided.way, tell: undefined };
    const way = state.runs.whole <= TIMED ? 'whole' : 'pieces';
    const isFirst = state.runs[way] === 0;
    if (isFirst) state.runs[way]++;
    return { way, tell: isFirst ? undefined : (time) => this.#tell(state, way, time) };
  }

  /** Why these shapes run in one piece; undefined before that is decided, and where they run in pieces. */
  reason(shape: InputShape): string | undefined {
    const { decided } = this.#states.get(keyOf(shape)) ?? {};
    return decided?.way === 'whole' ? decided.reason : undefined;
  }

  /** A way that fails is not gone again. */
  refuse(shape: InputShape, reason: string): void {
    const state = this.#states.get(keyOf(shape));
    if (state !== undefined) state.decided = { way: 'whole', reason };
  }

  #tell(state: State, way: Way, time: RunTime): void {
    state.runs[way]++;
    const best = state.best[way];
    if (best === undefined || time.done < best.done) state.best[way] = time;
    if (state.runs[way] <= TIMED) return;
    const { whole, pieces } = state.best;
    if (whole === undefined) return;
    const ms = (milliseconds: number) => `${milliseconds.toFixed(2)} ms`;
    if (pieces !== undefined) {
      const isFaster = pieces.done < whole.done;
      const reason = `the model in one piece was faster: ${ms(whole.done)}, ${ms(pieces.done)} in pieces`;
      state.decided = { way: isFaster ? 'pieces' : 'whole', reason };
    } else if (!mayGain(whole, this.#attentions)) {
      const reason = `a cut gains nothing: the processor takes ${ms(whole.recorded)} of the ${ms(whole.done)} of a run`;
      state.decided = { way: 'whole', reason };
    }
  }
}
