/** Joins the partial results of the splits of the keys: one warp takes one row. */
import type { DType } from '../../../tensor/dtype.ts';
import { KernelBuilder } from '../ptx/builder.ts';
import type { Target } from '../ptx/targets.ts';
import type { Kernel } from '../ptx/types.ts';
import { divide, integers, pointers } from './parts/addresses.ts';
import { type JoinConfig, joinRow, OUTPUT_STRIDES } from './parts/join.ts';
import { loadSequence } from './parts/sequences.ts';
import { sinkParameters } from './parts/sinks.ts';

export interface CombineConfig extends JoinConfig {
  readonly target: Target;
  /** Dtype of the sinks. */
  readonly sinks: 'none' | DType;
}

export const COMBINE_POINTERS = ['sequences', 'partialOutput', 'partialLse', 'output', 'lse'] as const;
export const COMBINE_INTEGERS = ['queryHeads', 'rowBlocks', 'splits', 'paddedQueries'] as const;
/** Rows of a CTA, one warp each. */
export const COMBINE_ROWS = 4;

export function combine(config: CombineConfig): Kernel {
  const b = new KernelBuilder({ name: 'combine', target: config.target, threads: COMBINE_ROWS * 32 });
  const pointer = pointers(b, COMBINE_POINTERS);
  const integer = integers(b, COMBINE_INTEGERS);
  const strides = pointers(b, OUTPUT_STRIDES);
  const sinks = sinkParameters(b, config.sinks);

  b.section('which row');
  const thread = b.special('%tid.x');
  const lane = b.and(thread, 31);
  const queryHeads = b.loadParameter(integer.queryHeads);
  const [rowBlock, headAndSequence] = divide(b, b.special('%ctaid.x'), b.loadParameter(integer.rowBlocks));
  const [head, sequence] = divide(b, headAndSequence, queryHeads);
  const { queryStart, queryLength, paddedQueryStart } = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  const row = b.mad(rowBlock, COMBINE_ROWS, b.shr(thread, 5));
  b.when(b.setp('ge', row, queryLength), () => b.exit());
  const paddedQueries = b.loadParameter(integer.paddedQueries);
  const place = {
    partialOutput: b.loadPointer(pointer.partialOutput),
    partialLse: b.loadPointer(pointer.partialLse),
    output: b.loadPointer(pointer.output),
    lse: () => b.loadPointer(pointer.lse),
    splits: b.loadParameter(integer.splits),
    rowsOfSplit: b.mul(paddedQueries, queryHeads),
    ...{ strides, sinks, lane },
  };
  const partialRow = b.add(b.mad(head, paddedQueries, paddedQueryStart), row);
  joinRow(b, config, place, { partialRow, sequence, head, row, queryStart, queryLength });
  return b.build();
}
