/** What every attention kernel does to a score between `q . k` and softmax, and to a row at its end. */
import type { QuerySmoothing } from '../../../quantization/schemes.ts';
import type { DType, MaskDType } from '../../../tensor/dtype.ts';
import { BLOCK_DECLARATIONS, BLOCK_PARAMS } from './blocks.ts';
import { MASK_PARAMS, SEQUENCE } from './layout.ts';
import { readsStatistics, type ValueScaling } from './prepare.ts';
import { JOIN_SINK } from './sinks.ts';
import { EXCLUDED, maskLoader, NAN_WORD, outputPacker, range } from './storage.ts';

/** What of a problem changes the code of an attention kernel, whatever its family and tiles. */
export interface ScoreConfig {
  readonly dtype: DType;
  readonly headDimPadded: number;
  readonly valueDim: number;
  readonly valueDimPadded: number;
  readonly mask: MaskDType | undefined;
  /** Of the keys that the band leaves, a block mask (buffer `blockMap`) says which are attended to. */
  readonly blocks: boolean;
  readonly softcap: boolean;
  readonly returnLse: boolean;
  /** The last kernel of a row adds its head's sink. With V smoothed results are partial: the sink's share has no mean of V. */
  readonly sinks: boolean;
  /** V's mean is added to every row that attends to something. */
  readonly values: ValueScaling;
  /** The keys of a block share a scale unless they are flagged. */
  readonly sharedScale: boolean;
  /** Q and K, and V, in FP4; undefined: in INT8 and float16. */
  readonly fp4: Fp4Products | undefined;
  /** `final`: outputs; `partial`: normalized sums, maximum and sum of each row, for the merging kernel. */
  readonly result: 'final' | 'partial';
}

/** What attention over FP4 keys and values does besides multiplying them. */
export interface Fp4Products {
  /** Weights are rounded to FP4 as well: blocks of 16 keys, in two levels. */
  readonly weights: boolean;
  /** Buffer `meanScores` holds what smoothing Q took from the scores. */
  readonly smoothQ: QuerySmoothing | false;
}

export const ATTENTION_PARAMS = [
  'tileStart',
  'headStart',
  'groupSize',
  'sequences',
  'chunks',
  'sequencesAt',
  'tilesAt',
  'queryRowsPerHead',
  'keyRowsPerHead',
  'queryRowBase',
  'keyRowBase',
  'valueRowBase',
  'partialBase',
  'outputHeadStride',
  'outputTokenStride',
  'outputBase',
  'lseHeadStride',
  'lseBase',
  ...MASK_PARAMS,
  'keyStart',
  'keySpan',
  'splitIndex',
  'splits',
  'recordBase',
  'softcap',
  'inverseQuarterSoftcap',
] as const;

/** Parameters of kernels that read buffer `meanScores`. */
export const MEAN_SCORE_PARAMS = ['meanGroups', 'scoreStride', 'scoreBase'] as const;

export const attentionParams = ({ fp4, blocks }: Pick<ScoreConfig, 'fp4' | 'blocks'>): readonly string[] => [
  ...ATTENTION_PARAMS,
  ...(fp4?.smoothQ ? MEAN_SCORE_PARAMS : []),
  ...(blocks ? BLOCK_PARAMS : []),
];

/** What decides how a score comes from a product. */
export type ScoreMeaning = Pick<ScoreConfig, 'mask' | 'softcap'>;

/** With a mask or softcap, scores are in natural units; otherwise log2(e) is folded into Q's scale. */
export const scoresAreFloat = (config: ScoreMeaning): boolean =>
  config.softcap || (config.mask !== undefined && config.mask !== 'bool');

export const LOG2E = '1.4426950408889634f';
const LN2 = '0.6931471805599453f';

/** `exp2` of a difference of scores. */
export const expOf = (config: ScoreMeaning, difference: string): string =>
  scoresAreFloat(config) ? `exp2((${difference}) * ${LOG2E})` : `exp2(${difference})`;

/**
 * Floats of one row's partial result: channels, then maximum, sum (negative: the row is NaN), the sum of the weights before they
 * were rounded to FP4, and the sink.
 */
export const recordFloats = (valueDimPadded: number): number => valueDimPadded + 4;

/** The reciprocal of a softcap above 2^126 is subnormal, which a GPU may take for 0, so the kernels get that of a quarter. */
export const overSoftcap = (score: string): string => `${score} * 0.25 * P.inverseQuarterSoftcap`;

/**
 * `soft_capped(s)`: `softcap * tanh(s / softcap)` with a small relative error for every size of either. Where s is
 * small beside the cap a series is multiplied with s itself: WGSL bounds the absolute error of `tanh` only, and a large
 * cap would multiply it.
 */
export const SOFTCAP = `
fn soft_capped(s: f32) -> f32 {
  let x = min(abs(${overSoftcap('s')}), 12.0);
  let y = x * x;
  let series = s * (1.0 - y * (0.33333333f - y * (0.13333333f - y * (0.053968254f - y * 0.021869489f))));
  let capped = P.softcap * (1.0 - 2.0 / (exp2(x * 2.8853901f) + 1.0));
  return select(select(capped, -capped, s < 0.0), series, x < 0.4);
}`;

