/**
 * The conformance table: what every backend and kernel must compute. Each case makes inputs from a seed; `suite.ts`
 * runs it and compares with exact attention in float64.
 */
import fc from 'fast-check';
import type { AttentionOptions } from '../../src/attention/options.ts';
import type { DType } from '../../src/tensor/dtype.ts';
import { contiguousStrides, elementCount, type Tensor, tensor } from '../../src/tensor/tensor.ts';
import type { Random } from '../support/random.ts';
import { place } from '../support/tensors.ts';

export interface CaseInputs {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly options: AttentionOptions;
  readonly cuSeqlens?: { readonly q: readonly number[]; readonly k: readonly number[] };
}

export interface ConformanceCase {
  readonly group: string;
  readonly name: string;
  /**
   * `kernel`: the kernel's own bound, for ordinary distributions. `algorithm`: where quantization itself loses more,
   * what the same algorithm in plain TypeScript loses on the same inputs. `row`: as `algorithm`, but for each class of
   * rows that see keys of one size (`rowClasses`), so that large rows hide no error of small ones.
   */
  readonly bound: 'kernel' | 'algorithm' | 'row';
  /** Multiply-adds of both products: a slow target leaves out large cases. */
  readonly work: number;
  /** Magnitude that V reaches; FP16 formats end at 65504. */
  readonly largestV: number;
  make(random: Random): CaseInputs;
}

/** What standard normal numbers reach in a case, generously. */
export const NORMAL_MAX = 10;

/** Sizes and contents of a dense case; defaults are ordinary. */
export interface Dense {
  dtype?: DType;
  layout?: 'HND' | 'NHD';
  batch?: number;
  heads?: number;
  kvHeads?: number;
  lq?: number;
  lk?: number;
  d?: number;
  dv?: number;
  options?: AttentionOptions;
  bound?: ConformanceCase['bound'];
  largestV?: number;
  /** Changes values in place; arrays are `[B,H,L,D]` row-major. */
  edit?(values: Values, size: Size, random: Random): void;
  mask?(size: Size, random: Random): Tensor;
  /** Options that are tensors of the case's size. */
  made?(size: Size, random: Random): AttentionOptions;
}
export type Size = Required<Pick<Dense, 'dtype' | 'layout' | 'batch' | 'heads' | 'kvHeads' | 'lq' | 'lk' | 'd' | 'dv'>>;
export interface Values {
  q: Float32Array;
  k: Float32Array;
  v: Float32Array;
}

function sizeOf(spec: Dense): Size {
  const lq = spec.lq ?? 70;
  const heads = spec.heads ?? 2;
  const d = spec.d ?? 64;
  return {
    dtype: spec.dtype ?? 'float32',
    layout: spec.layout ?? 'HND',
    batch: spec.batch ?? 1,
    heads,
    kvHeads: spec.kvHeads ?? heads,
    lq,
    lk: spec.lk ?? lq,
    d,
    dv: spec.dv ?? d,
  };
}

/** Normal values; K has a per-channel offset, as the keys of real models do and as smoothing is for. */
function ordinary(random: Random, { batch, heads, kvHeads, lq, lk, d, dv }: Size): Values {
  const k = random.normals(batch * kvHeads * lk * d);
  const offsets = random.normals(kvHeads * d, 2);
  for (let i = 0; i < k.length; i++) {
    const head = Math.floor(i / (lk * d)) % kvHeads;
    k[i] = (k[i] as number) + (offsets[head * d + (i % d)] as number);
  }
  return { q: random.normals(batch * heads * lq * d), k, v: random.normals(batch * kvHeads * lk * dv) };
}

