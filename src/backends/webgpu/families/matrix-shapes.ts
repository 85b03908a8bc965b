/** The tables of family `matrix`: its shapes by head dim, best first. */
import type { MatrixShape } from '../kernels/matrix-tiling.ts';

export interface MatrixVariant extends MatrixShape {
  /** Subgroups, rows, keys, groups of Q K^T and of P V. */
  readonly name: string;
}

const shape = (
  subgroups: number,
  rows: number,
  keys: number,
  qkGroups: number,
  pvGroups: number,
  { keysFirst = false } = {},
): MatrixVariant => ({
  name: `${subgroups}s${rows}r${keys}k-qk${qkGroups}-pv${pvGroups}${keysFirst ? '-qk-pv' : ''}`,
  subgroups,
  rows,
  keys,
  qkGroups,
  pvGroups,
  keysFirst,
  headroom: 8,
});

/** For devices with 16 KiB of workgroup memory, and for few queries. */
const SMALL = [shape(4, 64, 16, 4, 1), shape(2, 32, 16, 2, 1), shape(1, 16, 16, 1, 1)];

export interface MatrixShapes {
  /** The largest of D and Dv, padded. */
  readonly headDim: number;
  /** The longest query. */
  readonly queries: number;
  readonly variants: readonly MatrixVariant[];
}

/**
 * The first line that a problem does not exceed holds, and the first of its variants that the device and its products
 * can run is taken. Ordered by speed on an H200, 16 heads of 8192 tokens, TFLOP/s with quantization: D 64: 142, 138, 128
 * (causal 110, 103); D 80: 153, 108 (causal 121, 91); D 128: 182, 184, 140, 161, of which the first loses least where Dawn has no
 * analysis of ranges (173 against 124 for the kernel alone). D 256 in a benchmark of the kernel alone: 196. At 1024 tokens D 64: 58, 43,
 * 44, since 128 rows are too few workgroups; D 128: the first 95, the smallest 85.
 */
export const MATRIX_SHAPES: readonly MatrixShapes[] = [
  {
    headDim: 256,
    queries: 32,
    variants: [shape(2, 32, 32, 1, 1), ...SMALL.slice(1)],
  },
  {
    headDim: 96,
    queries: 1024,
    variants: [shape(4, 64, 32, 2, 1), shape(4, 128, 16, 4, 2), shape(8, 128, 16, 8, 4), ...SMALL],
  },
  {
    headDim: 96,
    queries: Number.POSITIVE_INFINITY,
    variants: [
      shape(4, 128, 16, 4, 2),
      shape(8, 128, 16, 8, 4),
      shape(4, 64, 32, 2, 1),
      shape(4, 64, 32, 4, 2),
      ...SMALL,
    ],
  },
  {
    headDim: 128,
    queries: Number.POSITIVE_INFINITY,
    variants: [
      shape(8, 128, 32, 4, 2, { keysFirst: true }),
      shape(8, 128, 32, 4, 1),
      shape(4, 128, 32, 4, 2),
      ...SMALL,
      shape(4, 64, 32, 2, 1),
    ],
  },
  {
    headDim: 256,
    queries: Number.POSITIVE_INFINITY,
    variants: [shape(8, 64, 32, 4, 1), shape(8, 64, 32, 4, 2), shape(8, 64, 32, 4, 4, { keysFirst: true }), ...SMALL],
  },
];

/** Every shape once. */
export const MATRIX_VARIANTS: readonly MatrixVariant[] = [
  ...new Map(MATRIX_SHAPES.flatMap(({ variants }) => variants).map((variant) => [variant.name, variant])).values(),
];

/** A shape with what decides whether it comes out right on a device. */
export const shapeKey = (
  variant: string,
  headDimPadded: number,
  valueDimPadded: number,
  float16Sums: boolean,
): string => `${variant} D ${headDimPadded}/${valueDimPadded}${float16Sums ? ', float16 sums' : ''}`;
