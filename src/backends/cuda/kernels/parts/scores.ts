/** What every attention kernel does to its scores between the product and the softmax: softcap, mask, band, faults. */
import type { DType } from '../../../../tensor/dtype.ts';
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Parameter, Reg } from '../../ptx/types.ts';
import { LOG2_E } from './constants.ts';
import { loadElement } from './elements.ts';
import { at } from './lists.ts';

/** Base 2: the lowest that a finite mask adds. A row of such values is not an empty one. */
const LOWEST_FINITE = -3e38;

/**
 * Excludes a score (boolean, 0: excluded) or adds to it (float, in base e; -Infinity: excluded) what the mask has at
 * `address`.
 *
 * @param score in base 2
 * @param inside whether there is such an element; outside a boolean mask excludes and a float one adds 0
 */
export function applyMask(
  b: KernelBuilder,
  kind: 'boolean' | DType,
  score: Reg<'f32'>,
  address: Reg<'global'>,
  inside: Reg<'pred'>,
): void {
  if (kind === 'boolean') {
    const attend = b.constant('u32', 0);
    b.when(inside, () => b.ldByte(address, 0, attend));
    b.when(b.setp('eq', attend, 0), () => b.set(score, Number.NEGATIVE_INFINITY));
    return;
  }
  const added = loadElement(b, kind, address, 0, inside);
  const excluded = b.setp('eq', added, Number.NEGATIVE_INFINITY);
  const inBase2 = b.mul(added, LOG2_E);
  // Not a maximum instruction, which would swallow NaN.
  b.when(b.setp('lt', inBase2, LOWEST_FINITE), () => b.set(inBase2, LOWEST_FINITE));
  b.add(score, inBase2, score);
  b.when(excluded, () => b.set(score, Number.NEGATIVE_INFINITY));
}

/** Visits a thread's scores of a tile: the row among the thread's own, the column from the thread's first. */
export type EachScore = (body: (score: Reg<'f32'>, row: number, column: number) => void) => void;

/** Up to this share of the cap, tanh is taken from its series. */
const SERIES_UNTIL = 0.25;
/** tanh(x) = x + x^3 (c0 + c1 x^2 + ...): the next term is below 2^-24 of it. */
const SERIES = [-1 / 3, 2 / 15, -17 / 315, 62 / 2835] as const;

/** The softcap of a call: parameters of every attention kernel. */
export interface SoftcapParameters {
  /** c * log2(e), at most float32's largest number. */
  readonly cap: Parameter<'f32'>;
  /** Its reciprocal, at most that too; so small that its square is 0 where the cap changes no score. */
  readonly inverse: Parameter<'f32'>;
}

export const softcapParameters = (b: KernelBuilder): SoftcapParameters => ({
  cap: b.parameter('softcap', 'f32'),
  inverse: b.parameter('softcapInverse', 'f32'),
});

/**
 * c * tanh(s / c) of the true scores, to float32's relative precision whatever the cap: where a score is small beside
 * it, 1 - 2 / (1 + e^2x) would be off by a rounding of 1, which is a rounding of the cap. What smoothing K took away
 * is added back first.
 *
 * @param rowBiases loads what smoothing took from each of the thread's rows
 */
export function capScores(
  b: KernelBuilder,
  softcap: SoftcapParameters,
  eachScore: EachScore,
  rowBiases: () => readonly Reg<'f32'>[],
): void {
  const [cap, inverse] = [b.loadParameter(softcap.cap), b.loadParameter(softcap.inverse)];
  const biases = rowBiases();
  const largest = b.constant('f32', 0);
  eachScore((score, r) => {
    b.add(score, at(biases, r), score);
    b.max(largest, b.abs(score), largest);
  });
  const series = (score: Reg<'f32'>, x: Reg<'f32'>) => {
    const square = b.mul(x, x);
    const [last, ...before] = [...SERIES].reverse() as [number, ...number[]];
    const sum = before.reduce((sum, c) => b.fma(sum, square, c), b.constant('f32', last));
    return b.fma(b.mul(score, square), sum, score);
  };
  b.if(
    b.voteAny(b.setp('gt', largest, b.mul(cap, SERIES_UNTIL))),
    () =>
      eachScore((score) => {
        const x = b.mul(score, inverse);
        // tanh(x) = 1 - 2 / (1 + e^2x)
        const quotient = b.rcpApprox(b.add(b.ex2(b.mul(x, 2 * LOG2_E)), 1));
        const capped = b.fma(b.mul(quotient, -2), cap, cap);
        b.selp(capped, series(score, x), b.setp('gt', b.abs(x), SERIES_UNTIL), score);
      }),
    () => eachScore((score) => b.mov(series(score, b.mul(score, inverse)), score)),
  );
}

/** A row of the caller's mask from a thread's first column on. */
export interface MaskRow {
  readonly address: Reg<'global'>;
  /** In bytes. */
  readonly keyStride: Reg<'u64'>;
  /** Whether the mask has such a row. */
  readonly inside: Reg<'pred'>;
  /** Columns that it has from the thread's first on. */
  readonly columnsLeft: Reg<'s32'>;
}

