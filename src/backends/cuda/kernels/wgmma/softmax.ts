/** From the scores of a tile to P: the online softmax of FlashAttention in base 2. */
import type { Reg } from '../../ptx/types.ts';
import { offset, offset64 } from '../parts/addresses.ts';
import { excludeHiddenBlocks, excludeHiddenGroups } from '../parts/blocks.ts';
import { MAGIC, MIN_SCALE } from '../parts/constants.ts';
import { at, maxOf } from '../parts/lists.ts';
import { quadMax } from '../parts/quad.ts';
import { capScores, excludeBeyondBand, keyFactors, maskRow, spreadFaults } from '../parts/scores.ts';
import { EXACT_SCALE, SCALE_BITS, type WgmmaConfig } from './config.ts';
import { groupBitsOf, WGMMA_BLOCK_K } from './frame.ts';
import { isEdge, markFaultyValues, reachesOut } from './inspector.ts';
import { exp2Halves } from './instructions.ts';
import { eachRow, THREAD_ROWS } from './rows.ts';
import type { Item } from './state.ts';

/** Bits of 1.0. */
const ONE_BITS = 0x3f800000;

/** A score s in base 2 is s * scale + zero, of each 64 keys and each of the thread's rows. */
interface ScoreUnits {
  readonly scale: readonly (readonly Reg<'f32'>[])[];
  readonly zero: readonly (readonly Reg<'f32'>[])[];
  scaleOf(r: number, column: number): Reg<'f32'>;
  zeroOf(r: number, column: number): Reg<'f32'>;
}

/**
 * From scores to P and the factors of the output. `finishValues` ends PV of the last tile, which reads P and sums to
 * what the factors are for.
 */
export function softmax(item: Item, finishValues = (): void => {}): void {
  const { frame, walk, scales, output } = item;
  const { b, config, fp8 } = frame;
  b.section('scale and maximum');
  const units = scoreUnits(item);
  if (frame.scoresAreFloat) finishScores(item, units);
  if (config.mask !== 'none') maskScores(item, config.mask);
  handleRareTiles(item, units);
  // Scales of V's tiles are powers of two: the ratio of the last to this one is a difference of exponents.
  const exponentsApart = fp8 ? b.sub(b.as(output.unit, 's32'), b.as(scales.values, 's32')) : undefined;
  if (fp8) b.mov(scales.values, output.unit);
  walk.fetchNext(scales);
  const maxima = tileMaxima(item, units);
  if (frame.exact) bringCloser(item, units, maxima);
  const nextFactor = raiseMaxima(item, maxima);

  finishValues();
  b.section('P = exp2(S - max)');
  exponentials(item, units, nextFactor);
  setFactors(item, nextFactor, exponentsApart);
  if (item.inspected !== undefined) frame.values.advance(item.inspected);
}

/** Units of scores that are sums of products of 16-bit operands: one scale for all. */
function plainUnits({ frame, queryScale }: Item): ScoreUnits {
  const { b } = frame;
  // Copies: {@link subtractMaximum} changes them.
  const scale = b.mov(at(queryScale, 0));
  const zero = eachRow(() => b.constant('f32', 0));
  return {
    scale: [
      [scale, scale],
      [scale, scale],
    ],
    zero: [zero, zero],
    scaleOf: () => scale,
    zeroOf: (r) => at(zero, r),
  };
}

function scoreUnits(item: Item): ScoreUnits {
  if (item.frame.exact) return plainUnits(item);
  const { frame, queryScale, scales } = item;
  const { b } = frame;
  // A group of zeros has scale 0; the smallest normal keeps -Infinity * scale from being NaN. With fewer bits, 1.5 *
  // 2^23 times the scale is exact.
  const scale = scales.keys.map((key) => {
    const magnitude = b.abs(key);
    const make = (query: Reg<'f32'>) =>
      b.as(b.and(b.as(b.max(b.mul(query, magnitude), MIN_SCALE), 'b32'), SCALE_BITS), 'f32');
    const first = make(at(queryScale, 0));
    return [first, queryScale.length === 1 ? first : make(at(queryScale, 1))];
  });
  // One zero point per row even when the rows share a scale: `subtractMaximum` gives each row its own.
  const zero = scale.map((ofRows) => {
    const first = b.mul(at(ofRows, 0), -MAGIC);
    if (ofRows[0] !== ofRows[1]) return [first, b.mul(at(ofRows, 1), -MAGIC)];
    return [first, frame.scoresAreFloat ? first : b.mov(first)];
  });
  return {
    scale,
    zero,
    scaleOf: (r, column) => at(at(scale, column >> 6), r),
    zeroOf: (r, column) => at(at(zero, column >> 6), r),
  };
}

