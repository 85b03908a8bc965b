/** Small random attention calls for property tests of the reference. */
import fc from 'fast-check';
import type { AttentionOptions } from '../../src/attention/options.ts';
import { type Tensor, tensor } from '../../src/tensor/tensor.ts';
import { Random } from './random.ts';
import { place } from './tensors.ts';

export interface DenseCall {
  readonly seed: number;
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly options: AttentionOptions;
}

const mask = (random: Random, kind: 'none' | 'bool' | 'additive', shape: readonly number[]): Tensor | undefined => {
  if (kind === 'none') return undefined;
  const broadcast = shape.map((size) => (random.uniform() < 0.3 ? 1 : size));
  const length = broadcast.reduce((product, size) => product * size, 1);
  return kind === 'bool'
    ? tensor(
        Uint8Array.from({ length }, () => (random.uniform() < 0.7 ? 1 : 0)),
        broadcast,
      )
    : tensor(
        Float32Array.from({ length }, () => (random.uniform() < 0.3 ? Number.NEGATIVE_INFINITY : random.normal())),
        broadcast,
      );
};

/** Dense HND calls: sizes, grouped heads, masks, bands, softcap. Values are normal, so float32 exponentials suffice. */
export const denseCall: fc.Arbitrary<DenseCall> = fc
  .record({
    seed: fc.integer({ min: 0, max: 2 ** 31 - 1 }),
    batch: fc.integer({ min: 1, max: 2 }),
    kvHeads: fc.integer({ min: 1, max: 2 }),
    group: fc.integer({ min: 1, max: 3 }),
    queryLength: fc.integer({ min: 0, max: 20 }),
    keyLength: fc.integer({ min: 0, max: 90 }),
    headDim: fc.integer({ min: 1, max: 20 }),
    valueDim: fc.integer({ min: 1, max: 20 }),
    dtype: fc.constantFrom('float32' as const, 'float16' as const, 'bfloat16' as const),
    maskKind: fc.constantFrom('none' as const, 'bool' as const, 'additive' as const),
    isCausal: fc.boolean(),
    causalAlignment: fc.constantFrom('top-left' as const, 'bottom-right' as const),
    windowSize: fc.option(fc.tuple(fc.integer({ min: -1, max: 30 }), fc.integer({ min: -1, max: 30 })), {
      nil: undefined,
    }),
    softcap: fc.constantFrom(0, 2),
    smScale: fc.option(fc.constantFrom(0.3, -1), { nil: undefined }),
  })
  .map(({ seed, batch, kvHeads, group, queryLength, keyLength, headDim, valueDim, dtype, maskKind, ...rest }) => {
    const random = new Random(seed);
    const operand = (heads: number, length: number, dim: number) => {
      const shape = [batch, heads, length, dim];
      const strides = [heads * length * (dim + 1), length * (dim + 1), dim + 1, 1];
      return place(random.normals(batch * heads * length * dim), shape, dtype, strides, 2);
    };
    const attnMask = mask(random, maskKind, [batch, kvHeads * group, queryLength, keyLength]);
    const { isCausal, causalAlignment, windowSize, softcap, smScale } = rest;
    return {
      seed,
      q: operand(kvHeads * group, queryLength, headDim),
      k: operand(kvHeads, keyLength, headDim),
      v: operand(kvHeads, keyLength, valueDim),
      options: {
        isCausal,
        causalAlignment,
        softcap,
        ...(windowSize === undefined ? {} : { windowSize }),
        ...(smScale === undefined ? {} : { smScale }),
        ...(attnMask === undefined ? {} : { attnMask }),
      },
    };
  });
