/** What every attention kernel does to its scores between the product and the softmax: softcap, mask, band, faults. */
import type { DType } from '../../../../tensor/dtype.ts';
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Parameter, Reg } from '../../ptx/types.ts';
import { LOG2_E } from './constants.ts';
import { at } from './lists.ts';

/** Base 2: the lowest that a finite mask adds. A row of such values is not an empty one. */
const LOWEST_FINITE = -3e38;

/**
 * Excludes a score (boolean, 0: excluded) or adds to it (float, in base e; -Infinity: excluded) what the mask has at `address`.
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
  const added = b.constant('f32', 0);
  if (kind === 'float32') b.when(inside, () => b.ld('f32', address, 0, { into: added }));
  else {
    const bits = b.reg('b16');
    b.set(bits, 0);
    b.when(inside, () => b.ld('b16', address, 0, { into: bits }));
    b.mov(kind === 'float16' ? b.cvt('f32', b.as(bits, 'f16')) : b.as(b.shl(b.cvt('u32', bits), 16), 'f32'), added);
  }
  const excluded = b.setp('eq', added, Number.NEGATIVE_INFINITY);
  b.add(score, b.max(b.mul(added, LOG2_E), LOWEST_FINITE), score);
  b.when(excluded, () => b.set(score, Number.NEGATIVE_INFINITY));
}

/** Visits a thread's scores of a tile: the row among the thread's own, the column from the thread's first. */
export type EachScore = (body: (score: Reg<'f32'>, row: number, column: number) => void) => void;

/**
 * c * tanh(s / c) of the true scores: what smoothing K took away comes back first.
 *
 * @param softcap c * log2(e)
 * @param rowBiases loads what comes back of each of the thread's rows
 */
export function capScores(
  b: KernelBuilder,
  softcap: Parameter<'f32'>,
  eachScore: EachScore,
  rowBiases: () => readonly Reg<'f32'>[],
): void {
  const cap = b.loadParameter(softcap);
  const slope = b.mul(b.rcp(cap), 2 * LOG2_E);
  const biases = rowBiases();
  eachScore((score, r) => {
    // tanh(x) = 1 - 2 / (1 + e^2x)
    const exponential = b.ex2(b.mul(b.add(score, at(biases, r)), slope));
    const quotient = b.rcpApprox(b.add(exponential, 1));
    b.fma(b.mul(quotient, -2), cap, cap, score);
  });
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

/** {@link applyMask} to a thread's scores of a row: columns 8n and 8n + 1 of `fragments` fragments. */
export function maskRow(
  b: KernelBuilder,
  kind: 'boolean' | DType,
  { address, keyStride, inside, columnsLeft }: MaskRow,
  fragments: number,
  score: (n: number, j: number) => Reg<'f32'>,
): void {
  let place = address;
  let column = 0;
  for (let n = 0; n < fragments; n++) {
    for (let j = 0; j < 2; j++) {
      const next = 8 * n + j;
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
 * Keys that are not finite make the rows that see them NaN. The sign of a K scale, which is never negative otherwise, says that
 * its 64 keys have some; a bit each says which.
 *
 * @param place where the 64 bits are, and twice the thread's number among the four that hold a row
 * @param eachScore visits the scores of those 64 keys
 */
export function spreadFaults(
  b: KernelBuilder,
  keyScale: Reg<'f32'>,
  place: () => { readonly faults: Reg<'global'>; readonly t2: Reg<'u32'> },
  eachScore: EachScore,
): void {
  b.if(b.setp('lt', b.as(keyScale, 's32'), 0), () => {
    const { faults, t2 } = place();
    const words = b.ldVector('b32', 2, faults).map((word) => b.shr(word, t2));
    eachScore((score, _, column) => {
      const bit = b.and(at(words, (column >> 5) & 1), 2 ** (column & 31));
      const seen = b.setp('gt', score, Number.NEGATIVE_INFINITY);
      b.when(b.andPred(seen, b.setp('ne', bit, 0)), () => b.set(score, Number.NaN));
    });
  });
}
