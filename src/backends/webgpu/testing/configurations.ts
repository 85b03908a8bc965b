/** Every WGSL kernel that the tables can ask for: compiled in tests, and digested by `scripts/kernel-digest.ts`. */
import type { DType, MaskDType } from '../../../tensor/dtype.ts';
import type { MatrixConfig } from '../capabilities.ts';
import { GRADIENT_VARIANTS, INT8_GRADIENT_VARIANTS, MATRIX_GRADIENT_VARIANTS } from '../families/backward.ts';
import { matrixProducts } from '../families/matrix.ts';
import { MATRIX_VARIANTS } from '../families/matrix-shapes.ts';
import { packedShape } from '../families/packed.ts';
import { TILED_VARIANTS } from '../families/tiled.ts';
import { matrixAttentionKernel } from '../kernels/attention-matrix.ts';
import { packedAttentionKernel } from '../kernels/attention-packed.ts';
import { dotInt8, tiledAttentionKernel } from '../kernels/attention-tiled.ts';
import { gradientCodesKernel } from '../kernels/backward/codes.ts';
import { gradientKernel } from '../kernels/backward/gradients.ts';
import { matrixGradientTiling } from '../kernels/backward/matrix-gradient-tiling.ts';
import { matrixGradientKernel } from '../kernels/backward/matrix-gradients.ts';
import { narrowKernel } from '../kernels/backward/narrow.ts';
import { gradientKeysKernel, gradientRowsKernel } from '../kernels/backward/prepare.ts';
import { softmaxAgainKernel } from '../kernels/backward/softmax.ts';
import { chooseKernel, meanKernel, packKernel, poolKernel, visibleBlocksKernel } from '../kernels/block-map.ts';
import { padDim } from '../kernels/layout.ts';
import { nativeMatrices } from '../kernels/matrix-operations.ts';
import { matrixTiling } from '../kernels/matrix-tiling.ts';
import { mergeKernel, mergeRowsKernel } from '../kernels/merge.ts';
import { prepareKernel, prepareKeyValueKernel, prepareQueryKernel } from '../kernels/prepare.ts';
import {
  meanScoresKernel,
  prepareFp4KeyValueKernel,
  prepareFp4QueryKernel,
  queryMeansKernel,
} from '../kernels/prepare-fp4.ts';
import type { ScoreConfig } from '../kernels/scores.ts';
import { statisticsKernel } from '../kernels/statistics.ts';
import { maskMaximaKernel, visibleKeysKernel } from '../kernels/visible-keys.ts';

export const EXTENSION = 'chromium_experimental_subgroup_matrix';
export const DIALECT = { majorness: 'template', unit: 'elements' } as const;

export const H200: readonly MatrixConfig[] = [
  { componentType: 'i8', resultComponentType: 'i32', M: 16, N: 16, K: 32 },
  { componentType: 'i8', resultComponentType: 'i32', M: 16, N: 8, K: 32 },
  { componentType: 'f16', resultComponentType: 'f16', M: 16, N: 16, K: 16 },
  { componentType: 'f16', resultComponentType: 'f32', M: 16, N: 16, K: 16 },
  { componentType: 'f16', resultComponentType: 'f32', M: 16, N: 8, K: 16 },
];
export const APPLE: readonly MatrixConfig[] = [
  { componentType: 'f32', resultComponentType: 'f32', M: 8, N: 8, K: 8 },
  { componentType: 'f16', resultComponentType: 'f16', M: 8, N: 8, K: 8 },
];

type ScoreRow = readonly [
  dtype: DType,
  headDimPadded: number,
  valueDim: number,
  mask: MaskDType | undefined,
  softcap: boolean,
  returnLse: boolean,
  keyScale: 'tile' | 'token',
  result: 'final' | 'partial',
  feature?: 'sinks' | 'blocks',
];

