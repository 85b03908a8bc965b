/**
 * Gradients of attention without subgroup matrices (FlashAttention-2, arXiv 2307.08691, algorithm 2; SageBwd, arXiv 2603.02170): scores
 * from the codes of the forward pass, everything after them in float32, or with `codes` the three products of P and dS in INT8.
 *
 * Two kernels of one make. In each a workgroup owns some tokens and adds up their gradients, while the tokens of the other side pass by
 * in tiles: for dQ queries are owned and keys pass; for dK and dV keys are owned and the queries of all heads that share them pass,
 * always in the same order. No two workgroups add to one number, so that the same inputs give the same bits.
 *
 * A workgroup's threads form a grid of `ownThreads` x `passingThreads`. Each has a register tile of scores and one of gradients; P and dS
 * go through workgroup memory once a tile. Operands come from storage, where neighbouring threads read the same vectors or neighbouring
 * ones.
 *
 * With `codes`, whatever a product does not sum over has a scale of its own: P and dS, rounded here, one for each own token of a tile;
 * dO, Q and K, rounded by `codes.ts`, one for each channel of 32 tokens. A token's size, which it has lost there, goes into its P and dS
 * before they are rounded. So a gradient is rounded by the largest that it adds up itself, and a token that it does not see costs it
 * nothing. dP stays in float32, as the ablation of SageBwd asks.
 */
import { INT_MAX } from '../../../../quantization/schemes.ts';
import type { DType } from '../../../../tensor/dtype.ts';
import { dotInt8 } from '../attention-tiled.ts';
import {
  CODE_ROW_PARAMS,
  FLAG_UNSMOOTHED,
  MASK_PARAMS,
  OWN_TILE,
  params,
  rowVectors,
  SEQUENCE,
  sequenceTable,
  tables,
} from '../layout.ts';
import { expOf, overSoftcap, type ScoreMeaning, SOFTCAP, scoreStatements } from '../scores.ts';
import { EXCLUDED_BELOW, INTEGERS_OF, maskLoader, NAN_WORD, outputPacker, range } from '../storage.ts';
import {
  BAD_SCORES,
  CODE_ROWS,
  GRADIENT_BLOCK,
  type GradientDims,
  gradientKey,
  gradientRow,
  PLACE,
  PLACES,
  ROW_FLAGS,
} from './layout.ts';

/** Tokens that a workgroup owns, and of a tile that passes by; `passing / passingThreads` is a multiple of 4. */
export interface GradientTile {
  readonly own: number;
  readonly passing: number;
  readonly ownThreads: number;
  readonly passingThreads: number;
}

export interface GradientConfig extends ScoreMeaning, GradientDims, GradientTile {
  readonly owner: 'query' | 'key';
  /** Of dq or dk, and of dv: 16-bit types only where its rows have an even number of channels. */
  readonly dtypes: readonly [DType, DType];
  readonly headDim: number;
  readonly valueDim: number;
  readonly packedDot: boolean;
}

export const GRADIENT_PARAMS = [
  'tileStart',
  'headStart',
  'groupSize',
  'sequencesAt',
  'tilesAt',
  'placesAt',
  ...CODE_ROW_PARAMS,
  'gradientRowBase',
  'gradientKeyBase',
  ...MASK_PARAMS,
  'firstHeadStride',
  'firstTokenStride',
  'firstBase',
  'valueHeadStride',
  'valueTokenStride',
  'valueBase',
  'smScale',
  'softcap',
  'inverseQuarterSoftcap',
  // Constants that the compiler is not told: lavapipe's unrolls such loops, and then takes minutes over the loads in them.
  'codeVectors',
  'valueVectors',
  'passingThreads',
] as const;

/** Bytes of workgroup memory that the kernel takes. */
export function gradientWorkgroupBytes(
  owner: GradientConfig['owner'],
  { own, passing }: GradientTile,
  codes = false,
): number {
  const weights = codes ? own * (passing + 2 * 4) : own * (passing + 4) * 4;
  // Of own keys: P beside dS, flags and the channels of dV that are no numbers.
  return owner === 'query' ? weights : 2 * weights + own * 4 * (1 + 256 / 32);
}

/** Largest code. */
const MOST = `${INT_MAX.int8}.0`;

/** Bits of 2^-119: a tile's P or dS below it have codes as if this were the largest, so that its reciprocal is a number. */
const SMALLEST_MAXIMUM = '0x04000000u';

