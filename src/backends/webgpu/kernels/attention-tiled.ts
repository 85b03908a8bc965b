/**
 * Attention without subgroup matrices: families `base` (core WebGPU only) and `subgroup` (row maxima by shuffles).
 *
 * A workgroup owns `rows` queries and walks over the keys in tiles of `keys`. Its threads form a grid of `rowThreads` x
 * `colThreads`: each holds a register tile of scores (INT8 dot products) and one of the output (float32). P goes
 * through workgroup memory once a tile, so that a thread finds the probabilities of its rows for all keys of the tile.
 *
 * Arrays in workgroup memory are arrays of arrays: one index is unrolled (a constant), one is the thread's place (the
 * same throughout) and one is the loop's. WebGPU clamps every index that is not constant to its array's length; a flat
 * index would be clamped, and its address computed anew, at each of the accesses that limit the speed of these
 * kernels.
 */
import { NVFP4_BLOCK } from '../../../quantization/fp4-blocks.ts';
import type { ValueFormat } from '../kernel-table.ts';
import { excludeHidden, MAP_AT, NOTHING_SEEN, nextTile, nextTileFrom } from './blocks.ts';
import { fp4QueryVectors, fp4Reader } from './fp4.ts';
import { FLAG_UNSMOOTHED, POISON, params, rowVectors, SEQUENCE, tables, valueSlices } from './layout.ts';
import { readsStatistics, valueFunctions } from './prepare.ts';
import { meanGroup } from './prepare-fp4.ts';
import {
  attentionParams,
  expOf,
  lseStatement,
  naturalLse,
  recordFloats,
  type ScoreConfig,
  scoreDeclarations,
  scoreStatements,
  storeChannels,
} from './scores.ts';
import { statisticsVectors } from './statistics.ts';
import { EXCLUDED, EXCLUDED_BELOW, range } from './storage.ts';

/** Sizes of a tiled kernel. `keys / colThreads` is a multiple of 4; 64 is a multiple of `keys`, 128 one of `rows`. */
export interface TileShape {
  readonly rows: number;
  readonly keys: number;
  readonly rowThreads: number;
  readonly colThreads: number;
  /** K and V tiles take turns in the same workgroup memory: one more barrier a tile, for devices with little of it. */
  readonly sharedKeyValue: boolean;
  /** Q is read out of storage for each tile of keys: of wide heads it takes more workgroup memory than there is. */
  readonly storedQuery: boolean;
}

export interface TiledConfig extends ScoreConfig, TileShape {
  readonly family: 'base' | 'subgroup';
  /** WGSL has `dot4I8Packed` (language feature packed_4x8_integer_dot_product). */
  readonly packedDot: boolean;
  /** WGSL has `subgroup_id` (language feature): a thread's place does not rest on how lanes are numbered. */
  readonly subgroupId: boolean;
}

/** Bytes of workgroup memory that the kernel takes: of V, the channels of a workgroup. */
export function tiledWorkgroupBytes(
  shape: TileShape,
  headDimPadded: number,
  allValues: number,
  format: ValueFormat = 'fp16',
): number {
  const fp4 = format === 'fp4';
  const valueDimPadded = allValues / valueSlices(allValues);
  const row = rowVectors(headDimPadded) * 16;
  const keys = shape.keys * row;
  const queries = shape.storedQuery ? 0 : shape.rows * row;
  if (format === 'int8') {
    const columns = shape.keys / 4 + 1 + 2 * shape.colThreads;
    return queries + keys + shape.keys * valueDimPadded + shape.rows * columns * 4;
  }
  const values = shape.keys * valueDimPadded * 2;
  return (
    queries +
    (shape.sharedKeyValue ? shape.keys * sharedPairs(headDimPadded, valueDimPadded) * 8 : keys + values) +
    shape.rows * (shape.keys + 4) * 4 +
    shape.rows * shape.colThreads * (fp4 ? shape.keys / NVFP4_BLOCK : 1) * 4 +
    (fp4 ? ((shape.rows + shape.keys) * headDimPadded) / NVFP4_BLOCK : 0) * 4
  );
}

/**
 * Pairs of words in a row of the memory that K and V share: an odd number of 16 bytes, so that rows start in other
 * banks.
 */
const sharedPairs = (headDimPadded: number, valueDimPadded: number): number =>
  Math.max(rowVectors(headDimPadded) * 2, valueDimPadded / 4 + 2);

/** Loads from storage that are under way together. */
const LOADS_AHEAD = 8;

const DOT = `fn dot_int8(a: u32, b: u32) -> i32 { return dot4I8Packed(a, b); }`;
const DOT_EMULATED = `fn dot_int8(a: u32, b: u32) -> i32 {
  let x = vec4<i32>(vec4<u32>(a << 24u, a << 16u, a << 8u, a)) >> vec4<u32>(24u);
  let y = vec4<i32>(vec4<u32>(b << 24u, b << 16u, b << 8u, b)) >> vec4<u32>(24u);
  return x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
}`;

const DOT_UNSIGNED = `fn dot_uint8(a: u32, b: u32) -> u32 { return dot4U8Packed(a, b); }`;
const DOT_UNSIGNED_EMULATED = `fn dot_uint8(a: u32, b: u32) -> u32 {
  let x = (vec4<u32>(a) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(0xffu);
  let y = (vec4<u32>(b) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(0xffu);
  return x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
}`;