/** Score configurations that together use every statement of the kernels. */
const SCORES: readonly ScoreConfig[] = (
  [
    ['float16', 64, 64, undefined, false, false, 'tile', 'final'],
    ['float32', 128, 100, 'bool', true, true, 'token', 'final'],
    ['bfloat16', 256, 254, 'bfloat16', false, true, 'tile', 'final'],
    ['float16', 32, 33, 'float16', true, true, 'token', 'partial'],
    ['bfloat16', 32, 1, 'float32', false, false, 'tile', 'partial'],
    ['float32', 64, 64, undefined, false, true, 'tile', 'final', 'sinks'],
    ['float16', 32, 32, undefined, true, false, 'tile', 'partial', 'sinks'],
    ['bfloat16', 64, 64, 'bool', false, false, 'tile', 'final', 'blocks'],
  ] satisfies ScoreRow[]
).map(scoresOf);

/** The same above 256 channels. */
const WIDE_SCORES: readonly ScoreConfig[] = (
  [
    ['float16', 512, 512, undefined, false, false, 'token', 'final'],
    ['bfloat16', 320, 300, 'bool', false, true, 'token', 'partial'],
    ['float32', 512, 512, 'float32', true, true, 'token', 'final'],
  ] satisfies ScoreRow[]
).map(scoresOf);

function scoresOf(row: ScoreRow): ScoreConfig {
  const [dtype, headDimPadded, valueDim, mask, softcap, returnLse, keyScale, result, feature] = row;
  return {
    dtype,
    headDimPadded,
    valueDim,
    valueDimPadded: padDim(valueDim),
    mask,
    softcap,
    returnLse,
    sinks: feature === 'sinks',
    blocks: feature === 'blocks',
    values: { integers: false, scaled: dtype !== 'float16', smoothed: dtype === 'bfloat16', exponent: 15 },
    sharedScale: keyScale === 'tile',
    fp4: undefined,
    result,
  };
}

/** The same with FP4, of which logsumexps come from partial results. */
const FP4_SCORES: readonly ScoreConfig[] = SCORES.map((scores, i) => {
  const weights = i % 3 !== 2;
  return {
    ...scores,
    values: { integers: false, scaled: false, smoothed: i % 2 === 0, exponent: 15 },
    sharedScale: false,
    fp4: { weights, smoothQ: weights && ([false, 'block', 'sequence'] as const)[i % 3] },
    result: (scores.returnLse || scores.sinks) && weights ? 'partial' : scores.result,
  } as ScoreConfig;
});

/** The same with V in INT8. */
const INTEGER_SCORES: readonly ScoreConfig[] = SCORES.map((scores) => ({
  ...scores,
  values: { ...scores.values, integers: true, scaled: true },
  sharedScale: false,
}));

/** A configuration of a generator. */
export interface WebgpuConfiguration {
  /** Tells the configuration from every other. */
  readonly name: string;
  /** The generator and its tile variant: configurations that are tested together. */
  readonly group: string;
  readonly source: () => string;
}

/** The score configuration's distinguishing fields. */
const scoresName = ({ dtype, headDimPadded, valueDim, mask, result, sinks, blocks, fp4, values }: ScoreConfig) =>
  `${fp4 === undefined ? '' : 'FP4 '}${values.integers ? 'V in INT8 ' : ''}${dtype} D${headDimPadded}/${valueDim} ${mask ?? 'no'} mask, ${result}${sinks ? ', sinks' : ''}${blocks ? ', blocks' : ''}`;

/** What devices with 48, 32 and 16 KiB of workgroup memory take for wide heads. */
const WIDE_VARIANTS = ['32x32s', '32x32sq', '16x16n', '16x16nsq'];

function tiledKernels(): WebgpuConfiguration[] {
  return TILED_VARIANTS.flatMap((variant) =>
    [
      ...(WIDE_VARIANTS.includes(variant.name) ? WIDE_SCORES : []),
      ...(variant.storedQuery ? [] : [...SCORES, ...FP4_SCORES, ...(variant.sharedKeyValue ? [] : INTEGER_SCORES)]),
    ]
      .filter(({ valueDimPadded }) => valueDimPadded % (4 * variant.colThreads) === 0)
      // Tiles have no part in sinks.
      .filter(({ sinks }) => !sinks || variant === TILED_VARIANTS[0])
      .flatMap((scores) =>
        (['base', 'subgroup'] as const).flatMap((family) =>
          [true, false].map((modern) => ({
            name: `${family} ${variant.name} ${scoresName(scores)}${modern ? '' : ', core WGSL'}`,
            group: `tiles ${variant.name} of both families`,
            source: () =>
              tiledAttentionKernel({ ...scores, ...variant, family, packedDot: modern, subgroupId: modern }),
          })),
        ),
      ),
  );
}