/** `[B,H,L,D]` values as a tensor of the layout. */
function arrange(values: Float32Array, size: Size, heads: number, length: number, dim: number): Tensor {
  const hnd = [size.batch, heads, length, dim];
  if (size.layout === 'HND') return place(values, hnd, size.dtype);
  const nhd = [size.batch, length, heads, dim];
  const [batchStride, tokenStride, headStride] = contiguousStrides(nhd) as [number, number, number, number];
  const asHnd = place(values, hnd, size.dtype, [batchStride, headStride, tokenStride, 1]);
  return { ...asHnd, shape: nhd, strides: contiguousStrides(nhd) };
}

export function dense(group: string, name: string, spec: Dense): ConformanceCase {
  const size = sizeOf(spec);
  const { batch, heads, kvHeads, lq, lk, d, dv } = size;
  return {
    group,
    name,
    bound: spec.bound ?? 'kernel',
    work: batch * heads * lq * lk * (d + dv),
    largestV: spec.largestV ?? NORMAL_MAX,
    make(random) {
      const values = ordinary(random, size);
      spec.edit?.(values, size, random);
      const options: AttentionOptions = {
        ...spec.options,
        tensorLayout: size.layout,
        ...(spec.mask === undefined ? {} : { attnMask: spec.mask(size, random) }),
        ...spec.made?.(size, random),
      };
      return {
        q: arrange(values.q, size, heads, lq, d),
        k: arrange(values.k, size, kvHeads, lk, d),
        v: arrange(values.v, size, kvHeads, lk, dv),
        options,
      };
    },
  };
}

const DTYPES = ['float32', 'float16', 'bfloat16'] as const;

const layouts = DTYPES.flatMap((dtype) =>
  (['HND', 'NHD'] as const).map((layout) =>
    dense('dtype and layout', `${dtype} ${layout}`, {
      dtype,
      layout,
      batch: 2,
      heads: 3,
      lq: 65,
      lk: 77,
      options: { returnLse: true },
    }),
  ),
);

const lengths = [
  ...[1, 2, 63, 64, 65, 127, 129, 1000].map((lq) => dense('length', `${lq}`, { lq, heads: 1 })),
  ...(
    [
      [1, 1000],
      [129, 65],
      [7, 300],
      [200, 3],
      [130, 1],
    ] as const
  ).map(([lq, lk]) => dense('length', `${lq} over ${lk}`, { lq, lk, options: { returnLse: true } })),
];

const headDims = [
  // A score of one or a few channels has the error of those alone: nothing averages out.
  ...[1, 8, 15, 40, 64, 72, 80, 96, 128, 192, 256].map((d) =>
    dense('head dim', `${d}`, d < 8 ? { d, lq: 67, heads: 8, bound: 'algorithm' } : { d, lq: 67 }),
  ),
  ...(
    [
      [192, 128],
      [64, 128],
      [40, 8],
      [64, 61],
      [1, 256],
      [128, 33],
    ] as const
  ).map(([d, dv]) =>
    dense('head dim', `D ${d}, Dv ${dv}`, { d, dv, lq: 66, lk: 71, bound: d < 8 ? 'algorithm' : 'kernel' }),
  ),
];

const heads = [
  dense('heads', 'GQA 8 over 2', { heads: 8, kvHeads: 2, batch: 2 }),
  dense('heads', 'MQA 4 over 1, NHD', { heads: 4, kvHeads: 1, layout: 'NHD', dtype: 'float16' }),
];

const causal = (['top-left', 'bottom-right'] as const).flatMap((causalAlignment) =>
  (
    [
      [130, 130],
      [5, 200],
      [200, 70],
      [1, 90],
    ] as const
  ).map(([lq, lk]) =>
    dense('causal', `${causalAlignment} ${lq} over ${lk}`, {
      lq,
      lk,
      options: { isCausal: true, causalAlignment, returnLse: true },
    }),
  ),
);

