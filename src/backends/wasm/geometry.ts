/** Sizes of what kernels keep in memory. */
import type { AttentionProblem } from '../../attention/problem.ts';
import { BLOCK_K, EXACT_DATA, MOST_APART, SCRATCH_BYTES } from './job.ts';

/** Which build of the kernels runs. */
export type Simd = 'simd128' | 'relaxed';

/** How the integers' dot product is computed: relaxed in one instruction or in two steps (no VNNI), or from 16-bit lanes. */
export type DotProduct = 'one-step' | 'two-steps' | '16-bit';

/** Where things lie inside a tile of BLOCK_K keys and their values; bytes. */
export interface TileGeometry {
  /** D and Dv, rounded up to a multiple of 8. */
  readonly headDimPadded: number;
  readonly valueDimPadded: number;
  /** 4-byte steps of a packed key. */
  readonly keySteps: number;
  readonly keyScales: number;
  readonly keySums: number;
  readonly values: number;
  readonly valueScales: number;
  readonly flags: number;
  readonly nans: number;
  readonly valueExponents: number;
  readonly valuesApart: number;
  readonly plainKeys: number;
  readonly shift: number;
  readonly bytes: number;
}

const roundUp = (value: number, unit: number) => Math.ceil(value / unit) * unit;

/** What stays in float32: nothing, P and V, or also Q and K. `fp4`: codes of 4 bits, which are decoded to float32. */
export type Precision = 'integer' | 'accurate' | 'exact' | 'fp4';

/** A tile of FP4: 4 bits of code and half a bit of scale for each element, a byte for each key and each channel. */
function fp4Geometry(headDim: number, valueDim: number, smoothV: boolean): TileGeometry {
  const headDimPadded = roundUp(headDim, 8);
  const valueDimPadded = roundUp(valueDim, 8);
  const [keyBlocks, valueBlocks] = [Math.ceil(headDim / 16), Math.ceil(valueDim / 16)];
  const keyScales = BLOCK_K * keyBlocks * 8;
  const keySums = keyScales + BLOCK_K * keyBlocks;
  const values = roundUp(keySums + BLOCK_K, 8);
  const valueScales = values + BLOCK_K * valueBlocks * 8;
  const valueExponents = valueScales + BLOCK_K * valueBlocks;
  const flags = roundUp(valueExponents + Math.max(BLOCK_K, valueDimPadded), 16);
  const plainKeys = flags + 16;
  const shift = plainKeys + BLOCK_K;
  return {
    ...{
      headDimPadded,
      valueDimPadded,
      keyScales,
      keySums,
      values,
      valueScales,
      flags,
      valueExponents,
      plainKeys,
      shift,
    },
    keySteps: 0,
    nans: flags,
    valuesApart: flags,
    bytes: roundUp(shift + (headDimPadded + (smoothV ? valueDimPadded : 0)) * 4, 64),
  };
}

export function tileGeometry(
  headDim: number,
  valueDim: number,
  simd: Simd,
  { precision, smoothV }: { readonly precision: Precision; readonly smoothV: boolean },
): TileGeometry {
  if (precision === 'fp4') return fp4Geometry(headDim, valueDim, smoothV);
  const headDimPadded = roundUp(headDim, 8);
  const valueDimPadded = roundUp(valueDim, 8);
  const bytesPerInteger = simd === 'relaxed' ? 1 : 2;
  const bytesPerKey = headDimPadded * (precision === 'exact' ? 4 : bytesPerInteger);
  const keyScales = BLOCK_K * bytesPerKey;
  const keySums = keyScales + BLOCK_K * 4;
  const values = keySums + BLOCK_K * 4;
  const valueScales = values + BLOCK_K * valueDimPadded * (precision === 'integer' ? bytesPerInteger : 4);
  const flags = valueScales + valueDimPadded * 4;
  const nans = flags + 16;
  const valueExponents = nans + (BLOCK_K * valueDimPadded) / 8;
  const integers = precision === 'integer' ? 1 : 0;
  const valuesApart = valueExponents + (integers * BLOCK_K * valueDimPadded) / 8;
  const plainKeys = valuesApart + integers * MOST_APART * valueDimPadded * bytesPerInteger;
  const shift = plainKeys + BLOCK_K;
  return {
    headDimPadded,
    valueDimPadded,
    keySteps: bytesPerKey / 4,
    keyScales,
    keySums,
    values,
    valueScales,
    flags,
    nans,
    valueExponents,
    valuesApart,
    plainKeys,
    shift,
    bytes: roundUp(shift + (headDimPadded + valueDimPadded) * 4, 64),
  };
}

/** Bytes of scratch beyond SCRATCH_BYTES that the kernel needs which quantizes nothing. */
export function exactScratch(
  { keyLength, headDim, valueDim }: Pick<AttentionProblem, 'keyLength' | 'headDim' | 'valueDim'>,
  way: 'in-place' | 'at-once',
): number {
  const keys = roundUp(keyLength, 16);
  // Scores and shares of one row; or keys, values and scores of 8 rows.
  const floats = way === 'in-place' ? 2 * keys : keys * (roundUp(headDim, 4) + roundUp(valueDim, 16) + 8);
  return Math.max(0, EXACT_DATA + 4 * floats - SCRATCH_BYTES);
}