/** `dot_int8(a, b)`: four products of INT8 in 32-bit words. */
export const dotInt8 = (packedDot: boolean): string => (packedDot ? DOT : DOT_EMULATED);

/** Numbers and names that the kernel's parts share. */
function partsOf(config: TiledConfig) {
  const { rows, keys, rowThreads, colThreads, sharedKeyValue, storedQuery, headDimPadded, fp4, values } = config;
  const slices = valueSlices(config.valueDimPadded);
  const valueDimPadded = config.valueDimPadded / slices;
  const quads = valueDimPadded / 4;
  const [tm, tn, tv] = [rows / rowThreads, keys / colThreads, quads / colThreads];
  return {
    threads: rowThreads * colThreads,
    vectors: rowVectors(headDimPadded),
    dims: rowVectors(headDimPadded) - 1,
    slices,
    quads,
    tm,
    tn,
    tv,
    /** Where weights are rounded in blocks: the keys of a tile that a thread has of each block. */
    blocks: fp4?.weights
      ? range(keys / NVFP4_BLOCK).map((b) =>
          range(NVFP4_BLOCK / colThreads).map((n) => b * (NVFP4_BLOCK / colThreads) + n),
        )
      : [],
    /** A thread's rows, its keys of a tile, its quads of channels. */
    I: range(tm),
    N: range(tn),
    V: range(tv),
    row: (i: number) => `(r + ${i * rowThreads}u)`,
    // Four keys of V in INT8 are a word: those of a thread are neighbours.
    col: (n: number) =>
      values.integers ? `(4u * (c + ${(n >> 2) * colThreads}u) + ${n & 3}u)` : `(c + ${n * colThreads}u)`,
    queryAt: (i: number, w: string) =>
      storedQuery
        ? `query_rows[(queryRow + r + ${i * rowThreads}u) * ${rowVectors(headDimPadded)}u + ${w} - P.queryRowBase]`
        : `tile_q[${i}][r][${w}]`,
    probabilityAt: (i: number, vector: string) => `tile_p[${i}][r][${vector}]`,
    maxAt: (i: number, column: string) => `tile_max[${i}][r][${column}]`,
    // With shared memory K is stored as pairs of words, as V is.
    keyAt: (n: number, w: string) =>
      sharedKeyValue
        ? `vec4<u32>(tile_kv[${n}][c][2u * ${w}], tile_kv[${n}][c][2u * ${w} + 1u])`
        : `tile_k[${n}][c][${w}]`,
    /** Four channels of key `n * colThreads + k`. */
    valueAt: (n: string, k: string, v: number) =>
      sharedKeyValue ? `tile_kv[${n}][${k}][c + ${v * colThreads}u]` : `tile_v[${n}][${k}][${v}][c]`,
  };
}

type Parts = ReturnType<typeof partsOf>;

/** Nested array types, outermost length first. */
const nested = (element: string, ...lengths: number[]) =>
  lengths.reduceRight((inner, length) => `array<${inner}, ${length}>`, element);

/** Arrays in workgroup memory. */
function tileMemory(config: TiledConfig, { tm, tn, tv, vectors, dims, blocks, quads }: Parts): string {
  const { keys, rowThreads, colThreads, sharedKeyValue, storedQuery, headDimPadded, fp4, values } = config;
  const queries = storedQuery ? '' : `var<workgroup> tile_q: ${nested('vec4<u32>', tm, rowThreads, vectors)};\n`;
  if (values.integers) {
    return `${queries}var<workgroup> tile_k: ${nested('vec4<u32>', tn, colThreads, vectors)};
var<workgroup> tile_v: ${nested('vec4<u32>', keys / 4, tv, colThreads)};
var<workgroup> tile_p: ${nested('u32', tm, rowThreads, keys / 4 + 1)};
var<workgroup> tile_max: ${nested('f32', tm, rowThreads, colThreads)};
var<workgroup> tile_top: ${nested('f32', tm, rowThreads, colThreads)};`;
  }
  const keyValue = sharedKeyValue
    ? `var<workgroup> tile_kv: ${nested('vec2<u32>', tn, colThreads, sharedPairs(headDimPadded, 4 * quads))};`
    : `var<workgroup> tile_k: ${nested('vec4<u32>', tn, colThreads, vectors)};
var<workgroup> tile_v: ${nested('vec2<u32>', tn, colThreads, tv, colThreads)};`;
  return `${queries}${keyValue}
var<workgroup> tile_p: ${nested('vec4<f32>', tm, rowThreads, keys / 4 + 1)};
var<workgroup> tile_max: ${nested('f32', tm, rowThreads, colThreads * Math.max(1, blocks.length))};${
    fp4
      ? `
var<workgroup> tile_q_scale: ${nested('f32', tm, rowThreads, dims)};
var<workgroup> tile_k_scale: ${nested('f32', tn, colThreads, dims)};`
      : ''
  }`;
}