const windows = (
  [
    [[10, 0], 150, 150, false],
    [[0, 0], 66, 66, false],
    [[-1, 5], 140, 140, false],
    [[70, 70], 200, 200, false],
    [[33, 20], 140, 140, true],
    [[4, 4], 40, 300, false],
  ] as const
).flatMap(([windowSize, lq, lk, isCausal]) =>
  (['top-left', 'bottom-right'] as const).map((causalAlignment) =>
    dense('window', `[${windowSize}] ${lq} over ${lk}${isCausal ? ' causal' : ''} ${causalAlignment}`, {
      lq,
      lk,
      options: { windowSize, isCausal, causalAlignment, returnLse: true },
    }),
  ),
);

const coin = (random: Random, length: number, keep: number) =>
  Uint8Array.from({ length }, () => (random.uniform() < keep ? 255 : 0));

const masks = [
  dense('mask', 'bool [Lq,Lk]', { mask: ({ lq, lk }, random) => tensor(coin(random, lq * lk, 0.5), [lq, lk]) }),
  dense('mask', 'bool [B,1,1,Lk], padding, second row all masked', {
    batch: 3,
    lk: 90,
    options: { returnLse: true },
    mask: ({ batch, lk }) =>
      tensor(
        Uint8Array.from({ length: batch * lk }, (_, i) =>
          i % lk < ([50, 0, 90][Math.floor(i / lk)] as number) ? 1 : 0,
        ),
        [batch, 1, 1, lk],
      ),
  }),
  dense('mask', 'bool [1,H,Lq,1]: whole rows', {
    heads: 3,
    options: { returnLse: true },
    mask: ({ heads, lq }, random) => tensor(coin(random, heads * lq, 0.6), [1, heads, lq, 1]),
  }),
  dense('mask', 'bool, strided: every second key of a wider mask, and causal', {
    lk: 85,
    options: { isCausal: true },
    mask: ({ lq, lk }, random) =>
      tensor(coin(random, lq * (2 * lk + 1) + 4, 0.7), [lq, lk], { strides: [2 * lk + 1, 2], offset: 3 }),
  }),
  ...DTYPES.map((dtype) =>
    dense('mask', `additive ${dtype} [1,1,Lq,Lk] with -Infinity`, {
      options: { returnLse: true },
      mask: ({ lq, lk }, random) =>
        place(
          Float32Array.from({ length: lq * lk }, () =>
            random.uniform() < 0.3 ? Number.NEGATIVE_INFINITY : random.normal() * 2,
          ),
          [1, 1, lq, lk],
          dtype,
        ),
    }),
  ),
  dense('mask', 'additive [H,1,Lk] (ALiBi-like), causal, window and softcap together', {
    heads: 4,
    kvHeads: 2,
    lq: 100,
    options: { isCausal: true, windowSize: [40, 0], softcap: 20, returnLse: true },
    mask: ({ heads, lk }) =>
      place(
        Float32Array.from({ length: heads * lk }, (_, i) => -0.1 * (1 + Math.floor(i / lk)) * (lk - (i % lk))),
        [heads, 1, lk],
        'float32',
      ),
  }),
  dense('mask', 'additive -1e9 as padding', {
    mask: ({ lk }) =>
      place(
        Float32Array.from({ length: lk }, (_, j) => (j < 40 ? 0 : -1e9)),
        [1, 1, 1, lk],
        'float32',
      ),
  }),
  // Scores that are large and negative throughout: a row's own maximum must be taken off before anything is rounded.
  ...[-1e4, -65504, -1e9].map((value) =>
    dense('mask', `additive ${value} on all keys`, {
      bound: 'algorithm',
      options: { returnLse: true },
      mask: ({ lk }) => place(new Float32Array(lk).fill(value), [1, 1, 1, lk], 'float32'),
    }),
  ),
  // torch.finfo(dtype).min, which transformers' masks are made of: finite, so a row that has nothing else gets V's
  // mean.
  ...(
    [
      ['float32', -3.4028234663852886e38],
      ['float16', -65504],
    ] as const
  ).flatMap(([dtype, least]) => [
    dense('mask', `${dtype}'s least number as padding`, {
      lk: 90,
      options: { returnLse: true },
      mask: ({ lk }) =>
        place(
          Float32Array.from({ length: lk }, (_, j) => (j < 40 ? 0 : least)),
          [1, 1, 1, lk],
          dtype,
        ),
    }),
    dense('mask', `${dtype}'s least number on every key of every third row`, {
      lk: 150,
      mask: ({ lq, lk }) =>
        place(
          Float32Array.from({ length: lq * lk }, (_, i) => (Math.floor(i / lk) % 3 === 0 ? least : 0)),
          [1, 1, lq, lk],
          dtype,
        ),
    }),
  ]),
];

