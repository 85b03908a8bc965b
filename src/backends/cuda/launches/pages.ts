/** Launches over keys and values in pages: the pool is laid out as one sequence of all its pages and one more, of keys that are not finite. */
import type { AttentionProblem } from '../../../attention/problem.ts';
import { UnsupportedOptionError } from '../../../errors.ts';
import type { OperandLayout } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import { BLOCK_K } from '../kernels/mma-sync/config.ts';
import { GATHER_INTEGERS, GATHER_POINTERS, GATHER_THREADS, gatherPages } from '../kernels/pages/gather.ts';
import { BYTES } from '../kernels/parts/elements.ts';
import { PAGE_INTEGERS, PAGE_POINTERS } from '../kernels/parts/pages.ts';
import { SEQUENCE_INTS } from '../kernels/parts/sequences.ts';
import { inOrder, launch, moduleOf, pointer, strideBytes, u32 } from './arguments.ts';
import { type Context, constantsOf, contextOf, type DeviceFacts, loadWidthOf, type PageLayout } from './context.ts';
import type { BufferName, KernelLaunch, LaunchSequence } from './launch.ts';
import { MMA_SYNC } from './mma-sync.ts';
import { keyValueBytes, statisticsLaunches } from './quantize.ts';

/** What every launch over a pool knows. */
export interface PoolFacts {
  readonly choice: KernelChoice;
  readonly device: DeviceFacts;
  readonly pages: PageLayout;
}

/** The context of a problem over a pool, whose keys lie among those of all pages. */
function contextOfPool(problem: AttentionProblem, { choice, device, pages }: PoolFacts): Context {
  const context = contextOf(MMA_SYNC, problem, choice, device, { pages });
  if (context.scheme.pvFormat === 'e4m3-as-f16') {
    // There V is unpacked to FP16 and summed over all tiles in one place, which leaves no room for a scale of each.
    const { name } = choice.descriptor;
    const expected = 'V in FP8 in pages only where mma.sync multiplies FP8: compute capability 8.9 and later, not 9.0';
    throw new UnsupportedOptionError(name, 'options.kernel', expected, `'${name}' on ${device.target}`);
  }
  const paddedKeys = (pages.poolPages + 1) * pages.pageTokens;
  if (problem.kvHeads * paddedKeys >= 2 ** 31) {
    const expected = 'fewer than 2^31 tokens over all pages and heads';
    throw new UnsupportedOptionError(
      choice.descriptor.name,
      'options.pages',
      expected,
      `${problem.kvHeads * paddedKeys}`,
    );
  }
  const table = context.layout.table.slice();
  // The table of pages says where keys are.
  for (let row = 0; row < table.length; row += SEQUENCE_INTS) table[row + 5] = 0;
  return { ...context, layout: { ...context.layout, paddedKeys, table } };
}

/** Sizes of a pool's buffers: codes and scales of all pages, and the unfinished tile of each as it came. */
export function poolBytes(problem: AttentionProblem, facts: PoolFacts): Readonly<Record<BufferName, number>> {
  const context = contextOfPool({ ...problem, batch: 1, keyLength: 0 }, facts);
  const { kvHeads, headDim, valueDim, dtype } = problem;
  const kept = kvHeads * facts.pages.poolPages * BLOCK_K * BYTES[dtype];
  return { ...keyValueBytes(context), keptKey: kept * headDim, keptValue: kept * valueDim };
}

const tiles = (rows: number, dim: number): OperandLayout => ({
  offset: 0,
  batchStride: 0,
  headStride: rows * BLOCK_K * dim,
  tokenStride: dim,
});

/** Rows of tiles that lie one behind the other, as problems of one tile each: buffers `gatheredKey` and `gatheredValue`. */
function quantizeTiles(problem: AttentionProblem, rows: number, facts: PoolFacts): KernelLaunch[] {
  const { headDim, valueDim } = problem;
  const [k, v] = [tiles(rows, headDim), tiles(rows, valueDim)];
  const context = contextOfPool({ ...problem, batch: rows, keyLength: BLOCK_K, k, v }, facts);
  const named = { k: 'gatheredKey', v: 'gatheredValue' } as const;
  return MMA_SYNC.keyValue(context, ['key', 'value']).map((each) => ({
    ...each,
    arguments: each.arguments.map((given) =>
      given.kind === 'pointer' && (given.buffer === 'k' || given.buffer === 'v')
        ? { ...given, buffer: named[given.buffer] }
        : given,
    ),
  }));
}

const gatheredBytes = ({ kvHeads, headDim, valueDim, dtype }: AttentionProblem, rows: number) => ({
  gatheredKey: kvHeads * rows * BLOCK_K * headDim * BYTES[dtype],
  gatheredValue: kvHeads * rows * BLOCK_K * valueDim * BYTES[dtype],
});

