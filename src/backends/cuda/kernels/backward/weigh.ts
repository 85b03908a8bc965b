/** From the codes' products and dP - D to P and dS. */
import type { DType } from '../../../../tensor/dtype.ts';
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Reg } from '../../ptx/types.ts';
import { offset, offset64 } from '../parts/addresses.ts';
import { COARSE_SCALE, MIN_SCALE } from '../parts/constants.ts';
import { headAddress } from '../parts/epilogue.ts';
import { at } from '../parts/lists.ts';
import { capScores, type EachScore, keyFactors, maskRow } from '../parts/scores.ts';
import { needsTrueScores } from './config.ts';
import type { Frame, Owner, Passing, ThreadPlace, Work } from './frame.ts';

/** Rows of `stream.rows`. */
const [SCALE, SHIFT, DELTA, BIAS, WEIGHT] = [0, 1, 2, 3, 4] as const;

/** The numbers of a row of Q, or of two neighbouring ones. */
interface RowNumbers {
  readonly scale: readonly Reg<'f32'>[];
  readonly shift: readonly Reg<'f32'>[];
  readonly bias: readonly Reg<'f32'>[];
}

/** Index into the scales of K of this thread's keys in a tile of 64 that starts at padded row `row`. */
function keyScaleAt({ b, config, pointer }: Frame, row: Reg<'u32'>, group: Reg<'u32'>): Reg<'global'> {
  const tile = b.shr(row, 6);
  const index = config.keyScales === 4 ? b.add(b.shl(tile, 2), group) : tile;
  return offset(b, b.loadPointer(pointer.keyScale), index, 4);
}

export const keyRowOf = (
  { b, integer }: Pick<Frame, 'b' | 'integer'>,
  { keyHead, paddedKeyStart }: Work,
  token: Reg<'u32'>,
) => b.add(b.mad(keyHead, b.loadParameter(integer.paddedKeys), paddedKeyStart), token);

/**
 * The scale of a product of codes, bit for bit the forward kernel's (`scoreUnits`): where scores are large, the logsumexp is of scores
 * with that scale and no other. The sign of `keyScale` says that some of its keys have exponents ({@link keyFactorsOf}).
 */
export function forwardScale(b: KernelBuilder, rowScale: Reg<'f32'>, keyScale: Reg<'f32'>): Reg<'f32'> {
  return b.as(b.and(b.as(b.max(b.mul(rowScale, b.abs(keyScale)), MIN_SCALE), 'b32'), 0xfffffffc), 'f32');
}

/**
 * The forward kernel's score where its scale is above {@link COARSE_SCALE}, which has the rounding of a larger number: the logsumexp is of
 * such scores.
 */
export function coarseScore(b: KernelBuilder, codes: Reg<'f32'>, scale: Reg<'f32'>, into = codes): Reg<'f32'> {
  const score = b.mul(b.add(codes, 2 ** 23), scale);
  return b.fma(scale, -(2 ** 23), score, into);
}

/** Of the thread's own rows g and g + 8; `minusDelta` is -D. */
export interface OwnRowNumbers extends RowNumbers {
  readonly minusDelta: readonly Reg<'f32'>[];
}

/** Padded row of the first own query. */
export const firstOwnRow = ({ b, integer }: Frame, { head, firstOwn, paddedQueryStart }: Work): Reg<'u32'> =>
  b.add(b.mad(head, b.loadParameter(integer.paddedQueries), paddedQueryStart), firstOwn);

export function ownRowNumbers(frame: Frame, { warpRow, g }: ThreadPlace, work: Work): OwnRowNumbers {
  const { b, config, pointer } = frame;
  b.section('numbers of own rows');
  const row = b.add(firstOwnRow(frame, work), b.add(warpRow, g));
  const numbers = (name: 'rowScale' | 'rowShift' | 'rowDelta' | 'rowBias') => {
    const base = offset(b, b.loadPointer(pointer[name]), row, 4);
    return [0, 8].map((r) => b.ld('f32', base, r * 4, { readOnly: true }));
  };
  return {
    scale: numbers('rowScale'),
    shift: numbers('rowShift'),
    minusDelta: numbers('rowDelta'),
    bias: needsTrueScores(config) ? numbers('rowBias') : [],
  };
}

/**
 * Values of the thread's own rows, and how to find the values that belong to a score.
 *
 * @param own of queries that are owned; default as in memory
 */