const scales = [
  dense('scale', 'softcap 15 with LSE', { options: { softcap: 15, returnLse: true } }),
  dense('scale', 'smScale 0.3', { d: 32, options: { smScale: 0.3, returnLse: true }, bound: 'algorithm' }),
  dense('scale', 'smScale 0: the mean of V', { options: { smScale: 0, returnLse: true } }),
  dense('scale', 'negative smScale', { options: { smScale: -0.125, returnLse: true }, bound: 'algorithm' }),
  dense('scale', 'without smoothing K', { options: { smoothK: false, returnLse: true }, bound: 'algorithm' }),
];

export function varlen(name: string, q: readonly number[], k: readonly number[], spec: Dense = {}): ConformanceCase {
  const starts = (lengths: readonly number[]) => {
    const ends = [0];
    for (const length of lengths) ends.push((ends.at(-1) as number) + length);
    return ends;
  };
  const cuSeqlens = { q: starts(q), k: starts(k) };
  const lq = cuSeqlens.q.at(-1) as number;
  const lk = cuSeqlens.k.at(-1) as number;
  const base = dense('varlen', name, { ...spec, layout: 'NHD', lq, lk });
  const squeeze = (view: Tensor): Tensor => ({ ...view, shape: view.shape.slice(1), strides: view.strides.slice(1) });
  return {
    ...base,
    work: (q.reduce((sum, length, i) => sum + length * (k[i] as number), 0) * base.work) / Math.max(1, lq * lk),
    make(random) {
      const { q, k, v, options } = base.make(random);
      const { tensorLayout: _, ...rest } = options;
      return { q: squeeze(q), k: squeeze(k), v: squeeze(v), options: rest, cuSeqlens };
    },
  };
}

const varlens = [
  varlen('5, 0, 64, 130 and 1 tokens', [5, 0, 64, 130, 1], [5, 0, 64, 130, 1], { options: { returnLse: true } }),
  varlen('different lengths of queries and keys, GQA, bottom-right causal', [7, 65, 0, 3], [70, 20, 9, 0], {
    heads: 4,
    kvHeads: 2,
    dtype: 'float16',
    options: { isCausal: true, causalAlignment: 'bottom-right', returnLse: true },
  }),
  varlen('each sequence with a large offset of its own', [40, 50], [40, 50], {
    edit: ({ k }, { lk, d }) => {
      for (let i = 0; i < k.length; i++) k[i] = (k[i] as number) + (Math.floor(i / d) % lk < 40 ? 30 : -30);
    },
  }),
  varlen('window and a mask of the largest lengths', [30, 90], [50, 70], {
    options: { windowSize: [20, 20], returnLse: true },
    mask: (_, random) => tensor(coin(random, 90 * 70, 0.8), [1, 1, 90, 70]),
  }),
];

/** q, k and v as views of one packed `[B,L,3,H,D]` tensor. */
function packed(dtype: DType): ConformanceCase {
  const [batch, length, heads, d] = [2, 70, 3, 40];
  return {
    group: 'strides',
    name: `views of one packed [B,L,3,H,D] ${dtype} tensor`,
    bound: 'kernel',
    work: batch * heads * length * length * 2 * d,
    largestV: NORMAL_MAX,
    make(random) {
      const all = place(random.normals(batch * length * 3 * heads * d), [batch, length, 3, heads, d], dtype);
      const [batchStride, tokenStride, part, headStride] = all.strides as [number, number, number, number, number];
      const view = (i: number): Tensor => ({
        ...all,
        shape: [batch, length, heads, d],
        strides: [batchStride, tokenStride, headStride, 1],
        offset: i * part,
      });
      return { q: view(0), k: view(1), v: view(2), options: { tensorLayout: 'NHD', isCausal: true } };
    },
  };
}