/**
 * Quantizes the page behind the last from what is not finite: buffers `gatheredKey` and `gatheredValue` of one page, in and not scratch.
 */
export function planLastPage(
  problem: AttentionProblem,
  facts: PoolFacts,
): LaunchSequence & {
  readonly given: Readonly<Record<BufferName, number>>;
} {
  const { pageTokens, poolPages } = facts.pages;
  const rows = pageTokens / BLOCK_K;
  const table = new Int32Array(rows * SEQUENCE_INTS);
  for (let row = 0; row < rows; row++) {
    table.set(
      [0, 0, row * BLOCK_K, BLOCK_K, 0, poolPages * pageTokens + row * BLOCK_K, 0, BLOCK_K],
      row * SEQUENCE_INTS,
    );
  }
  return {
    given: gatheredBytes(problem, rows),
    scratch: {},
    constants: { sequences: new Uint8Array(table.buffer) },
    launches: quantizeTiles(problem, rows, facts),
  };
}

/** The vector that smooths K, from the first sequence's keys: buffer `keyMean`. Nothing without smoothing. */
export function planPoolMean(problem: AttentionProblem, facts: PoolFacts): LaunchSequence {
  const context = contextOf(MMA_SYNC, { ...problem, batch: 1 }, facts.choice, facts.device, {});
  return { scratch: {}, constants: constantsOf(context), launches: [...statisticsLaunches(context, false)] };
}

/** Appends `problem.keyLength` tokens to each sequence: buffers `k`, `v`, `pages`, `lengths` in, those of the pool out. */
export function planAppendPages(problem: AttentionProblem, facts: PoolFacts): LaunchSequence {
  const { batch, kvHeads, keyLength, headDim, valueDim, dtype, k, v } = problem;
  const { device, pages } = facts;
  const { target, pointerAlignment = 16 } = device;
  // The first and the last may be touched in part.
  const tilesOfSequence = Math.floor((keyLength + BLOCK_K - 2) / BLOCK_K) + 1;
  const rows = batch * tilesOfSequence;
  const module = moduleOf('gatherPages', gatherPages, {
    ...{ target, dtype, headDim, valueDim },
    loadWidths: {
      key: loadWidthOf(k, headDim, dtype, pointerAlignment),
      value: loadWidthOf(v, valueDim, dtype, pointerAlignment),
    },
    pageTokens: pages.pageTokens,
  });
  const gather = launch('gather tiles', module, 'gatherPages', rows * kvHeads, GATHER_THREADS, 0, [
    ...inOrder(GATHER_POINTERS, {
      k: pointer('k', k.offset * BYTES[dtype]),
      v: pointer('v', v.offset * BYTES[dtype]),
      ...{ keptKey: pointer('keptKey'), keptValue: pointer('keptValue') },
      ...{ gatheredKey: pointer('gatheredKey'), gatheredValue: pointer('gatheredValue') },
      sequences: pointer('sequences'),
    }),
    ...inOrder(GATHER_INTEGERS, {
      ...{ heads: u32(kvHeads), rows: u32(rows) },
      ...{ tilesOfSequence: u32(tilesOfSequence), appended: u32(keyLength) },
    }),
    ...strideBytes(k, dtype),
    ...strideBytes(v, dtype),
    ...inOrder(PAGE_POINTERS, { pages: pointer('pages'), lengths: pointer('lengths') }),
    ...inOrder(PAGE_INTEGERS, { poolPages: u32(pages.poolPages), pagesPerSequence: u32(pages.pagesPerSequence) }),
  ]);
  return {
    scratch: { ...gatheredBytes(problem, rows), sequences: rows * SEQUENCE_INTS * 4 },
    constants: {},
    launches: [gather, ...quantizeTiles(problem, rows, facts)],
  };
}

/** Attends to a pool; `problem.keyLength` is what a row of the table has room for. */
export function planAttendPages(problem: AttentionProblem, facts: PoolFacts): LaunchSequence {
  const context = contextOfPool(problem, facts);
  return { ...MMA_SYNC.attend(context), constants: constantsOf(context) };
}

/** Makes the launches of a pool; tests put others in place of it. */
export interface PagePlanner {
  readonly poolBytes: typeof poolBytes;
  readonly planLastPage: typeof planLastPage;
  readonly planPoolMean: typeof planPoolMean;
  readonly planAppendPages: typeof planAppendPages;
  readonly planAttendPages: typeof planAttendPages;
}

export const PAGE_PLANNER: PagePlanner = { poolBytes, planLastPage, planPoolMean, planAppendPages, planAttendPages };
