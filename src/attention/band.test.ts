import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { runSeed } from '../../test/support/random.ts';
import { bandOf, createBand, isBanded, NO_LIMIT, visibleKeys } from './band.ts';
import type { AttentionOptions, CausalAlignment } from './options.ts';

const seed = runSeed();
const lengths = { queryLength: 3, keyLength: 10 };

describe('bandOf', () => {
  const of = (isCausal: boolean, causalAlignment: CausalAlignment, windowSize: [number, number]) =>
    bandOf({ band: createBand({ isCausal, causalAlignment, windowSize }) }, lengths);
  const all = Number.POSITIVE_INFINITY;

  it('has no bounds without causality and window', () => {
    expect(of(false, 'top-left', [all, all])).toEqual({ lower: -NO_LIMIT, upper: NO_LIMIT });
    expect(of(false, 'top-left', [-1, -1])).toEqual({ lower: -NO_LIMIT, upper: NO_LIMIT });
  });
  it('puts the causal diagonal at either corner', () => {
    expect(of(true, 'top-left', [all, all])).toEqual({ lower: -NO_LIMIT, upper: 0 });
    expect(of(true, 'bottom-right', [all, all])).toEqual({ lower: 7 - NO_LIMIT, upper: 7 });
  });
  it('places the window around the same diagonal, and causality cuts its right side', () => {
    expect(of(false, 'bottom-right', [2, 4])).toEqual({ lower: 5, upper: 11 });
    expect(of(true, 'top-left', [2, 4])).toEqual({ lower: -2, upper: 0 });
  });
});

describe('createBand', () => {
  it('is a band exactly where an option limits', () => {
    expect(isBanded(createBand({}))).toBe(false);
    expect(isBanded(createBand({ causalAlignment: 'bottom-right', windowSize: [-1, -1] }))).toBe(false);
    // No sequence is as long.
    expect(isBanded(createBand({ windowSize: [NO_LIMIT, 2 ** 52] }))).toBe(false);
    expect(isBanded(createBand({ isCausal: true }))).toBe(true);
    expect(isBanded(createBand({ windowSize: [-1, 0] }))).toBe(true);
    expect(isBanded(createBand({ windowSize: [0, -1] }))).toBe(true);
  });

  it('has no negative zero', () => {
    const { lower, upper } = createBand({ isCausal: true, windowSize: [0, 0] });
    expect([Object.is(lower, 0), Object.is(upper, 0)]).toEqual([true, true]);
  });
});

describe('visibleKeys', () => {
  const side = fc.integer({ min: -1, max: 12 });
  const options: fc.Arbitrary<AttentionOptions> = fc.record({
    isCausal: fc.boolean(),
    causalAlignment: fc.constantFrom<CausalAlignment>('top-left', 'bottom-right'),
    windowSize: fc.tuple(side, side),
  });
  const length = fc.integer({ min: 1, max: 12 });

  it(`is the union over rows of what each may see, also of a block with an offset (seed ${seed})`, () => {
    fc.assert(
      fc.property(options, length, length, fc.integer({ min: -20, max: 20 }), (of, queryLength, keyLength, offset) => {
        const whole = createBand(of);
        const band = { ...whole, lower: whole.lower + offset, upper: whole.upper + offset };
        const [left, right] = of.windowSize as [number, number];
        const seen = new Set<number>();
        for (let i = 0; i < queryLength; i++) {
          const diagonal = i + offset + (of.causalAlignment === 'bottom-right' ? keyLength - queryLength : 0);
          for (let j = 0; j < keyLength; j++) {
            const inWindow = (left === -1 || j >= diagonal - left) && (right === -1 || j <= diagonal + right);
            if (inWindow && !(of.isCausal && j > diagonal)) seen.add(j);
          }
        }
        const [first, end] = visibleKeys({ band }, { queryLength, keyLength });
        expect(Array.from({ length: end - first }, (_, i) => first + i)).toEqual([...seen].sort((a, b) => a - b));
      }),
      { seed },
    );
  });

  it('is every key where no query has come yet, as in a cache', () => {
    expect(visibleKeys({ band: createBand({}) }, { queryLength: 0, keyLength: 5 })).toEqual([0, 5]);
  });
});