const strides: ConformanceCase[] = [
  ...DTYPES.map(packed),
  {
    group: 'strides',
    name: 'padded rows, an offset, and one head of K and V for all (stride 0)',
    bound: 'kernel',
    work: 2 * 66 * 75 * 2 * 24,
    largestV: NORMAL_MAX,
    make(random) {
      const at = (heads: number, length: number, headStride: number) =>
        place(random.normals(heads * length * 24), [1, heads, length, 24], 'float16', [9999, headStride, 29, 1], 7);
      const shared = (view: Tensor): Tensor => ({ ...view, shape: [1, 2, 75, 24], strides: [9999, 0, 29, 1] });
      return { q: at(2, 66, 66 * 29 + 5), k: shared(at(1, 75, 0)), v: shared(at(1, 75, 0)), options: {} };
    },
  },
  {
    group: 'strides',
    name: 'D and Dv 1, whatever the last stride',
    bound: 'algorithm',
    work: 8 * 50 * 60 * 2,
    largestV: NORMAL_MAX,
    make(random) {
      // Many heads: with one channel all rows of a head share the errors of its keys, and only heads average them out.
      const column = (length: number) =>
        place(random.normals(8 * length), [1, 8, length, 1], 'float32', [length * 24, length * 3, 3, 17]);
      return { q: column(50), k: column(60), v: column(60), options: {} };
    },
  },
];

const empty = (
  [
    ['no batch', { batch: 0 }],
    ['no queries', { lq: 0, lk: 5 }],
    ['no keys', { lq: 5, lk: 0 }],
    ['no heads', { heads: 0, kvHeads: 0 }],
  ] as const
).map(([name, spec]) => dense('empty', name, { ...spec, d: 16, options: { returnLse: true } }));

export const fill = (values: Float32Array, value: (i: number) => number) => {
  for (let i = 0; i < values.length; i++) values[i] = value(i);
};

