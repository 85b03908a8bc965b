/**
 * What a row may not see must not change it: garbage behind masks and outside of bands, padding, later tokens, other
 * documents, however large; and the ends of the ranges of what changes scores (softcap, masks that are not a number).
 */
import { contiguousStrides, type Tensor, tensor } from '../../src/tensor/tensor.ts';
import type { Random } from '../support/random.ts';
import { place } from '../support/tensors.ts';
import { type ConformanceCase, type Dense, dense, NORMAL_MAX, varlen } from './cases.ts';

/**
 * Kinds of fault, one a group. A target names those that are a limit of its kernels in `exceptions`, with the reason.
 */
export type VisibilityGroup =
  | 'hidden keys'
  | 'padding'
  | 'outside the band'
  | 'later tokens'
  | 'documents'
  | 'heads of a group'
  | 'cache'
  | 'cache of tiny values'
  | 'cache padding'
  | 'softcap'
  | 'mask not a number';

export type VisibilityCase = ConformanceCase & { readonly group: VisibilityGroup };

/** Small enough for simulated devices. */
const SMALL = { heads: 1, lq: 16, lk: 150, d: 32, options: { returnLse: true } } as const satisfies Dense;

const rowCase = (group: VisibilityGroup, name: string, spec: Dense): VisibilityCase => ({
  ...dense(group, name, { ...SMALL, bound: 'row', ...spec }),
  group,
});

/** Multiplies the tokens of `[B,H,L,D]` values that `which` names. */
function multiply(
  x: Float32Array,
  length: number,
  dim: number,
  factor: number,
  which: (token: number, at: number) => boolean,
) {
  for (let i = 0; i < x.length; i++) {
    const row = Math.floor(i / dim);
    if (which(row % length, Math.floor(row / length))) x[i] = (x[i] as number) * factor;
  }
}

/** Keys behind the mask: a tail, and some among the others. */
const isHidden = (key: number) => key >= 110 || key % 13 === 5;

const garbage =
  (magnitude: number): NonNullable<Dense['edit']> =>
  ({ k, v }, { lk, d, dv }, random) => {
    for (const [x, dim] of [
      [k, d],
      [v, dv],
    ] as const) {
      for (let i = 0; i < x.length; i++) {
        if (isHidden(Math.floor(i / dim) % lk)) x[i] = magnitude * (1 + 0.3 * random.normal());
      }
    }
  };

const booleanMask = (shape: readonly number[], attends: (index: number) => boolean): Tensor =>
  tensor(
    Uint8Array.from({ length: shape.reduce((product, size) => product * size, 1) }, (_, i) => (attends(i) ? 1 : 0)),
    shape,
  );

const additiveMask = (
  shape: readonly number[],
  entry: (index: number) => number,
  dtype: 'float32' | 'float16' | 'bfloat16' = 'float32',
): Tensor =>
  place(
    Float32Array.from({ length: shape.reduce((product, size) => product * size, 1) }, (_, i) => entry(i)),
    shape,
    dtype,
  );

