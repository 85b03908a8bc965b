/** From the scores of a tile to P: the online softmax of FlashAttention in base 2. */
import type { Reg } from '../../ptx/types.ts';
import { roundToScale } from '../fp4/e2m1.ts';
import { offset, offset64 } from '../parts/addresses.ts';
import { excludeHiddenBlocks } from '../parts/blocks.ts';
import { COARSE_SCALE, MAGIC, MIN_SCALE } from '../parts/constants.ts';
import { headAddress } from '../parts/epilogue.ts';
import { at, maxOf } from '../parts/lists.ts';
import { quadMax } from '../parts/quad.ts';
import { capScores, excludeBeyondBand, keyFactors, maskRow, spreadFaultBytes, spreadFaults } from '../parts/scores.ts';
import { type AttentionConfig, BLOCK_K } from './config.ts';
import type { Frame } from './frame.ts';
import { exponentOffsetOf, type Parked } from './parked.ts';
import type { Output, Scores, SoftmaxState } from './state.ts';

/** A maximum above this, in base 2, leaves too few bits of a sum with LOG2_E4M3_MAX. */
const COARSE_MAX = 2 ** 12;

/** The tile at hand, and what its softmax reads and writes. */
export interface ScoreTile {
  readonly frame: Frame;
  readonly parked: Parked;
  readonly tile: Reg<'s32'>;
  /** Where it lies; see `WalkTile`. */
  readonly place: Reg<'s32'>;
  /** A part of the tile is hidden by a block mask; undefined without one. */
  readonly cut: Reg<'pred'> | undefined;
  readonly scores: Scores;
  readonly state: SoftmaxState;
  readonly output: Output;
  /** Scale of the thread's keys; its sign says that some keys of the tile have exponents, or are not finite. */
  readonly keyScale: Reg<'f32'>;
}

/** A score s in base 2 is s * scale + zero. */
interface ScoreUnits {
  readonly scale: Reg<'f32'>;
  /** Undefined: 0. */
  readonly zero: Reg<'f32'> | undefined;
  /** The scale with the sign of K's. */
  readonly signed: Reg<'f32'>;
}

/** From scores to P, in their registers. */
export function softmax(self: ScoreTile): void {
  const { frame, scores, state } = self;
  const { b, config, scoresAreFloat, exponentOffset } = frame;
  let units = scoreUnits(self);
  if (!scoresAreFloat && exponentOffset === 0) scaleCoarseScores(self, units);
  if (scoresAreFloat) finishScores(self, units);
  if (config.mask !== 'none') maskScores(self, config.mask);
  excludeKeys(self);
  excludeBlocks(self);
  if (frame.given === undefined) handleSpecialKeys(self, units);
  else markFaultyValues(self);
  // Computed from the scale again, which costs less than a register that holds it from there.
  if (!scoresAreFloat && exponentOffset !== 0) units = { ...units, zero: b.mul(units.scale, -MAGIC) };
  raiseMaxima(self, tileMaxima(self, units));

  b.section('what is added for the exponents');
  const ownOffset = exponentOffset === 0 ? [] : [exponentOffsetOf(frame)];
  const folded = state.max.map((max) => {
    const shift = b.neg(finite(frame, max));
    const terms = [...ownOffset, ...(scoresAreFloat || units.zero === undefined ? [] : [units.zero])];
    return terms.reduce<Reg<'f32'>>((sum, term) => b.add(sum, term), shift);
  });
  if (exponentOffset !== 0) subtractCoarseMaxima(self, units, folded);

  if (config.quantizedWeights) {
    exponentiateToFp4(self, folded);
    return;
  }
  b.section('P = exp2(S - max)');
  scores.each((score, r) => {
    const exponent = scoresAreFloat ? b.add(score, at(folded, r)) : b.fma(score, units.scale, at(folded, r));
    b.ex2(exponent, score);
    b.add(at(state.sum, r), score, at(state.sum, r));
  });
}

/**
 * P in units of the scales of its blocks of 16 keys, which these lanes and their neighbours hold. A score that is not
 * a number makes its block's scale NaN, and so the row: E2M1 has no NaN.
 */
