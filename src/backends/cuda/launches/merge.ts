/** Partial outputs, each over a part of the keys, become one; gradients are added. */
import type { DType } from '../../../tensor/dtype.ts';
import {
  MERGE_INTEGERS,
  MERGE_POINTERS,
  MERGE_ROWS,
  MERGE_STRIDES,
  type MergeConfig,
  merge,
  mergePart,
  SUM_POINTERS,
  type SumConfig,
  sum,
} from '../kernels/merge.ts';
import { BYTES } from '../kernels/parts/elements.ts';
import type { Target } from '../ptx/targets.ts';
import { inOrder, launch, moduleOf, pointer, u32, u64 } from './arguments.ts';
import type { LaunchSequence } from './launch.ts';

export interface MergeProblem {
  readonly batch: number;
  readonly heads: number;
  readonly rows: number;
  readonly valueDim: number;
  readonly dtype: DType;
  /** Elements between batch entries, heads and rows of the output. */
  readonly strides: readonly [batch: number, head: number, row: number];
  /** The first row and the number of rows of each part, 1 to `MERGE_PARTS` of them. */
  readonly parts: readonly { readonly start: number; readonly rows: number }[];
  readonly returnLse: boolean;
}

/** Buffers `partOutput0`, `partLse0`, ... in, `output` and, where asked for, `lse` out. */
export function planMerge(problem: MergeProblem, target: Target): LaunchSequence {
  const { batch, heads, rows, valueDim, dtype, strides, parts, returnLse } = problem;
  const config: MergeConfig = { target, valueDim, dtype, parts: parts.length, lse: returnLse };
  const rowBlocks = Math.ceil(rows / MERGE_ROWS);
  const [outputBatch, outputHead, outputToken] = strides.map((stride) => u64(stride * BYTES[dtype]));
  const merged = launch(
    'merge parts',
    moduleOf('merge', merge, config),
    'merge',
    rowBlocks * heads * batch,
    MERGE_ROWS * 32,
    0,
    [
      ...parts.flatMap(({ start, rows: ofPart }, i) => {
        const { output, lse } = mergePart(i);
        return [pointer(output), pointer(lse), u32(start), u32(ofPart)];
      }),
      ...inOrder(MERGE_POINTERS, { output: pointer('output'), ...(returnLse && { lse: pointer('lse') }) }),
      ...inOrder(MERGE_INTEGERS, { heads: u32(heads), rowBlocks: u32(rowBlocks), rows: u32(rows) }),
      ...inOrder(MERGE_STRIDES, { outputBatch, outputHead, outputToken } as never),
    ],
  );
  return { scratch: {}, constants: {}, launches: rowBlocks * heads * batch === 0 ? [] : [merged] };
}

export interface SumProblem extends Omit<MergeProblem, 'valueDim' | 'returnLse'> {
  readonly dim: number;
}

/** Buffers `partOutput0`, `partOutput1`, ... in, float32 `[B,H,rows,dim]` contiguous; `output` out. */
export function planSum(problem: SumProblem, target: Target): LaunchSequence {
  const { batch, heads, rows, dim, dtype, strides, parts } = problem;
  const config: SumConfig = { target, dim, dtype, parts: parts.length };
  const rowBlocks = Math.ceil(rows / MERGE_ROWS);
  const grid = rowBlocks * heads * batch;
  const [outputBatch, outputHead, outputToken] = strides.map((stride) => u64(stride * BYTES[dtype]));
  const added = launch('sum parts', moduleOf('sum', sum, config), 'sum', grid, MERGE_ROWS * 32, 0, [
    ...parts.flatMap(({ start, rows: ofPart }, i) => [pointer(mergePart(i).output), u32(start), u32(ofPart)]),
    ...inOrder(SUM_POINTERS, { output: pointer('output') }),
    ...inOrder(MERGE_INTEGERS, { heads: u32(heads), rowBlocks: u32(rowBlocks), rows: u32(rows) }),
    ...inOrder(MERGE_STRIDES, { outputBatch, outputHead, outputToken } as never),
  ]);
  return { scratch: {}, constants: {}, launches: grid === 0 ? [] : [added] };
}