const hiddenKeys = [30, 1000, Number.NaN].flatMap((magnitude) => {
  const behind = (name: string, spec: Dense) =>
    rowCase('hidden keys', `of magnitude ${magnitude} behind ${name}`, {
      largestV: Number.isNaN(magnitude) ? NORMAL_MAX : 3 * magnitude,
      edit: garbage(magnitude),
      ...spec,
    });
  // 0 times a NaN is a NaN, so only a key that is excluded altogether may hold one.
  const finite: readonly [number, 'float32' | 'float16' | 'bfloat16'][] = [
    [-1e4, 'float32'],
    [-65504, 'float16'],
    [-3.3895313892515355e38, 'bfloat16'],
    [-3.4028234663852886e38, 'float32'],
  ];
  return [
    behind('a boolean mask of keys', { mask: ({ lk }) => booleanMask([lk], (j) => !isHidden(j)) }),
    behind('a boolean mask of rows and keys', {
      mask: ({ lq, lk }) => booleanMask([lq, lk], (i) => !isHidden(i % lk) && (i % lk) % 4 !== Math.floor(i / lk) % 4),
    }),
    behind('-Infinity in an additive mask, float16 operands', {
      dtype: 'float16',
      mask: ({ lk }) => additiveMask([1, 1, 1, lk], (j) => (isHidden(j) ? Number.NEGATIVE_INFINITY : 0.01 * j)),
    }),
    ...(Number.isNaN(magnitude)
      ? []
      : [
          ...finite.map(([low, dtype]) =>
            behind(`${low} in an additive ${dtype} mask`, {
              mask: ({ lk }) => additiveMask([1, 1, 1, lk], (j) => (isHidden(j) ? low : 0), dtype),
            }),
          ),
          behind('entries far below the others of their row, which are low themselves', {
            mask: ({ lq, lk }) =>
              additiveMask([lq, lk], (i) => (isHidden(i % lk) ? -8000 : -2000) - 500 * Math.floor(i / lk)),
          }),
        ]),
  ];
});

/** Batches of unequal lengths, padded with zeros, where the keys of real tokens share an offset. */
const padding = (['boolean', 'additive'] as const).flatMap((kind) =>
  (['right', 'left'] as const).map((side) => {
    const lengths = [90, 30];
    const isToken = (batch: number, key: number, lk: number) =>
      side === 'right' ? key < (lengths[batch] as number) : key >= lk - (lengths[batch] as number);
    return rowCase('padding', `zeros on the ${side} of a batch, ${kind} mask`, {
      batch: 2,
      lk: 90,
      edit: ({ k, v }, { lk, d, dv, heads }, random) => {
        const offsets = random.normals(d, 10);
        for (let i = 0; i < k.length; i++) k[i] = (k[i] as number) + (offsets[i % d] as number);
        const isPadding = (token: number, at: number) => !isToken(Math.floor(at / heads), token, lk);
        multiply(k, lk, d, 0, isPadding);
        multiply(v, lk, dv, 0, isPadding);
      },
      mask: ({ lk }) => {
        const shape = [2, 1, 1, lk];
        const token = (i: number) => isToken(Math.floor(i / lk), i % lk, lk);
        return kind === 'boolean' ? booleanMask(shape, token) : additiveMask(shape, (i) => (token(i) ? 0 : -1e4));
      },
    });
  }),
);

const outsideTheBand = [30, 1000, Number.NaN].flatMap((magnitude) => {
  const beyond = (name: string, options: NonNullable<Dense['options']>, isSeen: (key: number) => boolean) =>
    rowCase('outside the band', `magnitude ${magnitude}, ${name}`, {
      options: { ...options, returnLse: true },
      largestV: Number.isNaN(magnitude) ? NORMAL_MAX : magnitude * NORMAL_MAX,
      edit: ({ k, v }, { lk, d, dv }) => {
        multiply(k, lk, d, magnitude, (token) => !isSeen(token));
        multiply(v, lk, dv, magnitude, (token) => !isSeen(token));
      },
    });
  return [
    beyond('a window', { windowSize: [5, 5] }, (key) => key < 21),
    beyond('a window, bottom-right', { windowSize: [70, 2], causalAlignment: 'bottom-right' }, (key) => key >= 64),
    beyond('causal over more keys', { isCausal: true }, (key) => key < 16),
    beyond(
      'causal and a window, bottom-right',
      { isCausal: true, windowSize: [9, -1], causalAlignment: 'bottom-right' },
      (key) => key >= 125,
    ),
  ];
});