function exponentiateToFp4({ frame, scores, state }: ScoreTile, folded: readonly Reg<'f32'>[]): void {
  const { b, config } = frame;
  b.section('scales of P');
  const inverses = scores.blocks.map((blocks, r) =>
    blocks.map((largest) => {
      const share = b.mul(b.ex2(b.add(largest, at(folded, r))), 1 / 6);
      b.mov(roundToScale(b, share), largest);
      return b.rcpApprox(largest);
    }),
  );
  b.section('P = exp2(S - max), over its scales');
  scores.each((score, r, column) => {
    const p = b.ex2(b.add(score, at(folded, r)));
    if (config.lse) b.add(at(state.exactSum, r), p, at(state.exactSum, r));
    b.mul(p, at(at(inverses, r), column >> 5), score);
  });
}

function scaled({ b }: Frame, value: Reg<'f32'>, { scale, zero }: ScoreUnits, into = value): Reg<'f32'> {
  return zero === undefined ? b.mul(value, scale, into) : b.fma(value, scale, zero, into);
}

function scoreUnits({ frame, parked, keyScale }: ScoreTile): ScoreUnits {
  const { b } = frame;
  if (frame.given !== undefined) {
    const scale = b.loadParameter(frame.scoreScale);
    return { scale, zero: undefined, signed: scale };
  }
  const signed = b.mul(parked.queryScale(), keyScale);
  const whole = b.max(b.abs(signed), MIN_SCALE);
  if (frame.fp4Keys) return { scale: whole, zero: undefined, signed };
  // Without its last two bits its product with 1.5 * 2^23 is exact.
  const scale = b.as(b.and(b.as(whole, 'b32'), 0xfffffffc), 'f32');
  return { scale, zero: b.mul(scale, -MAGIC), signed };
}

/** But for special tiles, which {@link handleSpecialKeys} scales. */
function scaleCoarseScores({ frame, scores }: ScoreTile, { scale, zero, signed }: ScoreUnits): void {
  const { b } = frame;
  if (zero === undefined) return;
  b.if(b.voteAny(b.setp('gt', signed, COARSE_SCALE)), () => {
    b.section('coarse scores are scaled');
    // (2^23 + q.k) * scale, positive still. The zero point is exact, and so is its distance to each score: the largest
    // score's exponent is 0.
    const shift = b.mul(scale, -(2 ** 22));
    scores.each((score) => b.fma(score, scale, shift, score));
    b.mul(scale, -(2 ** 23), zero);
    b.set(scale, 1);
  });
}

function finishScores(self: ScoreTile, units: ScoreUnits): void {
  const { frame, parked, scores } = self;
  const { b, config, threadRows, softcap } = frame;
  b.section('scores in base 2: scale, mean of Q, softcap');
  const { scale, zero } = units;
  if (zero !== undefined) {
    b.if(isSpecial(self), () => {
      scaleByKey(self, scale);
      b.set(scale, 1);
      b.set(zero, 0);
    });
  }
  if (config.smoothQ) addMeanScores(self, units);
  else scores.each((score) => scaled(frame, score, units));
  if (!config.softcap) return;
  capScores(b, softcap, scores.each, () => {
    if (frame.given !== undefined) return Array.from({ length: threadRows }, () => b.constant('f32', 0));
    const { rowBias } = parked.reload();
    return Array.from({ length: threadRows }, (_, r) => rowBias(r));
  });
}

/**
 * Scales the scores and adds the share of Q's block mean, `[head, block of Q, key]`, already times smScale * log2(e).
 */
function addMeanScores({ frame, parked, tile, scores }: ScoreTile, { scale, zero }: ScoreUnits): void {
  const { b, pointer, integer, rowTiles, keyTiles, firstColumn, columnOf } = frame;
  const { queryRow, t2 } = parked.reload();
  const rowBytes = b.mulWide(b.loadParameter(integer.meanScoreKeys), 4);
  const row = offset64(b, b.loadPointer(pointer.meanScores), b.shr(queryRow, 7), rowBytes);
  const source = offset(b, row, b.add(b.as(b.shl(tile, 6), 'u32'), firstColumn(t2)), 4);
  for (let n = 0; n < keyTiles; n++) {
    const loaded = b.ldVector('f32', 2, source, columnOf(n, 0) * 4);
    const shares = zero === undefined ? loaded : loaded.map((share) => b.add(share, zero));
    for (let m = 0; m < rowTiles; m++) {
      at(at(scores.floats, m), n).forEach((score, i) => {
        b.fma(score, scale, at(shares, i & 1), score);
      });
    }
  }
}