/** Copies of Q, K and V into workgroup memory. */
function tileLoads(config: TiledConfig, { threads, vectors, dims, quads, slices }: Parts) {
  const { rows, keys, rowThreads, colThreads, sharedKeyValue, storedQuery, headDimPadded, fp4, values } = config;
  /** A vector of the channels of this workgroup; `row`: of a token, or of four. */
  const valueAt = (row: string, i: string) =>
    slices === 1
      ? `value_rows[${row} * ${quads}u + ${i} - P.valueRowBase]`
      : `value_rows[(${row} + ${i} / ${quads}u) * ${slices * quads}u + slice * ${quads}u + ${i} % ${quads}u - P.valueRowBase]`;
  /** Copies `count` elements, a few loads ahead of their stores. */
  const copy = (count: number, load: (i: string) => string, store: (i: string, x: string) => string) => {
    const whole = Math.floor(count / threads);
    const rest = count % threads;
    const batches = range(Math.ceil(whole / LOADS_AHEAD)).map((batch) => {
      const items = range(Math.min(LOADS_AHEAD, whole - batch * LOADS_AHEAD)).map((i) => batch * LOADS_AHEAD + i);
      return `{ ${items.map((i) => `let i_${i} = t + ${i * threads}u; let x_${i} = ${load(`i_${i}`)};`).join(' ')}
      ${items.map((i) => store(`i_${i}`, `x_${i}`)).join(' ')} }`;
    });
    const tail = `if (t < ${rest}u) { let i = t + ${whole * threads}u; let x = ${load('i')}; ${store('i', 'x')} }`;
    return [...batches, ...(rest === 0 ? [] : [tail])].join('\n    ');
  };
  const place = (i: string, size: number) =>
    values.integers
      ? `[${i} / ${size * 4 * colThreads}u * 4u + ${i} / ${size}u % 4u][${i} / ${size * 4}u % ${colThreads}u]`
      : `[${i} / ${size * colThreads}u][${i} / ${size}u % ${colThreads}u]`;
  /** A vector of a key's row: `vector` of the `size` that items have of it. */
  const storeKey = (i: string, x: string, size: number, vector: string) =>
    sharedKeyValue
      ? `tile_kv${place(i, size)}[2u * (${vector})] = ${x}.xy; tile_kv${place(i, size)}[2u * (${vector}) + 1u] = ${x}.zw;`
      : `tile_k${place(i, size)}[${vector}] = ${x};`;
  const keyRow = (i: string, size: number) => `kvRow + first + ${i} / ${size}u`;
  const query = (i: string, size: number) =>
    `tile_q_scale[${i} / ${size * rowThreads}u][${i} / ${size}u % ${rowThreads}u]`;
  const queryVectors = fp4QueryVectors(headDimPadded);
  const scaleVectors = queryVectors - vectors;
  // Rows past a buffer's end are never visible, so reading them as anything is fine; WebGPU bounds every access.
  return {
    keys: fp4
      ? [
          copy(
            keys * dims,
            (i) => `key_codes(${keyRow(i, dims)}, ${i} % ${dims}u)`,
            (i, x) => storeKey(i, x, dims, `${i} % ${dims}u`),
          ),
          copy(
            keys * dims,
            (i) => `key_scale(${keyRow(i, dims)}, ${i} % ${dims}u)`,
            (i, x) => `tile_k_scale${place(i, dims)}[${i} % ${dims}u] = ${x};`,
          ),
          copy(
            keys,
            (i) => `key_facts(${keyRow(i, 1)})`,
            (i, x) => storeKey(i, x, 1, `${dims}u`),
          ),
        ].join('\n    ')
      : copy(
          keys * vectors,
          (i) => `key_rows[(kvRow + first) * ${vectors}u + ${i} - P.keyRowBase]`,
          (i, x) => storeKey(i, x, vectors, `${i} % ${vectors}u`),
        ),
    values: values.integers
      ? copy(
          (keys / 4) * quads,
          (i) => valueAt('(kvRow + first) / 4u', i),
          (i, x) => `tile_v[${i} / ${quads}u][${i} % ${quads}u / ${colThreads}u][${i} % ${colThreads}u] = ${x};`,
        )
      : copy(
          keys * quads,
          (i) => (fp4 ? `value_quad(${keyRow(i, quads)}, ${i} % ${quads}u)` : valueAt('(kvRow + first)', i)),
          (i, x) =>
            sharedKeyValue
              ? `tile_kv${place(i, quads)}[${i} % ${quads}u] = ${x};`
              : `tile_v${place(i, quads)}[${i} % ${quads}u / ${colThreads}u][${i} % ${colThreads}u] = ${x};`,
        ),
    queries: storedQuery
      ? ''
      : [
          copy(
            rows * vectors,
            (i) =>
              fp4
                ? `query_rows[(queryRow + ${i} / ${vectors}u) * ${queryVectors}u + ${i} % ${vectors}u - P.queryRowBase]`
                : `query_rows[queryRow * ${vectors}u + ${i} - P.queryRowBase]`,
            (i, x) =>
              `tile_q[${i} / ${vectors * rowThreads}u][${i} / ${vectors}u % ${rowThreads}u][${i} % ${vectors}u] = ${x};`,
          ),
          ...(fp4
            ? [
                copy(
                  rows * scaleVectors,
                  (i) =>
                    `query_rows[(queryRow + ${i} / ${scaleVectors}u) * ${queryVectors}u + ${vectors}u + ${i} % ${scaleVectors}u - P.queryRowBase]`,
                  (i, x) =>
                    `for (var e = 0u; e < min(4u, ${dims}u - 4u * (${i} % ${scaleVectors}u)); e++) { ${query(i, scaleVectors)}[4u * (${i} % ${scaleVectors}u) + e] = bitcast<f32>(${x}[e]); }`,
                ),
              ]
            : []),
        ].join('\n    '),
  };
}

