/**
 * From a problem and a kernel choice to launches, as pure data: what a plan binds to device memory, and what the
 * simulator runs without a device. Quantized operands are padded (every sequence to whole tiles, channels to whole
 * tensor-core steps) and ordered `[head, token, channel]` with the sequences of a batch end to end.
 */
import type { AttentionProblem, MaskLayout } from '../../../attention/problem.ts';
import { UnsupportedOptionError } from '../../../errors.ts';
import type { KernelChoice } from '../../backend.ts';
import { descriptorOf, type Family, MOST_VALUE_DIM } from '../kernel-table.ts';
import { isExact } from '../kernels/mma-sync/config.ts';
import type { planBackward } from './backward.ts';
import type { planBlockMap } from './block-map.ts';
import {
  type Context,
  constantsOf,
  contextOf,
  type DeviceFacts,
  type FamilyLaunches,
  type KeyRoom,
  type KeyValuePart,
  type Tuning,
  type ValueChannels,
} from './context.ts';
import { EXACT } from './exact.ts';
import type { BufferName, KernelLaunch, LaunchSequence } from './launch.ts';
import type { planMerge, planSum } from './merge.ts';
import { MMA_SYNC } from './mma-sync.ts';
import { keyValueBytes, keyValueScratch } from './quantize.ts';
import { visibleKeysLaunches } from './visible-keys.ts';
import { WGMMA } from './wgmma.ts';

/** The launches of each kernel family. */
const FAMILIES: Readonly<Record<Family, FamilyLaunches>> = { 'mma-sync': MMA_SYNC, wgmma: WGMMA, exact: EXACT };

function familyOf(problem: AttentionProblem, choice: KernelChoice): FamilyLaunches {
  const family = FAMILIES[descriptorOf(choice.descriptor.name).family];
  return family.insteadFor?.(problem, choice) ?? family;
}

export interface PlanOptions {
  /** Where quantized K and V have room for keys to come, and from which token on they are filled. */
  readonly room?: KeyRoom;
  /** Replaces parts of what the tables of tiles say: for measurements. */
  readonly overrides?: Partial<Tuning>;
}

export interface KeyValuePlanOptions extends PlanOptions {
  /** The parts to compute, default all; the others must have been computed before, in the same buffers. */
  readonly parts?: readonly KeyValuePart[];
  /** Says which tokens count in means and scales (buffer `mask`); default all. Its offset is that of the first token quantized. */
  readonly tokenMask?: MaskLayout;
}

const ALL_PARTS: readonly KeyValuePart[] = ['means', 'key', 'value'];

function keyValueLaunches(context: Context, parts: readonly KeyValuePart[] = ALL_PARTS): KernelLaunch[] {
  const { problem, layout } = context;
  if (layout.keyTiles * problem.batch * problem.kvHeads === 0 || isExact(context.scheme)) return [];
  return [...visibleKeysLaunches(context), ...familyOf(problem, context.choice).keyValue(context, parts)];
}

/**
 * A whole call: buffers `q`, `k`, `v`, `output` and, where the problem has them, `mask` and `lse`.
 *
 * @throws {InvalidArgumentError} when the problem is too large or the target lacks the kernel's formats
 */
export function planLaunches(
  problem: AttentionProblem,
  choice: KernelChoice,
  device: DeviceFacts,
  { overrides }: Pick<PlanOptions, 'overrides'> = {},
): LaunchSequence {
  const family = familyOf(problem, choice);
  const parts = partsOf(problem).map(([part, channels]) => {
    const context = contextOf(family, part, choice, device, { overrides, whole: true, channels });
    const attend = family.attend(context);
    return {
      scratch: { ...keyValueBytes(context), ...keyValueScratch(context), ...attend.scratch },
      zeroed: attend.zeroed ?? {},
      constants: constantsOf(context),
      launches: [...keyValueLaunches(context), ...attend.launches],
    };
  });
  // One part after the other: they share their memory.
  const largestOf = (sizes: readonly Readonly<Record<BufferName, number>>[]) => {
    const largest: Record<BufferName, number> = {};
    for (const [name, bytes] of sizes.flatMap((own) => Object.entries(own))) {
      largest[name] = Math.max(bytes, largest[name] ?? 0);
    }
    return largest;
  };
  const scratch = largestOf(parts.map((part) => part.scratch));
  const zeroed = largestOf(parts.map((part) => part.zeroed));
  const constants = parts[0]?.constants ?? {};
  return { scratch, zeroed, constants, launches: parts.flatMap(({ launches }) => launches) };
}