/** The kernel that packs the heads of a group, with and without rows left over. */
function packedKernels(): WebgpuConfiguration[] {
  const found: WebgpuConfiguration[] = [];
  for (const scores of [...SCORES, ...WIDE_SCORES]) {
    for (const layout of ['rows', 'tiles'] as const) {
      for (const [packed, group] of [
        [1, 1],
        [6, 3],
        [8, 8],
      ] as const) {
        const shape = packedShape({ workgroupBytes: 16384 }, packed, scoresDims(scores), layout);
        if (shape === undefined) throw new Error('a device with the core limits has no packed kernel');
        for (const packedDot of [true, false]) {
          found.push({
            name: `packed ${layout} ${shape.rows}x${shape.keys} group ${group} ${scoresName(scores)}${packedDot ? '' : ', core WGSL'}`,
            group: 'packed heads',
            source: () =>
              packedAttentionKernel({
                ...scores,
                ...shape,
                ...{ layout, group, packedDot, result: 'partial', dot: dotInt8(packedDot) },
              }),
          });
        }
      }
    }
  }
  return found;
}

const scoresDims = ({ headDimPadded, valueDim }: ScoreConfig) => ({ headDim: headDimPadded, valueDim });

/** Bytes of workgroup memory above which no device needs to take a variant. */
const WORKGROUP_BYTES = 48 * 1024;

function matrixKernels(): WebgpuConfiguration[] {
  const found: WebgpuConfiguration[] = [];
  for (const [device, configs] of [
    ['an H200', H200],
    ['an Apple GPU', APPLE],
  ] as const) {
    for (const variant of MATRIX_VARIANTS) {
      for (const accumulate of ['f32', 'f16'] as const) {
        const products = matrixProducts(configs, accumulate);
        if (products === undefined) continue;
        for (const scores of SCORES.filter(({ sinks }) => !sinks || variant === MATRIX_VARIANTS[0])) {
          const { headDimPadded, valueDimPadded } = scores;
          const tiling = matrixTiling(variant, products, 32, headDimPadded, valueDimPadded);
          if (tiling === undefined || tiling.bytes > WORKGROUP_BYTES) continue;
          found.push({
            name: `matrix of ${device} ${variant.name} ${accumulate} ${scoresName(scores)}`,
            group: `matrices of ${device}, ${variant.name},`,
            source: () => {
              const operations = nativeMatrices(EXTENSION, DIALECT);
              return matrixAttentionKernel({ ...scores, ...variant, ...products, lanes: 32, operations });
            },
          });
        }
      }
    }
  }
  return found;
}

const PREPARING = 'preparing kernels';
/** Sinks may be of another dtype than Q. */
const SINK_DTYPES = { float16: 'float32', bfloat16: 'float16', float32: 'bfloat16' } as const;