/** Weights above this power of e or 2 come from a logsumexp of other inputs. */
const LARGEST_EXPONENT = '80.0';

/** Names and numbers that the kernel's parts share. */
export function partsOf(config: GradientConfig) {
  const { owner, own, passing, ownThreads, passingThreads, headDimPadded, valueDimPadded } = config;
  const [row, key] = [gradientRow(config), gradientKey(config)];
  const codes = rowVectors(headDimPadded);
  const ownsQueries = owner === 'query';
  const [tm, tn] = [own / ownThreads, passing / passingThreads];
  /** Where the codes and the floats of a token are, given an expression of its row. */
  const at = {
    query: {
      codes: (token: string) => `(${token}) * ${codes}u - P.queryRowBase`,
      floats: (token: string) => `(${token}) * ${row.vectors}u - P.gradientRowBase`,
    },
    key: {
      codes: (token: string) => `(${token}) * ${codes}u - P.keyRowBase`,
      floats: (token: string) => `(${token}) * ${key.vectors}u - P.gradientKeyBase`,
    },
  };
  const floatOf = {
    query: (index: string) => `bitcast<vec4<f32>>(gradient_rows[${index}])`,
    key: (index: string) => (config.codes ? `bitcast<vec4<f32>>(gradient_keys[${index}])` : `gradient_keys[${index}]`),
  };
  const passer = ownsQueries ? ('key' as const) : ('query' as const);
  return {
    row,
    key,
    codes,
    ownsQueries,
    passer,
    threads: ownThreads * passingThreads,
    I: range(tm),
    N: range(tn),
    quads: range(tn / 4),
    headQuads: range(headDimPadded / 4 / passingThreads),
    valueQuads: range(valueDimPadded / 4 / passingThreads),
    ownAt: at[owner],
    passingAt: at[passer],
    ownFloat: floatOf[owner],
    passingFloat: floatOf[passer],
    ownToken: (i: number) => `(r + ${i * ownThreads}u)`,
    /** Four neighbours share a word of codes. */
    passingToken: (n: number) => (config.codes ? `(c * ${tn}u + ${n}u)` : `(c + ${n * passingThreads}u)`),
    /** Of a pair: the register index that stands for its row, and for its key. */
    rowOf: (i: number, n: number) => (ownsQueries ? i : n),
    keyOf: (i: number, n: number) => (ownsQueries ? n : i),
  };
}

export type Parts = ReturnType<typeof partsOf>;

/** What is known of a row: its scale, its weights' base, its band. `at` is its index in its sequence. */
export function rowNumbers(
  config: GradientConfig,
  { row, codes }: Parts,
  x: number,
  token: string,
  at: string,
): string {
  return `
    let query_${x} = query_rows[(${token}) * ${codes}u + ${codes - 1}u - P.queryRowBase];
    let facts_${x} = gradient_rows[(${token}) * ${row.vectors}u + ${row.facts}u - P.gradientRowBase];
    let scale_${x} = bitcast<f32>(query_${x}.x); let constant_${x} = bitcast<f32>(query_${x}.z);
    let top_${x} = bitcast<f32>(facts_${x}.x); let factor_${x} = bitcast<f32>(facts_${x}.y); let delta_${x} = bitcast<f32>(facts_${x}.z);
    let low_${x} = lower + i32(${at}); let high_${x} = select(-1, min(key_length - 1, upper + i32(${at})), ${at} < query_length);
    ${config.mask === undefined ? '' : `let mask_${x} = sequence_field(sequence, ${SEQUENCE.mask}u) - P.maskBase + query_head * P.maskHeadStride + (${at}) * P.maskQueryStride;`}`;
}

export const keyNumbers = ({ codes }: Parts, x: number, token: string, at: string): string => `
    let key_facts_${x} = key_rows[(${token}) * ${codes}u + ${codes - 1}u - P.keyRowBase]; let key_${x} = i32(${at});
    let key_scale_${x} = bitcast<f32>(key_facts_${x}.x); let plain_${x} = (key_facts_${x}.y & ${FLAG_UNSMOOTHED}u) != 0u;`;