/**
 * {@link applyMask} to a thread's scores of a row: two of each of `fragments` fragments, at columns that ascend;
 * default 8n and 8n + 1.
 */
export function maskRow(
  b: KernelBuilder,
  kind: 'boolean' | DType,
  { address, keyStride, inside, columnsLeft }: MaskRow,
  fragments: number,
  score: (n: number, j: number) => Reg<'f32'>,
  columnOf = (n: number, j: number) => 8 * n + j,
): void {
  let place = address;
  let column = 0;
  for (let n = 0; n < fragments; n++) {
    for (let j = 0; j < 2; j++) {
      const next = columnOf(n, j);
      if (next > column) {
        place = b.add(place, b.as(b.mul(keyStride, next - column), 'global'));
        column = next;
      }
      applyMask(b, kind, score(n, j), place, b.andPred(inside, b.setp('gt', columnsLeft, column)));
    }
  }
}

/** What a thread needs to know of a tile to exclude keys beyond what its rows see. */
export interface BandEdge {
  /** Key of the thread's first column. */
  readonly origin: Reg<'s32'>;
  readonly keyLength: Reg<'s32'>;
  /** The band, and the tokens of the thread's rows; undefined where every row sees every key. */
  readonly band:
    | { readonly lower: Reg<'s32'>; readonly upper: Reg<'s32'>; readonly token: (row: number) => Reg<'s32'> }
    | undefined;
}

/** Excludes keys outside the band or beyond the last. */
export function excludeBeyondBand(
  b: KernelBuilder,
  rows: number,
  { origin, keyLength, band }: BandEdge,
  eachScore: EachScore,
): void {
  // Columns relative to this thread's first.
  const [first, last]: [Reg<'s32'>[], Reg<'s32'>[]] = [[], []];
  for (let r = 0; r < rows; r++) {
    let limit = b.sub(keyLength, 1);
    if (band !== undefined) {
      const token = band.token(r);
      limit = b.min(limit, b.add(token, band.upper));
      first.push(b.sub(b.add(token, band.lower), origin));
    }
    last.push(b.sub(limit, origin));
  }
  eachScore((score, r, column) => {
    b.when(b.setp('lt', at(last, r), column), () => b.set(score, Number.NEGATIVE_INFINITY));
    if (band !== undefined) {
      b.when(b.setp('gt', at(first, r), column), () => b.set(score, Number.NEGATIVE_INFINITY));
    }
  });
}

/**
 * What the scores of a thread's keys must be multiplied by: the sign of a K scale, which is never negative otherwise, says that some of
 * its 64 keys have codes larger than it says (`keyExponents`), or are not finite.
 *
 * @param exponents those of 64 keys from the thread's first column on, a byte each
 * @returns by column among the 64, of neighbours in turn: each pair of columns is loaded once
 */
export function keyFactors(b: KernelBuilder, exponents: Reg<'global'>): (column: number) => Reg<'f32'> {
  let loaded: { readonly pair: number; readonly bytes: Reg<'u32'> } | undefined;
  return (column) => {
    const pair = column & 62;
    if (loaded?.pair !== pair) {
      loaded = { pair, bytes: b.cvt('u32', b.ld('b16', exponents, pair, { readOnly: true })) };
    }
    // Made anew each time: registers are short.
    const exponent = (column & 1) === 0 ? b.and(loaded.bytes, 0xff) : b.shr(loaded.bytes, 8);
    return b.as(b.shl(exponent, 23), 'f32');
  };
}

/**
 * {@link spreadFaults} where a byte for each key says whether it is finite.
 *
 * @param faults of the thread's first column, which is even
 */
export function spreadFaultBytes(b: KernelBuilder, faults: Reg<'shared'>, eachScore: EachScore): void {
  eachScore((score, _, column) => {
    const seen = b.setp('gt', score, Number.NEGATIVE_INFINITY);
    const isFaulty = b.setp('ne', b.ldByte(faults, column), 0);
    b.when(b.andPred(seen, isFaulty), () => b.set(score, Number.NaN));
  });
}

/**
 * Keys that are not finite make the rows that see them NaN. The sign of a K scale says that its 64 keys may have some; a bit each
 * says which.
 *
 * @param place where the 64 bits are, and the thread's first column
 * @param eachScore visits the scores of those 64 keys
 */
export function spreadFaults(
  b: KernelBuilder,
  { faults, firstColumn }: { readonly faults: Reg<'global'>; readonly firstColumn: Reg<'u32'> },
  eachScore: EachScore,
): void {
  const words = b.ldVector('b32', 2, faults).map((word) => b.shr(word, firstColumn));
  eachScore((score, _, column) => {
    const bit = b.and(at(words, (column >> 5) & 1), 2 ** (column & 31));
    const seen = b.setp('gt', score, Number.NEGATIVE_INFINITY);
    b.when(b.andPred(seen, b.setp('ne', bit, 0)), () => b.set(score, Number.NaN));
  });
}