/** Products of Q and K, and what becomes of them before softmax: `f_<i>_<n>`. */
function tileScores(config: TiledConfig, { I, N, dims, queryAt, keyAt, row, col }: Parts): string {
  const { rows, keys, fp4, values } = config;
  // In FP4 a vector is a block: its products are summed exactly, in units of a quarter.
  const product = (sum: string, i: number) => (fp4 ? `f32(${sum}) * (qs_${i} * ks)` : sum);
  const products = `${I.map((i) => N.map((n) => `var s_${i}_${n} = ${fp4 ? '0.0' : '0'};`).join(' ')).join('\n    ')}
    for (var w = 0u; w < ${dims}u; w++) {
      ${I.map((i) => `let q_${i} = ${queryAt(i, 'w')};${fp4 ? ` let qs_${i} = tile_q_scale[${i}][r][w];` : ''}`).join('\n      ')}
      ${N.map(
        (n) => `{ let k = ${keyAt(n, 'w')};${fp4 ? ` let ks = tile_k_scale[${n}][c][w];` : ''}
        ${I.map((i) => `s_${i}_${n} += ${product(['x', 'y', 'z', 'w'].map((e) => `dot_int8(q_${i}.${e}, k.${e})`).join(' + '), i)};`).join('\n        ')} }`,
      ).join('\n      ')}
    }`;
  const each = (f: (i: number, n: number) => string) => I.map((i) => N.map((n) => f(i, n)).join(' ')).join('\n      ');
  const finish = (i: number, n: number) => {
    const f = `f_${i}_${n}`;
    const { softcap, mask: masking } = scoreStatements(
      config,
      f,
      { constant: `constant_${i}`, mask: `mask_${i}`, poison: `poison_${i}` },
      `key_${n}`,
    );
    // The mask is read only for visible keys; a band check costs nothing in tiles that lie inside every row's band.
    const visible = `key_${n} >= low_${i} && key_${n} <= high_${i}`;
    return `${softcap}
      if (edge && !(${visible})) { ${f} = ${EXCLUDED}; } ${masking === '' ? '' : `else { ${masking} }`}${config.blocks ? ` ${excludeHidden(f, row(i), `key_${n}`)}` : ''}`;
  };
  return `${products}
    ${N.map(
      (n) => `let key_${n} = start + i32(${col(n)});
    let facts_k_${n} = ${keyAt(n, `${dims}u`)}; let key_scale_${n} = bitcast<f32>(facts_k_${n}.x);${
      fp4?.smoothQ ? ` let mean_score_${n} = mean_scores[mean_at + u32(key_${n})];` : ''
    }${values.integers ? ` let value_scale_${n} = bitcast<f32>(facts_k_${n}.w);` : ''}`,
    ).join('\n    ')}
    let edge = start + ${keys} > length || start < lower + ${rows - 1} || start + ${keys - 1} > upper || start < begin;
    let key_flags = ${N.map((n) => `facts_k_${n}.y`).join(' | ')};
    ${each((i, n) => `var f_${i}_${n} = ${fp4 ? '' : 'f32'}(s_${i}_${n}) * (scale_${i} * key_scale_${n})${fp4?.smoothQ ? ` + mean_score_${n}` : ''};`)}
    if ((key_flags & ${FLAG_UNSMOOTHED}u) != 0u) {
      ${each((i, n) => `f_${i}_${n} -= select(0.0, constant_${i}, (facts_k_${n}.y & ${FLAG_UNSMOOTHED}u) != 0u);`)}
    }
    ${each(finish)}
    if ((key_flags & ${POISON}u) != 0u) {
      ${each((i, n) => `if (f_${i}_${n} > ${EXCLUDED_BELOW}) { poison_${i} |= facts_k_${n}.y & ${POISON}u; }`)}
    }`;
}