/** Products of codes `s_<i>_<n>` and of dO and V `d_<i>_<n>` of own tokens and those that pass by. */
export function products(parts: Parts): string {
  const { row, key, ownsQueries, I, N, ownAt, passingAt, ownFloat, passingFloat, ownToken, passingToken } = parts;
  const [ownCodes, passingCodes] = ownsQueries ? ['query_rows', 'key_rows'] : ['key_rows', 'query_rows'];
  const [ownValues, passingValues] = ownsQueries ? [row.dOutput, key.value] : [key.value, row.dOutput];
  const pairs = (f: (i: number, n: number) => string) => I.flatMap((i) => N.map((n) => f(i, n))).join(' ');
  return `
    ${pairs((i, n) => `var s_${i}_${n} = 0; var d_${i}_${n} = 0.0;`)}
    {
      ${I.map((i) => `let own_${i} = ${ownAt.codes(`own_at + ${ownToken(i)}`)};`).join(' ')}
      ${N.map((n) => `let passing_${n} = ${passingAt.codes(`passing_at + ${passingToken(n)}`)};`).join(' ')}
      for (var w = 0u; w < P.codeVectors; w++) {
        ${I.map((i) => `let a_${i} = ${ownCodes}[own_${i} + w];`).join(' ')}
        ${N.map(
          (n) => `{ let b = ${passingCodes}[passing_${n} + w];
          ${I.map((i) => `s_${i}_${n} += ${['x', 'y', 'z', 'w'].map((e) => `dot_int8(a_${i}.${e}, b.${e})`).join(' + ')};`).join(' ')} }`,
        ).join('\n        ')}
      }
    }
    {
      ${I.map((i) => `let own_${i} = ${ownAt.floats(`own_at + ${ownToken(i)}`)} + ${ownValues}u;`).join(' ')}
      ${N.map((n) => `let passing_${n} = ${passingAt.floats(`passing_at + ${passingToken(n)}`)} + ${passingValues}u;`).join(' ')}
      for (var w = 0u; w < P.valueVectors; w++) {
        ${I.map((i) => `let a_${i} = ${ownFloat(`own_${i} + w`)};`).join(' ')}
        ${N.map(
          (n) => `{ let b = ${passingFloat(`passing_${n} + w`)};
          ${I.map((i) => `d_${i}_${n} += dot(a_${i}, b);`).join(' ')} }`,
        ).join('\n        ')}
      }
    }`;
}

/**
 * From the products to `p_<i>_<n>`, the weight, and `s_`'s gradient `ds_<i>_<n>`: of the score before the softcap, or with `masked` of
 * what the mask is added to. Of own keys also the flags of the rows that see them; with `masked` those of each pair, `flags_<i>_<n>`.
 */
export function weigh(config: GradientConfig, parts: Parts, i: number, n: number, masked = false): string {
  const { ownsQueries, row, rowOf, keyOf, ownToken, passingToken } = parts;
  const [x, y] = [rowOf(i, n), keyOf(i, n)];
  const names = { constant: `constant_${x}`, mask: `mask_${x}`, poison: 'poison' };
  const { softcap: capping, mask: masking } = scoreStatements(config, 'f', names, `key_${y}`);
  const bends = config.softcap && !masked;
  const slope = bends ? ' * slope' : '';
  const channels = range(row.channelWords)
    .map(
      (word) =>
        `atomicOr(&channels[${ownToken(i)} * ${row.channelWords}u + ${word}u], gradient_rows[(passing_at + ${passingToken(n)}) * ${row.vectors}u + ${row.channels + Math.floor(word / 4)}u - P.gradientRowBase].${'xyzw'[word % 4]});`,
    )
    .join(' ');
  const spread = `if (seen && facts_${x}.w != 0u) { bad_${i} |= facts_${x}.w; if ((facts_${x}.w & ${ROW_FLAGS.channels}u) != 0u) { ${channels} } }`;
  return `
    var ds_${i}_${n} = 0.0;${ownsQueries ? '' : ` var p_${i}_${n} = 0.0;`}
    { var f = f32(s_${i}_${n}) * (scale_${x} * key_scale_${y}) - select(0.0, constant_${x}, plain_${y});
      ${capping}${bends ? ` let bend = ${overSoftcap('f')}; let slope = 1.0 - bend * bend;` : ''}
      var seen = key_${y} >= low_${x} && key_${y} <= high_${x};
      ${masking === '' ? '' : `if (seen) { ${masking} seen = f > ${EXCLUDED_BELOW}; }`}
      let p = select(0.0, factor_${x} * ${expOf(config, `min(f - top_${x}, ${LARGEST_EXPONENT})`)}, seen);
      if (p > 0.0) { ds_${i}_${n} = p * (d_${i}_${n} - delta_${x})${slope};${ownsQueries ? '' : ` p_${i}_${n} = p;`} }
      ${ownsQueries ? '' : spread}${masked ? `if (seen) { flags_${i}_${n} |= facts_${x}.w; }` : ''} }`;
}

