/**
 * Chooses the blocks of keys that a block of rows computes, from means. One warp takes one block of rows, a line of the map; `chooseBlocks`
 * of src/attention/block-choice.ts says the same in TypeScript.
 *
 * Nothing is sorted: the weight down to which blocks are kept is found bit by bit, since weights that are not negative are in the order
 * of their bits.
 */
import { KernelBuilder } from '../../ptx/builder.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Parameter, Reg } from '../../ptx/types.ts';
import { divide, integers, offset, pointers } from '../parts/addresses.ts';
import { bandParameters } from '../parts/band.ts';
import { at } from '../parts/lists.ts';
import { loadSequence } from '../parts/sequences.ts';
import { sumOverWarp, sumsOfWarp } from '../parts/warp.ts';
import type { HiddenKeys } from '../quantize/visible-keys.ts';
import { meanFloats } from './pool.ts';

export interface ChooseConfig {
  readonly target: Target;
  readonly dim: number;
  readonly banded: boolean;
  /** A fraction of the blocks is kept (top-k), or a share of their weights (top-p). */
  readonly by: 'count' | 'mass';
  /** Blocks of rows or keys that are not alike enough are computed whole. */
  readonly similarities: boolean;
  /** Whether a mask hides blocks, and whether each head has its own. */
  readonly masked: HiddenKeys;
}

export const CHOOSE_POINTERS = [
  'sequences',
  'queryMeans',
  'keyMeans',
  'querySimilarities',
  'keySimilarities',
  'visibleBlocks',
  'weights',
  'map',
  'lines',
] as const;
export const CHOOSE_INTEGERS = [
  'count',
  'rowBlocks',
  'keyBlocks',
  'heads',
  'headsPerKeyHead',
  'blockRows',
  'blockKeys',
  'sinkBlocks',
] as const;
/** The scale of scores in base 2, the share of blocks or of weights to keep, and the least similarity. */
export const CHOOSE_FLOATS = ['scale', 'wanted', 'similarity'] as const;
/** Lines of a CTA, one warp each. */
export const CHOOSE_WARPS = 4;

/** Dot products that are under way at once. */
const AT_ONCE = 4;
/** The highest bit of weights, which are at most 1. */
const HIGHEST_BIT = 2 ** 29;
/** Marks blocks that are computed in any case, and those that a mask hides. */
const [FORCED, HIDDEN] = [-1, -2];
/** A weight that every sum with a block of weight 1 reaches, and nothing does not. */
const ANY_WEIGHT = 1e-37;

interface Frame {
  readonly b: KernelBuilder;
  readonly config: ChooseConfig;
  readonly pointer: Readonly<Record<(typeof CHOOSE_POINTERS)[number], Parameter<'u64'>>>;
  readonly integer: Readonly<Record<(typeof CHOOSE_INTEGERS)[number], Parameter<'u32'>>>;
  readonly float: Readonly<Record<(typeof CHOOSE_FLOATS)[number], Parameter<'f32'>>>;
  readonly lane: Reg<'u32'>;
  /** The line's number, its sequence's and its head of K's among all. */
  readonly line: Reg<'u32'>;
  readonly keyHead: Reg<'u32'>;
  readonly keyLength: Reg<'u32'>;
  /** A float for each block of keys. */
  readonly weights: Reg<'global'>;
  /** What `visibleBlocks` left of the line; undefined without a mask. */
  readonly visible: Reg<'global'> | undefined;
  /** Blocks that some row of the line sees, `to` exclusive. */
  readonly from: Reg<'u32'>;
  readonly to: Reg<'u32'>;
  /** Blocks from this one on hold the last key that a row sees, of each of the rows: where they see different blocks. */
  readonly edge: Reg<'u32'>;
}