/** Kernels that quantize, for each dtype and access. */
function quantizingKernels(): WebgpuConfiguration[] {
  return (['float16', 'bfloat16', 'float32'] as const).flatMap((dtype) =>
    (['vector', 'scalar'] as const).flatMap((access) => {
      const sizes = { dtype, access, headDim: 48, headDimPadded: 64, valueDim: 80, valueDimPadded: 96 };
      const wide = { dtype, access, headDim: 500, headDimPadded: 512, valueDim: 264, valueDimPadded: 320 };
      const valueMax = dtype !== 'float16';
      const of = `${dtype} ${access}`;
      const statistics = [false, true].map((masked) => ({
        name: `statistics ${of}${masked ? ' masked' : ''}`,
        group: PREPARING,
        source: () =>
          statisticsKernel({ ...sizes, keyMean: true, valueMax, valueMean: valueMax, valueTypical: false, masked }),
      }));
      const typical = [false, true].map((valueMean) => ({
        name: `statistics ${of}, typical sizes of V${valueMean ? ' and means' : ''}`,
        group: PREPARING,
        source: () =>
          statisticsKernel({ ...sizes, keyMean: true, valueMax: true, valueMean, valueTypical: true, masked: false }),
      }));
      const prepare = [true, false].flatMap((smoothK) => {
        const features = `${of}${smoothK ? ', smooth K' : ''}`;
        const values = { integers: false, scaled: valueMax, smoothed: valueMax && smoothK, exponent: smoothK ? 15 : 0 };
        const integers = { ...values, integers: true, scaled: true };
        const layouts = [
          ['rows', false],
          ['tiles', false],
          ['tiles', true],
        ] as const;
        const query = { ...sizes, smoothK, sinks: undefined };
        const keyValues = [
          ...layouts.map(([layout, sharedScale]) => ({
            name: `${layout}${sharedScale ? ', shared scales' : ''}`,
            config: { ...sizes, smoothK, sharedScale, values, layout },
          })),
          {
            name: 'rows, V in INT8',
            config: { ...sizes, smoothK, sharedScale: false, values: integers, layout: 'rows' as const },
          },
        ];
        return [
          {
            name: `prepare Q ${features}`,
            group: PREPARING,
            source: () => prepareQueryKernel(query),
          },
          {
            name: `prepare Q ${features}, sinks`,
            group: PREPARING,
            source: () => prepareQueryKernel({ ...sizes, smoothK, sinks: SINK_DTYPES[dtype] }),
          },
          ...keyValues.flatMap(({ name, config }) => [
            {
              name: `prepare K and V ${features} ${name}`,
              group: PREPARING,
              source: () => prepareKeyValueKernel(config),
            },
            { name: `prepare ${features} ${name}`, group: PREPARING, source: () => prepareKernel(query, config) },
          ]),
        ];
      });
      const values = { integers: false, scaled: true, smoothed: true, exponent: 15 };
      const wideQuery = { ...wide, smoothK: true, sinks: undefined };
      const wideKeyValue = { ...wide, smoothK: true, sharedScale: false, values, layout: 'rows' as const };
      const wideKernels = [
        [
          'statistics',
          () =>
            statisticsKernel({
              ...wide,
              ...{ keyMean: true, valueMax: true, valueMean: true, valueTypical: false, masked: false },
            }),
        ],
        ['prepare Q', () => prepareQueryKernel(wideQuery)],
        ['prepare K and V', () => prepareKeyValueKernel(wideKeyValue)],
        ['prepare', () => prepareKernel(wideQuery, wideKeyValue)],
      ] as const;
      const widened = wideKernels.map(([name, source]) => ({
        name: `${name} ${of}, wide heads`,
        group: PREPARING,
        source,
      }));
      return [...statistics, ...typical, ...prepare, ...widened];
    }),
  );
}

/** Kernels that quantize to FP4. */
function fp4Kernels(): WebgpuConfiguration[] {
  const searches = ['mse', 'four-over-six', 'none'] as const;
  const found: WebgpuConfiguration[] = [];
  (['float16', 'bfloat16', 'float32'] as const).forEach((dtype, at) => {
    for (const access of ['vector', 'scalar'] as const) {
      const sizes = { dtype, access, headDim: 48, headDimPadded: 64, valueDim: 80, valueDimPadded: 96 };
      const scaleSearch = searches[at] ?? 'mse';
      const add = (name: string, source: () => string) =>
        found.push({ name: `FP4 ${name} ${dtype} ${access}`, group: PREPARING, source });
      for (const smooth of [true, false]) {
        const config = { ...sizes, scaleSearch, smoothK: smooth };
        const of = smooth ? ', smoothed' : '';
        for (const valueBlocks of ['keys', 'channels'] as const) {
          add(`prepare K and V${of}, blocks of ${valueBlocks}`, () =>
            prepareFp4KeyValueKernel({ ...config, smoothV: smooth, valueBlocks }),
          );
        }
        for (const [format, smoothQ] of [
          ['fp4', 'block'],
          ['fp4', 'sequence'],
          ['fp4', false],
          ['int8', false],
        ] as const) {
          for (const sinks of [undefined, 'float16'] as const) {
            const label = `prepare Q ${format} ${smoothQ}${of}${sinks === undefined ? '' : ', sinks'}`;
            add(label, () => prepareFp4QueryKernel({ ...config, format, smoothQ, sinks }));
          }
        }
        add(`mean scores${of}`, () => meanScoresKernel({ ...config, smoothQ: smooth ? 'block' : 'sequence' }));
      }
      add('query means', () => queryMeansKernel({ ...sizes, smoothQ: at === 0 ? 'block' : 'sequence' }));
    }
  });
  return found;
}