/** Scores in base 2, with softcap. */
function finishScores(item: Item, { scaleOf, zeroOf }: ScoreUnits): void {
  const { frame, rows, scores } = item;
  const { b, config, softcap } = frame;
  b.section('scores in base 2: scale, softcap');
  scores.each((score, r, column) => {
    b.fma(score, scaleOf(r, column), zeroOf(r, column), score);
  });
  if (!frame.exact) multiplyByKey(item);
  if (config.softcap) capScores(b, softcap, scores.each, () => eachRow((r) => rows.bias(r)));
}

/** Excludes (boolean) or adds (float) mask elements, read from the caller's tensor. */
function maskScores(
  { frame, thread, work, rows, scores, walk }: Item,
  kind: Exclude<WgmmaConfig['mask'], 'none'>,
): void {
  const { b, pointer, strides } = frame;
  b.section('mask');
  const keyStride = b.loadParameter(strides.maskKey);
  const firstColumn = b.add(b.as(b.shl(walk.tile(), 7), 'u32'), thread.t2);
  const batch = offset64(b, b.loadPointer(pointer.mask), work.sequence, b.loadParameter(strides.maskBatch));
  const columnsLeft = b.sub(b.as(work.keyLength, 's32'), b.as(firstColumn, 's32'));
  for (let r = 0; r < THREAD_ROWS; r++) {
    const row = rows.row(r);
    const token = rows.token(row);
    const inside = b.setp('lt', token, work.queryLength);
    let address = offset64(b, batch, rows.head(row), b.loadParameter(strides.maskHead));
    address = offset64(b, address, token, b.loadParameter(strides.maskQuery));
    address = offset64(b, address, firstColumn, keyStride);
    maskRow(b, kind, { address, keyStride, inside, columnsLeft }, WGMMA_BLOCK_K / 8, (n, j) =>
      at(scores.floats, 4 * n + 2 * r + j),
    );
  }
}

/**
 * What few tiles need, behind one branch: keys outside the band or beyond the last, keys with exponents of their own or not finite,
 * and scales so large that 1.5 * 2^23 times the scale swallows differences between scores.
 */
function handleRareTiles(item: Item, units: ScoreUnits): void {
  const { frame, work, walk } = item;
  const { b } = frame;
  if (frame.exact) {
    handleEdges(item);
    return;
  }
  b.section('keys out of reach or special, large scores');
  const tileStart = b.shl(walk.tile(), 7);
  let edge = b.setp('gt', b.add(tileStart, WGMMA_BLOCK_K), work.wholeUntil);
  if (work.wholeFrom !== undefined) edge = b.orPred(edge, b.setp('lt', tileStart, work.wholeFrom));
  const special = isSpecial(item);
  const largestScale = () => maxOf([...new Set(units.scale.flat())], (x, y) => b.max(x, y));
  const large = frame.scoresAreFloat ? undefined : b.setp('gt', largestScale(), EXACT_SCALE);
  const cut = walk.isCut();
  let rare = b.orPred(edge, large === undefined ? special : b.orPred(special, large));
  if (cut !== undefined) rare = b.orPred(rare, cut);
  b.if(b.voteAny(rare), () => {
    b.if(edge, () => excludeKeys(item, tileStart));
    if (cut !== undefined) b.if(cut, () => excludeBlocks(item, tileStart));
    if (large !== undefined) b.if(b.voteAny(b.orPred(special, large)), () => subtractMaximum(item, units));
    markFaultyKeys(item);
  });
}

/** {@link handleRareTiles} where nothing is quantized: keys out of reach, and values that are not finite. */
function handleEdges(item: Item): void {
  const { frame, work, walk } = item;
  const { b } = frame;
  b.section('keys out of reach, values that are not finite');
  const tileStart = b.shl(walk.tile(), 7);
  const edge = isEdge(frame, work, tileStart);
  const handle = () => {
    if (edge === undefined) b.if(reachesOut(frame, work, tileStart), () => excludeKeys(item, tileStart));
    else excludeKeys(item, tileStart);
    const cut = walk.isCut();
    if (cut !== undefined) b.if(cut, () => excludeBlocks(item, tileStart));
    markFaultyValues(item);
  };
  if (edge === undefined) handle();
  else b.if(b.voteAny(edge), handle);
}