export function ownConstants(frame: Frame, place: ThreadPlace, work: Work, own?: OwnRowNumbers) {
  const { b, config, stream, ownsQueries } = frame;
  const { g, t2 } = place;
  if (ownsQueries) {
    const { scale, shift, minusDelta: minus, bias } = own ?? ownRowNumbers(frame, place, work);
    const keyScaleOfTile = (tile: Passing['tile']) => {
      const token = b.as(b.shl(tile, Math.log2(config.streamTokens)), 'u32');
      return b.ld('f32', keyScaleAt(frame, keyRowOf(frame, work, token), b.shr(t2, 1)), 0, { readOnly: true });
    };
    const seed = [at(minus, 0), at(minus, 0), at(minus, 1), at(minus, 1)];
    return {
      minusDelta: (_rows: Reg<'shared'> | undefined) => (_column: number) => seed,
      /** `rowWeight` of the four scores of an 8-token tile. */
      weightsOf(_rows: Reg<'shared'> | undefined): (column: number) => readonly Reg<'f32'>[] {
        const row = b.add(firstOwnRow(frame, work), b.add(place.warpRow, g));
        const base = offset(b, b.loadPointer(frame.pointer.rowWeight), row, 4);
        const two = [0, 8].map((r) => b.ld('f32', base, r * 4, { readOnly: true }));
        const four = two.flatMap((weight) => [weight, weight]);
        return () => four;
      },
      keyScaleOf: ({ tile }: Passing) => keyScaleOfTile(tile),
      /** Calls back with the numbers of each 8-token tile: `scale[i]`, ... of its four scores. */
      ofTiles(
        { tile }: Passing,
        _rows: Reg<'shared'> | undefined,
        body: (n: number, numbers: RowNumbers) => void,
      ): void {
        const keyScale = keyScaleOfTile(tile);
        const whole = scale.map((own) => forwardScale(b, own, keyScale));
        const four = (two: readonly Reg<'f32'>[]) => two.flatMap((value) => [value, value]);
        const same = { scale: four(whole), shift: four(shift), bias: four(bias) };
        for (let n = 0; n < frame.columnTiles; n++) body(n, same);
      },
    };
  }
  b.section('scale of own keys');
  const keyRow = keyRowOf(frame, work, work.firstOwn);
  const keyScale = b.ld('f32', keyScaleAt(frame, keyRow, b.shr(g, 1)), 0, { readOnly: true });
  const rowBytes = stream.rows?.layout.rowBytes ?? 0;
  const pairAt = (rows: Reg<'shared'>, which: number, n: number) =>
    b.ldVector('f32', 2, b.add(rows, b.as(b.shl(t2, 2), 'shared')), which * rowBytes + n * 32);
  const twice = (pair: readonly Reg<'f32'>[]) => [...pair, ...pair];
  return {
    keyScaleOf: (_: Passing) => keyScale,
    minusDelta: (rows: Reg<'shared'> | undefined) => (n: number) => twice(pairAt(rows as Reg<'shared'>, DELTA, n)),
    weightsOf: (rows: Reg<'shared'> | undefined) => (n: number) => twice(pairAt(rows as Reg<'shared'>, WEIGHT, n)),
    ofTiles(_: Passing, rows: Reg<'shared'> | undefined, body: (n: number, numbers: RowNumbers) => void): void {
      const place = rows as Reg<'shared'>;
      for (let n = 0; n < frame.columnTiles; n++) {
        const scale = pairAt(place, SCALE, n).map((value) => forwardScale(b, value, keyScale));
        const bias = needsTrueScores(config) ? pairAt(place, BIAS, n) : [];
        body(n, { scale: twice(scale), shift: twice(pairAt(place, SHIFT, n)), bias: twice(bias) });
      }
    },
  };
}

/** What the parts of a gradient kernel know that find a key's exponent. */
type KeyOwner = Pick<Frame, 'b' | 'integer' | 'pointer' | 'ownsQueries'>;

/**
 * What scores must be multiplied by whose keys have exponents of their own: by row (0, 1) and column of the thread's scores. Loaded when
 * asked, and only of tiles whose K scales say so ({@link hasExponents}).
 *
 * @param firstOwn the first token of the warp's own rows
 * @param firstPassing the first token of those that pass by
 */