/** Row maxima over the threads of a row, and sums at the end: by shuffles in family `subgroup`, else through memory. */
function rowReductions({ family, colThreads }: TiledConfig, { N, maxAt, blocks }: Parts) {
  const subgroup = family === 'subgroup';
  const steps = range(Math.log2(colThreads));
  const largestOf = (values: readonly string[]) =>
    values.slice(1).reduce((acc, value) => `max(${acc}, ${value})`, values[0] as string);
  /** The largest of a row: of each block of keys `max_<i>_<b>`, and of those `max_<i>`. */
  const blockNames = (i: number) => blocks.map((_, b) => `max_${i}_${b}`);
  const blockMax = (i: number) =>
    blocks
      .map((own, b) => {
        const largest = largestOf(own.map((n) => `f_${i}_${n}`));
        if (!subgroup) return `${maxAt(i, `${b * colThreads}u + c`)} = ${largest};`;
        const shuffles = steps.map((s) => `x = max(x, subgroupShuffleXor(x, ${1 << s}u));`);
        return `var max_${i}_${b} = ${largest}; { var x = max_${i}_${b}; ${shuffles.join(' ')} max_${i}_${b} = x; }`;
      })
      .join(' ') + (subgroup ? ` let max_${i} = ${largestOf(blockNames(i))};` : '');
  const sharedBlockMax = (i: number) =>
    `${blocks
      .map(
        (_, b) => `let max_${i}_${b} = ${largestOf(range(colThreads).map((n) => maxAt(i, `${b * colThreads + n}`)))};`,
      )
      .join(' ')} let max_${i} = ${largestOf(blockNames(i))};`;
  const rowMax = (i: number) => {
    if (blocks.length > 0) return blockMax(i);
    const own = N.slice(1).reduce((acc, n) => `max(${acc}, f_${i}_${n})`, `f_${i}_0`);
    if (!subgroup) return `${maxAt(i, 'c')} = ${own};`;
    const shuffles = steps.map((s) => `x = max(x, subgroupShuffleXor(x, ${1 << s}u));`);
    return `var max_${i} = ${own}; { var x = max_${i}; ${shuffles.join(' ')} max_${i} = x; }`;
  };
  const sharedMax = (i: number) =>
    blocks.length > 0
      ? sharedBlockMax(i)
      : `let max_${i} = ${largestOf(range(colThreads).map((n) => maxAt(i, `${n}`)))};`;
  /** Sums of `<of>_<i>` over a row's threads, as `<name>_<i>`; without subgroups once they are in memory. */
  const rowSum = (i: number, name = 'sum', of = 'l') =>
    subgroup
      ? `var ${name}_${i} = ${of}_${i}; ${steps.map((s) => `${name}_${i} += subgroupShuffleXor(${name}_${i}, ${1 << s}u);`).join(' ')}`
      : `let ${name}_${i} = ${range(colThreads)
          .map((n) => maxAt(i, `${n}`))
          .join(' + ')};`;
  return { rowMax, sharedMax, rowSum };
}

/** The sum of the weights before they were rounded: what a logsumexp is of, and a sink stands beside. */
const countsExactly = ({ fp4, returnLse, sinks }: TiledConfig): boolean =>
  fp4?.weights === true && (returnLse || sinks);

/** A row's probabilities into workgroup memory, its sum and its output rescaled. */
function tileSoftmax(config: TiledConfig, { N, V, tn, blocks, probabilityAt }: Parts, i: number): string {
  const { colThreads, fp4 } = config;
  const quads = range(tn / 4).map((q) => range(4).map((n) => 4 * q + n));
  const vector = (names: readonly string[]) => `vec4<f32>(${names.join(', ')})`;
  const exact = countsExactly(config);
  /** Weights as FP4 numbers: each block relative to its largest, whose scale is rounded first. */
  const rounded = () => {
    const blockOf = (n: number) => blocks.findIndex((keys) => keys.includes(n));
    const scales = blocks.map(
      (_, b) =>
        `let scale_w_${b} = weight_scale(select(${expOf(config, `max_${i}_${b} - updated`)}, 0.0, max_${i}_${b} < ${EXCLUDED_BELOW}));`,
    );
    const each = quads.map((four, q) => {
      const own = vector(four.map((n) => `f_${i}_${n}`));
      return `let rounded_${q} = rounded_weights(${own}, ${vector(four.map((n) => `scale_w_${blockOf(n)}`))});
      ${four.map((n, at) => `f_${i}_${n} = rounded_${q}.${'xyzw'[at]};`).join(' ')}`;
    });
    return `${scales.join(' ')}
      ${exact ? `e_${i} = e_${i} * alpha + ${N.map((n) => `f_${i}_${n}`).join(' + ')};` : ''}
      ${each.join('\n      ')}`;
  };
  // The power of two of a key's values goes into its weight.
  const weight = (n: number) => (fp4 ? `f_${i}_${n} * bitcast<f32>(facts_k_${n}.z)` : `f_${i}_${n}`);
  return `
    { let updated = max(m_${i}, max_${i});
      let alpha = select(${expOf(config, `m_${i} - updated`)}, 0.0, m_${i} < ${EXCLUDED_BELOW});
      m_${i} = updated;
      l_${i} *= alpha;
      ${V.map((v) => `o_${i}_${v} *= alpha;`).join(' ')}
      ${N.map((n) => `f_${i}_${n} = select(${expOf(config, `f_${i}_${n} - updated`)}, 0.0, f_${i}_${n} < ${EXCLUDED_BELOW});`).join('\n      ')}
      ${blocks.length > 0 ? `${rounded()}\n      ` : ''}l_${i} += ${N.map((n) => `f_${i}_${n}`).join(' + ')};
      ${quads
        .map((four, q) => `${probabilityAt(i, `${q * colThreads}u + c`)} = ${vector(four.map(weight))};`)
        .join(' ')} }`;
}

/**
 * The same with P in 8 bits: what a key's values are multiplied with, its scale among them, relative to the largest of the row in
 * this tile (`255 w`); `s` is what that makes of a sum of products. The first half ends with each thread's largest weight in memory where
 * there are no subgroups. The sum of the row is of weights that were not rounded.
 */
