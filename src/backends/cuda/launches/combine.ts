/** Keys split over thread blocks: what the parts are written to, and the launch that joins them. */
import {
  COMBINE_INTEGERS,
  COMBINE_POINTERS,
  COMBINE_ROWS,
  COMBINE_STRIDES,
  type CombineConfig,
  combine,
} from '../kernels/combine.ts';
import { BYTES } from '../kernels/parts/elements.ts';
import {
  inOrder,
  launch,
  moduleOf,
  outputStridesOf,
  pointer,
  sinkArgumentsOf,
  sinkFormatOf,
  u32,
} from './arguments.ts';
import type { Context } from './context.ts';
import type { BufferName, KernelLaunch } from './launch.ts';

/** Where an attention kernel writes output and LSE. */
export const outputPointersOf = (context: Context, splits: number) => ({
  output: splits > 1 ? pointer('partialOutput') : outputPointerOf(context),
  ...(splits > 1 ? { lse: pointer('partialLse') } : context.problem.returnLse ? { lse: pointer('lse') } : {}),
});

const outputPointerOf = ({ problem, channels }: Context) => pointer('output', channels.first * BYTES[problem.dtype]);

/** Scratch that parts need. */
export function combineScratch({ problem, layout, scheme }: Context, splits: number): Record<BufferName, number> {
  if (splits <= 1) return {};
  const rows = splits * problem.queryHeads * layout.paddedQueries;
  return { partialOutput: rows * scheme.paddedValueDim * 4, partialLse: rows * 4 };
}

/** Joins the splits' `partialOutput` and `partialLse`; no launch without splits. */
export function combineLaunches(context: Context, splits: number): KernelLaunch[] {
  const { problem, rowsAreHeads, device, layout, scheme } = context;
  if (splits <= 1) return [];
  const { batch, queryHeads, dtype, valueDim } = problem;
  const { target } = device;
  const combineConfig: CombineConfig = {
    target,
    valueDim,
    paddedValueDim: scheme.paddedValueDim,
    outputType: dtype,
    lse: problem.returnLse,
    sinks: sinkFormatOf(problem),
    rowsAreHeads: rowsAreHeads && problem.sinks !== undefined,
  };
  const rowBlocks = Math.ceil(problem.queryLength / COMBINE_ROWS);
  return [
    launch(
      'combine splits',
      moduleOf('combine', combine, combineConfig),
      'combine',
      rowBlocks * queryHeads * batch,
      COMBINE_ROWS * 32,
      0,
      [
        ...inOrder(COMBINE_POINTERS, {
          sequences: pointer('sequences'),
          partialOutput: pointer('partialOutput'),
          partialLse: pointer('partialLse'),
          output: outputPointerOf(context),
          ...(problem.returnLse ? { lse: pointer('lse') } : {}),
        }),
        ...inOrder(COMBINE_INTEGERS, {
          queryHeads: u32(queryHeads),
          rowBlocks: u32(rowBlocks),
          splits: u32(splits),
          paddedQueries: u32(layout.paddedQueries),
        }),
        ...inOrder(COMBINE_STRIDES, outputStridesOf(problem, context.channels.of)),
        ...sinkArgumentsOf(problem),
      ],
    ),
  ];
}