/** Adds `weights . passing` to the registers `name_<i>_<v>`: component e of vector `q * passingThreads + k` is of token `k + (4q + e) * passingThreads`. */
function accumulate(config: GradientConfig, parts: Parts): string {
  const { ownsQueries, row, I, quads, headQuads, valueQuads, passingAt, passingFloat } = parts;
  const { passingThreads } = config;
  const add = (name: string, from: string, list: readonly number[], first: number, e: string) =>
    list
      .map(
        (v) => `{ let z = ${passingFloat(`at + ${first + v * passingThreads}u`)};
        ${I.map((i) => `${name}_${i}_${v} = fma(vec4<f32>(${from}_${i}.${e}), z, ${name}_${i}_${v});`).join(' ')} }`,
      )
      .join('\n        ');
  return quads
    .map(
      (q) => `for (var k = 0u; k < P.passingThreads; k++) {
      ${I.map((i) => `let x_${i} = tile_s[${i}][r][${q * passingThreads}u + k];${ownsQueries ? '' : ` let y_${i} = tile_p[${i}][r][${q * passingThreads}u + k];`}`).join('\n      ')}
      ${range(4)
        .map(
          (e) => `{ let at = ${passingAt.floats(`passing_at + k + ${(4 * q + e) * passingThreads}u`)} + c;
        ${add('a', 'x', headQuads, 0, 'xyzw'[e] as string)}
        ${ownsQueries ? '' : add('b', 'y', valueQuads, row.dOutput, 'xyzw'[e] as string)} }`,
        )
        .join('\n      ')}
    }`,
    )
    .join('\n    ');
}

/**
 * Writes four channels of a token's gradient.
 *
 * @param bad an expression of channel e's word: whether it is NaN
 */
export function store(
  buffer: string,
  at: string,
  dtype: DType,
  dim: number,
  channel: string,
  value: string,
  bad: (e: number) => string,
): string {
  const step = dtype === 'float32' ? 1 : 2;
  const words = range(4 / step).map((word) => {
    const [a, b] = ['x', 'y', 'z', 'w'].slice(word * step);
    if (dtype === 'float32') {
      return `if (channel + ${word}u < ${dim}u) { ${buffer}[${at} + channel + ${word}u] = select(bitcast<u32>(x.${a}), ${NAN_WORD.float32}, ${bad(word)}); }`;
    }
    const masked = [0, 1].map(
      (half) => `select(0u, ${half === 0 ? '0xffffu' : '0xffff0000u'}, ${bad(2 * word + half)})`,
    );
    return `if (channel + ${2 * word}u < ${dim}u) { let nan = ${masked.join(' | ')};
        ${buffer}[((${at} + channel) >> 1u) + ${word}u] = (pack_output(x.${a}, x.${b}) & ~nan) | (${NAN_WORD[dtype]} & nan); }`;
  });
  return `{ let x = ${value}; let channel = ${channel};
      ${words.join('\n      ')} }`;
}

/** Stores the gradients of own token i. */
function finish(config: GradientConfig, parts: Parts, i: number): string {
  const { ownsQueries, headQuads, valueQuads, ownToken, row } = parts;
  const { dtypes, headDim, valueDim, passingThreads } = config;
  const place = (field: number, name: string) =>
    `(place_of(sequence, ${field}u) - P.${name}Base + head * P.${name}HeadStride + (first + ${ownToken(i)}) * P.${name}TokenStride)`;
  const channel = (v: number) => `4u * (c + ${v * passingThreads}u)`;
  const first = headQuads.map((v) =>
    store('first_gradient', 'at', dtypes[0], headDim, channel(v), `a_${i}_${v} * P.smScale`, () => 'is_bad'),
  );
  const values = valueQuads.map((v) =>
    store(
      'value_gradient',
      'value_at',
      dtypes[1],
      valueDim,
      channel(v),
      `b_${i}_${v}`,
      (e) =>
        `(weights_bad || ((atomicLoad(&channels[${ownToken(i)} * ${row.channelWords}u + channel / 32u]) >> (channel % 32u + ${e}u)) & 1u) != 0u)`,
    ),
  );
  const flags = ownsQueries ? `facts_${i}.w` : `atomicLoad(&bad[${ownToken(i)}])`;
  return `
  if (${ownToken(i)} < count) {
    let flags = ${flags}; let is_bad = (flags & ${BAD_SCORES}u) != 0u;
    let at = ${place(ownsQueries ? PLACE.dq : PLACE.dk, 'first')};
    ${first.join('\n    ')}
    ${ownsQueries ? '' : `let weights_bad = (flags & ${ROW_FLAGS.weights}u) != 0u; let value_at = ${place(PLACE.dv, 'value')};\n    ${values.join('\n    ')}`}
  }`;
}