export function chooseBlocks(config: ChooseConfig): Kernel {
  const { target, banded } = config;
  const b = new KernelBuilder({ name: 'chooseBlocks', target, threads: CHOOSE_WARPS * 32 });
  const pointer = pointers(b, CHOOSE_POINTERS);
  const integer = integers(b, CHOOSE_INTEGERS);
  const float = Object.fromEntries(CHOOSE_FLOATS.map((name) => [name, b.parameter(name, 'f32')])) as Frame['float'];
  const band = bandParameters(b);

  b.section('which line');
  const thread = b.special('%tid.x');
  const lane = b.and(thread, 31);
  const line = b.mad(b.special('%ctaid.x'), CHOOSE_WARPS, b.shr(thread, 5));
  b.when(b.setp('ge', line, b.loadParameter(integer.count)), () => b.exit());
  const [rowBlock, headOfSequence] = divide(b, line, b.loadParameter(integer.rowBlocks));
  const keyHead = b.div(headOfSequence, b.loadParameter(integer.headsPerKeyHead));
  const sequence = b.div(headOfSequence, b.loadParameter(integer.heads));
  const { queryLength, keyLength } = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  const [blockRows, blockKeys] = [b.loadParameter(integer.blockRows), b.loadParameter(integer.blockKeys)];
  const keyBlocks = b.loadParameter(integer.keyBlocks);

  b.section('blocks that the rows see');
  const map = offset(b, b.loadPointer(pointer.map), line, keyBlocks);
  const nothing = b.constant('u32', 0);
  each(b, lane, nothing, keyBlocks, (block) => b.stByte(nothing, b.add(map, wide(b, block))));
  const firstRow = b.min(b.mul(rowBlock, blockRows), queryLength);
  const endRow = b.min(b.add(firstRow, blockRows), queryLength);
  const length = b.as(keyLength, 's32');
  const firstKey = b.constant('s32', 0);
  const endKey = b.mov(length);
  const edgeKey = b.mov(length);
  // Of the last row.
  const lastFirstKey = b.constant('s32', 0);
  if (banded) {
    const align = b.as(b.loadParameter(band.alignBottomRight), 's32');
    const shift = b.mul(b.sub(length, b.as(queryLength, 's32')), align);
    const lower = b.sub(shift, b.loadParameter(band.left));
    const upper = b.add(shift, b.loadParameter(band.right));
    b.max(b.add(b.as(firstRow, 's32'), lower), 0, firstKey);
    b.min(length, b.add(b.as(endRow, 's32'), upper), endKey);
    b.add(b.as(firstRow, 's32'), upper, edgeKey);
    b.max(b.add(b.as(b.sub(endRow, 1), 's32'), lower), 0, lastFirstKey);
  }
  const [from, to] = [b.constant('u32', 0), b.constant('u32', 0)];
  const some = b.andPred(b.setp('lt', firstKey, endKey), b.setp('lt', firstRow, endRow));
  b.if(some, () => {
    b.mov(b.div(b.as(firstKey, 'u32'), blockKeys), from);
    b.add(b.div(b.as(b.sub(endKey, 1), 'u32'), blockKeys), 1, to);
  });
  const edge = b.div(b.as(b.max(edgeKey, 0), 'u32'), blockKeys);
  const seesEnd = b.setp('ge', edgeKey, length);
  b.when(seesEnd, () => b.mov(to, edge));
  if (banded) {
    const isCut = b.setp('gt', b.div(b.as(lastFirstKey, 'u32'), blockKeys), from);
    b.when(b.andPred(seesEnd, isCut), () => b.sub(to, 1, edge));
  }
  const weights = offset(b, b.loadPointer(pointer.weights), line, b.shl(keyBlocks, 2));
  let visible: Reg<'global'> | undefined;
  if (config.masked !== 'none') {
    const ofAllHeads = () => b.mad(sequence, b.loadParameter(integer.rowBlocks), rowBlock);
    const maskLine = config.masked === 'of each head' ? line : ofAllHeads();
    visible = offset(b, b.loadPointer(pointer.visibleBlocks), maskLine, b.shl(keyBlocks, 2));
  }

  const frame: Frame = {
    ...{ b, config, pointer, integer, float, lane, line, keyHead, keyLength, weights, visible, from, to, edge },
  };
  const largest = weighScores(frame);
  const forced = weighBlocks(frame, largest);
  const kept = keepLargest(frame, forced, map);

  b.section('what the line comes to');
  const lost = b.max(b.fma(b.divF32(kept.mass, forced.sum), -1, 1), 0);
  b.when(b.setp('eq', forced.sum, 0), () => b.set(lost, 0));
  const rows = b.cvt('f32', b.sub(endRow, firstRow));
  const own = offset(b, b.loadPointer(pointer.lines), line, 16);
  b.when(b.setp('eq', lane, 0), () => b.stVector([forced.candidates, kept.count, rows, b.mul(lost, rows)], own));
  return b.build();
}

