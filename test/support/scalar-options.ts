/**
 * The scalar options of attention over all that they may be, on inputs whose answer is known without computing it in any precision: all
 * scores of a row are either 4 or -2 times the size of `smScale`, the one of a single key.
 */
import fc from 'fast-check';
import type { AttentionOptions } from '../../src/attention/options.ts';
import { type Tensor, tensor } from '../../src/tensor/tensor.ts';
import { Random } from './random.ts';

/** Lengths are at most this: no two keys are alike. */
const D = 64;
const [OWN, OTHER] = [4, -2];
/** Scores that float32 has no number for are refused or infinite. */
const LARGEST_SCALE = 2e37;

/** Any size that a double has, tiny or huge, and the ends of the float types. */
const magnitude = fc.oneof(
  fc.double({ min: -46, max: 308.2, noNaN: true }).map((exponent) => 10 ** exponent),
  fc.double({ min: -3, max: 3, noNaN: true }).map((exponent) => 10 ** exponent),
  fc.constantFrom(
    0,
    Number.MIN_VALUE,
    1e-45,
    2 ** -126,
    65504,
    65520,
    2 ** 127,
    3.4028234663852886e38,
    1e39,
    Number.MAX_VALUE,
  ),
);
const side = fc.oneof(
  fc.integer({ min: -1, max: 30 }),
  fc.constantFrom(2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 32, Number.MAX_SAFE_INTEGER, Number.POSITIVE_INFINITY),
);

export interface ScalarCall {
  readonly salt: number;
  /** Queries and keys. */
  readonly length: number;
  readonly smScale: number;
  readonly softcap: number;
  readonly windowSize: readonly [number, number];
  readonly isCausal: boolean;
}

export const scalarCalls = (lengths: readonly number[]): fc.Arbitrary<ScalarCall> =>
  fc.record({
    salt: fc.integer({ min: 0, max: 1000 }),
    length: fc.constantFrom(...lengths),
    smScale: fc
      .tuple(magnitude, fc.boolean())
      .map(([size, isNegative]) => Math.min(size, LARGEST_SCALE) * (isNegative ? -1 : 1)),
    softcap: fc.oneof(fc.constant(0), magnitude),
    windowSize: fc.oneof(fc.constant([-1, -1] as const), fc.tuple(side, side)),
    isCausal: fc.boolean(),
  });

/** Always tried: its softcap has a subnormal reciprocal, and its scores feel the cap. */
export const SCALAR_EXAMPLES: [ScalarCall][] = [
  [{ salt: 0, length: 5, smScale: 1e37, softcap: 2 ** 127, windowSize: [-1, -1], isCausal: false }],
];

export interface ScalarCase {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly options: AttentionOptions;
  readonly output: Float64Array;
  /** Undefined for a row that sees no key. */
  readonly lse: readonly (number | undefined)[];
  /** False for a row of which only this is known: it is finite. */
  readonly isKnown: readonly boolean[];
}

export function scalarCase(call: ScalarCall, seed: number): ScalarCase {
  const { length, smScale, softcap, isCausal, windowSize } = call;
  const random = new Random(seed + call.salt);
  const like = Array.from({ length }, () => random.integer(0, length - 1));
  const inChannels = (valueAt: (token: number, channel: number) => number) =>
    tensor(
      Float32Array.from({ length: length * D }, (_, i) => valueAt(Math.floor(i / D), i % D)),
      [1, 1, length, D],
    );
  const v = random.normals(length * D);
  const capped = (score: number) => {
    const ratio = Math.tanh(score / softcap);
    // Both ends of the range: a score over a tiny softcap, and one that is itself tiny.
    return softcap === 0 || Number.isNaN(ratio) ? score : Math.abs(score) < softcap * 1e-9 ? score : softcap * ratio;
  };
  const [own, other] = [capped(OWN * Math.abs(smScale)), capped(OTHER * Math.abs(smScale))];
  const output = new Float64Array(length * D);
  const isKnown = new Array<boolean>(length).fill(true);
  const lse = like.map((channel, row) => {
    const [left, right] = windowSize.map((size) => (size < 0 ? Number.POSITIVE_INFINITY : size)) as [number, number];
    const sees = (j: number) => j >= row - left && j <= row + right && (!isCausal || j <= row);
    const seen = Array.from({ length }, (_, j) => j).filter(sees);
    if (seen.length === 0) return undefined;
    // Scores that are equal, and large, differ by what 8 bits lose.
    isKnown[row] = seen.includes(channel) || Math.abs(other) < 1;
    const scoreOf = (j: number) => (j === channel ? own : other);
    const largest = Math.max(...seen.map(scoreOf));
    const weights = seen.map((j) => (scoreOf(j) === largest ? 1 : Math.exp(scoreOf(j) - largest)));
    const sum = weights.reduce((a, b) => a + b, 0);
    for (const [i, j] of seen.entries()) {
      for (let c = 0; c < D; c++) {
        const at = row * D + c;
        output[at] = (output[at] as number) + ((weights[i] as number) / sum) * (v[j * D + c] as number);
      }
    }
    return largest + Math.log(sum);
  });
  return {
    q: inChannels((row, channel) => (channel === like[row] ? (smScale < 0 ? -2 : 2) : 0)),
    k: inChannels((key, channel) => (channel === key ? OWN : OTHER) / 2),
    v: tensor(v, [1, 1, length, D]),
    options: { smScale, softcap, windowSize, isCausal, returnLse: true },
    output,
    lse,
    isKnown,
  };
}

/** What is wrong with an output, if anything. */
export function scalarFault(
  { output, lse, isKnown }: Pick<ScalarCase, 'output' | 'lse' | 'isKnown'>,
  actual: { readonly output: ArrayLike<number>; readonly lse: ArrayLike<number> },
  /** Of values, which are normal, and of scores by their size. */
  tolerance = 0.02,
): string | undefined {
  for (let i = 0; i < output.length; i++) {
    const [is, should] = [actual.output[i] as number, output[i] as number];
    const bound = isKnown[Math.floor(i / D)] === true ? 8 * tolerance : 10;
    if (!(Math.abs(is - should) <= bound)) return `output[${i}] is ${is} and should be ${should}`;
  }
  for (const [row, should] of lse.entries()) {
    const is = actual.lse[row] as number;
    // What float32 has no number for is infinite or the largest that it has.
    if (should === undefined || Math.abs(should) > 3e38) {
      if (Number.isNaN(is)) return `lse[${row}] is ${is}`;
    } else if (!(Math.abs(is - should) <= 2.5 * tolerance + tolerance * Math.abs(should)))
      return `lse[${row}] is ${is} and should be ${should}`;
  }
  return undefined;
}