export function keyFactorsOf(
  frame: KeyOwner,
  { g, t2 }: Pick<ThreadPlace, 'g' | 't2'>,
  work: Work,
  { firstOwn, firstPassing }: { readonly firstOwn: Reg<'u32'>; readonly firstPassing: Reg<'u32'> },
): (row: number, column: number) => Reg<'f32'> {
  const { b, pointer, ownsQueries } = frame;
  const first = ownsQueries ? b.add(firstPassing, t2) : b.add(firstOwn, g);
  const exponents = offset(b, b.loadPointer(pointer.keyExponents), keyRowOf(frame, work, first), 1);
  if (ownsQueries) {
    const ofColumn = keyFactors(b, exponents);
    return (_, column) => ofColumn(column);
  }
  const ofRows = [0, 8].map((row) => b.as(b.shl(b.ldByte(exponents, row), 23), 'f32'));
  return (row) => at(ofRows, row);
}

/** Of a tile of keys, by its scale: some may also be not finite. */
export const hasExponents = (b: KernelBuilder, keyScale: Reg<'f32'>): Reg<'pred'> =>
  b.setp('lt', b.as(keyScale, 's32'), 0);

/** The scale of the codes of a tile that passes by, whose tokens are innermost: those of K, of Q or of dO. */
export function transposedScaleOf(
  frame: Frame,
  work: Work,
  { head, tile }: Passing,
  which: 'queryTransposedScale' | 'keyTransposedScale' | 'outputGradientTransposedScale',
): Reg<'f32'> {
  const { b, config, integer, pointer } = frame;
  const token = b.as(b.shl(tile, Math.log2(config.streamTokens)), 'u32');
  const row = frame.ownsQueries
    ? keyRowOf(frame, work, token)
    : b.add(b.mad(head, b.loadParameter(integer.paddedQueries), work.paddedQueryStart), token);
  return b.ld('f32', offset(b, b.loadPointer(pointer[which]), b.shr(row, 6), 4), 0, { readOnly: true });
}

/** A tile of pairs of own tokens and of those that pass by. */
export interface OwnedTile {
  readonly frame: Owner;
  readonly place: Pick<ThreadPlace, 'warpRow' | 'g' | 't2'>;
  readonly work: Work;
  readonly now: Pick<Passing, 'tile'>;
}

/** The tile at hand: `codes` become P ({@link weigh}), and `gradientsOfP` (dP - D) become dS ({@link weighGradients}). */
export interface WeighedTile {
  readonly frame: Frame;
  readonly place: ThreadPlace;
  readonly work: Work;
  readonly now: Passing;
  readonly constants: ReturnType<typeof ownConstants>;
  readonly rows: Reg<'shared'> | undefined;
  readonly codes: readonly (readonly Reg<'s32'>[])[];
  readonly gradientsOfP: readonly (readonly Reg<'f32'>[])[];
}

/**
 * Returns the derivative of the softcap at each score; none without one.
 *
 * @param until `scores`: stops at the scores of P, in base 2, -Infinity where a row does not see the key
 */