/** Beyond this, a product of a score and its scale may be more than 2^3 from what the maximum was rounded to. */
const COARSE_MAX = 2 ** 26;

/** Where maxima are so large that exponents taken from rounded ones might overflow: takes differences first. */
function bringCloser(item: Item, units: ScoreUnits, maxima: readonly Reg<'f32'>[]): void {
  const { b, scoresAreFloat } = item.frame;
  if (scoresAreFloat) return;
  // Rows that see nothing of the tile have -Infinity.
  const isCoarse = (magnitude: Reg<'f32'>) =>
    b.andPred(b.setp('gt', magnitude, COARSE_MAX), b.setp('lt', magnitude, Number.POSITIVE_INFINITY));
  const [first, second] = maxima.map((max) => isCoarse(b.abs(max))) as [Reg<'pred'>, Reg<'pred'>];
  b.if(b.voteAny(b.orPred(first, second)), () => {
    subtractMaximum(item, units);
    for (const [r, max] of tileMaxima(item, units).entries()) b.mov(max, at(maxima, r));
  });
}

/** The tile has keys with exponents, or keys that are not finite. */
function isSpecial({ frame, scales }: Item): Reg<'pred'> {
  const { b } = frame;
  return b.setp('lt', b.or(b.as(at(scales.keys, 0), 's32'), b.as(at(scales.keys, 1), 's32')), 0);
}

/** Scores in base 2 of keys with exponents of their own. */
function multiplyByKey(item: Item): void {
  const { frame, thread, scores, scales } = item;
  const { b, pointer } = frame;
  b.if(b.voteAny(isSpecial(item)), () => {
    for (const half of scales.keys.keys()) {
      const first = b.add(b.shl(groupOf(item, half), 6), thread.t2);
      const factorOf = keyFactors(b, offset(b, b.loadPointer(pointer.keyExponents), first, 1));
      scores.each((score, _, column) => {
        if (column >> 6 === half) b.mul(score, factorOf(column), score);
      });
    }
  });
}

/** Which 64 keys of all heads' half a tile is; the last again where the tile ends before. */
function groupOf({ frame, walk, scales }: Item, half: number): Reg<'u32'> {
  const { b } = frame;
  const group = b.min(b.add(b.shl(walk.tile(), 1), half), scales.lastGroup);
  return b.add(scales.firstGroup, b.as(group, 'u32'));
}

/** Keys outside the band or beyond the last. */
function excludeKeys({ frame, thread, work, rows, scores }: Item, tileStart: Reg<'s32'>): void {
  const { b, config } = frame;
  const { lower, upper, keyLength } = work;
  const token = (r: number) => b.as(rows.token(rows.row(r)), 's32');
  const origin = b.add(tileStart, b.as(thread.t2, 's32'));
  const band = config.banded ? { lower, upper, token } : undefined;
  excludeBeyondBand(b, THREAD_ROWS, { origin, keyLength: b.as(keyLength, 's32'), band }, scores.each);
}

/** Keys of blocks that the block mask hides. */
function excludeBlocks({ frame, thread, work, walk, rows, scores }: Item, tileStart: Reg<'s32'>): void {
  const { b, config, blocks } = frame;
  const entry = walk.entry();
  if (blocks === undefined || entry === undefined) return;
  if (config.blocks === 'whole rows') {
    excludeHiddenGroups(b, entry, groupBitsOf(config), scores.each);
    return;
  }
  excludeHiddenBlocks(b, blocks, {
    ...{ sequence: work.sequence, queryLength: work.queryLength, keyLength: work.keyLength },
    // Rows of packed heads are of several; else both of a thread are among the same 16.
    rows: Array.from({ length: config.packedHeads === 1 ? 1 : THREAD_ROWS }, (_, r) => {
      const row = rows.row(r);
      return { head: rows.head(row), token: rows.token(row) };
    }),
    rowGroup: (r) => (config.packedHeads === 1 ? 0 : r),
    ...{ firstKey: b.add(b.as(tileStart, 'u32'), thread.t2), columns: 16, groups: WGMMA_BLOCK_K / 16 },
    eachScore: scores.each,
  });
}