function tileSoftmaxIntegers(config: TiledConfig, { N, V, tn, maxAt }: Parts, i: number) {
  const { colThreads, family } = config;
  const quads = range(tn / 4).map((q) => range(4).map((n) => 4 * q + n));
  const topAt = (column: string) => maxAt(i, column).replace('tile_max', 'tile_top');
  const weights = `
    let updated_${i} = max(m_${i}, max_${i});
    let seen_${i} = select(${expOf(config, `max_${i} - updated_${i}`)}, 0.0, max_${i} < ${EXCLUDED_BELOW});
    { let alpha = select(${expOf(config, `m_${i} - updated_${i}`)}, 0.0, m_${i} < ${EXCLUDED_BELOW});
      m_${i} = updated_${i};
      ${V.map((v) => `o_${i}_${v} *= alpha;`).join(' ')}
      ${N.map((n) => `f_${i}_${n} = select(${expOf(config, `f_${i}_${n} - max_${i}`)}, 0.0, f_${i}_${n} < ${EXCLUDED_BELOW});`).join('\n      ')}
      l_${i} = fma(${N.map((n) => `f_${i}_${n}`).join(' + ')}, seen_${i}, l_${i} * alpha);
      ${N.map((n) => `f_${i}_${n} *= value_scale_${n};`).join(' ')} }
    var top_${i} = ${N.slice(1).reduce((acc, n) => `max(${acc}, f_${i}_${n})`, `f_${i}_0`)};
    ${
      family === 'subgroup'
        ? range(Math.log2(colThreads))
            .map((s) => `top_${i} = max(top_${i}, subgroupShuffleXor(top_${i}, ${1 << s}u));`)
            .join(' ')
        : `${topAt('c')} = top_${i};`
    }`;
  const pack = `
    ${
      family === 'subgroup'
        ? ''
        : `top_${i} = ${range(colThreads)
            .slice(1)
            .reduce((acc, n) => `max(${acc}, ${topAt(`${n}`)})`, topAt('0'))};`
    }
    let s_${i} = seen_${i} * top_${i} * ${1 / 255}f;
    { let relative = 1.0 / max(top_${i}, 1.0e-37f);
      ${quads
        .map(
          (four, q) =>
            `tile_p[${i}][r][${q * colThreads}u + c] = pack4x8unorm(vec4<f32>(${four.map((n) => `f_${i}_${n}`).join(', ')}) * relative);`,
        )
        .join('\n      ')} }`;
  return { weights, pack };
}

/**
 * Products of P and V in INT8, four keys a word. Both are not negative: V as 128 more than it is, which the sum of P takes out again.
 * The loops are short enough to be unrolled by compilers that gain from it.
 */
function accumulateIntegers({ keys }: TiledConfig, { I, V }: Parts): string {
  const loop = `for (var four = 0u; four < ${keys / 4}u; four++)`;
  const p = (i: number) => `tile_p[${i}][r][four]`;
  return `${I.map((i) => `var sum_p_${i} = 0u;`).join(' ')}
    ${loop} { ${I.map((i) => `sum_p_${i} += dot_uint8(${p(i)}, 0x01010101u);`).join(' ')} }
    ${I.map((i) => `let shift_${i} = vec4<i32>(-128 * i32(sum_p_${i}));`).join(' ')}
    ${V.map(
      (v) => `{ ${I.map((i) => `var a_${i} = vec4<u32>();`).join(' ')}
      ${loop} { let w = tile_v[four][${v}][c];
        ${I.map((i) => `{ let p = ${p(i)}; a_${i} += vec4<u32>(${['x', 'y', 'z', 'w'].map((e) => `dot_uint8(p, w.${e})`).join(', ')}); }`).join(' ')} }
      ${I.map((i) => `o_${i}_${v} = fma(vec4<f32>(vec4<i32>(a_${i}) + shift_${i}), vec4<f32>(s_${i}), o_${i}_${v});`).join(' ')} }`,
    ).join('\n    ')}`;
}

/** Component n of P's vector q * colThreads + c is key c + (4q + n) * colThreads: a thread writes whole vectors. */
function accumulateValues({ colThreads }: TiledConfig, { I, V, tn, probabilityAt, valueAt }: Parts): string {
  return range(tn / 4)
    .map(
      (q) => `for (var k = 0u; k < ${colThreads}u; k++) {
      ${I.map((i) => `let p_${i} = ${probabilityAt(i, `${q * colThreads}u + k`)};`).join('\n      ')}
      ${range(4)
        .map((n) =>
          V.map(
            (v) => `{ let w = ${valueAt(`${4 * q + n}`, 'k', v)};
        let x = vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y));
        ${I.map((i) => `o_${i}_${v} = fma(vec4<f32>(p_${i}.${'xyzw'[n]}), x, o_${i}_${v});`).join(' ')} }`,
          ).join('\n      '),
        )
        .join('\n      ')}
    }`,
    )
    .join('\n    ');
}

/** Probabilities of a tile into workgroup memory. */
function tileWeights(config: TiledConfig, parts: Parts): string {
  const { I } = parts;
  if (!config.values.integers) return I.map((i) => tileSoftmax(config, parts, i)).join('');
  const rows = I.map((i) => tileSoftmaxIntegers(config, parts, i));
  const barrier = config.family === 'subgroup' ? '' : 'workgroupBarrier();';
  return `${rows.map(({ weights }) => weights).join('')}
    ${barrier}${rows.map(({ pack }) => pack).join('')}`;
}

