/** Launches that find out which keys a mask hides from every row, and where the quantizers read it. */
import type { AttentionProblem } from '../../../attention/problem.ts';
import {
  MASK_STRIDES,
  maskRowLimits,
  maskVisibleKeys,
  ROW_LIMITS_INTEGERS,
  ROW_LIMITS_POINTERS,
  ROW_LIMITS_THREADS,
  VISIBLE_KEYS_INTEGERS,
  VISIBLE_KEYS_POINTERS,
  type VisibleKeysConfig,
} from '../kernels/quantize/visible-keys.ts';
import { inOrder, launch, maskArgumentsOf, maskFormatOf, moduleOf, pointer, u32 } from './arguments.ts';
import type { Context } from './context.ts';
import type { BufferName, KernelArgument, KernelLaunch } from './launch.ts';

export const visibleKeysPointer = ({ hiddenKeys }: Context): { visibleKeys?: KernelArgument } =>
  hiddenKeys === 'none' ? {} : { visibleKeys: pointer('visibleKeys') };

/** Heads and rows that the mask has of its own: 1 where it broadcasts. */
function maskExtentOf({ mask, queryHeads, queryLength }: AttentionProblem) {
  const [, head, row] = mask?.strides ?? [0, 0, 0, 0];
  return { heads: head === 0 ? 1 : queryHeads, rows: row === 0 ? 1 : queryLength };
}

/** Buffers that {@link visibleKeysLaunches} fills. */
export function visibleKeysScratch({ problem, layout, hiddenKeys }: Context): Record<BufferName, number> {
  if (hiddenKeys === 'none') return {};
  const { heads, rows } = maskExtentOf(problem);
  const additive = problem.mask?.kind === 'additive';
  return {
    visibleKeys: ((heads === 1 ? 1 : problem.kvHeads) * layout.paddedKeys) / 8,
    ...(additive ? { rowLimits: problem.batch * heads * rows * 4 } : {}),
  };
}

/** Which keys the mask hides from every row: one launch, or two where it is additive; none without a mask. */
export function visibleKeysLaunches(context: Context): KernelLaunch[] {
  const { problem, device, layout, hiddenKeys } = context;
  const { batch, kvHeads, queryHeads } = problem;
  const { target } = device;
  const mask = maskFormatOf(problem);
  if (mask === 'none' || hiddenKeys === 'none' || problem.queryLength === 0) return [];
  const extent = maskExtentOf(problem);
  const { strides, mask: maskPointer } = maskArgumentsOf(problem);
  const additive = mask !== 'boolean';
  const pointers = {
    sequences: pointer('sequences'),
    mask: maskPointer,
    ...(additive ? { rowLimits: pointer('rowLimits') } : {}),
  };
  const integers = { maskHeads: u32(extent.heads), maskRows: u32(extent.rows) };
  const launches: KernelLaunch[] = [];
  if (additive) {
    const module = moduleOf('maskRowLimits', maskRowLimits, { target, mask });
    const blocks = extent.rows * extent.heads * batch;
    launches.push(
      launch('limits of the mask', module, 'maskRowLimits', blocks, ROW_LIMITS_THREADS, module.kernel().sharedBytes, [
        ...inOrder(ROW_LIMITS_POINTERS, pointers),
        ...inOrder(ROW_LIMITS_INTEGERS, integers),
        ...inOrder(MASK_STRIDES, strides),
      ]),
    );
  }
  const config: VisibleKeysConfig = { target, mask, hidden: hiddenKeys, warps: extent.rows === 1 ? 1 : 16 };
  const module = moduleOf('maskVisibleKeys', maskVisibleKeys, config);
  const heads = extent.heads === 1 ? 1 : kvHeads;
  // A word holds 32 keys, so a tile has two.
  const words = 2 * layout.keyTiles;
  const threads = 32 * config.warps;
  launches.push(
    launch('visible keys', module, 'maskVisibleKeys', words * heads * batch, threads, module.kernel().sharedBytes, [
      ...inOrder(VISIBLE_KEYS_POINTERS, { ...pointers, visibleKeys: pointer('visibleKeys') }),
      ...inOrder(VISIBLE_KEYS_INTEGERS, {
        ...integers,
        heads: u32(heads),
        words: u32(words),
        groupHeads: u32(extent.heads === 1 ? 1 : queryHeads / kvHeads),
        paddedTokens: u32(layout.paddedKeys),
      }),
      ...inOrder(MASK_STRIDES, strides),
    ]),
  );
  return launches;
}