/** Bindings from 5 on, and the helpers that follow from the configuration. */
export function scoreDeclarations(config: ScoreConfig): string {
  const { mask, dtype, returnLse, values, softcap, sinks, blocks, result, fp4 } = config;
  return `
${mask === undefined ? '' : maskLoader(5, mask)}
${
  result === 'final'
    ? `@group(0) @binding(6) var<storage, read_write> output: array<u32>;
${returnLse ? '@group(0) @binding(7) var<storage, read_write> lse: array<u32>;' : ''}
${outputPacker(dtype)}`
    : '@group(0) @binding(6) var<storage, read_write> records: array<f32>;'
}
${readsStatistics(values) ? '@group(0) @binding(8) var<storage, read> partials: array<vec4<f32>>;' : ''}${fp4?.smoothQ ? '\n@group(0) @binding(7) var<storage, read> mean_scores: array<f32>;' : ''}
${softcap ? SOFTCAP : ''}${blocks ? BLOCK_DECLARATIONS : ''}${sinks && result === 'final' ? JOIN_SINK : ''}
`;
}

/**
 * Statements after `var f = f32(i32 score) * scales`: softcap, then the mask. `f` becomes EXCLUDED where the mask says
 * so; `poison` (a u32 variable) becomes nonzero for a NaN or +Infinity in an additive mask.
 *
 * @param row names of the row's variables: its constant, its mask offset, its poison flag
 * @param key expression of the key's index, which must be visible
 */
export function scoreStatements(
  config: ScoreMeaning,
  f: string,
  row: { readonly constant: string; readonly mask: string; readonly poison: string },
  key: string,
): { softcap: string; mask: string } {
  const softcap = config.softcap ? `${f} = soft_capped(${f} + ${row.constant});` : '';
  if (config.mask === undefined) return { softcap, mask: '' };
  const at = `${row.mask} + u32(${key}) * P.maskKeyStride`;
  if (config.mask === 'bool') return { softcap, mask: `if (mask_at(${at}) == 0u) { ${f} = ${EXCLUDED}; }` };
  return {
    softcap,
    mask: `{ let bits = mask_at(${at});
      if ((bits & 0x7f800000u) != 0x7f800000u) { ${f} = clamp(${f} + clamp(bitcast<f32>(bits), -3.4e38f, 1.0e38f), -3.4e38f, 1.7e38f); }
      else if (bits == 0xff800000u) { ${f} = ${EXCLUDED}; }
      else { ${row.poison} = 1u; } }`,
  };
}

/**
 * `store_row`'s parts: the statement that writes the logsumexp of a row with maximum `m` and sum `l`, given the row's
 * index in its sequence, and its head's `sink` where the configuration has sinks. A negative sum marks a NaN row, a sum of 0 a row that attends to nothing.
 */
export function lseStatement(
  config: ScoreConfig,
  row: string,
  m: string,
  l: string,
  constant: string,
  sink: string,
): string {
  const value = naturalLse(config, m, l, constant);
  if (config.sinks) {
    return `{ let at = sequence_field(sequence, ${SEQUENCE.lse}u) - P.lseBase + head * P.lseHeadStride + ${row};
    if (${l} < 0.0) { lse[at] = 0x7fc00000u; }
    else { lse[at] = joined_lse(${sink}, ${l}, ${value}); } }`;
  }
  return `{ let at = sequence_field(sequence, ${SEQUENCE.lse}u) - P.lseBase + head * P.lseHeadStride + ${row};
    if (${l} < 0.0) { lse[at] = 0x7fc00000u; }
    else if (${l} == 0.0) { lse[at] = 0xff800000u; }
    else { lse[at] = bitcast<u32>(${value}); } }`;
}

/** A row's logsumexp over its keys. */
export function naturalLse(config: ScoreConfig, m: string, l: string, constant: string): string {
  // With softcap the constant is inside the scores already.
  const shift = config.softcap ? m : `${m} + ${constant}`;
  return scoresAreFloat(config) ? `${shift} + log(${l})` : `(${shift} + log2(${l})) * ${LN2}`;
}

/**
 * Writes four channels of a row, of which those past Dv are dropped.
 *
 * @param at expression of the row's first element in the output (16-bit types: even)
 * @param channel expression of the first channel, a multiple of 4
 * @param value a vec4<f32> expression
 * @param nanRow a bool expression
 */
export function storeChannels(config: ScoreConfig, at: string, channel: string, value: string, nanRow: string): string {
  const { dtype, valueDim } = config;
  const nan = NAN_WORD[dtype];
  // A word of two 16-bit elements is written when its first is a channel: Dv is even where this is used.
  const step = dtype === 'float32' ? 1 : 2;
  const words = range(4 / step).map((word) => {
    const [a, b] = ['x', 'y', 'z', 'w'].slice(word * step);
    const bits = dtype === 'float32' ? `bitcast<u32>(x.${a})` : `pack_output(x.${a}, x.${b})`;
    const index = dtype === 'float32' ? `${at} + ${channel}` : `((${at} + ${channel}) >> 1u)`;
    return `if (${channel} + ${word * step}u < ${valueDim}u) { output[${index} + ${word}u] = select(${bits}, ${nan}, ${nanRow}); }`;
  });
  return `{ let x = ${value};
      ${words.join('\n      ')} }`;
}