/** A token that only later rows see, in K or in V; each row is judged by the keys that it sees itself. */
const laterTokens = [100, 1000].flatMap((factor) =>
  (['K', 'V'] as const).flatMap((operand) => {
    const later = (name: string, spec: Dense, at: number) =>
      rowCase('later tokens', `${operand} ${factor} times as large ${name}`, {
        options: { isCausal: true, returnLse: true },
        largestV: operand === 'V' ? factor * NORMAL_MAX : NORMAL_MAX,
        edit: ({ k, v }, { lk, d, dv }) =>
          operand === 'K'
            ? multiply(k, lk, d, factor, (token) => token === at)
            : multiply(v, lk, dv, factor, (token) => token === at),
        ...spec,
      });
    return [
      later('in the middle', { lq: 48, lk: 48 }, 29),
      later('at the end', { lq: 48, lk: 48 }, 47),
      later('at the end of 2', { lq: 2, lk: 2, heads: 16 }, 1),
      later('at the end of 3', { lq: 3, lk: 3, heads: 16 }, 2),
      later('in a later tile', { lq: 200, lk: 200, heads: 2 }, 150),
      later(
        'at the end of more keys, bottom-right',
        { lk: 100, options: { isCausal: true, causalAlignment: 'bottom-right', returnLse: true } },
        99,
      ),
      later(
        'hidden from some rows by a mask',
        {
          options: { returnLse: true },
          lk: 100,
          mask: ({ lq, lk }) => booleanMask([lq, lk], (i) => i % lk !== 70 || Math.floor(i / lk) >= 10),
        },
        70,
      ),
    ];
  }),
);

/** Two documents in one sequence, of different sizes, under a block-diagonal mask; and as packed sequences. */
const documents = [100, 1000].flatMap((factor) =>
  (
    [
      ['K', (values) => [values.k]],
      ['V', (values) => [values.v]],
      ['K and V', (values) => [values.k, values.v]],
    ] as const satisfies readonly (readonly [
      string,
      (values: { k: Float32Array; v: Float32Array }) => Float32Array[],
    ])[]
  ).flatMap(([operand, pick]) => {
    const size = { lq: 48, lk: 48, largestV: operand === 'K' ? NORMAL_MAX : factor * NORMAL_MAX };
    const edit: NonNullable<Dense['edit']> = (values, { lk, d }) => {
      for (const x of pick(values)) multiply(x, lk, d, factor, (token) => token >= 20);
    };
    const together = (i: number, lk: number) => Math.floor(i / lk) < 20 === i % lk < 20;
    const packed = varlen(`${operand} ${factor} times as large in the second sequence`, [20, 28], [20, 28], {
      ...SMALL,
      ...size,
      edit,
      bound: 'row',
    });
    return [
      rowCase('documents', `${operand} ${factor} times as large in the second, boolean mask`, {
        ...size,
        edit,
        mask: ({ lq, lk }) => booleanMask([lq, lk], (i) => together(i, lk)),
      }),
      rowCase('documents', `${operand} ${factor} times as large in the second, additive mask`, {
        ...size,
        edit,
        mask: ({ lq, lk }) => additiveMask([1, 1, lq, lk], (i) => (together(i, lk) ? 0 : -1e4)),
      }),
      { ...packed, group: 'documents' as const },
    ];
  }),
);

const headsOfAGroup = [100, 1000].map((factor) =>
  rowCase('heads of a group', `a value ${factor} times as large that one of two heads sees`, {
    heads: 2,
    kvHeads: 1,
    lk: 70,
    largestV: factor * NORMAL_MAX,
    edit: ({ v }, { lk, dv }) => multiply(v, lk, dv, factor, (token) => token === 40),
    mask: ({ lk }) => booleanMask([1, 2, 1, lk], (i) => i !== 40),
  }),
);

/** The smallest and largest that mean something: without effect from about the scores' own size up. */
const softcaps = [1e-30, 1e-3, 1, 1e4, 1e7, 1e20, 3e38, Number.MAX_VALUE].flatMap((softcap) => [
  rowCase('softcap', `${softcap}`, { options: { softcap, returnLse: true } }),
  rowCase('softcap', `${softcap}, causal and a mask`, {
    lk: 16,
    options: { softcap, isCausal: true, returnLse: true },
    mask: ({ lk }, random) => additiveMask([lk], () => random.normal()),
  }),
]);