const extremes = [
  dense('extreme', 'all keys equal', {
    edit: ({ k }, { d }, random) => {
      const key = random.normals(d, 5);
      fill(k, (i) => key[i % d] as number);
    },
    options: { returnLse: true },
  }),
  dense('extreme', 'one huge outlier token', {
    lk: 140,
    bound: 'algorithm',
    edit: ({ k }, { d, lk }) => {
      for (let i = 0; i < k.length; i++) if (Math.floor(i / d) % lk === 77) k[i] = (k[i] as number) * 100;
    },
  }),
  dense('extreme', 'one huge outlier channel in K', {
    lk: 140,
    edit: ({ k }, { d }) => {
      for (let i = 3; i < k.length; i += d) k[i] = (k[i] as number) + 500;
    },
    // Smoothing takes the offset away; without it the channel would take all 8 bits. Only the rounding
    // of the 500 in the inputs' own dtype remains.
    bound: 'algorithm',
  }),
  // All rows of a head and of one sign see the same largest key, so they gain or lose together: many heads, few rows.
  dense('extreme', 'one huge outlier channel in Q and K', {
    heads: 32,
    lq: 5,
    lk: 140,
    bound: 'algorithm',
    edit: ({ q, k }, { d }) => {
      for (let i = 5; i < q.length; i += d) q[i] = (q[i] as number) * 40;
      for (let i = 5; i < k.length; i += d) k[i] = (k[i] as number) * 40;
    },
  }),
  dense('extreme', 'one huge outlier channel in V', {
    bound: 'algorithm',
    largestV: 1000 * NORMAL_MAX,
    edit: ({ v }, { dv }) => {
      for (let i = 9; i < v.length; i += dv) v[i] = (v[i] as number) * 1000;
    },
  }),
  dense('extreme', 'subnormal float32 inputs', {
    edit: ({ q, k, v }) => {
      for (const values of [q, k, v]) fill(values, (i) => (values[i] as number) * 1e-41);
    },
    bound: 'algorithm',
  }),
  dense('extreme', 'subnormal float16 inputs', {
    dtype: 'float16',
    edit: ({ q, k, v }) => {
      for (const values of [q, k, v]) fill(values, (i) => (values[i] as number) * 2e-6);
    },
    bound: 'algorithm',
  }),
  dense('extreme', 'scores near the float16 limit', {
    dtype: 'float16',
    bound: 'algorithm',
    options: { smScale: 1, returnLse: true },
    edit: ({ q, k }, { lq, lk, d, heads }, random) => {
      // Each row's own key scores about 64 * 29 * 27 = 50112, over the limit once scaled by log2(e); no other comes
      // near. Magnitudes differ, so that the roundings of a channel's elements do: equal ones would add up over all
      // rows.
      fill(k, (i) => Math.sign(k[i] as number) * random.uniform(26, 28));
      fill(q, (i) => {
        const [head, row] = [Math.floor(i / (lq * d)) % heads, Math.floor(i / d) % lq];
        return Math.sign(k[(head * lk + ((row * 7) % lk)) * d + (i % d)] as number) * random.uniform(28, 30);
      });
    },
  }),
  dense('extreme', 'V near the float16 limit', {
    dtype: 'float16',
    largestV: 65000,
    edit: ({ v }) => fill(v, (i) => Math.max(-65000, Math.min(65000, (v[i] as number) * 20000))),
  }),
  dense('extreme', 'V near the float32 limit', {
    dtype: 'bfloat16',
    largestV: 1e38,
    edit: ({ v }) => fill(v, (i) => (v[i] as number) * 1e37),
  }),
  dense('extreme', 'a zero channel in V, and one head of V all zero', {
    edit: ({ v }, { dv, lk }) => fill(v, (i) => (i % dv === 4 || i >= lk * dv ? 0 : (v[i] as number))),
  }),
  dense('extreme', 'all zero Q', { edit: ({ q }) => q.fill(0), options: { returnLse: true } }),
  dense('extreme', 'all zero Q, K and V', {
    edit: ({ q, k, v }) => {
      for (const values of [q, k, v]) values.fill(0);
    },
    options: { returnLse: true },
  }),
  // Scores reach from 128 to 8e6 at the larger magnitudes: a factor taken before the difference leaves no fraction
  // there. The softcap is near each magnitude's scores: far below them a row's error comes from its slope alone, and
  // says nothing.
  ...[4, 100, 300, 1000].flatMap((magnitude) => {
    const few = { lq: 20, lk: 70, d: 32 };
    return (
      [
        ['', {}],
        [', few queries', { ...few, options: { returnLse: true } }],
        [
          ', a mask is added',
          { ...few, mask: ({ lq, lk }, random) => place(random.normals(lq * lk), [lq, lk], 'float32') },
        ],
        [', softcap', { ...few, options: { softcap: 10 * magnitude ** 2, returnLse: true } }],
      ] satisfies [string, Dense][]
    ).map(([what, spec]) =>
      dense('extreme', `one key wins each row, q and k of magnitude ${magnitude}${what}`, {
        ...spec,
        bound: 'algorithm',
        edit: ({ q, k }, { lq, lk, d, heads }, random) => {
          const key = random.normals(heads * lk * d, magnitude);
          k.set(key);
          fill(q, (i) => {
            const [head, row] = [Math.floor(i / (lq * d)), Math.floor(i / d) % lq];
            return key[(head * lk + ((row * 7) % lk)) * d + (i % d)] as number;
          });
        },
      }),
    );
  }),
];

