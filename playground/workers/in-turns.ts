/** Times contestants in turns, so that what a machine does besides falls on all of them alike. */

import { accuracyOnRows, sampleRows } from '../../src/measure/accuracy.ts';
import { median } from '../../src/measure/statistics.ts';
import type { Accuracy } from '../../src/reference/metrics.ts';
import { isLoss } from './backends.ts';
import type { BenchInputs, Contestant, Ready } from './contestants.ts';

/** Samples of each contestant; of calls of {@link SLOW_CALL_MS} and more, fewer. */
const ROUNDS = 5;
const SLOW_ROUNDS = 3;
const SLOW_CALL_MS = 2_000;
/** Calls of a sample are submitted together to a GPU, so that waiting for it is not measured. */
const SAMPLE_MS = 100;
const MOST_TOGETHER = 16;
/** Before each sample: onnxruntime's threads spin for a while after a call, on the processors that the next needs. */
const PAUSE_MS = 30;

/** Steps that {@link measureInTurns} takes for a contestant: making it ready, and its samples. */
export const STEPS = 1 + ROUNDS;

export interface Timing extends Pick<Accuracy, 'relativeL1' | 'cosineSimilarity'> {
  /** Of a call, milliseconds. */
  readonly medianMs: number;
  /** Calls that were timed. */
  readonly calls: number;
}

/** The result of a contestant, or why there is none. */
export type Outcome = Timing | { readonly failure: string };

export const isTiming = (outcome: Outcome | undefined): outcome is Timing =>
  outcome !== undefined && 'medianMs' in outcome;

interface Running extends Pick<Timing, 'relativeL1' | 'cosineSimilarity'> {
  readonly contestant: Contestant;
  readonly ready: Ready;
  readonly together: number;
  readonly rounds: number;
  readonly samples: number[];
}

/** Milliseconds of a call, the mean of some that were started together. */
async function sample(ready: Ready, together: number, signal: AbortSignal): Promise<number> {
  const start = performance.now();
  for (let i = 0; i < together; i++) {
    await ready.run(signal);
    signal.throwIfAborted();
  }
  await ready.finish();
  return (performance.now() - start) / together;
}

async function begin(contestant: Contestant, inputs: BenchInputs, rows: number, signal: AbortSignal): Promise<Running> {
  const ready = await contestant.prepare(inputs);
  try {
    // The first call compiles and starts workers, the second tells how many fit into a sample.
    const output = await ready.output(signal);
    const ranges = sampleRows(inputs.q.shape[1] as number, rows);
    const { relativeL1, cosineSimilarity } = await accuracyOnRows({ ...inputs, tensorLayout: 'NHD' }, output, ranges);
    signal.throwIfAborted();
    const call = await sample(ready, 1, signal);
    return {
      contestant,
      ready,
      together: Math.max(1, Math.min(MOST_TOGETHER, Math.floor(SAMPLE_MS / call))),
      rounds: call < SLOW_CALL_MS ? ROUNDS : SLOW_ROUNDS,
      samples: [],
      relativeL1,
      cosineSimilarity,
    };
  } catch (error) {
    ready.dispose();
    throw error;
  }
}

export interface TurnsOptions {
  /** Query rows on which outputs are compared with float64. */
  readonly rows: number;
  readonly signal: AbortSignal;
  /** Told before each step how many of `STEPS` rounds are done, and what comes next. */
  readonly onStep: (done: number, doing: string) => void;
}

/**
 * Makes every contestant ready, then takes a sample of each in turn, forwards and backwards, until all have theirs.
 *
 * @returns by the contestants' ids
 * @throws {ExecutionError} `device-lost`: all of it is to be done again
 */
export async function measureInTurns(
  contestants: readonly Contestant[],
  inputs: BenchInputs,
  { rows, signal, onStep }: TurnsOptions,
): Promise<ReadonlyMap<string, Outcome>> {
  const outcomes = new Map<string, Outcome>();
  const running = new Map<string, Running>();
  let done = 0;
  /** One step of one contestant; its failure is its own, but for a stop and a lost device. */
  const attempt = async ({ id, label }: Contestant, what: string, work: () => Promise<void>) => {
    signal.throwIfAborted();
    onStep(done, `${label}${what}`);
    try {
      if (!outcomes.has(id)) await work();
    } catch (error) {
      if (signal.aborted || isLoss(error)) throw error;
      outcomes.set(id, { failure: error instanceof Error ? error.message : String(error) });
    }
    done++;
  };
  try {
    for (const contestant of contestants) {
      await attempt(contestant, '', async () => {
        running.set(contestant.id, await begin(contestant, inputs, rows, signal));
      });
    }
    for (let round = 0; round < ROUNDS; round++) {
      for (const contestant of round % 2 === 0 ? contestants : [...contestants].reverse()) {
        await attempt(contestant, `, round ${round + 1} of ${ROUNDS}`, async () => {
          const { ready, together, rounds, samples } = running.get(contestant.id) as Running;
          if (round >= rounds) return;
          await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
          samples.push(await sample(ready, together, signal));
        });
      }
    }
    for (const [id, { samples, together, relativeL1, cosineSimilarity }] of running) {
      if (outcomes.has(id)) continue;
      const calls = samples.length * together;
      outcomes.set(id, { medianMs: median(samples), calls, relativeL1, cosineSimilarity });
    }
    return outcomes;
  } finally {
    for (const { ready } of running.values()) ready.dispose();
  }
}
