import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { runSeed } from '../../../../test/support/random.ts';
import { CutTrials, mayGain, type RunTime, type Way } from './cut-trials.ts';
import { inputShapeOf } from './whole-shapes.ts';

const SHAPE = inputShapeOf([[1, 24, 64]]);

/** Runs until nothing is timed any more; the ways that were gone, and the last. */
function settle(trials: CutTrials, times: Record<Way, RunTime>) {
  const ways: Way[] = [];
  for (let run = 0; run < 12; run++) {
    const { way, tell } = trials.next(SHAPE);
    ways.push(way);
    tell?.(times[way]);
  }
  return { ways, last: ways.at(-1), reason: trials.reason(SHAPE) };
}

describe('short attention on a GPU', () => {
  it('is not cut where a run waits for the processor, and pieces are not tried', () => {
    const times = { whole: { recorded: 5, done: 5.3 }, pieces: { recorded: 0, done: 0 } };
    const { ways, reason } = settle(new CutTrials(2), times);
    expect(new Set(ways)).toEqual(new Set(['whole']));
    expect(reason).toBe('a cut gains nothing: the processor takes 5.00 ms of the 5.30 ms of a run');
  });

  it('stays in the way that was faster where a run waits for the GPU', () => {
    const whole = { recorded: 2, done: 20 };
    const slower = settle(new CutTrials(2), { whole, pieces: { recorded: 3, done: 21 } });
    expect(slower.ways.slice(0, 7)).toEqual(['whole', 'whole', 'whole', 'pieces', 'pieces', 'pieces', 'whole']);
    expect(slower.reason).toBe('the model in one piece was faster: 20.00 ms, 21.00 ms in pieces');
    const faster = settle(new CutTrials(2), { whole, pieces: { recorded: 3, done: 12 } });
    expect([faster.last, faster.reason]).toEqual(['pieces', undefined]);
  });

  it('decides nothing by runs that were not timed, and each shape by its own', () => {
    const trials = new CutTrials(1);
    for (let run = 0; run < 9; run++) expect(trials.next(SHAPE).way).toBe('whole');
    expect(trials.reason(SHAPE)).toBeUndefined();
    settle(trials, { whole: { recorded: 1, done: 9 }, pieces: { recorded: 1, done: 3 } });
    expect(trials.next(SHAPE).way).toBe('pieces');
    expect(trials.next(inputShapeOf([[1, 25, 64]])).way).toBe('whole');
    trials.refuse(SHAPE, 'no');
    expect([trials.next(SHAPE).way, trials.reason(SHAPE)]).toEqual(['whole', 'no']);
  });

  it('never cuts what is not faster by its own times', () => {
    const time = fc.tuple(fc.double({ min: 0, max: 50, noNaN: true }), fc.double({ min: 0, max: 50, noNaN: true }));
    const run = ([recorded, wait]: readonly [number, number]) => ({ recorded, done: recorded + wait });
    fc.assert(
      fc.property(time, time, fc.integer({ min: 1, max: 40 }), (a, b, attentions) => {
        const [whole, pieces] = [run(a), run(b)];
        const isCut = settle(new CutTrials(attentions), { whole, pieces }).last === 'pieces';
        expect(isCut).toBe(mayGain(whole, attentions) && pieces.done < whole.done);
      }),
      { seed: runSeed(), numRuns: 200 },
    );
  });
});