/**
 * The first key scores so much above the rest, which lie close together: what nearly every head of a decoder does. Each
 * of the others weighs less than 1/256 of it, all of them about as much as it does.
 */
const sinks = (
  [
    [128, 5.55, 0.1],
    [128, 6.5, 1],
    [256, 6, 0.3],
    [256, 8, 1],
    [1000, 7, 0.5],
    [1000, 8, 1],
  ] as const
).map(([lk, above, spread]) =>
  dense('attention sink', `the first of ${lk} keys ${above} above the others, which spread by ${spread}`, {
    lq: 40,
    lk,
    edit: ({ q, k }, { lk, d }, random) => {
      // Channel 0 carries the sink: 8 * above / sqrt(64).
      fill(k, (i) => (i % d > 0 ? random.normal() * spread : Math.floor(i / d) % lk === 0 ? above : 0));
      fill(q, (i) => (i % d === 0 ? 8 : (q[i] as number)));
    },
  }),
);

const poison = (values: Float32Array, length: number, dim: number, token: number, value: number) => {
  for (let i = 0; i < values.length; i++) if (Math.floor(i / dim) % length === token) values[i] = value;
};

/**
 * NaN and infinities where no row, or only some rows, may look. Rows that see one are not finite; the others are right.
 */
const nans = [
  ...DTYPES.map((dtype) =>
    dense('not a number', `in keys and values that the mask hides from all rows, ${dtype}`, {
      dtype,
      lk: 150,
      options: { returnLse: true },
      edit: ({ k, v }, { lk, d, dv }) => {
        for (const token of [0, 61, 149]) {
          poison(k, lk, d, token, Number.NaN);
          poison(v, lk, dv, token, Number.NaN);
        }
        poison(k, lk, d, 70, Number.POSITIVE_INFINITY);
        poison(v, lk, dv, 70, Number.NEGATIVE_INFINITY);
      },
      mask: ({ lk }) =>
        tensor(
          Uint8Array.from({ length: lk }, (_, j) => ([0, 61, 70, 149].includes(j) ? 0 : 1)),
          [lk],
        ),
    }),
  ),
  dense('not a number', 'in the last key and value of a causal problem: all rows but the last are right', {
    lq: 130,
    options: { isCausal: true, returnLse: true },
    edit: ({ k, v }, { lk, d, dv }) => {
      poison(k, lk, d, lk - 1, Number.NaN);
      poison(v, lk, dv, lk - 1, Number.NaN);
    },
  }),
  dense('not a number', 'in a value only: rows that see it are not finite', {
    lq: 100,
    options: { isCausal: true },
    edit: ({ v }, { lk, dv }) => poison(v, lk, dv, 50, Number.NaN),
  }),
  dense('not a number', 'in one query row: the other rows are right', {
    lq: 100,
    edit: ({ q }, { lq, d }) => poison(q, lq, d, 33, Number.NaN),
    options: { returnLse: true },
  }),
  dense('not a number', 'outside the window of every row', {
    lq: 40,
    lk: 200,
    options: { windowSize: [5, 5] },
    edit: ({ k, v }, { lk, d, dv }) => {
      for (let token = 50; token < lk; token += 7) {
        poison(k, lk, d, token, Number.NaN);
        poison(v, lk, dv, token, Number.NaN);
      }
    },
  }),
];

