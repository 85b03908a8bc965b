/**
 * Means of blocks of rows, and how much alike the rows of each are: what blocks of scores are chosen by. One CTA takes one block, so many
 * rows at once, eight channels a thread.
 *
 * @see SpargeAttn, arXiv 2502.18137, section 3; `poolBlocks` of src/quantization/pooling.ts is the same in float64
 */
import type { DType } from '../../../../tensor/dtype.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor } from '../../ptx/layouts.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Reg } from '../../ptx/types.ts';
import { divide, integers, offset, offset64, pointers } from '../parts/addresses.ts';
import { nextPowerOfTwo } from '../parts/constants.ts';
import { BYTES, type LoadWidth, loadEight } from '../parts/elements.ts';
import { at } from '../parts/lists.ts';
import { loadSequence } from '../parts/sequences.ts';
import { sumOverWarp } from '../parts/warp.ts';

export interface PoolConfig {
  readonly target: Target;
  readonly dtype: DType;
  readonly dim: number;
  readonly loadWidth: LoadWidth;
  /** Rows are tokens of Q, or of K. */
  readonly operand: 'query' | 'key';
  readonly means: boolean;
  /** The mean cosine of all pairs of rows, `less a mean`: after buffer `shift`, a line of each head, was subtracted. */
  readonly similarities: 'none' | 'as they are' | 'less a mean';
}

export const POOL_POINTERS = [
  'sequences',
  'input',
  'shift',
  'means',
  'similarities',
  'batch',
  'head',
  'token',
] as const;
/** Heads, blocks of the longest sequence, rows of a block. */
export const POOL_INTEGERS = ['heads', 'blocks', 'blockRows'] as const;
export const POOL_THREADS = 256;
const WARPS = POOL_THREADS / 32;
/** Loads that a thread has under way at once. */
const AT_ONCE = 2;

/** Threads of a row, each with eight channels. */
const threadsPerRow = (dim: number) => nextPowerOfTwo(Math.ceil(dim / 8));

/** Floats of a mean: zeros follow the last channel. */
export const meanFloats = (dim: number): number => Math.max(32, threadsPerRow(dim) * 8);