/** Kernels of masks before and of partial results after attention. */
function otherKernels(): WebgpuConfiguration[] {
  const found: WebgpuConfiguration[] = [];
  const add = (name: string, source: () => string) => found.push({ name, group: PREPARING, source });
  for (const mask of ['bool', 'float16', 'bfloat16', 'float32'] as const) {
    for (const banded of [false, true]) {
      const of = `${mask}${banded ? ', banded' : ''}`;
      add(`visible keys ${of}`, () => visibleKeysKernel({ mask, banded }));
      if (mask !== 'bool') add(`mask maxima ${of}`, () => maskMaximaKernel({ mask, banded }));
    }
  }
  for (const scores of [...SCORES, ...FP4_SCORES]) {
    for (const headsInner of [true, false]) {
      const of = `${scoresName(scores)}${headsInner ? ', heads inner' : ''}`;
      add(`merge ${of}`, () => mergeKernel(scores, headsInner));
      const rows = scores.fp4 === undefined && (scores.dtype === 'float32' || scores.valueDim % 2 === 0);
      if (rows) add(`merge rows ${of}`, () => mergeRowsKernel(scores, headsInner));
    }
  }
  return found;
}

/** Kernels that choose blocks. */
function blockMapKernels(): WebgpuConfiguration[] {
  const found: WebgpuConfiguration[] = [];
  const add = (name: string, source: () => string) => found.push({ name, group: PREPARING, source });
  for (const dtype of ['float16', 'bfloat16', 'float32'] as const) {
    for (const [access, headDim] of [
      ['vector', 64],
      ['scalar', 136],
    ] as const) {
      for (const operand of ['q', 'k'] as const) {
        for (const similarities of [true, false]) {
          const shifted = similarities && operand === 'k';
          const of = `${operand} ${dtype} D${headDim}${similarities ? ', similarities' : ''}`;
          add(`pool ${of}`, () => poolKernel({ dtype, access, headDim, operand, similarities, shifted }));
        }
      }
    }
  }
  add('mean of blocks', () => meanKernel(136));
  for (const by of ['count', 'mass'] as const) {
    for (const similarities of [true, false]) {
      add(`choose blocks by ${by}${similarities ? ', similarities' : ''}`, () =>
        chooseKernel({ headDim: 136, by, similarities, masked: false }),
      );
    }
    add(`choose blocks by ${by}, mask`, () => chooseKernel({ headDim: 136, by, similarities: false, masked: true }));
  }
  for (const mask of ['bool', 'float16', 'bfloat16', 'float32'] as const) {
    add(`visible blocks, ${mask} mask`, () => visibleBlocksKernel({ mask }));
  }
  add('pack map', packKernel);
  return found;
}

/** Kernels of the backward pass. */
function gradientKernels(): WebgpuConfiguration[] {
  const group = 'gradient kernels';
  const found: WebgpuConfiguration[] = [];
  const add = (name: string, source: () => string) => found.push({ name, group, source });
  for (const scores of SCORES) {
    const { dtype, headDimPadded, valueDim, valueDimPadded, mask, softcap } = scores;
    const headDim = headDimPadded - 2;
    const of = `${dtype} D${headDim}/${valueDim} ${mask ?? 'no'} mask${softcap ? ', softcap' : ''}`;
    const sizes = { dtype, headDim, headDimPadded, valueDim, valueDimPadded };
    for (const packedDot of [true, false]) {
      const core = packedDot ? '' : ', core WGSL';
      const dtypes = [dtype, valueDim % 2 === 0 ? dtype : 'float32'] as const;
      for (const tile of GRADIENT_VARIANTS) {
        for (const owner of ['query', 'key'] as const) {
          add(`gradients of own ${owner} ${tile.name} ${of}${core}`, () =>
            gradientKernel({ ...sizes, mask, softcap, ...tile, owner, dtypes, packedDot }),
          );
        }
      }
      add(`softmax again ${of}${core}`, () => softmaxAgainKernel({ ...sizes, mask, softcap, packedDot }));
    }
    for (const access of ['vector', 'scalar'] as const) {
      const natural = mask !== undefined && mask !== 'bool';
      add(`gradient rows ${of} ${access}`, () =>
        gradientRowsKernel({ ...sizes, queryAccess: access, outputAccess: access, softcap, natural }),
      );
      add(`gradient keys ${of} ${access}`, () => gradientKeysKernel({ ...sizes, access, smoothed: !softcap }));
      const half = { ...sizes, half: true };
      add(`gradient rows ${of} ${access}, float16`, () =>
        gradientRowsKernel({ ...half, queryAccess: access, outputAccess: access, softcap, natural }),
      );
      add(`gradient keys ${of} ${access}, float16`, () => gradientKeysKernel({ ...half, access, smoothed: !softcap }));
    }
  }
  for (const dtype of ['float16', 'bfloat16'] as const) add(`narrow ${dtype}`, () => narrowKernel(dtype));
  return found;
}

