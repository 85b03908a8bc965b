/**
 * Joins the partial results of the splits of the keys: each split's output is normalized by its own sum, so they are
 * averaged with weights 2^(lse - max lse). One warp takes one row.
 */
import type { DType } from '../../../tensor/dtype.ts';
import { KernelBuilder } from '../ptx/builder.ts';
import type { Target } from '../ptx/targets.ts';
import type { Kernel, Reg } from '../ptx/types.ts';
import { divide, integers, offset, offset64, pointers } from './parts/addresses.ts';
import { BYTES } from './parts/elements.ts';
import { loadSequence } from './parts/sequences.ts';
import { joinSink, loadSink, sinkParameters } from './parts/sinks.ts';

export interface CombineConfig {
  readonly target: Target;
  readonly valueDim: number;
  readonly paddedValueDim: number;
  readonly outputType: DType;
  readonly lse: boolean;
  /** Dtype of the sinks. */
  readonly sinks: 'none' | DType;
  /** With sinks: rows are heads over one token, each of which has its own. */
  readonly rowsAreHeads: boolean;
}

/**
 * `partialOutput`: `[split, head, row, paddedValueDim]` float32; `partialLse`: `[split, head, row]` float32, base 2.
 */
export const COMBINE_POINTERS = ['sequences', 'partialOutput', 'partialLse', 'output', 'lse'] as const;
export const COMBINE_INTEGERS = ['queryHeads', 'rowBlocks', 'splits', 'paddedQueries'] as const;
export const COMBINE_STRIDES = ['outputBatch', 'outputHead', 'outputToken', 'lseBatch', 'lseHead'] as const;
/** Rows of a CTA, one warp each. */
export const COMBINE_ROWS = 4;
/** Splits whose loads are under way at once. */
const SPLITS_AT_ONCE = 4;