export function poolBlocks(config: PoolConfig): Kernel {
  const { target, dtype, dim, loadWidth, operand, means, similarities } = config;
  const b = new KernelBuilder({ name: 'poolBlocks', target, threads: POOL_THREADS });
  const pointer = pointers(b, POOL_POINTERS);
  const integer = integers(b, POOL_INTEGERS);
  const perRow = threadsPerRow(dim);
  const lineBytes = meanFloats(dim) * 4;
  const planes = b.shared('sums of each warp', WARPS * 2, rowMajor(lineBytes));
  const warpSquares = b.shared('squares of each warp', 1, rowMajor(WARPS * 4));
  const shared = b.sharedAddress();

  b.section('which block');
  const thread = b.special('%tid.x');
  const blocks = b.loadParameter(integer.blocks);
  const index = b.special('%ctaid.x');
  const [block, headOfSequence] = divide(b, index, blocks);
  const [head, sequence] = divide(b, headOfSequence, b.loadParameter(integer.heads));
  const places = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  const [start, length] =
    operand === 'query' ? [places.queryStart, places.queryLength] : [places.keyStart, places.keyLength];
  const first = b.mul(block, b.loadParameter(integer.blockRows));
  b.when(b.setp('ge', first, length), () => b.exit());
  const end = b.min(b.add(first, b.loadParameter(integer.blockRows)), length);
  const channel = b.shl(b.and(thread, perRow - 1), 3);
  let source = offset64(b, b.loadPointer(pointer.input), sequence, b.loadParameter(pointer.batch));
  source = offset64(b, source, head, b.loadParameter(pointer.head));
  const stride = b.loadParameter(pointer.token);
  source = offset(b, offset64(b, source, start, stride), channel, BYTES[dtype]);

  const shift: Reg<'f32'>[] = [];
  if (similarities === 'less a mean') {
    const line = offset(b, b.loadPointer(pointer.shift), headOfSequence, lineBytes);
    for (const half of [0, 16]) shift.push(...b.ldVector('f32', 4, offset(b, line, channel, 4), half));
  }

  b.section('rows');
  const eight = () => Array.from({ length: 8 }, () => b.constant('f32', 0));
  const [sums, directions] = [eight(), eight()];
  const rowsAtOnce = POOL_THREADS / perRow;
  const row = b.add(first, b.shr(thread, Math.log2(perRow)));
  b.loop(
    // The lanes of a warp go on together: they add up squares together.
    () => b.voteAny(b.setp('lt', row, end)),
    () => {
      const loaded = Array.from({ length: AT_ONCE }, () => {
        const inside = b.setp('lt', row, end);
        const values = loadEight(b, dtype, loadWidth, offset64(b, source, row, stride), channel, dim, inside);
        b.add(row, rowsAtOnce, row);
        return { inside, values };
      });
      for (const { inside, values } of loaded) {
        if (means) for (const [i, value] of values.entries()) b.add(at(sums, i), value, at(sums, i));
        if (similarities !== 'none') addDirection(b, perRow, inside, values, shift, directions);
      }
    },
  );

  b.section('join the rows');
  const [lane, warp] = [b.and(thread, 31), b.shr(thread, 5)];
  const writes = b.setp('lt', lane, perRow);
  const ownAt = b.add(shared, b.as(b.mad(warp, lineBytes, b.shl(channel, 2)), 'shared'));
  const joined = [...(means ? [sums] : []), ...(similarities === 'none' ? [] : [directions])].map(
    (registers, plane) => {
      for (const register of registers) {
        for (let mask = perRow; mask < 32; mask *= 2) b.add(register, b.shflBfly(register, mask), register);
      }
      const base = planes.base + plane * WARPS * lineBytes;
      b.when(writes, () => {
        for (const half of [0, 4]) b.stVector(registers.slice(half, half + 4), ownAt, base + half * 4);
      });
      return base;
    },
  );
  b.barSync();
  const rows = b.cvt('f32', b.sub(end, first));
  const exists = b.setp('lt', thread, perRow * 8);
  const columnAt = b.add(shared, b.as(b.shl(thread, 2), 'shared'));
  const totals = joined.map((base) => {
    const total = b.constant('f32', 0);
    b.if(exists, () => {
      for (let i = 0; i < WARPS; i++) b.add(total, b.ld('f32', columnAt, base + i * lineBytes), total);
    });
    return total;
  });
  if (means) {
    const line = offset(b, offset(b, b.loadPointer(pointer.means), index, lineBytes), thread, 4);
    const mean = b.divF32(at(totals, 0), rows);
    b.when(b.setp('lt', thread, lineBytes / 4), () => b.st(mean, line));
  }
  if (similarities !== 'none') {
    const direction = totals.at(-1) as Reg<'f32'>;
    const squares = sumOverWarp(b, b.mul(direction, direction));
    const warpAt = b.add(shared, b.as(b.shl(warp, 2), 'shared'));
    b.when(b.setp('eq', lane, 0), () => b.st(squares, warpAt, warpSquares.base));
    b.barSync();
    b.if(b.setp('eq', thread, 0), () => {
      const all = b.constant('f32', 0);
      for (let i = 0; i < WARPS; i++) b.add(all, b.ld('f32', shared, warpSquares.base + i * 4), all);
      b.st(b.divF32(all, b.mul(rows, rows)), offset(b, b.loadPointer(pointer.similarities), index, 4));
    });
  }
  return b.build();
}

/** Adds a row of length 1; a row of zeros has no direction. */
function addDirection(
  b: KernelBuilder,
  perRow: number,
  inside: Reg<'pred'>,
  values: readonly Reg<'f32'>[],
  shift: readonly Reg<'f32'>[],
  directions: readonly Reg<'f32'>[],
): void {
  const shifted = values.map((value, i) => (shift.length === 0 ? value : b.sub(value, at(shift, i))));
  const squares = b.constant('f32', 0);
  for (const value of shifted) b.fma(value, value, squares, squares);
  for (let mask = 1; mask < perRow; mask *= 2) b.add(squares, b.shflBfly(squares, mask), squares);
  const inverse = b.ex2(b.mul(b.lg2(squares), -0.5));
  b.when(b.setp('eq', squares, 0), () => b.set(inverse, 0));
  b.when(b.notPred(inside), () => b.set(inverse, 0));
  for (const [i, value] of shifted.entries()) b.fma(value, inverse, at(directions, i), at(directions, i));
}