const wide = (b: KernelBuilder, index: Reg<'u32'>) => b.as(b.cvt('u64', index), 'global');

/** A lane's blocks among those from `from` to `to`: the same ones in every loop, so that it reads what it wrote itself. */
function each(
  b: KernelBuilder,
  lane: Reg<'u32'>,
  from: Reg<'u32'>,
  to: Reg<'u32'>,
  body: (block: Reg<'u32'>) => void,
): void {
  const block = b.add(b.and(from, 0xffffffe0), lane);
  b.loop(
    () => b.setp('lt', block, to),
    () => {
      b.if(b.setp('ge', block, from), () => body(block));
      b.add(block, 32, block);
    },
  );
}

/** Whether a mask leaves a block; undefined without one. */
function isCandidate({ b, visible }: Pick<Frame, 'b' | 'visible'>, block: Reg<'u32'>): Reg<'pred'> | undefined {
  return visible && b.setp('ne', b.ld('u32', offset(b, visible, block, 4)), 0);
}

const isNumber = (b: KernelBuilder, value: Reg<'f32'>) => b.setp('lt', b.abs(value), Number.POSITIVE_INFINITY);

/** Writes the score of each block, in base 2, as its weight; returns the largest. The lanes share the channels of each product. */
function weighScores(frame: Frame): Reg<'f32'> {
  const { b, config, pointer, integer, float, lane, line, keyHead, keyLength, weights, from, to } = frame;
  const bytes = meanFloats(config.dim) * 4;
  const channels = Array.from({ length: bytes / 128 }, (_, i) => i * 128);
  const ofLane = (address: Reg<'global'>) => offset(b, address, lane, 4);
  const query = ofLane(offset(b, b.loadPointer(pointer.queryMeans), line, bytes));
  const scale = b.loadParameter(float.scale);
  const means = channels.map((channel) => b.mul(b.ld('f32', query, channel), scale));
  const keyBlocks = b.loadParameter(integer.keyBlocks);
  const keys = ofLane(offset(b, b.loadPointer(pointer.keyMeans), keyHead, b.mul(keyBlocks, bytes)));
  const last = b.sub(to, 1);
  const largest = b.constant('f32', Number.NEGATIVE_INFINITY);

  b.section('scores of blocks');
  const base = b.and(from, 0xffffffe0);
  b.loop(
    () => b.setp('lt', base, to),
    () => {
      const score = b.constant('f32', 0);
      const next = b.constant('u32', 0);
      b.loop(
        () => b.setp('lt', next, 32),
        () => {
          const sums = Array.from({ length: AT_ONCE }, (_, i) => {
            const key = offset(b, keys, b.min(b.add(b.add(base, next), i), last), bytes);
            const sum = b.constant('f32', 0);
            for (const [c, channel] of channels.entries()) b.fma(b.ld('f32', key, channel), at(means, c), sum, sum);
            return sum;
          });
          for (const [i, sum] of sums.entries()) {
            sumOverWarp(b, sum);
            b.when(b.setp('eq', lane, b.add(next, i)), () => b.mov(sum, score));
          }
          b.add(next, AT_ONCE, next);
        },
      );
      const block = b.add(base, lane);
      const inside = b.andPred(b.setp('ge', block, from), b.setp('lt', block, to));
      b.if(inside, () => {
        const blockKeys = b.loadParameter(integer.blockKeys);
        const count = b.min(blockKeys, b.sub(keyLength, b.mul(block, blockKeys)));
        b.add(score, b.lg2(b.cvt('f32', count)), score);
        const counts = isCandidate(frame, block);
        if (counts === undefined) b.max(largest, score, largest);
        else b.when(counts, () => b.max(largest, score, largest));
        b.st(score, offset(b, weights, block, 4));
      });
      b.add(base, 32, base);
    },
  );
  for (let lanes = 1; lanes < 32; lanes *= 2) b.max(largest, b.shflBfly(largest, lanes), largest);
  return largest;
}