/** Writes a row: its output and its logsumexp, or its partial result. */
function finishRow(config: TiledConfig, { V, row, quads, slices }: Parts, i: number): string {
  const firstSlice = slices === 1 ? '' : ' && slice == 0u';
  const { colThreads, valueDim, valueDimPadded, result, returnLse, values, softcap, sinks } = config;
  const joins = sinks && result === 'final';
  const sink = `bitcast<f32>(facts_${i}.w)`;
  const scaled = (v: number) =>
    `${values.scaled ? ` * scale_v_${v}` : ''}${values.smoothed ? ` + select(vec4<f32>(), mean_v_${v}, sum_${i} > 0.0)` : ''}`;
  const element = `sequence_field(sequence, ${SEQUENCE.output}u)`;
  const rowOffset = `head * P.outputHeadStride + (first_row + ${row(i)}) * P.outputTokenStride`;
  const store = (v: number) => {
    const channel = `(4u * (${slices === 1 ? '' : `slice * ${quads}u + `}c + ${v * colThreads}u))`;
    if (result === 'final') {
      return storeChannels(config, 'at', channel, `o_${i}_${v} * norm${scaled(v)}`, `sum_${i} < 0.0`);
    }
    return `{ let x = o_${i}_${v} * norm${scaled(v)}; let to = record + ${channel};
      records[to] = x.x; records[to + 1u] = x.y; records[to + 2u] = x.z; records[to + 3u] = x.w; }`;
  };
  const maximum = softcap ? `m_${i}` : `m_${i} + constant_${i}`;
  const first =
    result === 'final'
      ? `let at = (${element} - P.outputBase + ${rowOffset});`
      : `let record = ((${element} + ${rowOffset}) / ${valueDim}u * P.splits + P.splitIndex + group.z) * ${recordFloats(valueDimPadded)}u - P.recordBase;`;
  const last =
    result === 'partial'
      ? `if (c == 0u${firstSlice}) { records[record + ${valueDimPadded}u] = select(${maximum}, ${EXCLUDED}, sum_${i} == 0.0); records[record + ${valueDimPadded + 1}u] = sum_${i};${sinks ? ` records[record + ${valueDimPadded + 3}u] = ${sink};` : ''}${countsExactly(config) ? ` records[record + ${valueDimPadded + 2}u] = exact_${i};` : ''} }`
      : returnLse
        ? `if (c == 0u${firstSlice}) ${lseStatement(config, `(first_row + ${row(i)})`, `m_${i}`, `sum_${i}`, `constant_${i}`, sink)}`
        : '';
  return `
  if (${row(i)} < count) {
    ${joins ? `let keep = join_sink(${sink}, ${naturalLse(config, `m_${i}`, `sum_${i}`, `constant_${i}`)}).x;\n    ` : ''}let norm = select(1.0 / max(sum_${i}, 1.0e-37f)${joins ? ' * keep' : ''}, 0.0, sum_${i} <= 0.0);
    ${first}
    ${V.map(store).join('\n    ')}
    ${last}
  }`;
}

const keyValueBindings = ({
  fp4,
  values,
}: TiledConfig): string => `@group(0) @binding(3) var<storage, read> key_rows: array<${fp4 ? 'u32' : 'vec4<u32>'}>;
@group(0) @binding(4) var<storage, read> value_rows: array<${fp4 ? 'u32' : values.integers ? 'vec4<u32>' : 'vec2<u32>'}>;`;

const dots = ({ packedDot, values }: TiledConfig): string => {
  const unsigned = packedDot ? DOT_UNSIGNED : DOT_UNSIGNED_EMULATED;
  return `${dotInt8(packedDot)}${values.integers ? `\n${unsigned}` : ''}`;
};

