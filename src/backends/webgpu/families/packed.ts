/** The kernel for few queries over many keys, which packs the query heads of a key head: when, and in which sizes. */
import type { AttentionProblem } from '../../../attention/problem.ts';
import type { Capabilities } from '../capabilities.ts';
import { type PackedShape, packedAttentionKernel, packedTiling } from '../kernels/attention-packed.ts';
import { dotInt8 } from '../kernels/attention-tiled.ts';
import { type KeyValueLayout, padDim } from '../kernels/layout.ts';
import type { ValueScaling } from '../kernels/prepare.ts';
import type { Forced } from './choose.ts';
import type { AttentionVariant } from './family.ts';

/** From more queries on, the families' tiles share what they read of K and V among enough rows. */
const MOST_QUERIES = 4;

/** Below this, joining partial results costs more than is gained. */
const FEWEST_KEYS = 128;

/** Packed rows of a workgroup: each takes registers for its sums of P V. */
const MOST_ROWS = 8;

/** Keys of a step, the first that fits: many keys to a barrier, or little workgroup memory. */
const STEPS = [128, 64] as const;

/** Scores of a step beyond which a thread would hold too many sums of Q K^T. */
const MOST_SCORES = 512;

interface KeysHeld {
  readonly layout: KeyValueLayout;
  readonly format: 'int8' | 'fp4';
  readonly values: ValueScaling;
}

/**
 * The variant's rows: those of all tiles of a key head are alike, so that as few as possible are left over.
 *
 * @param packed rows of a key head in the longest sequence
 */
const rowsOf = (packed: number): number => Math.ceil(packed / Math.ceil(packed / MOST_ROWS));

/** Sizes for a device; undefined where none fits its workgroup memory. */
export function packedShape(
  { workgroupBytes }: Pick<Capabilities, 'workgroupBytes'>,
  packed: number,
  dims: Pick<AttentionProblem, 'headDim' | 'valueDim'>,
  layout: KeyValueLayout,
): PackedShape | undefined {
  const rows = rowsOf(packed);
  const fits = (keys: number) =>
    rows * keys <= MOST_SCORES &&
    packedTiling({ rows, keys }, padDim(dims.headDim), padDim(dims.valueDim), layout).bytes <= workgroupBytes;
  const keys = STEPS.find(fits);
  return keys === undefined ? undefined : { rows, keys };
}

/**
 * The packed kernel in place of a family's own, for queries that it serves better: keys in INT8 and values in float16,
 * and where neither a variant nor sums in float16 are asked for.
 */
export function packedVariant(
  capabilities: Capabilities,
  problem: AttentionProblem,
  held: KeysHeld,
  chosen: AttentionVariant,
  { variant }: Forced,
  float16Sums: boolean,
): AttentionVariant {
  const { queryHeads, kvHeads, queryLength, keyLength } = problem;
  const apt = queryLength >= 1 && queryLength <= MOST_QUERIES && keyLength >= FEWEST_KEYS && kvHeads > 0;
  const able = held.format === 'int8' && !held.values.integers && !float16Sums;
  if (!apt || !able || variant !== undefined) return chosen;
  const group = queryHeads / kvHeads;
  const shape = packedShape(capabilities, group * queryLength, problem, held.layout);
  if (shape === undefined) return chosen;
  const name = `packed-${shape.rows}x${shape.keys}`;
  const { packedDot } = capabilities;
  return {
    family: chosen.family,
    name,
    kernel: {
      label: `attention ${chosen.family} ${name}`,
      rows: shape.rows,
      pack: group,
      source: (config) =>
        packedAttentionKernel({
          ...config,
          ...shape,
          layout: held.layout,
          group,
          packedDot,
          dot: dotInt8(packedDot),
        }),
    },
  };
}
