/** How P.V is summed: the registers of tensor cores, emulated. */
import type { PvAccumDtype, PvFormat } from '../quantization/schemes.ts';
import { roundToFloat16 } from '../tensor/formats/float16.ts';
import { floorToPowerOfTwo } from '../tensor/formats/rounding.ts';

/**
 * A register that matrix instructions accumulate into.
 *
 * - `exact`: 32-bit integers, and sums that are exact before they are rounded to fp32 once a tile.
 * - `fp32`: each instruction's exact sum is rounded to fp32.
 * - `fp16`: each instruction's exact sum is rounded to fp16, to nearest even (Fasi et al., "Numerical behavior of
 *   NVIDIA tensor cores", PeerJ CS 2021: binary16 mode rounds to nearest).
 * - `aligned`: the FP32 accumulator of FP8 instructions where it keeps about 22 bits ("FP22" in SageAttention2, arXiv
 *   2411.10958; "about 14 bits" in DeepSeek-V3's report, arXiv 2412.19437). Products and accumulator are aligned to the
 *   largest of them, cut off (not rounded) some bits below it, summed, and the sum is cut to as many mantissa bits: the
 *   shape of the units in Khattak and Mikaitis, "Accurate Models of NVIDIA Tensor Cores", arXiv 2512.07004. The golden
 *   files agree: on all four the emulation comes closest to the H200's `wgmma` outputs with 13 bits, and to its `mma`
 *   outputs with 23.
 */
export type RegisterKind = 'exact' | 'fp32' | 'fp16' | 'aligned';

export interface Accumulation {
  readonly register: RegisterKind;
  /**
   * Sums of a tile start at 0 and are added to a true fp32 register after it; else the register holds the whole row.
   */
  readonly promotedEveryTile: boolean;
  /** Tokens that one instruction sums. */
  readonly instructionTokens: number;
}

/** Tokens summed by one matrix instruction of each format. */
const INSTRUCTION_TOKENS = { fp32: 1, fp16: 16, fp8: 32, int8: 32, fp4: 64 } as const satisfies Record<
  PvFormat,
  number
>;

const REGISTER = {
  fp32: { narrow: false, promotedEveryTile: false },
  fp16: { narrow: true, promotedEveryTile: false },
  'fp16+fp32': { narrow: true, promotedEveryTile: true },
  'fp32+fp32': { narrow: false, promotedEveryTile: true },
  'fp32+fp16': { narrow: true, promotedEveryTile: true },
} as const satisfies Record<PvAccumDtype, { narrow: boolean; promotedEveryTile: boolean }>;

/** The accumulation that a format and a `pvAccumDtype` mean. Integer products are always summed exactly. */
export function accumulationOf(format: PvFormat, accumDtype: PvAccumDtype): Accumulation {
  const instructionTokens = INSTRUCTION_TOKENS[format];
  if (format === 'int8') return { register: 'exact', promotedEveryTile: true, instructionTokens };
  // A tile's product starts from zero and is added to the rescaled sum of those before it.
  if (format === 'fp4') return { register: 'fp32', promotedEveryTile: true, instructionTokens };
  const { narrow, promotedEveryTile } = REGISTER[accumDtype];
  const wide: RegisterKind = format === 'fp8' ? 'aligned' : 'fp32';
  return { register: narrow ? 'fp16' : wide, promotedEveryTile, instructionTokens };
}

/** Cuts a number to `bits` mantissa bits. */
function truncateMantissa(x: number, bits: number): number {
  if (x === 0 || !Number.isFinite(x)) return x;
  const step = floorToPowerOfTwo(Math.abs(x)) * 2 ** -bits;
  return Math.trunc(x / step) * step;
}

/** P of one tile and the V it meets. */
export interface TileProduct {
  /** Multiplied values of P; read where `visible` is 1. */
  readonly p: Float32Array;
  readonly visible: Uint8Array;
  /** `[length, dim]` */
  readonly v: Float32Array;
  readonly dim: number;
  /** First token of the tile in `v`. */
  readonly firstToken: number;
  readonly tokens: number;
}

/**
 * Adds one tile's P.V to `accumulator`, instruction by instruction. Tokens that are not visible are not read.
 *
 * @param fractionBits bits below the largest exponent that the `aligned` register keeps
 */
export function accumulateTile(
  accumulator: Float64Array,
  tile: TileProduct,
  { register, instructionTokens }: Accumulation,
  fractionBits: number,
): void {
  for (let first = 0; first < tile.tokens; first += instructionTokens) {
    const end = Math.min(first + instructionTokens, tile.tokens);
    if (register === 'aligned') addAligned(accumulator, tile, first, end, fractionBits);
    else addExactly(accumulator, tile, first, end, register);
  }
  if (register === 'exact') for (let d = 0; d < tile.dim; d++) accumulator[d] = Math.fround(accumulator[d] as number);
}

function addExactly(
  accumulator: Float64Array,
  { p, visible, v, dim, firstToken }: TileProduct,
  first: number,
  end: number,
  register: RegisterKind,
): void {
  let added = false;
  for (let token = first; token < end; token++) {
    if (visible[token] === 0) continue;
    added = true;
    const weight = p[token] as number;
    const row = (firstToken + token) * dim;
    for (let d = 0; d < dim; d++) accumulator[d] = (accumulator[d] as number) + weight * (v[row + d] as number);
  }
  if (!added || register === 'exact') return;
  const round = register === 'fp16' ? roundToFloat16 : Math.fround;
  for (let d = 0; d < dim; d++) accumulator[d] = round(accumulator[d] as number);
}

function addAligned(
  accumulator: Float64Array,
  { p, visible, v, dim, firstToken }: TileProduct,
  first: number,
  end: number,
  fractionBits: number,
): void {
  for (let d = 0; d < dim; d++) {
    const before = accumulator[d] as number;
    let largest = Math.abs(before);
    let sum = before;
    for (let token = first; token < end; token++) {
      if (visible[token] === 0) continue;
      const product = (p[token] as number) * (v[(firstToken + token) * dim + d] as number);
      sum += product;
      if (Math.abs(product) > largest) largest = Math.abs(product);
    }
    if (!Number.isFinite(sum) || largest === 0) {
      accumulator[d] = sum;
      continue;
    }
    const step = floorToPowerOfTwo(largest) * 2 ** -fractionBits;
    const steps = 1 / step;
    let aligned = Math.trunc(before * steps);
    for (let token = first; token < end; token++) {
      if (visible[token] === 0) continue;
      aligned += Math.trunc((p[token] as number) * (v[(firstToken + token) * dim + d] as number) * steps);
    }
    accumulator[d] = truncateMantissa(aligned * step, fractionBits);
  }
}