/** What of the backward pass is another in INT8. */
function integerGradientKernels(): WebgpuConfiguration[] {
  const found: WebgpuConfiguration[] = [];
  const add = (name: string, source: () => string) => found.push({ name, group: 'gradient kernels', source });
  for (const { dtype, headDimPadded, valueDim, valueDimPadded, mask, softcap } of SCORES) {
    const of = `${dtype} D${headDimPadded}/${valueDim} ${mask ?? 'no'} mask${softcap ? ', softcap' : ''}`;
    const sizes = { headDim: headDimPadded, headDimPadded, valueDim, valueDimPadded, codes: true };
    const dtypes = [dtype, valueDim % 2 === 0 ? dtype : 'float32'] as const;
    for (const owner of ['query', 'key'] as const) {
      add(`gradient codes, ${owner} ${of}`, () => gradientCodesKernel({ ...sizes, operands: owner }));
      for (const tile of INT8_GRADIENT_VARIANTS) {
        for (const packedDot of [true, false]) {
          add(`gradients in INT8 of own ${owner} ${tile.name} ${of}${packedDot ? '' : ', core WGSL'}`, () =>
            gradientKernel({ ...sizes, mask, softcap, ...tile, owner, dtypes, packedDot }),
          );
        }
      }
    }
  }
  return found;
}

/** Gradients with subgroup matrices. */
function matrixGradientKernels(): WebgpuConfiguration[] {
  const found: WebgpuConfiguration[] = [];
  const products = matrixProducts(H200, 'f32');
  if (products === undefined) throw new Error('an H200 has products');
  for (const variant of MATRIX_GRADIENT_VARIANTS) {
    for (const { dtype, headDimPadded, valueDim, valueDimPadded, mask, softcap } of SCORES) {
      for (const owner of ['query', 'key'] as const) {
        const dims = { headDimPadded, valueDimPadded };
        const tiling = matrixGradientTiling(variant, products, 32, owner, dims);
        if (tiling === undefined || tiling.bytes > WORKGROUP_BYTES) continue;
        const dtypes = [dtype, valueDim % 2 === 0 ? dtype : 'float32'] as const;
        const operations = nativeMatrices(EXTENSION, DIALECT);
        const sizes = { ...dims, headDim: headDimPadded - 2, valueDim };
        found.push({
          name: `gradients with matrices of own ${owner} ${variant.name} ${dtype} D${headDimPadded}/${valueDim} ${mask ?? 'no'} mask${softcap ? ', softcap' : ''}`,
          group: 'gradient kernels with matrices',
          source: () =>
            matrixGradientKernel({
              ...{ ...sizes, ...variant, ...products, owner, dtypes, mask, softcap, lanes: 32, operations },
            }),
        });
      }
    }
  }
  return found;
}

export const webgpuKernels = (): WebgpuConfiguration[] => [
  ...tiledKernels(),
  ...matrixKernels(),
  ...packedKernels(),
  ...quantizingKernels(),
  ...fp4Kernels(),
  ...otherKernels(),
  ...blockMapKernels(),
  ...gradientKernels(),
  ...integerGradientKernels(),
  ...matrixGradientKernels(),
];