/** Types of the gradients that are packed; both are the same. */
export const packer = (dtypes: readonly DType[]): string =>
  outputPacker(dtypes.find((dtype) => dtype !== 'float32') ?? 'float32');

/** Bindings and functions that every kernel with the scores' gradients has: parameters and bindings 0 to 6. */
export function scoreGradientDeclarations(
  { mask, softcap, packedDot, half, codes }: Omit<GradientConfig, 'ownThreads' | 'passingThreads'>,
  parameters: readonly string[],
): string {
  return `
${packedDot ? 'requires packed_4x8_integer_dot_product;' : ''}
${params(0, parameters)}
${parameters.includes('tilesAt') ? tables(1) : sequenceTable(1)}
@group(0) @binding(2) var<storage, read> query_rows: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> key_rows: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> gradient_rows: array<vec4<u32>>;
${mask === undefined ? '' : maskLoader(5, mask)}
@group(0) @binding(6) var<storage, read> gradient_keys: array<vec4<${half || codes ? 'u32' : 'f32'}>>;
${softcap ? SOFTCAP : ''}
${dotInt8(packedDot)}`;
}

/** Declarations of a kernel's bindings and of its workgroup memory. */
function declarations(config: GradientConfig, { ownsQueries, row, I }: Parts): string {
  const { own, passing, ownThreads, dtypes, codes } = config;
  const tile = `array<array<array<${codes ? `u32, ${passing / 4}` : `vec4<f32>, ${passing / 4 + 1}`}>, ${ownThreads}>, ${I.length}>`;
  return `${scoreGradientDeclarations(config, GRADIENT_PARAMS)}
${PLACES}
@group(0) @binding(7) var<storage, read_write> first_gradient: array<u32>;
${ownsQueries ? '' : '@group(0) @binding(8) var<storage, read_write> value_gradient: array<u32>;'}
${packer(ownsQueries ? dtypes.slice(0, 1) : dtypes)}
var<workgroup> tile_s: ${tile};
${codes ? `var<workgroup> maxima: array<atomic<u32>, ${2 * own * (ownsQueries ? 1 : 2)}>;` : ''}
${
  ownsQueries
    ? ''
    : `var<workgroup> tile_p: ${tile};
var<workgroup> bad: array<atomic<u32>, ${own}>;
var<workgroup> channels: array<atomic<u32>, ${own * row.channelWords}>;`
}`;
}

/** P or dS in codes, and what they are multiplied by. */
interface CodedProduct {
  /** Prefix of the registers with P or dS, and its tile of codes. */
  readonly weight: 'p' | 'ds';
  readonly tile: string;
  /** Of the sums `sums_<i>_<v>`. */
  readonly sums: 'a' | 'b';
  readonly channels: readonly number[];
  /** First of the rows that have the other operand's codes. */
  readonly row: number;
}

function codedProducts({ ownsQueries, headQuads, valueQuads }: Parts): readonly CodedProduct[] {
  const scores = { weight: 'ds', tile: 'tile_s', sums: 'a', channels: headQuads } as const;
  if (ownsQueries) return [{ ...scores, row: CODE_ROWS.k }];
  return [
    { ...scores, row: CODE_ROWS.q },
    { weight: 'p', tile: 'tile_p', sums: 'b', channels: valueQuads, row: CODE_ROWS.dOutput },
  ];
}

/** Words of codes whose loads are under way together; a tile has a multiple of it. */
const WORDS = 4;