/** Excludes (boolean) or adds (float) mask elements, read from the caller's tensor. */
function maskScores({ frame, parked, tile, scores }: ScoreTile, kind: Exclude<AttentionConfig['mask'], 'none'>): void {
  const { b, pointer, strides, threadRows, keyTiles, firstColumn: firstColumnOf, columnOf } = frame;
  b.section('mask');
  const { sequence, head, queryLength, rowIndex, length, t2 } = parked.reload();
  const keyStride = b.loadParameter(strides.maskKey);
  const headStrides = { batch: strides.maskBatch, head: strides.maskHead };
  let origin = headAddress(b, b.loadPointer(pointer.mask), { sequence, head }, headStrides);
  const firstColumn = b.add(b.as(b.shl(tile, 6), 'u32'), firstColumnOf(t2));
  origin = offset64(b, origin, firstColumn, keyStride);
  const columnsLeft = b.sub(length, b.as(firstColumn, 's32'));
  for (let r = 0; r < threadRows; r++) {
    const row = b.as(b.add(rowIndex, 8 * r), 'u32');
    const inside = b.setp('lt', row, queryLength);
    const address = offset64(b, origin, row, b.loadParameter(strides.maskQuery));
    const score = (n: number, j: number) => at(at(at(scores.floats, r >> 1), n), 2 * (r & 1) + j);
    maskRow(b, kind, { address, keyStride, inside, columnsLeft }, keyTiles, score, columnOf);
  }
}

/** The tile has keys beyond the last, or out of a row's band. */
function reachesOut({ b, config }: Frame, parked: Parked, tileStart: Reg<'s32'>): Reg<'pred'> {
  const whole = parked.wholeKeys();
  const beyond = b.setp('gt', b.add(tileStart, BLOCK_K), whole.until);
  return config.banded ? b.orPred(beyond, b.setp('lt', tileStart, whole.from)) : beyond;
}

/** Emits what only a tile of which some row may not see some key needs. */
export function atEdges(frame: Frame, parked: Parked, tile: Reg<'s32'>, body: () => void): void {
  const { b, config, blocks } = frame;
  if (config.mask !== 'none' || blocks !== undefined) body();
  else b.if(reachesOut(frame, parked, b.shl(tile, 6)), body);
}

/** Keys whose values are not finite make the rows that see them NaN; see `inspect-values.ts`. */
function markFaultyValues({ frame, parked, tile, scores }: ScoreTile): void {
  const { b, tiles } = frame;
  const { faults } = tiles;
  if (faults === undefined) return;
  b.section('values that are not finite');
  atEdges(frame, parked, tile, () => {
    const { t2 } = parked.reload();
    spreadFaultBytes(b, b.add(frame.own(faults.base), b.as(t2, 'shared')), scores.each);
  });
}

function excludeKeys({ frame, parked, tile, scores }: ScoreTile): void {
  const { b, config, threadRows } = frame;
  b.section('keys outside the band or beyond the last');
  const tileStart = b.shl(tile, 6);
  b.if(reachesOut(frame, parked, tileStart), () => {
    const { rowIndex, length, lower, upper, t2 } = parked.reload();
    const token = (r: number) => (config.sameBand ? b.constant('s32', 0) : b.add(rowIndex, 8 * r));
    const origin = b.add(tileStart, b.as(frame.firstColumn(t2), 's32'));
    const band = config.banded ? { lower, upper, token } : undefined;
    excludeBeyondBand(b, threadRows, { origin, keyLength: length, band }, scores.each);
  });
}

function excludeBlocks({ frame, parked, tile, cut, scores }: ScoreTile): void {
  const { b, blocks, rowTiles, fp4Values } = frame;
  if (blocks === undefined || cut === undefined) return;
  b.section('hidden blocks');
  b.if(cut, () => {
    const { sequence, head, queryLength, rowIndex, length, t2 } = parked.reload();
    const origin = b.add(b.as(b.shl(tile, 6), 'u32'), frame.firstColumn(t2));
    // Keys of a thread within 16 of each other: with V in NVFP4 they are 32 apart.
    const columns = fp4Values ? 32 : 16;
    excludeHiddenBlocks(b, blocks, {
      ...{ sequence, queryLength, keyLength: b.as(length, 'u32') },
      rows: Array.from({ length: rowTiles }, (_, m) => ({ head, token: b.as(b.add(rowIndex, 16 * m), 'u32') })),
      rowGroup: (r) => r >> 1,
      ...{ firstKey: origin, columns, groups: BLOCK_K / columns },
      eachScore: scores.each,
    });
  });
}