/** A share of the row's maximum that is more than a rounding of it. */
const ABOVE_ROUNDING = 2 ** -20;

/**
 * Scores become floats of scale 1 above 128 less than the row's maximum, and less than its neighbours among floats where those are further
 * apart; what lies lower counts nothing.
 */
function subtractMaximum(item: Item, units: ScoreUnits): void {
  const { frame, scores, state } = item;
  const { b, exact } = frame;
  b.section('large scores');
  scores.each((score, r, column) => {
    b.mul(exact ? score : b.sub(score, MAGIC), units.scaleOf(r, column), score);
  });
  if (!exact) multiplyByKey(item);
  const largest = eachRow(() => b.constant('f32', Number.NEGATIVE_INFINITY));
  scores.each((score, r) => {
    b.max(at(largest, r), score, at(largest, r));
  });
  const zero = largest.map((own, r) => {
    const top = b.max(quadMax(b, own), at(state.max, r));
    return b.add(b.fma(b.abs(top), -ABOVE_ROUNDING, top), -128);
  });
  scores.each((score, r) => {
    const excluded = b.setp('eq', score, Number.NEGATIVE_INFINITY);
    b.max(b.sub(score, at(zero, r)), 0, score);
    b.when(excluded, () => b.set(score, Number.NEGATIVE_INFINITY));
  });
  for (const registers of units.scale) for (const register of registers) b.set(register, 1);
  for (const registers of units.zero) for (const [r, register] of registers.entries()) b.mov(at(zero, r), register);
}

function markFaultyKeys(item: Item): void {
  const { frame, thread, scores, scales } = item;
  const { b, pointer } = frame;
  for (const [half, scale] of scales.keys.entries()) {
    b.if(b.setp('lt', b.as(scale, 's32'), 0), () => {
      const faults = offset(b, b.loadPointer(pointer.keyFaults), groupOf(item, half), 8);
      spreadFaults(b, { faults, firstColumn: thread.t2 }, (body) =>
        scores.each((score, row, column) => {
          if (column >> 6 === half) body(score, row, column);
        }),
      );
    });
  }
}

/** The largest score of each row in this tile. */
function tileMaxima({ frame, scores }: Item, { scaleOf, zeroOf }: ScoreUnits): Reg<'f32'>[] {
  const { b, scoresAreFloat, exact } = frame;
  // Positive floats, and -Infinity below them, order like the integers of their bits; three-input integer maxima exist.
  // Chains of maxima take turns, and so do the rows' shuffles: each waits for its last.
  const chains = [0, 1, 2, 3].map((chain) =>
    scores.integers.filter((_, i) => ((i >> 5) << 1) + ((i >> 1) & 1) === chain),
  );
  const raw = chains.map((chain) => at(chain, 0));
  for (let i = 1; i < at(chains, 0).length; i++) {
    chains.forEach((chain, c) => {
      const [soFar, next] = [at(raw, c), at(chain, i)];
      raw[c] = scoresAreFloat || exact ? b.as(b.max(b.as(soFar, 'f32'), b.as(next, 'f32')), 's32') : b.max(soFar, next);
    });
  }
  const maxima = eachRow((r) => {
    const halves = [0, 1].map((half) => {
      const own = b.as(at(raw, 2 * half + r), 'f32');
      return scoresAreFloat ? own : b.fma(own, scaleOf(r, 64 * half), zeroOf(r, 64 * half));
    });
    return b.max(at(halves, 0), at(halves, 1));
  });
  for (const lanes of [1, 2]) {
    const others = maxima.map((largest) => b.shflBfly(largest, lanes));
    for (const [r, other] of others.entries()) maxima[r] = b.max(at(maxima, r), other);
  }
  return maxima;
}