/** From P and dS of a tile in registers to the sums, by way of codes. */
function accumulateCodes(config: GradientConfig, parts: Parts): string {
  const { I, quads, passer, passingAt, ownToken, row, key } = parts;
  const { own, passingThreads } = config;
  const list = codedProducts(parts);
  const vectors = (passer === 'key' ? key : row).vectors;
  const passing = (at: string) => `${passer === 'key' ? 'gradient_keys' : 'gradient_rows'}[block + ${at}]`;
  const maximum = (turn: string, product: number, i: number) =>
    `maxima[(${turn} * ${list.length}u + ${product}u) * ${own}u + ${ownToken(i)}]`;
  const each = (f: (product: CodedProduct, x: number, i: number) => string) =>
    list.flatMap((product, x) => I.map((i) => f(product, x, i))).join('\n    ');
  const weights = ({ weight }: CodedProduct, i: number, q: number) =>
    `vec4<f32>(${range(4)
      .map((e) => `${weight}_${i}_${4 * q + e}`)
      .join(', ')})`;
  const multiply = ({ tile, sums, channels, row: first }: CodedProduct, x: number) =>
    channels
      .map(
        (v) => `{ let at = c + ${v * passingThreads}u;
      ${I.map((i) => `var t_${i} = vec4<i32>();`).join(' ')}
      for (var k = 0u; k < P.passingThreads * ${quads.length}u; k += ${WORDS}u) {
        ${range(WORDS)
          .map((w) => `let z_${w} = ${passing(`(${first + w}u + word + k) * ${vectors}u + at`)};`)
          .join(' ')}
        ${range(WORDS)
          .flatMap((w) =>
            I.map(
              (i) =>
                `{ let y = ${tile}[${i}][r][k + ${w}u]; t_${i} += vec4<i32>(${['x', 'y', 'z', 'w'].map((e) => `dot_int8(y, z_${w}.${e})`).join(', ')}); }`,
            ),
          )
          .join('\n        ')}
      }
      let scale = bitcast<vec4<f32>>(${passing(`${(first + CODE_ROWS.scales) * vectors}u + at`)});
      ${I.map((i) => `${sums}_${i}_${v} = fma(vec4<f32>(t_${i}) * scale, vec4<f32>(unit_${x}_${i}), ${sums}_${i}_${v});`).join(' ')} }`,
      )
      .join('\n    ');
  return `
    let block = ${passingAt.floats(`passing_first + u32(start) / ${GRADIENT_BLOCK}u * ${GRADIENT_BLOCK}u`)};
    let word = u32(start) % ${GRADIENT_BLOCK}u / 4u;
    ${list
      .flatMap((product, x) =>
        quads.map(
          (q) =>
            `let size_${x}_${q} = bitcast<vec4<f32>>(${passing(`${(product.row + CODE_ROWS.sizes) * vectors}u + word + c * ${quads.length}u + ${q}u`)});`,
        ),
      )
      .join('\n    ')}
    ${each((product, x, i) => {
      const sized = quads.map((q) => `let w_${x}_${i}_${q} = ${weights(product, i, q)} * size_${x}_${q};`);
      // As bits, a NaN is larger than all numbers.
      const bits = quads.map((q) => `bitcast<vec4<u32>>(abs(w_${x}_${i}_${q}))`);
      return `${sized.join(' ')}
    { let m = ${bits.reduce((a, b) => `max(${a}, ${b})`)}; atomicMax(&${maximum('turn', x, i)}, max(max(m.x, m.y), max(m.z, m.w))); }`;
    })}
    workgroupBarrier();
    if (c == 0u) { ${each((_, x, i) => `atomicStore(&${maximum('(1u - turn)', x, i)}, 0u);`)} }
    ${each(
      (
        { tile },
        x,
        i,
      ) => `let most_${x}_${i} = bitcast<f32>(max(atomicLoad(&${maximum('turn', x, i)}), ${SMALLEST_MAXIMUM}));
    let unit_${x}_${i} = most_${x}_${i} / ${MOST};
    { let over = ${MOST} / most_${x}_${i}; ${quads.map((q) => `${tile}[${i}][r][c * ${quads.length}u + ${q}u] = integers_of(w_${x}_${i}_${q} * over);`).join(' ')} }`,
    )}
    turn = 1u - turn;
    workgroupBarrier();
    ${list.map(multiply).join('\n    ')}`;
}

