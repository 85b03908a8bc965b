/**
 * FP4 with a scale for each block of consecutive elements: NVFP4 (1x16, E4M3 scales) of SageAttention3 (arXiv
 * 2505.11594), and MXFP4 (1x32, UE8M0 scales) of the OCP MX specification beside it.
 *
 * All of it is float32 arithmetic in a stated order, so that a kernel can give the same codes bit for bit.
 */
import { E2M1_MAX, E2M1_VALUES, e2m1FromNumber } from '../tensor/formats/float4.ts';
import { e4m3FromNumber, e4m3ToNumber } from '../tensor/formats/float8.ts';
import { ue8m0FromNumber, ue8m0ToNumber } from '../tensor/formats/ue8m0.ts';

export type Fp4Format = 'nvfp4' | 'mxfp4';

/**
 * How a block's scale is found. `'none'`: from its largest magnitude. `'four-over-six'`: that or the one which puts it
 * at 4, whichever errs less (arXiv 2512.02010). `'mse'`: the one of eight near it that errs least in squares.
 */
export type ScaleSearch = 'none' | 'four-over-six' | 'mse';

export const SCALE_SEARCHES = ['mse', 'four-over-six', 'none'] as const satisfies readonly ScaleSearch[];

/** Elements that share a scale. */
export const NVFP4_BLOCK = 16;
export const MXFP4_BLOCK = 32;

/** How blocks are quantized. */
export interface Fp4Rules {
  readonly format: Fp4Format;
  readonly scaleSearch: ScaleSearch;
  /**
   * True: a scale that E4M3 rounds to 0 stays 0, and its block becomes zeros, as the official quantizers have it.
   * Default: it is 2^-9.
   */
  readonly zeroScales?: boolean;
}

interface FormatRules {
  readonly block: number;
  /** Code, in the scale's format, of a float32 >= 0. */
  encode(scale: number): number;
  decode(code: number): number;
  /** What the largest magnitude is multiplied by, float32, for each candidate in turn; of equals the first is taken. */
  readonly candidates: Readonly<Record<ScaleSearch, Float32Array>>;
}

/** Factors on `max / 6`. Above 1 the largest element is coded as less than 6 (1.5: as 4), below 1 it is clamped. */
const NVFP4_FACTORS = {
  none: [1],
  'four-over-six': [1, 1.25, 1.5],
  mse: [1, 0.875, 0.94, 1.0625, 1.125, 1.25, 1.375, 1.5],
} as const satisfies Record<ScaleSearch, readonly number[]>;

/**
 * Exponent of E2M1's largest number: MX puts the binade of the block's largest magnitude there, and clamps values
 * above 6.
 */
const MX_LARGEST_BINADE = 4;

const RULES: Readonly<Record<Fp4Format, FormatRules>> = {
  nvfp4: {
    block: NVFP4_BLOCK,
    encode: e4m3FromNumber,
    decode: e4m3ToNumber,
    candidates: {
      none: Float32Array.from(NVFP4_FACTORS.none, (factor) => factor / E2M1_MAX),
      'four-over-six': Float32Array.from(NVFP4_FACTORS['four-over-six'], (factor) => factor / E2M1_MAX),
      mse: Float32Array.from(NVFP4_FACTORS.mse, (factor) => factor / E2M1_MAX),
    },
  },
  mxfp4: {
    block: MXFP4_BLOCK,
    encode: (scale) => ue8m0FromNumber(scale, 'down'),
    decode: ue8m0ToNumber,
    candidates: {
      none: Float32Array.of(1 / MX_LARGEST_BINADE),
      'four-over-six': Float32Array.of(1 / MX_LARGEST_BINADE, 2 / MX_LARGEST_BINADE),
      mse: Float32Array.of(1 / MX_LARGEST_BINADE, 2 / MX_LARGEST_BINADE),
    },
  },
};