/** Raises the running maxima that have grown by more than the threshold; returns the change of each row's unit. */
function raiseMaxima({ frame, state }: Item, maxima: readonly Reg<'f32'>[]): Reg<'f32'>[] {
  const { b, config } = frame;
  // The maxima of few tiles grow. The branch also keeps ptxas from waiting for PV before the maxima are found.
  const nextFactor = eachRow(() => b.constant('f32', 1));
  const grown = maxima.map((largest, r) => {
    const { rescaleThreshold } = config;
    const limit = rescaleThreshold > 0 ? b.add(at(state.max, r), rescaleThreshold) : at(state.max, r);
    return b.setp('gt', largest, limit);
  });
  b.if(b.voteAny(b.orPred(at(grown, 0), at(grown, 1))), () => {
    for (const [r, largest] of maxima.entries()) {
      const change = b.ex2(b.sub(at(state.max, r), largest));
      b.when(at(grown, r), () => {
        b.mov(change, at(nextFactor, r));
        b.mov(largest, at(state.max, r));
      });
    }
  });
  return nextFactor;
}

/** P in its format, and its sums. */
function exponentials(
  { frame, scores, state, output }: Item,
  { scaleOf, zeroOf }: ScoreUnits,
  nextFactor: readonly Reg<'f32'>[],
): void {
  const { b, config, fp8, scoresAreFloat } = frame;
  const { exponentOffset, onesColumn, polynomialShare } = config;
  // The maximum is subtracted first: where it is large, scores near it lose nothing.
  const folded = [0, 1].map((half) =>
    state.max.map((max, r) => (scoresAreFloat ? max : b.add(b.sub(zeroOf(r, 64 * half), max), exponentOffset))),
  );
  const exponentOf = (n: number, r: number, j: number) => {
    const [score, constant] = [at(scores.floats, 4 * n + 2 * r + j), at(at(folded, n >> 3), r)];
    return scoresAreFloat ? b.add(b.sub(score, constant), exponentOffset) : b.fma(score, scaleOf(r, 8 * n), constant);
  };
  const tileSums = eachRow(() => [] as Reg<'f32'>[]);
  const neighbours = (make: (j: number) => Reg<'f32'>) => [make(0), make(1)] as const;
  /** exp2 of two neighbours of a row, counted into its sum. */
  const exponentialPair = (n: number, r: number) =>
    neighbours((j) => {
      const value = b.ex2(exponentOf(n, r, j));
      const sums = at(tileSums, r);
      const chain = sums[j];
      if (!onesColumn) sums[j] = chain === undefined ? value : b.add(chain, value);
      return value;
    });
  let pairs = 0;
  const period = polynomialShare === 0 ? 0 : 1 / polynomialShare;
  const e4m3Pair = (n: number, r: number): Reg<'e4m3x2'> => {
    if (period === 0 || pairs++ % period !== 0) return b.cvtPack('e4m3x2', ...exponentialPair(n, r));
    return exp2Halves(b, b.cvtPack('f16x2', ...neighbours((j) => exponentOf(n, r, j))));
  };
  for (const [k, fragment] of output.weights.entries()) {
    for (const [index, register] of fragment.entries()) {
      const [r, half] = [index & 1, index >> 1];
      if (fp8) {
        const n = 4 * k + 2 * half;
        const packed = b.pack('e4m3x4', e4m3Pair(n, r), e4m3Pair(n + 1, r));
        b.mov(b.as(packed, 'b32'), register);
      } else if (config.pvFormat === 'bf16') {
        b.cvtPack('bf16x2', ...exponentialPair(2 * k + half, r), b.as(register, 'bf16x2'));
      } else b.cvtPack('f16x2', ...exponentialPair(2 * k + half, r), b.as(register, 'f16x2'));
    }
  }
  if (onesColumn) return;
  for (const [r, chains] of tileSums.entries()) {
    const sum = at(state.sum, r);
    b.fma(sum, at(nextFactor, r), b.add(at(chains, 0), at(chains, 1)), sum);
  }
}

/** What the output and its row sums are multiplied by: the change of the maximum, and of the unit of V's codes. */
function setFactors(
  { frame, state }: Item,
  nextFactor: readonly Reg<'f32'>[],
  exponentsApart: Reg<'s32'> | undefined,
): void {
  const { b, config } = frame;
  if (config.onesColumn) for (const [r, register] of state.sumFactor.entries()) b.mov(at(nextFactor, r), register);
  const ratio = exponentsApart === undefined ? undefined : b.as(b.add(exponentsApart, ONE_BITS), 'f32');
  for (const [r, register] of state.factor.entries()) {
    if (ratio === undefined) b.mov(at(nextFactor, r), register);
    else b.mul(at(nextFactor, r), ratio, register);
  }
}