/** The walk over the tokens that pass by, from `begin` to `end`; `passing_at` is the row of the tile's first. */
function walk(config: GradientConfig, parts: Parts): string {
  const { ownsQueries, I, N, quads, passingToken } = parts;
  const { passing, passingThreads } = config;
  const numbers = N.map((n) => {
    const [token, at] = [`passing_at + ${passingToken(n)}`, `(u32(start) + ${passingToken(n)})`];
    return ownsQueries ? keyNumbers(parts, n, token, at) : rowNumbers(config, parts, n, token, at);
  });
  const vectors = (name: string, i: number, q: number) =>
    `vec4<f32>(${range(4)
      .map((e) => `${name}_${i}_${4 * q + e}`)
      .join(', ')})`;
  const throughFloats = `workgroupBarrier();
    ${I.flatMap((i) =>
      quads.map(
        (q) =>
          `tile_s[${i}][r][${q * passingThreads}u + c] = ${vectors('ds', i, q)};${ownsQueries ? '' : ` tile_p[${i}][r][${q * passingThreads}u + c] = ${vectors('p', i, q)};`}`,
      ),
    ).join('\n    ')}
    workgroupBarrier();
    ${accumulate(config, parts)}`;
  return `for (var start = begin; start < end; start += ${passing}) {
    let passing_at = passing_first + u32(start);
    ${products(parts)}
    ${numbers.join('')}
    var poison = 0u;
    ${I.flatMap((i) => N.map((n) => weigh(config, parts, i, n))).join('')}
    ${config.codes ? accumulateCodes(config, parts) : throughFloats}
  }`;
}

export function gradientKernel(config: GradientConfig): string {
  const { passing, passingThreads } = config;
  const parts = partsOf(config);
  const { ownsQueries, threads, I, headQuads, valueQuads, ownToken } = parts;
  const queryFirst = `query_head * P.queryRowsPerHead + sequence_field(sequence, ${SEQUENCE.queryRow}u)`;
  const keyFirst = (head: string) => `${head} * P.keyRowsPerHead + sequence_field(sequence, ${SEQUENCE.keyRow}u)`;
  const own = I.map((i) => {
    const [token, at] = [`own_at + ${ownToken(i)}`, `(first + ${ownToken(i)})`];
    return ownsQueries ? rowNumbers(config, parts, i, token, at) : keyNumbers(parts, i, token, at);
  });
  const sums = I.flatMap((i) => [
    ...headQuads.map((v) => `var a_${i}_${v} = vec4<f32>();`),
    ...(ownsQueries ? [] : [`var bad_${i} = 0u;`, ...valueQuads.map((v) => `var b_${i}_${v} = vec4<f32>();`)]),
  ]);
  const body = ownsQueries
    ? `
  let query_head = head;
  let own_at = ${queryFirst} + first;
  let passing_first = ${keyFirst('head / P.groupSize')};
  let begin = max(0, lower + i32(first)) / ${passing} * ${passing};
  let end = min(key_length, upper + i32(first + count));
  ${own.join('')}
  ${walk(config, parts)}`
    : `
  let own_at = ${keyFirst('head')} + first;
  let begin = max(0, i32(first) - upper) / ${passing} * ${passing};
  let end = min(i32(query_length), i32(first + count) - lower);
  ${own.join('')}
  for (var member = 0u; member < P.groupSize; member++) {
  let query_head = head * P.groupSize + member;
  let passing_first = ${queryFirst};
  ${walk(config, parts)}
  }
  ${I.map((i) => `if (bad_${i} != 0u) { atomicOr(&bad[${ownToken(i)}], bad_${i}); }`).join(' ')}
  workgroupBarrier();`;
  return `${declarations(config, parts)}
${config.codes ? INTEGERS_OF : ''}

@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let r = lid / ${passingThreads}u;
  let c = lid % ${passingThreads}u;
${OWN_TILE}
  let query_length = sequence_field(sequence, ${SEQUENCE.queryLength}u);
  let key_length = i32(sequence_field(sequence, ${SEQUENCE.keyLength}u));
  let lower = i32(sequence_field(sequence, ${SEQUENCE.lower}u));
  let upper = i32(sequence_field(sequence, ${SEQUENCE.upper}u));
  ${sums.join(' ')}${config.codes ? '\n  var turn = 0u;' : ''}
  ${body}
  ${I.map((i) => finish(config, parts, i)).join('')}
}`;
}