/** Candidates of NVFP4's scale search, as float32 factors on the block's largest magnitude. */
export const nvfp4Candidates = (search: ScaleSearch): Float32Array => RULES.nvfp4.candidates[search];

/** Elements that share a scale. */
export const fp4Block = (format: Fp4Format): number => RULES[format].block;

/** The value of a scale's code. */
export const fp4Scale = (format: Fp4Format, code: number): number => RULES[format].decode(code);

const f32 = Math.fround;

/**
 * Codes `block` by `scale`; returns the squared error: four partial sums, of the elements equal modulo 4, added in
 * pairs.
 */
function codeBlock(block: Float32Array, count: number, scale: number, codes: Uint8Array): number {
  const inverse = scale === 0 ? 0 : f32(1 / scale);
  const sums = [0, 0, 0, 0];
  for (let i = 0; i < count; i++) {
    const value = block[i] as number;
    const code = e2m1FromNumber(f32(value * inverse));
    codes[i] = code;
    const error = f32(value - scale * (E2M1_VALUES[code] as number));
    sums[i & 3] = f32((sums[i & 3] as number) + f32(error * error));
  }
  return f32(f32((sums[0] as number) + (sums[1] as number)) + f32((sums[2] as number) + (sums[3] as number)));
}

const trial = /* @__PURE__ */ new Uint8Array(MXFP4_BLOCK);

/**
 * Quantizes one block: `scale = round(largest * factor / 6)`, at least 2^-9, `code = E2M1(x * (1 / scale))`, with the
 * factor that errs least.
 *
 * @param block `count` elements, at most the format's block; those that are not finite take no part in the scale and
 *     get code 0
 * @param codes receives `count` E2M1 codes
 * @returns the scale's code, E4M3 or UE8M0
 */
export function quantizeFp4Block(
  block: Float32Array,
  count: number,
  { format, scaleSearch, zeroScales = false }: Fp4Rules,
  codes: Uint8Array,
): number {
  const { encode, decode, candidates } = RULES[format];
  const leastCode = zeroScales || format === 'mxfp4' ? 0 : 1;
  let largest = 0;
  for (let i = 0; i < count; i++) {
    const magnitude = Math.abs(block[i] as number);
    if (Number.isFinite(magnitude)) largest = Math.max(largest, magnitude);
    else block[i] = 0;
  }
  let best = 0;
  let least = Number.POSITIVE_INFINITY;
  let last = -1;
  for (const factor of candidates[scaleSearch]) {
    const code = Math.max(encode(f32(largest * factor)), leastCode);
    if (code === last) continue;
    last = code;
    const error = codeBlock(block, count, decode(code), trial);
    if (!(error < least)) continue;
    [best, least] = [code, error];
    codes.set(trial.subarray(0, count));
  }
  return best;
}

const gathered = /* @__PURE__ */ new Float32Array(MXFP4_BLOCK);
const gatheredCodes = /* @__PURE__ */ new Uint8Array(MXFP4_BLOCK);

/**
 * Quantizes `count` elements `start, start + stride, ...` in blocks and writes their dequantized values, `scale *
 * code`, in place. Elements that are not finite stay unchanged.
 */
export function quantizeFp4InPlace(
  x: Float32Array,
  start: number,
  stride: number,
  count: number,
  rules: Fp4Rules,
): void {
  const { block, decode } = RULES[rules.format];
  for (let first = 0; first < count; first += block) {
    const size = Math.min(block, count - first);
    const at = (i: number) => start + (first + i) * stride;
    for (let i = 0; i < size; i++) gathered[i] = x[at(i)] as number;
    const scale = decode(quantizeFp4Block(gathered, size, rules, gatheredCodes));
    for (let i = 0; i < size; i++) {
      if (Number.isFinite(x[at(i)])) x[at(i)] = scale * (E2M1_VALUES[gatheredCodes[i] as number] as number);
    }
  }
}