/**
 * The problem by parts of the channels of V, which are attended to one after the other: a thread's registers hold the sums of
 * {@link MOST_VALUE_DIM}. Scores are computed anew for each.
 */
function partsOf(problem: AttentionProblem): (readonly [part: AttentionProblem, channels: ValueChannels])[] {
  const { valueDim, v } = problem;
  // Parts of an odd number start at odd elements, which kernels know of odd numbers of channels alone.
  const most = valueDim % 2 === 0 || valueDim <= MOST_VALUE_DIM ? MOST_VALUE_DIM : MOST_VALUE_DIM - 1;
  return Array.from({ length: Math.ceil(valueDim / most) }, (_, i) => {
    const first = i * most;
    const part = {
      ...problem,
      valueDim: Math.min(most, valueDim - first),
      v: { ...v, offset: v.offset + first },
    };
    return [part, { first, of: valueDim }] as const;
  });
}

/** Keys and values that are kept have all channels in one buffer. */
function requireOnePart({ valueDim, headDim }: AttentionProblem, { descriptor: { name } }: KernelChoice): void {
  const size = Math.max(valueDim, headDim);
  if (size <= MOST_VALUE_DIM) return;
  const expected = `head dims up to ${MOST_VALUE_DIM} where keys and values are prepared`;
  throw new UnsupportedOptionError(name, valueDim > MOST_VALUE_DIM ? 'v' : 'q', expected, String(size));
}

/**
 * The part of a call that depends on K and V only: buffers `k`, `v` in, `KEY_VALUE_BUFFERS` out, whose sizes are
 * `kept`.
 */
export function planKeyValue(
  problem: AttentionProblem,
  choice: KernelChoice,
  device: DeviceFacts,
  { room, overrides, parts, tokenMask }: KeyValuePlanOptions = {},
): LaunchSequence & { readonly kept: Readonly<Record<BufferName, number>> } {
  requireOnePart(problem, choice);
  const context = contextOf(familyOf(problem, choice), problem, choice, device, { room, overrides, tokenMask });
  return {
    kept: keyValueBytes(context),
    scratch: keyValueScratch(context),
    constants: constantsOf(context),
    launches: keyValueLaunches(context, parts),
  };
}

/**
 * The rest of it: attends to the buffers that {@link planKeyValue} filled, over the same room. (`smoothQ` reads `k`
 * once more.)
 */
export function planAttend(
  problem: AttentionProblem,
  choice: KernelChoice,
  device: DeviceFacts,
  { room, overrides }: PlanOptions = {},
): LaunchSequence {
  requireOnePart(problem, choice);
  const family = familyOf(problem, choice);
  const context = contextOf(family, problem, choice, device, { room, overrides });
  return { ...family.attend(context), constants: constantsOf(context) };
}

/** Makes launches of problems, without touching a device; tests put others in place of the kernels of this package. */
export interface LaunchPlanner {
  readonly planLaunches: typeof planLaunches;
  readonly planKeyValue: typeof planKeyValue;
  readonly planAttend: typeof planAttend;
  readonly planBackward: typeof planBackward;
  readonly planBlockMap: typeof planBlockMap;
  readonly planMerge: typeof planMerge;
  readonly planSum: typeof planSum;
}