/** The tile has keys with exponents, or keys that are not finite. */
function isSpecial({ frame, keyScale }: ScoreTile): Reg<'pred'> {
  return frame.b.setp('lt', frame.b.as(keyScale, 's32'), 0);
}

/** Scores as products left them become those in base 2, each key's with its exponent. */
function scaleByKey({ frame, parked, place, scores }: ScoreTile, scale: Reg<'f32'>): void {
  const { b, pointer } = frame;
  const { firstKeyTile, t2 } = parked.reload();
  const first = b.add(b.shl(b.add(firstKeyTile, b.as(place, 'u32')), 6), frame.firstColumn(t2));
  const factorOf = keyFactors(b, offset(b, b.loadPointer(pointer.keyExponents), first, 1));
  scores.each((score, _, column) => {
    b.mul(b.mul(b.sub(score, MAGIC), scale), factorOf(column), score);
  });
}

function handleSpecialKeys(self: ScoreTile, units: ScoreUnits): void {
  const { b, scoresAreFloat } = self.frame;
  const { scale, zero } = units;
  b.section('keys with exponents of their own, or not finite');
  b.if(isSpecial(self), () => {
    if (!scoresAreFloat && zero !== undefined) {
      scaleByKey(self, scale);
      moveScoresToMagic(self, scale, zero);
    }
    markFaultyKeys(self);
  });
}

/** Steps of scores that were scaled by key, where no row needs larger ones. */
const FINE_SCALE = 2 ** -12;

/**
 * Scores in base 2 become 1.5 * 2^23 + n again, n in steps of a power of two, as products leave them: so wide that each row's largest is
 * positive, for maxima are found as those of integers.
 */
function moveScoresToMagic({ frame, scores }: ScoreTile, scale: Reg<'f32'>, zero: Reg<'f32'>): void {
  const { b, threadRows } = frame;
  const lowest = b.constant('f32', 0);
  // Row by row: no more than one maximum is held at a time.
  for (let row = 0; row < threadRows; row++) {
    const largest = b.constant('f32', Number.NEGATIVE_INFINITY);
    scores.each((score, r) => {
      if (r === row) b.max(largest, score, largest);
    });
    b.min(lowest, finite(frame, largest), lowest);
  }
  const step = b.as(b.mul(lowest, -(2 ** -23)), 'u32');
  const power = b.as(b.and(b.add(step, 0x7fffff), 0x7f800000), 'f32');
  b.max(power, FINE_SCALE, scale);
  // The reciprocal of a power of two.
  const inverse = b.as(b.sub(b.constant('u32', 0x7f000000), b.as(scale, 'u32')), 'f32');
  scores.each((score) => b.add(b.mul(score, inverse), MAGIC, score));
  b.mul(scale, -MAGIC, zero);
}

function markFaultyKeys({ frame, parked, place, scores }: ScoreTile): void {
  const { b, pointer } = frame;
  const { firstKeyTile, t2 } = parked.reload();
  const faults = offset(b, b.loadPointer(pointer.keyFaults), b.add(firstKeyTile, b.as(place, 'u32')), 8);
  spreadFaults(b, { faults, firstColumn: frame.firstColumn(t2) }, scores.each);
}

/** This thread's largest score of a row, as the products left it. */
function ownLargest({ frame, scores }: ScoreTile, r: number): Reg<'f32'> {
  const { b, scoresAreFloat } = frame;
  const own = at(scores.integers, r >> 1).flatMap((fragment) => fragment.slice(2 * (r & 1), 2 * (r & 1) + 2));
  // Positive floats, and -Infinity below them, order like the integers of their bits; three-input integer maxima exist.
  const largestInteger = () => maxOf(own, (x, y) => b.max(x, y));
  if (!scoresAreFloat) return b.as(largestInteger(), 'f32');
  const floats = own.map((score) => b.as(score, 'f32'));
  return maxOf(floats, (x, y) => b.max(x, y));
}

/**
 * A row's largest score of the tile, from the largest of each block of 16 keys, which are kept. A NaN makes its
 * block's maximum NaN, and is ignored in the row's.
 */
function rowLargest({ frame, scores }: ScoreTile, r: number): Reg<'f32'> {
  const { b } = frame;
  const blocks = at(scores.blocks, r);
  const fragments = at(scores.floats, r >> 1);
  blocks.forEach((block, group) => {
    const own = fragments.slice(4 * group, 4 * group + 4).flatMap((four) => four.slice(2 * (r & 1), 2 * (r & 1) + 2));
    const largest = maxOf(own, (x, y) => b.maxNaN(x, y));
    b.maxNaN(largest, b.shflBfly(largest, 1), block);
  });
  const ofLanes = maxOf(blocks, (x, y) => b.max(x, y));
  return b.max(ofLanes, b.shflBfly(ofLanes, 2));
}