/** What is computed in any case, the blocks among which is chosen, and the sum of their weights. */
interface Forced {
  readonly candidates: Reg<'f32'>;
  readonly count: Reg<'f32'>;
  readonly mass: Reg<'f32'>;
  readonly sum: Reg<'f32'>;
}

/** Makes weights of scores, and marks blocks that are forced or hidden. */
function weighBlocks({ b, config, pointer, integer, float, lane, ...frame }: Frame, largest: Reg<'f32'>): Forced {
  const { line, keyHead, weights, visible, from, to, edge } = frame;
  b.section('weights');
  const [count, mass, sum] = [b.constant('f32', 0), b.constant('f32', 0), b.constant('f32', 0)];
  const sinkBlocks = b.loadParameter(integer.sinkBlocks);
  const similarity = b.loadParameter(float.similarity);
  const similarities = (of: Parameter<'u64'>) => b.loadPointer(of);
  const unlike = b.setp('ne', lane, lane);
  // Not a number is not alike.
  const isUnlike = (value: Reg<'f32'>) => b.notPred(b.setp('ge', value, similarity));
  if (config.similarities) {
    b.orPred(unlike, isUnlike(b.ld('f32', offset(b, similarities(pointer.querySimilarities), line, 4))), unlike);
  }
  const keyBlocks = b.loadParameter(integer.keyBlocks);
  const candidates = visible === undefined ? b.cvt('f32', b.sub(to, from)) : b.constant('f32', 0);
  each(b, lane, from, to, (block) => {
    const address = offset(b, weights, block, 4);
    const fact = visible && b.ld('u32', offset(b, visible, block, 4));
    const score = b.ld('f32', address);
    const weight = b.ex2(b.sub(score, largest));
    b.when(b.notPred(isNumber(b, weight)), () => b.set(weight, 0));
    if (fact !== undefined) {
      b.when(b.setp('eq', fact, 0), () => b.set(weight, 0));
      b.when(b.setp('ne', fact, 0), () => b.add(candidates, 1, candidates));
    }
    b.add(sum, weight, sum);
    const isForced = b.orPred(b.setp('lt', block, sinkBlocks), b.setp('ge', block, edge));
    // A score that is not a number says nothing.
    b.orPred(isForced, b.notPred(isNumber(b, score)), isForced);
    b.orPred(isForced, unlike, isForced);
    if (config.similarities) {
      const ofKeys = offset(b, similarities(pointer.keySimilarities), b.mad(keyHead, keyBlocks, block), 4);
      b.orPred(isForced, isUnlike(b.ld('f32', ofKeys)), isForced);
    }
    if (fact !== undefined) {
      b.orPred(isForced, b.setp('eq', fact, 2), isForced);
      b.andPred(isForced, b.setp('ne', fact, 0), isForced);
    }
    b.when(isForced, () => {
      b.add(count, 1, count);
      b.add(mass, weight, mass);
      b.set(weight, FORCED);
    });
    if (fact !== undefined) b.when(b.setp('eq', fact, 0), () => b.set(weight, HIDDEN));
    b.st(weight, address);
  });
  for (const register of [count, mass, sum]) sumOverWarp(b, register);
  if (visible !== undefined) sumOverWarp(b, candidates);
  return { candidates, count, mass, sum };
}

