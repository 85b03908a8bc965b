/** Keys split over thread blocks: what the parts are written to, and the launch that joins them. */
import { COMBINE_INTEGERS, COMBINE_POINTERS, COMBINE_ROWS, type CombineConfig, combine } from '../kernels/combine.ts';
import { BYTES } from '../kernels/parts/elements.ts';
import { OUTPUT_STRIDES } from '../kernels/parts/join.ts';
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
import type { BufferName, KernelArgument, KernelLaunch } from './launch.ts';

/** Where an attention kernel writes output and LSE. */
export const outputPointersOf = (context: Context, splits: number) => ({
  output: splits > 1 ? pointer('partialOutput') : outputPointerOf(context),
  ...(splits > 1 ? { lse: pointer('partialLse') } : context.problem.returnLse ? { lse: pointer('lse') } : {}),
});

const outputPointerOf = ({ problem, channels }: Context) => pointer('output', channels.first * BYTES[problem.dtype]);

/**
 * Bytes of partial results up to which the last CTA of a tile of rows joins them: one CTA reads about 100 KB a microsecond, and a launch
 * of its own, spread over the card, takes five.
 */
const MOST_JOINED_BYTES = 2 ** 18;

/**
 * Whether the last CTA of each tile of rows joins the splits.
 *
 * @param tileRows rows of a tile that exist
 */
export const joinsInside = (context: Context, tileRows: number, splits: number): boolean =>
  splits > 1 && splits <= mostJoinedInside(context, tileRows);

/** Splits that the last CTA of a tile of rows joins at most. */
export const mostJoinedInside = ({ scheme }: Context, tileRows: number): number =>
  Math.floor(MOST_JOINED_BYTES / (tileRows * scheme.paddedValueDim * 4));

/** What a kernel whose last CTA joins takes besides; see `joinParameters`. */
export const joinArguments = (context: Context): KernelArgument[] => [
  outputPointerOf(context),
  context.problem.returnLse ? pointer('lse') : pointer(undefined),
  pointer('arrivals'),
];

/** Every fourth channel of the output lies at a multiple of four elements. */
export const hasAlignedFours = ({ problem, channels }: Context): boolean =>
  problem.valueDim % 4 === 0 && channels.of % 4 === 0;

/** Scratch that parts need, of so many rows each. */
export function combineScratch(
  { problem, layout, scheme }: Context,
  splits: number,
  rowsOfPart = problem.queryHeads * layout.paddedQueries,
): Record<BufferName, number> {
  if (splits <= 1) return {};
  const rows = splits * rowsOfPart;
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
    alignedFours: hasAlignedFours(context),
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
        ...inOrder(OUTPUT_STRIDES, outputStridesOf(problem, context.channels.of)),
        ...sinkArgumentsOf(problem),
      ],
    ),
  ];
}