/** Few tokens over grouped heads, which kernels may work on together. */
const decoding = (
  [
    [8, 2, 1],
    [7, 1, 1],
    [24, 2, 1],
    [8, 2, 3],
  ] as const
).flatMap(([heads, kvHeads, lq]) => {
  const shape = { heads, kvHeads, lq, lk: 150, d: 32 };
  return [
    dense('decoding', `${lq} over ${heads} heads on ${kvHeads}`, {
      ...shape,
      batch: 2,
      options: { returnLse: true },
    }),
    dense('decoding', `${lq} over ${heads} heads on ${kvHeads}, NHD, bottom-right causal`, {
      ...shape,
      layout: 'NHD',
      dtype: 'bfloat16',
      options: { returnLse: true, isCausal: true, causalAlignment: 'bottom-right' },
    }),
    dense('decoding', `${lq} over ${heads} heads on ${kvHeads}, a window`, {
      ...shape,
      options: { windowSize: [20, 0], causalAlignment: 'bottom-right', returnLse: true },
    }),
    dense('decoding', `${lq} over ${heads} heads on ${kvHeads}, a mask of each head, softcap`, {
      ...shape,
      options: { returnLse: true, softcap: 20 },
      mask: ({ lk }, random) => place(random.normals(heads * lk), [1, heads, 1, lk], 'float32'),
    }),
    dense('decoding', `${lq} over ${heads} heads on ${kvHeads}, one head's query not a number, the others far apart`, {
      ...shape,
      batch: 2,
      options: { returnLse: true },
      edit: ({ q, k }, { d }) => {
        // A channel in which all keys agree: it gives every fifth head a scale 64 times its neighbours', and moves no
        // score. Scores that are large themselves would leave each row to a key or two, and its error to chance.
        for (let i = 0; i < k.length; i += d) k[i] = 1;
        for (let i = 0; i < q.length; i += d) q[i] = Math.floor(i / (lq * d)) % 5 === 4 ? 256 : 4;
        q.fill(Number.NaN, lq * d, 2 * lq * d);
      },
      bound: 'algorithm',
    }),
  ];
});

export const CASES: readonly ConformanceCase[] = [
  ...layouts,
  ...lengths,
  ...headDims,
  ...heads,
  ...decoding,
  ...causal,
  ...windows,
  ...masks,
  ...scales,
  ...varlens,
  ...strides,
  ...empty,
  ...extremes,
  ...sinks,
  ...nans,
];

/** Any dense problem, for property-based runs; fast-check shrinks it to the smallest that fails. */
export const arbitraryCase: fc.Arbitrary<ConformanceCase> = fc
  .record({
    dtype: fc.constantFrom(...DTYPES),
    layout: fc.constantFrom('HND' as const, 'NHD' as const),
    batch: fc.integer({ min: 1, max: 2 }),
    kvHeads: fc.integer({ min: 1, max: 2 }),
    group: fc.integer({ min: 1, max: 3 }),
    lq: fc.integer({ min: 1, max: 140 }),
    lk: fc.integer({ min: 1, max: 200 }),
    d: fc.integer({ min: 1, max: 130 }),
    dv: fc.integer({ min: 1, max: 130 }),
    isCausal: fc.boolean(),
    causalAlignment: fc.constantFrom('top-left' as const, 'bottom-right' as const),
    windowSize: fc.oneof(
      fc.constant([-1, -1] as const),
      fc.tuple(fc.integer({ min: -1, max: 60 }), fc.integer({ min: -1, max: 60 })),
    ),
    softcap: fc.constantFrom(0, 0, 10),
    smoothK: fc.boolean(),
    returnLse: fc.boolean(),
    mask: fc.option(fc.record({ perRow: fc.boolean(), perHead: fc.boolean(), keep: fc.constantFrom(0.1, 0.7) }), {
      nil: undefined,
    }),
  })
  .map((choice) => {
    const { group, isCausal, causalAlignment, windowSize, softcap, smoothK, returnLse, mask, ...sizes } = choice;
    const spec: Dense = {
      ...sizes,
      heads: sizes.kvHeads * group,
      options: { isCausal, causalAlignment, windowSize, softcap, smoothK, returnLse },
      bound: 'algorithm',
    };
    if (mask !== undefined) {
      spec.mask = ({ heads, lq, lk }, random) => {
        const shape = [1, mask.perHead ? heads : 1, mask.perRow ? lq : 1, lk];
        return tensor(coin(random, elementCount(shape), mask.keep), shape);
      };
    }
    return dense('random', JSON.stringify(choice), spec);
  });