export function tiledAttentionKernel(config: TiledConfig): string {
  const { keys, colThreads, sharedKeyValue, family, packedDot, subgroupId } = config;
  const { headDimPadded, valueDimPadded, values, mask, fp4, blocks } = config;
  const parts = partsOf(config);
  const { threads, dims, quads, slices, I, V, row, queryAt, maxAt } = parts;
  // Tiles are listed once for each slice of V's channels.
  const sliceAt = slices === 1 ? '' : `slice * ${quads}u + `;
  const subgroup = family === 'subgroup';
  const loads = tileLoads(config, parts);
  const { rowMax, sharedMax, rowSum } = rowReductions(config, parts);
  const statistics = statisticsVectors(headDimPadded, valueDimPadded);

  return `
${subgroup ? 'enable subgroups;' : ''}
${packedDot ? 'requires packed_4x8_integer_dot_product;' : ''}
${subgroup && subgroupId ? 'requires subgroup_id;' : ''}
${params(0, attentionParams(config))}
${tables(1)}
@group(0) @binding(2) var<storage, read> query_rows: array<vec4<u32>>;
${keyValueBindings(config)}
${scoreDeclarations(config)}${blocks ? nextTile(keys) : ''}
${dots(config)}
${valueFunctions(statistics, values)}${fp4 ? fp4Reader(headDimPadded, valueDimPadded) : ''}
${tileMemory(config, parts)}

@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32${
    subgroup
      ? `, @builtin(subgroup_size) subgroup_size: u32, @builtin(subgroup_invocation_id) lane: u32${subgroupId ? ', @builtin(subgroup_id) subgroup: u32' : ''}`
      : ''
  }) {
  let t = ${subgroup && subgroupId ? 'subgroup * subgroup_size + lane' : 'lid'};
  let r = t / ${colThreads}u;
  let c = t % ${colThreads}u;
  let tile = P.tileStart + group.x;
  let head = P.headStart + group.y;${
    slices === 1
      ? ''
      : `
  let slice = tile % ${slices}u;`
  }
  let sequence = tile_field(tile, 0u);
  let first_row = tile_field(tile, 1u);
  let count = tile_field(tile, 2u);
  let queryRow = head * P.queryRowsPerHead + sequence_field(sequence, ${SEQUENCE.queryRow}u) + first_row;${
    fp4?.smoothQ
      ? `
  let mean_group = ${meanGroup(fp4.smoothQ, `sequence_field(sequence, ${SEQUENCE.queryRow}u) + first_row`)};
  let mean_at = (head * P.meanGroups + mean_group) * P.scoreStride - P.scoreBase;`
      : ''
  }
  let kvRow = head / P.groupSize * P.keyRowsPerHead + sequence_field(sequence, ${SEQUENCE.keyRow}u);
  ${loads.queries}

  let length = i32(sequence_field(sequence, ${SEQUENCE.keyLength}u));
  let lower = i32(sequence_field(sequence, ${SEQUENCE.lower}u)) + i32(first_row);
  let upper = i32(sequence_field(sequence, ${SEQUENCE.upper}u)) + i32(first_row);
  let begin = i32(P.keyStart + group.z * P.keySpan);
  let key_begin = max(begin, max(0, lower)) / ${keys} * ${keys};
  let key_end = min(min(length, begin + i32(P.keySpan)), upper + i32(count));

${I.map(
  (
    i,
  ) => `  var m_${i} = ${EXCLUDED}; var l_${i} = 0.0; var poison_${i} = 0u;${countsExactly(config) ? ` var e_${i} = 0.0;` : ''}
  let low_${i} = lower + i32(${row(i)}); let high_${i} = min(length - 1, upper + i32(${row(i)}));
${mask === undefined ? '' : `  let mask_${i} = sequence_field(sequence, ${SEQUENCE.mask}u) - P.maskBase + head * P.maskHeadStride + (first_row + ${row(i)}) * P.maskQueryStride;`}
${V.map((v) => `  var o_${i}_${v} = vec4<f32>();`).join('')}`,
).join('\n')}
  workgroupBarrier();
${I.map(
  (i) => `  let facts_${i} = ${queryAt(i, `${dims}u`)};
  let scale_${i} = bitcast<f32>(facts_${i}.x); let constant_${i} = bitcast<f32>(facts_${i}.z);`,
).join('\n')}

  ${
    blocks
      ? `${MAP_AT}
  var seen = ${NOTHING_SEEN};
  for (var from_key = key_begin; ; from_key = seen.start + ${keys}) {
    seen = ${nextTileFrom('seen', 'from_key')};
    if (seen.start >= key_end) { break; }
    let start = seen.start;
    let cut = seen.cut != 0u;`
      : `for (var start = key_begin; start < key_end; start += ${keys}) {`
  }
    let first = u32(start);
    workgroupBarrier();
    ${loads.keys}
    ${sharedKeyValue ? '' : loads.values}
    workgroupBarrier();
    ${tileScores(config, parts)}
    ${I.map(rowMax).join('\n    ')}
    ${subgroup && !sharedKeyValue ? '' : 'workgroupBarrier();'}
    ${sharedKeyValue ? loads.values : ''}
    ${subgroup ? '' : I.map(sharedMax).join('\n    ')}
    ${tileWeights(config, parts)}
    workgroupBarrier();
    ${values.integers ? accumulateIntegers(config, parts) : accumulateValues(config, parts)}
  }

  ${I.map((i) => `if (poison_${i} != 0u || (l_${i} > 0.0 && facts_${i}.y != 0u)) { l_${i} = -1.0e30f; }`).join('\n  ')}
  ${subgroup ? '' : `workgroupBarrier();\n  ${I.map((i) => `${maxAt(i, 'c')} = l_${i};`).join('\n  ')}\n  workgroupBarrier();`}
  ${I.map((i) => rowSum(i)).join('\n  ')}${
    countsExactly(config)
      ? `
  ${subgroup ? '' : `workgroupBarrier();\n  ${I.map((i) => `${maxAt(i, 'c')} = e_${i};`).join('\n  ')}\n  workgroupBarrier();`}
  ${I.map((i) => rowSum(i, 'exact', 'e')).join('\n  ')}`
      : ''
  }
  ${
    readsStatistics(values)
      ? `let record = ((head / P.groupSize * P.sequences + sequence) * P.chunks) * ${statistics}u - P.partialBase;
  ${values.smoothed ? 'let factor_v = mean_factor(record, P.chunks);' : ''}
  ${V.map((v) => `${values.scaled ? `let scale_v_${v} = value_scale(record + ${sliceAt}${headDimPadded / 4 + v * colThreads}u + c, P.chunks, 1);` : ''}${values.smoothed ? ` let mean_v_${v} = value_mean(record + ${sliceAt}${headDimPadded / 4 + slices * quads + v * colThreads}u + c, P.chunks) * factor_v;` : ''}`).join('\n  ')}`
      : ''
  }
${I.map((i) => finishRow(config, parts, i)).join('')}
}`;
}