export function combine(config: CombineConfig): Kernel {
  const { target, valueDim, paddedValueDim, outputType, lse } = config;
  const b = new KernelBuilder({ name: 'combine', target, threads: COMBINE_ROWS * 32 });
  const pointer = pointers(b, COMBINE_POINTERS);
  const integer = integers(b, COMBINE_INTEGERS);
  const strides = pointers(b, COMBINE_STRIDES);
  const sinks = sinkParameters(b, config.sinks);

  b.section('which row');
  const thread = b.special('%tid.x');
  const lane = b.and(thread, 31);
  const queryHeads = b.loadParameter(integer.queryHeads);
  const [rowBlock, headAndSequence] = divide(b, b.special('%ctaid.x'), b.loadParameter(integer.rowBlocks));
  const [head, sequence] = divide(b, headAndSequence, queryHeads);
  const table = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  const row = b.mad(rowBlock, COMBINE_ROWS, b.shr(thread, 5));
  b.when(b.setp('ge', row, table.queryLength), () => b.exit());
  const paddedQueries = b.loadParameter(integer.paddedQueries);
  const splits = b.loadParameter(integer.splits);
  const partialRow = b.add(b.mad(head, paddedQueries, table.paddedQueryStart), row);
  const rowsOfSplit = b.mul(paddedQueries, queryHeads);

  b.section('largest logsumexp');
  const lseBase = offset(b, b.loadPointer(pointer.partialLse), partialRow, 4);
  const lseStep = b.as(b.mulWide(rowsOfSplit, 4), 'global');
  const maximum = b.constant('f32', Number.NEGATIVE_INFINITY);
  // Each lane looks at every 32nd: one load after the other would take its latency as often.
  const split = b.mov(lane);
  b.loop(
    () => b.setp('lt', split, splits),
    () => {
      const own = b.add(lseBase, b.as(b.mul(b.cvt('u64', split), b.as(lseStep, 'u64')), 'global'));
      b.max(maximum, b.ld('f32', own), maximum);
      b.add(split, 32, split);
    },
  );
  for (let mask = 1; mask < 32; mask *= 2) b.max(maximum, b.shflBfly(maximum, mask), maximum);
  const reference = b.selp(0, maximum, b.setp('eq', maximum, Number.NEGATIVE_INFINITY));

  b.section('weighted mean');
  const channels = Array.from({ length: Math.ceil(valueDim / 32) }, (_, i) => i * 32);
  const sums = channels.map(() => b.constant('f32', 0));
  const total = b.constant('f32', 0);
  const source = b.add(
    offset(b, b.loadPointer(pointer.partialOutput), partialRow, paddedValueDim * 4),
    b.as(b.mulWide(lane, 4), 'global'),
  );
  const sourceStep = b.as(b.mulWide(rowsOfSplit, paddedValueDim * 4), 'global');
  b.set(split, 0);
  const lseAt = b.mov(lseBase);
  b.loop(
    () => b.setp('lt', split, splits),
    () => {
      const loaded = Array.from({ length: SPLITS_AT_ONCE }, (_, ahead) => {
        const inside = b.setp('lt', b.add(split, ahead), splits);
        const partLse = b.constant('f32', Number.NEGATIVE_INFINITY);
        b.when(inside, () => b.ld('f32', lseAt, 0, { into: partLse }));
        const values = channels.map((channel) => {
          const value = b.constant('f32', 0);
          const has =
            channel + 32 <= paddedValueDim ? inside : b.andPred(inside, b.setp('lt', lane, paddedValueDim - channel));
          b.when(has, () => b.ld('f32', source, channel * 4, { into: value }));
          return value;
        });
        b.add(source, sourceStep, source);
        b.add(lseAt, lseStep, lseAt);
        return { inside, partLse, values };
      });
      for (const { inside, partLse, values } of loaded) {
        const weight = b.ex2(b.sub(partLse, reference));
        b.when(inside, () => {
          b.add(total, weight, total);
          values.forEach((value, i) => {
            b.fma(value, weight, sums[i] as Reg<'f32'>, sums[i]);
          });
        });
      }
      b.add(split, SPLITS_AT_ONCE, split);
    },
  );

  b.section('store');
  const empty = b.setp('eq', total, 0);
  const inverse = b.rcp(total);
  let joint: Reg<'f32'> | undefined;
  if (sinks !== undefined) {
    const inside = b.setp('lt', row, table.queryLength);
    const ofRow = config.rowsAreHeads ? b.add(b.mul(head, table.queryLength), row) : head;
    const joined = joinSink(b, b.add(b.lg2(total), reference), loadSink(b, sinks, ofRow, inside));
    b.mul(inverse, joined.keep, inverse);
    joint = joined.lse;
  }
  b.when(empty, () => b.set(inverse, 0));
  const token = b.add(table.queryStart, row);
  let destination = offset64(b, b.loadPointer(pointer.output), sequence, b.loadParameter(strides.outputBatch));
  destination = offset64(b, destination, head, b.loadParameter(strides.outputHead));
  destination = offset64(b, destination, token, b.loadParameter(strides.outputToken));
  destination = offset(b, destination, lane, BYTES[outputType]);
  channels.forEach((channel, i) => {
    const value = b.mul(sums[i] as Reg<'f32'>, inverse);
    const stored = outputType === 'float32' ? value : b.cvt(outputType === 'float16' ? 'f16' : 'bf16', value);
    b.when(b.setp('lt', lane, valueDim - channel), () => b.st(stored, destination, channel * BYTES[outputType]));
  });
  if (lse) {
    const value = b.mul(joint ?? b.add(b.lg2(total), reference), Math.LN2);
    if (joint === undefined) b.when(empty, () => b.set(value, Number.NEGATIVE_INFINITY));
    let at = offset64(b, b.loadPointer(pointer.lse), sequence, b.loadParameter(strides.lseBatch));
    at = offset(b, offset64(b, at, head, b.loadParameter(strides.lseHead)), token, 4);
    b.when(b.setp('eq', lane, 0), () => b.st(value, at));
  }
  return b.build();
}