/** Keeps the fewest blocks, the largest first, that reach what is wanted; of equal ones the first. */
function keepLargest(
  { b, config, float, lane, weights, from, to }: Frame,
  { candidates, count: forcedCount, mass: forcedMass, sum }: Forced,
  map: Reg<'global'>,
): { readonly count: Reg<'f32'>; readonly mass: Reg<'f32'> } {
  const byCount = config.by === 'count';
  b.section('what is wanted');
  const wanted = b.loadParameter(float.wanted);
  const base = byCount ? forcedCount : forcedMass;
  let target: Reg<'f32'>;
  if (byCount) {
    const exact = b.mul(wanted, candidates);
    target = b.cvt('f32', b.cvt('s32', exact));
    b.when(b.setp('lt', target, exact), () => b.add(target, 1, target));
    b.max(target, 1, target);
  } else {
    target = b.mul(wanted, sum);
    // At least one block of each row.
    b.when(b.setp('eq', forcedCount, 0), () => b.max(target, ANY_WEIGHT, target));
  }
  /** What this lane's blocks add up to that are not forced and `comparison` says are kept. */
  const sumWhere = (comparison: 'ge' | 'gt', bits: Reg<'s32'>) => {
    const own = b.constant('f32', 0);
    each(b, lane, from, to, (block) => {
      const weight = b.ld('f32', offset(b, weights, block, 4));
      const isKept = b.setp(comparison, b.as(weight, 's32'), bits);
      b.when(isKept, () => b.add(own, byCount ? 1 : weight, own));
    });
    return sumOverWarp(b, own);
  };

  b.section('the least weight that is kept');
  const least = b.constant('u32', 0);
  const bit = b.constant('u32', HIGHEST_BIT);
  b.loop(
    () => b.setp('ne', bit, 0),
    () => {
      const candidate = b.or(least, bit);
      const reached = b.add(base, sumWhere('ge', b.as(candidate, 's32')));
      b.when(b.setp('ge', reached, target), () => b.mov(candidate, least));
      b.mov(b.shr(bit, 1), bit);
    },
  );

  b.section('what is kept');
  const leastBits = b.as(least, 's32');
  const above = b.add(base, sumWhere('gt', leastBits));
  const share = byCount ? b.constant('f32', 1) : b.as(least, 'f32');
  const [count, mass] = [b.constant('f32', 0), b.constant('f32', 0)];
  const [equals, computed] = [b.constant('u32', 0), b.constant('u32', 1)];
  const start = b.and(from, 0xffffffe0);
  b.loop(
    () => b.setp('lt', start, to),
    () => {
      const block = b.add(start, lane);
      const inside = b.andPred(b.setp('ge', block, from), b.setp('lt', block, to));
      const weight = b.constant('f32', 0);
      b.when(inside, () => b.ld('f32', offset(b, weights, block, 4), 0, { into: weight }));
      const bits = b.as(weight, 's32');
      const isEqual = b.andPred(inside, b.setp('eq', bits, leastBits));
      const one = b.constant('u32', 0);
      b.when(isEqual, () => b.set(one, 1));
      const { before, total } = sumsOfWarp(b, lane, one);
      const reached = b.fma(b.cvt('f32', b.add(equals, before)), share, above);
      const isKept = b.andPred(isEqual, b.setp('lt', reached, target));
      b.orPred(isKept, b.andPred(inside, b.setp('gt', bits, leastBits)), isKept);
      b.when(isKept, () => {
        b.add(count, 1, count);
        b.add(mass, weight, mass);
      });
      b.orPred(isKept, b.andPred(inside, b.setp('eq', weight, FORCED)), isKept);
      const flagAt = b.add(map, wide(b, block));
      b.when(isKept, () => b.stByte(computed, flagAt));
      b.add(equals, total, equals);
      b.add(start, 32, start);
    },
  );
  for (const register of [count, mass]) sumOverWarp(b, register);
  return { count: b.add(count, forcedCount), mass: b.add(mass, forcedMass) };
}