/** The running maximum of each row with this tile. */
function tileMaxima(self: ScoreTile, { scale, zero }: ScoreUnits): Reg<'f32'>[] {
  const { frame, state } = self;
  const { b, scoresAreFloat } = frame;
  b.section('running maximum');
  return state.max.map((before, r) => {
    if (frame.config.quantizedWeights) return b.max(rowLargest(self, r), before);
    let largest = ownLargest(self, r);
    if (!scoresAreFloat && zero !== undefined) largest = b.fma(largest, scale, zero);
    return b.max(quadMax(b, largest), before);
  });
}

/** Takes new maxima, and rescales sums and output to them, when one has grown by more than the threshold. */
function raiseMaxima({ frame, state, output }: ScoreTile, maxima: readonly Reg<'f32'>[]): void {
  const { b, config } = frame;
  const { rescaleThreshold } = config;
  let grown: Reg<'pred'> | undefined;
  for (const [r, max] of state.max.entries()) {
    const limit = rescaleThreshold === 0 ? max : b.add(max, rescaleThreshold);
    const more = b.setp('gt', at(maxima, r), limit);
    grown = grown === undefined ? more : b.orPred(grown, more);
  }
  b.if(b.voteAny(grown as Reg<'pred'>), () => {
    b.section('rescale the output to the new maximum');
    for (const [r, old] of state.max.entries()) {
      // A row that has seen no key yet: exp2(-Infinity - anything) is 0, and its sums are 0 anyway.
      const factor = b.ex2(b.sub(old, finite(frame, at(maxima, r))));
      b.mov(at(maxima, r), old);
      b.mul(at(state.sum, r), factor, at(state.sum, r));
      for (const exact of state.exactSum.slice(r, r + 1)) b.mul(exact, factor, exact);
      if (config.accumulate === 'f16') {
        const factors = b.cvtPack('f16x2', factor, factor);
        for (const fragment of at(output.halves, r >> 1)) b.mul(at(fragment, r & 1), factors, at(fragment, r & 1));
      } else {
        for (const fragment of at(output.floats, r >> 1)) {
          for (const register of fragment.slice(2 * (r & 1), 2 * (r & 1) + 2)) b.mul(register, factor, register);
        }
      }
    }
  });
}

/** Where maxima or scales are large, exponents are taken from differences, before the offset is added. */
function subtractCoarseMaxima(self: ScoreTile, { scale }: ScoreUnits, folded: readonly Reg<'f32'>[]): void {
  const { frame, scores, state } = self;
  const { b, config, scoresAreFloat } = frame;
  const magnitudes = state.max.map((max) => b.abs(max));
  const largest = () => maxOf(magnitudes, (x, y) => b.max(x, y));
  const coarse = scoresAreFloat ? b.setp('gt', largest(), COARSE_MAX) : b.setp('gt', scale, COARSE_SCALE);
  b.if(b.voteAny(coarse), () => {
    b.section('coarse exponents are taken from differences, before the offset is added');
    for (const [r, rowMax] of state.max.entries()) {
      const own = scoresAreFloat ? undefined : finite(frame, ownLargest(self, r));
      const max = finite(frame, rowMax);
      // Differences of products are exact, and the largest score has the exponent of its own maximum.
      const share = own === undefined ? undefined : b.sub(b.fma(own, scale, b.mul(scale, -MAGIC)), max);
      scores.each((score, row) => {
        if (row !== r) return;
        if (own === undefined || share === undefined) b.sub(score, max, score);
        else b.fma(b.sub(score, own), scale, share, score);
      });
      if (config.quantizedWeights) for (const block of at(scores.blocks, r)) b.sub(block, max, block);
      const ownOffset = exponentOffsetOf(frame);
      if (typeof ownOffset === 'number') b.set(at(folded, r), ownOffset);
      else b.mov(ownOffset, at(folded, r));
    }
    if (!scoresAreFloat) b.set(scale, 1);
  });
}

/** The value, or 0 for -Infinity. */
function finite({ b }: Frame, value: Reg<'f32'>): Reg<'f32'> {
  return b.selp(b.constant('f32', 0), value, b.setp('eq', value, Number.NEGATIVE_INFINITY));
}