export function weigh(self: Omit<WeighedTile, 'gradientsOfP'>, until: 'weights' | 'scores' = 'weights'): Slopes {
  const { frame, place, work, now, constants, rows, codes } = self;
  const { b, config } = frame;
  const weights = codes.map((fragment) => fragment.map((register) => b.as(register, 'f32')));
  const plain = !config.softcap && config.mask === 'none';
  // As the forward kernel has them where nothing is added.
  const isCodes = !needsTrueScores(config);
  let slopes: Slopes = [];
  codes.forEach((fragment, n) => {
    fragment.forEach((code, i) => {
      b.mov(b.cvt('f32', code), at(at(weights, n), i));
    });
  });
  b.section('keys with exponents of their own');
  const haveExponents = hasExponents(b, constants.keyScaleOf(now));
  b.if(haveExponents, () => {
    const firstPassing = b.as(b.shl(now.tile, Math.log2(config.streamTokens)), 'u32');
    const tokens = { firstOwn: b.add(work.firstOwn, place.warpRow), firstPassing };
    const factorOf = keyFactorsOf(frame, place, work, tokens);
    weights.forEach((fragment, n) => {
      fragment.forEach((score, i) => {
        b.mul(score, factorOf(i >> 1, 8 * n + (i & 1)), score);
      });
    });
  });
  b.section(plain ? 'P = exp2(S - LSE)' : 'scores in base 2');
  let isRare: Reg<'pred'> | undefined;
  constants.ofTiles(now, rows, (n, { scale, shift, bias }) => {
    const each = (scored: (score: Reg<'f32'>, scale: Reg<'f32'>, added: Reg<'f32'>) => void) =>
      at(weights, n).forEach((score, i) => {
        scored(score, at(scale, i), at(isCodes ? shift : bias, i));
      });
    const exactly = () => each((score, scale, added) => b.fma(score, scale, added, score));
    if (!isCodes) exactly();
    else {
      // Scales are the same for 32 rows of Q at least.
      if (n % 4 === 0) {
        const largest = b.max(b.max(at(scale, 0), at(scale, 1)), at(scale, 2));
        isRare = b.orPred(b.setp('gt', largest, COARSE_SCALE), haveExponents);
      }
      // Rounded before the shift is added: it is, of a row whose softmax is made anew, such a score itself.
      b.if(
        isRare as Reg<'pred'>,
        () =>
          each((score, scale, added) => {
            const rounded = b.selp(b.mul(score, scale), coarseScore(b, score, scale, b.reg('f32')), haveExponents);
            b.add(rounded, added, score);
          }),
        exactly,
      );
    }
    if (plain && until === 'weights') for (const score of at(weights, n)) b.ex2(score, score);
  });
  if (!plain) slopes = finishScores(self, weights, until);
  if (config.rowWeights) {
    b.section('weights of rows made anew');
    const weightsOf = constants.weightsOf(rows);
    weights.forEach((fragment, n) => {
      const own = weightsOf(n);
      fragment.forEach((weight, i) => {
        b.mul(weight, at(own, i), weight);
      });
    });
  }
  if (excludes(frame)) excludePairs(self, weights, until === 'weights' ? 0 : Number.NEGATIVE_INFINITY);
  return slopes;
}

type Slopes = readonly (readonly Reg<'f32'>[])[];

/** Whether a tile may have pairs that do not see each other, or keys beyond the last. */
const excludes = ({ config, ownsQueries }: Frame) => config.banded || ownsQueries;

/** After {@link weigh}, which returned the slopes. */
export function weighGradients(self: WeighedTile, slopes: Slopes): void {
  const { frame, codes, gradientsOfP } = self;
  const { b, config } = frame;
  const weights = codes.map((fragment) => fragment.map((register) => b.as(register, 'f32')));
  b.section('dS = P (dP - D)');
  gradientsOfP.forEach((fragment, n) => {
    fragment.forEach((value, i) => {
      const weight = at(at(weights, n), i);
      b.mul(value, weight, value);
      if (slopes.length > 0) b.mul(value, at(at(slopes, n), i), value);
      // Where D is not a number.
      if (config.mask !== 'none') b.when(b.setp('eq', weight, 0), () => b.set(value, 0));
    });
  });
  if (excludes(frame)) excludePairs(self, gradientsOfP);
}

/** Softcap and mask; then P. Returns the derivative of the softcap at each score. */
function finishScores(
  self: Omit<WeighedTile, 'gradientsOfP'>,
  weights: readonly (readonly Reg<'f32'>[])[],
  until: 'weights' | 'scores',
): Reg<'f32'>[][] {
  const { frame, now, constants, rows } = self;
  const { b, config, softcap } = frame;
  const slopes: Reg<'f32'>[][] = [];
  // The mask is added behind the softcap.
  const bends = !config.gradients.includes('mask');
  const each: EachScore = (body) => {
    weights.forEach((fragment, n) => {
      fragment.forEach((score, i) => {
        body(score, i >> 1, 8 * n + (i & 1));
      });
    });
  };
  if (config.softcap) {
    b.section('softcap, and its derivative 1 - (score / cap)^2');
    const none = b.constant('f32', 0);
    capScores(b, softcap, each, () => [none, none]);
    const inverse = b.loadParameter(softcap.inverse);
    for (const fragment of bends ? weights : []) {
      slopes.push(
        fragment.map((score) => {
          const share = b.mul(score, inverse);
          return b.fma(b.neg(share), share, 1);
        }),
      );
    }
  }
  if (config.mask !== 'none') maskPairs(self, weights, config.mask);
  if (until === 'scores') return slopes;
  b.section('P = exp2(S - LSE)');
  constants.ofTiles(now, rows, (n, { shift }) => {
    at(weights, n).forEach((score, i) => {
      const excluded = config.mask === 'none' ? undefined : b.setp('eq', score, Number.NEGATIVE_INFINITY);
      // Last: a score that a mask pushes far down, and the shift of a row of such scores, are large beside what they differ by.
      if (needsTrueScores(config)) b.add(score, at(shift, i), score);
      b.ex2(score, score);
      // Also of a row whose shift is not a number.
      if (excluded !== undefined) b.when(excluded, () => b.set(score, 0));
    });
  });
  return slopes;
}