const nanMasks = (['float32', 'float16', 'bfloat16'] as const).flatMap((dtype) => {
  const base = (random: Random, count: number) => random.normals(count);
  return [
    rowCase('mask not a number', `${dtype}, one entry of one row: that row alone`, {
      lk: 90,
      mask: ({ lq, lk }, random) => {
        const values = base(random, lq * lk);
        values[5 * lk + 70] = Number.NaN;
        return place(values, [lq, lk], dtype);
      },
    }),
    rowCase('mask not a number', `${dtype}, one entry of a row that is hidden otherwise`, {
      lk: 90,
      mask: ({ lq, lk }) =>
        additiveMask(
          [1, 1, lq, lk],
          (i) => (Math.floor(i / lk) !== 3 ? 0 : i % lk === 2 ? Number.NaN : Number.NEGATIVE_INFINITY),
          dtype,
        ),
    }),
    rowCase('mask not a number', `${dtype}, outside of the band, where nothing is read`, {
      lk: 90,
      options: { isCausal: true, returnLse: true },
      mask: ({ lq, lk }) =>
        place(
          Float32Array.from({ length: lq * lk }, (_, i) => (i % lk > Math.floor(i / lk) ? Number.NaN : 0)),
          [lq, lk],
          dtype,
          contiguousStrides([lq, lk]),
        ),
    }),
  ];
});

export const VISIBILITY_CASES: readonly VisibilityCase[] = [
  ...hiddenKeys,
  ...padding,
  ...outsideTheBand,
  ...laterTokens,
  ...documents,
  ...headsOfAGroup,
  ...softcaps,
  ...nanMasks,
];

/** Multiplies the first tokens of an NHD tensor, or sets every third channel of them. */
const firstTokens = (view: Tensor, tokens: number, change: (value: number, channel: number) => number) => {
  const [, , heads, dim] = view.shape as [number, number, number, number];
  for (let i = 0; i < tokens * heads * dim; i++) view.data[i] = change(view.data[i] as number, i % dim);
};

/** Batches whose padding a cache is told of, and every query hides. `isToken`: whether a token is none of it. */
export const CACHE_PADDING: readonly {
  readonly name: string;
  readonly steps: readonly number[];
  readonly magnitude: number;
  readonly isToken: (batch: number, token: number) => boolean;
}[] = [30, 1000, Number.NaN].flatMap((magnitude) => [
  {
    name: `a prompt padded on the left with ${magnitude}`,
    steps: [40, 1, 99],
    magnitude,
    isToken: (batch, token) => token >= 9 * (batch + 1),
  },
  {
    name: `a prompt and an append padded on the right with ${magnitude}, one token between them`,
    steps: [40, 1, 129],
    magnitude,
    isToken: (batch, token) => (token < 40 ? token < 33 - 2 * batch : token < 150 + batch),
  },
]);

/** Caches that begin with tokens unlike all that are appended. */
export const CACHE_EDITS: readonly {
  readonly name: string;
  /** Default `cache`. */
  readonly group?: VisibilityGroup;
  readonly steps: readonly number[];
  readonly edit: (key: Tensor, value: Tensor) => void;
}[] = [
  ...[30, 100].map((sink) => ({
    name: `the first token is a sink of ${sink}, unlike all other keys`,
    steps: [1, 139],
    edit: (key: Tensor) => firstTokens(key, 1, (value, channel) => (channel % 3 === 0 ? sink : value)),
  })),
  ...[1e-6, 1e3].map((factor) => ({
    name: `the first values are ${factor} times as large as those appended`,
    group: factor < 1 ? ('cache of tiny values' as const) : ('cache' as const),
    steps: [4, 36, 100],
    edit: (_: Tensor, value: Tensor) => firstTokens(value, 4, (x) => x * factor),
  })),
  {
    name: 'the first keys are 1e-6 times as large as those appended',
    steps: [4, 36, 100],
    edit: (key: Tensor) => firstTokens(key, 4, (x) => x * 1e-6),
  },
];