/** Excludes (boolean) or adds (float) mask elements, read from the caller's tensor. Excluded scores are -Infinity. */
function maskPairs(
  { frame, place, work, now }: Omit<WeighedTile, 'gradientsOfP'>,
  weights: readonly (readonly Reg<'f32'>[])[],
  kind: 'boolean' | DType,
): void {
  const { b, config, pointer, strides, ownsQueries, columnTiles } = frame;
  const { warpRow, g, t2 } = place;
  b.section('mask');
  const [rowStride, columnStride] = (
    ownsQueries ? [strides.maskQuery, strides.maskKey] : [strides.maskKey, strides.maskQuery]
  ).map((stride) => b.loadParameter(stride)) as [Reg<'u64'>, Reg<'u64'>];
  const [rowLength, columnLength] = ownsQueries
    ? [work.queryLength, work.keyLength]
    : [work.keyLength, work.queryLength];
  const headStrides = { batch: strides.maskBatch, head: strides.maskHead };
  const { sequence } = work;
  const ofHead = headAddress(b, b.loadPointer(pointer.mask), { sequence, head: now.head }, headStrides);
  const firstColumn = b.add(b.as(b.shl(now.tile, Math.log2(config.streamTokens)), 'u32'), t2);
  const ofColumn = offset64(b, ofHead, firstColumn, columnStride);
  const columnsLeft = b.sub(b.as(columnLength, 's32'), b.as(firstColumn, 's32'));
  for (let r = 0; r < 2; r++) {
    const row = b.add(b.add(work.firstOwn, warpRow), b.add(g, 8 * r));
    const address = offset64(b, ofColumn, row, rowStride);
    const inside = b.setp('lt', row, rowLength);
    const maskOfRow = { address, keyStride: columnStride, inside, columnsLeft };
    maskRow(b, kind, maskOfRow, columnTiles, (n, j) => at(at(weights, n), 2 * r + j));
  }
}

/** P = 0, or `excluded`, of pairs that the band excludes, and of keys beyond the last. Only in tiles that have some. */
export function excludePairs(
  { frame, place, work, now }: OwnedTile,
  weights: readonly (readonly Reg<'f32'>[])[],
  excluded = 0,
): void {
  const { b, config, ownsQueries } = frame;
  const { warpRow, g, t2 } = place;
  const { lower, upper, wholeFrom, wholeUntil, firstOwn, keyLength } = work;
  b.section('keys beyond what rows see');
  const start = b.shl(now.tile, Math.log2(config.streamTokens));
  const before = b.setp('lt', start, wholeFrom);
  const beyond = b.setp('gt', b.add(start, config.streamTokens), wholeUntil);
  b.if(b.orPred(before, beyond), () => {
    const origin = b.add(start, b.as(t2, 's32'));
    const ownRow = b.as(b.add(b.add(firstOwn, warpRow), g), 's32');
    for (let r = 0; r < 2; r++) {
      const token = b.add(ownRow, 8 * r);
      let last: Reg<'s32'> | undefined;
      if (ownsQueries) {
        const limit = b.sub(b.as(keyLength, 's32'), 1);
        last = config.banded ? b.min(limit, b.add(token, upper)) : limit;
      } else last = b.sub(token, lower);
      const first = ownsQueries ? b.add(token, lower) : b.sub(token, upper);
      const [firstColumn, lastColumn] = [b.sub(first, origin), b.sub(last, origin)];
      weights.forEach((fragment, n) => {
        for (let j = 0; j < 2; j++) {
          const weight = at(fragment, 2 * r + j);
          b.when(b.setp('lt', lastColumn, 8 * n + j), () => b.set(weight, excluded));
          if (config.banded) b.when(b.setp('gt', firstColumn, 8 * n + j), () => b.set(weight, excluded));
        }
      });
    }
  });
}
