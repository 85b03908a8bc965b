/**
 * Attention of few queries over many keys (decoding): memory bounds it, so every byte of K and V is read once. A
 * workgroup owns one key head and a range of keys, and packs the rows of all query heads that share the head, which
 * would otherwise read the same keys once each. Partial results of the ranges are joined afterwards (merge.ts).
 *
 * One kernel serves every family: core WGSL, K and V in rows or in tiles. A step over {@link PackedShape.keys} keys:
 *
 * - Q K^T: {@link packedTiling} `lanesPerKey` threads share a key, each reads vectors of 16 bytes of it, and leaves an
 *   exact integer sum for each row. Several loads are issued before the first is used.
 * - Softmax: a thread has four keys of a row. Maxima go through workgroup memory.
 * - P V: out of rows, a thread has 8 channels of every `groups`-th four keys; out of tiles, whole channels of every
 *   `groups`-th 16 keys. Both are loads of 16 bytes that neighbouring threads continue.
 *
 * Keys behind the last are read as the last one: their weight is 0, and memory that was never written may hold a NaN.
 */
import { HAS_COMPUTED, isHidden, leaveOutHiddenOfGroup } from './blocks.ts';
import {
  FLAG_UNSMOOTHED,
  KEY_TILE,
  type KeyValueLayout,
  POISON,
  params,
  rowVectors,
  SEQUENCE,
  tables,
  VALUE_GROUP,
} from './layout.ts';
import { KEY_BLOCK, readsStatistics, valueFunctions } from './prepare.ts';
import {
  attentionParams,
  expOf,
  recordFloats,
  type ScoreConfig,
  scoreDeclarations,
  scoreStatements,
} from './scores.ts';
import { statisticsVectors } from './statistics.ts';
import { EXCLUDED, EXCLUDED_BELOW, range } from './storage.ts';

export interface PackedShape {
  /** Packed rows of a workgroup. */
  readonly rows: number;
  /** Keys of a step. */
  readonly keys: number;
}

export interface PackedConfig extends ScoreConfig, PackedShape {
  readonly layout: KeyValueLayout;
  /** Query heads that share a key head: packed row `i` is query `i / group` of the group's head `i % group`. */
  readonly group: number;
  readonly packedDot: boolean;
  /** `dot_int8`, as every kernel declares it. */
  readonly dot: string;
}

const THREADS = 128;

/** Vectors of K, and of V, that a thread has under way. */
const LOADS_AHEAD = 8;

/** How a workgroup divides a step. */
export function packedTiling(
  { rows, keys }: PackedShape,
  headDimPadded: number,
  valueDimPadded: number,
  layout: KeyValueLayout,
) {
  const dims = rowVectors(headDimPadded) - 1;
  const lanesPerKey = dims % 4 === 0 ? 4 : 2;
  const keysAtOnce = THREADS / lanesPerKey;
  /** Words from one lane's sums to the next's: lanes of a key begin in other banks. */
  const sumStride = rows * keys + 32 / lanesPerKey;
  const inRows = layout === 'rows';
  /** Threads that together have all channels, and channels of a thread. */
  const channelThreads = inRows ? valueDimPadded / 8 : Math.min(THREADS, valueDimPadded);
  const channels = inRows ? 8 : Math.ceil(valueDimPadded / channelThreads);
  const groups = Math.floor(THREADS / channelThreads);
  /** Rows whose sums of all groups lie in workgroup memory together, at the end. */
  const partWords = groups * channelThreads * channels;
  const words = Math.max(lanesPerKey * sumStride, partWords);
  return {
    dims,
    lanesPerKey,
    keysAtOnce,
    keysEach: keys / keysAtOnce,
    sumStride,
    channelThreads,
    channels,
    groups,
    partWords,
    rowsAtOnce: Math.min(rows, Math.floor(words / partWords)),
    quads: keys / 4,
    /** Pairs of a row and four keys that a thread has. */
    items: Math.ceil((rows * keys) / 4 / THREADS),
    words,
    bytes: rows * dims * 16 + 4 * words + 4 * rows * keys + 8 * keys + rows * keys + 8 * rows,
  };
}

type Tiling = ReturnType<typeof packedTiling>;

/** Where a key's vectors and its facts are; `key`: an expression of its row in the binding's sequence. */
function keyPlace({ layout, headDimPadded }: PackedConfig, { dims }: Tiling) {
  const vectors = rowVectors(headDimPadded);
  if (layout === 'rows') {
    return {
      vector: (row: string, w: string) => `${row} * ${vectors}u + ${w} - P.keyRowBase`,
      facts: (row: string) => `${row} * ${vectors}u + ${dims}u - P.keyRowBase`,
    };
  }
  const tile = (row: string) => `${row} / ${KEY_TILE}u * ${KEY_TILE * vectors}u`;
  const within = (row: string) => `${row} % ${KEY_TILE}u`;
  return {
    vector: (row: string, w: string) =>
      `${tile(row)} + ${w} / 2u * ${2 * KEY_TILE}u + ${within(row)} * 2u + ${w} % 2u - P.keyRowBase`,
    facts: (row: string) => `${tile(row)} + ${KEY_TILE * dims}u + ${within(row)} - P.keyRowBase`,
  };
}

/** Integer sums of every row and key, a part from each lane of a key, and each key's scale and flags. */
function multiplyKeys(config: PackedConfig, tiling: Tiling): string {
  const { rows } = config;
  const { dims, lanesPerKey, keysAtOnce, keysEach, sumStride } = tiling;
  const place = keyPlace(config, tiling);
  const [R, N] = [range(rows), range(keysEach)];
  const steps = dims / lanesPerKey;
  const most = Math.max(1, Math.floor(LOADS_AHEAD / keysEach));
  const stepsAtOnce = range(most)
    .map((i) => most - i)
    .find((count) => steps % count === 0) as number;
  const S = range(stepsAtOnce);
  const vector = (step: number) => `(w + ${step * lanesPerKey}u)`;
  const loads = S.flatMap((step) =>
    N.map((n) => `let k_${n}_${step} = key_rows[${place.vector(`row_${n}`, vector(step))}];`),
  );
  const products = S.flatMap((step) =>
    R.map((r) => {
      const sums = N.map((n) => {
        const words = ['x', 'y', 'z', 'w'].map((e) => `dot_int8(q.${e}, k_${n}_${step}.${e})`);
        return `s_${r}_${n} += ${words.join(' + ')};`;
      });
      return `{ let q = tile_q[${r}][${vector(step)}]; ${sums.join(' ')} }`;
    }),
  );
  const key = (n: number) => `(own_key + ${n * keysAtOnce}u)`;
  return `
    ${N.map((n) => `let row_${n} = kv_row + min(first + ${key(n)}, last_key);`).join(' ')}
    ${R.map((r) => N.map((n) => `var s_${r}_${n} = 0;`).join(' ')).join(' ')}
    for (var w = key_lane; w < ${dims}u; w += ${stepsAtOnce * lanesPerKey}u) {
      ${loads.join('\n      ')}
      ${products.join('\n      ')}
    }
    ${R.map((r) => N.map((n) => `sums[key_lane * ${sumStride}u + ${r * config.keys}u + ${key(n)}] = s_${r}_${n};`).join(' ')).join('\n    ')}
    if (key_lane == 0u) {
      ${N.map((n) => `{ let facts = key_rows[${place.facts(`row_${n}`)}]; key_facts[${key(n)}] = facts.xy; }`).join('\n      ')}
    }`;
}

/** Scores of a thread's four keys of a row, and the largest of them; the second half: weights, once maxima are known. */
function softmax(config: PackedConfig, tiling: Tiling, item: number) {
  const { keys, rows } = config;
  const { quads, lanesPerKey, sumStride } = tiling;
  const own = `row_of_${item}`;
  const E = range(4);
  const f = (e: number) => `f_${item}_${e}`;
  const hidden = (e: number) => (config.blocks ? ` || ${isHidden(`map_${item}`, `key_${e}`)}` : '');
  const score = (e: number) => {
    const at = `${own} * ${keys}u + 4u * quad_of_${item} + ${e}u`;
    const sum = range(lanesPerKey)
      .map((lane) => `sums[${lane * sumStride}u + ${at}]`)
      .join(' + ');
    const { softcap, mask } = scoreStatements(
      config,
      f(e),
      { constant: `constant_${item}`, mask: `mask_${item}`, poison: `poison_${item}` },
      `key_${e}`,
    );
    return `{ let facts = key_facts[4u * quad_of_${item} + ${e}u]; let key_${e} = start + i32(4u * quad_of_${item} + ${e}u);
        ${f(e)} = f32(${sum}) * (scale_${item} * bitcast<f32>(facts.x));
        if ((facts.y & ${FLAG_UNSMOOTHED}u) != 0u) { ${f(e)} -= constant_${item}; }
        ${softcap}
        if (key_${e} < low_${item} || key_${e} > high_${item}${hidden(e)}) { ${f(e)} = ${EXCLUDED}; } ${mask === '' ? '' : `else { ${mask} }`}
        if (${f(e)} > ${EXCLUDED_BELOW}) { poison_${item} |= facts.y & ${POISON}u; } }`;
  };
  const within = rows * quads < (item + 1) * THREADS ? `if (${own} < ${rows}u) ` : '';
  const scores = `${E.map((e) => `var ${f(e)} = ${EXCLUDED};`).join(' ')}
    ${within}{
      ${E.map(score).join('\n      ')}
      maxima[${own} * ${quads}u + quad_of_${item}] = max(max(${f(0)}, ${f(1)}), max(${f(2)}, ${f(3)}));
    }`;
  const weights = `${within}{
      var updated = m_${item};
      for (var i = 0u; i < ${quads}u; i++) { updated = max(updated, maxima[${own} * ${quads}u + i]); }
      let alpha = select(${expOf(config, `m_${item} - updated`)}, 0.0, m_${item} < ${EXCLUDED_BELOW});
      m_${item} = updated;
      ${E.map((e) => `${f(e)} = select(${expOf(config, `${f(e)} - updated`)}, 0.0, ${f(e)} < ${EXCLUDED_BELOW});`).join('\n      ')}
      l_${item} = l_${item} * alpha + (${E.map(f).join(' + ')});
      weights[${own} * ${quads}u + quad_of_${item}] = vec4<f32>(${E.map(f).join(', ')});
      if (quad_of_${item} == 0u) { row_factor[${own}] = alpha; }
    }`;
  return { scores, weights };
}

/** Names of a row's accumulators. */
const accumulators = ({ layout }: PackedConfig, { channels }: Tiling, r: number): string[] =>
  range(layout === 'rows' ? 2 : channels).map((a) => `o_${r}_${a}`);

/** P V in units of keys: their number, and statements that load a unit (an expression) and multiply it. */
interface ValueUnits {
  readonly count: number;
  /** Vectors that a thread loads of one. */
  readonly vectors: number;
  load(unit: string, suffix: string): string;
  multiply(unit: string, suffix: string): string;
}

/** Out of rows: a thread's 8 channels of four keys at a time. */
function unitsInRows({ rows, valueDimPadded }: PackedConfig, { quads }: Tiling): ValueUnits {
  const [R, E] = [range(rows), range(4)];
  return {
    count: quads,
    vectors: 4,
    load: (quad, suffix) =>
      E.map(
        (e) =>
          `let w_${e}${suffix} = value_rows[(kv_row + min(first + 4u * (${quad}) + ${e}u, last_key)) * ${valueDimPadded / 8}u + channel_thread - P.valueRowBase];`,
      ).join('\n        '),
    multiply: (quad, suffix) => `{
        ${R.map((r) => `let p_${r} = weights[${r * quads}u + ${quad}];`).join(' ')}
        ${E.map((e) => {
          const w = `w_${e}${suffix}`;
          const products = R.map((r) => {
            const p = `vec4<f32>(p_${r}.${'xyzw'[e]})`;
            return `o_${r}_0 = fma(${p}, a, o_${r}_0); o_${r}_1 = fma(${p}, b, o_${r}_1);`;
          });
          return `{ let a = vec4<f32>(unpack2x16float(${w}.x), unpack2x16float(${w}.y)); let b = vec4<f32>(unpack2x16float(${w}.z), unpack2x16float(${w}.w));
          ${products.join(' ')} }`;
        }).join('\n        ')}
      }`,
  };
}

/** Out of tiles: 16 keys of a channel at a time. */
function unitsInTiles(config: PackedConfig, tiling: Tiling): ValueUnits {
  const { rows, keys, valueDimPadded } = config;
  const { channels, channelThreads, quads } = tiling;
  const [R, C, H] = [range(rows), range(channels), range(2)];
  const perGroup = VALUE_GROUP / 4;
  const channel = (c: number) => `(channel_thread + ${c * channelThreads}u)`;
  const whole = channels * channelThreads === valueDimPadded;
  const at = (sixteen: string, c: number, h: number) =>
    `(kv_row + min(first + ${VALUE_GROUP}u * (${sixteen}), last_key)) / ${VALUE_GROUP}u * ${2 * valueDimPadded}u + ${whole ? channel(c) : `min(${channel(c)}, ${valueDimPadded - 1}u)`} * 2u + ${h}u - P.valueRowBase`;
  return {
    count: keys / VALUE_GROUP,
    vectors: 2 * channels,
    load: (sixteen, suffix) =>
      C.flatMap((c) => H.map((h) => `let w_${c}_${h}${suffix} = value_rows[${at(sixteen, c, h)}];`)).join(' '),
    multiply: (sixteen, suffix) =>
      C.flatMap((c) =>
        H.map((h) => {
          const w = `w_${c}_${h}${suffix}`;
          return `{ let a = vec4<f32>(unpack2x16float(${w}.x), unpack2x16float(${w}.y)); let b = vec4<f32>(unpack2x16float(${w}.z), unpack2x16float(${w}.w));
          ${R.map((r) => {
            const p = (part: number) => `weights[${r * quads}u + ${perGroup}u * (${sixteen}) + ${2 * h + part}u]`;
            return `o_${r}_${c} += dot(${p(0)}, a) + dot(${p(1)}, b);`;
          }).join(' ')} }`;
        }),
      ).join('\n        '),
  };
}

/**
 * P V of a step: its first loads, which are issued before the softmax, whose barriers they would otherwise wait behind,
 * and the products. Where the groups of threads do not divide a step's units, a unit is loaded when it is needed.
 */
function multiplyWeights(config: PackedConfig, tiling: Tiling): { readonly ahead: string; readonly products: string } {
  const { groups, channelThreads } = tiling;
  const units = config.layout === 'rows' ? unitsInRows(config, tiling) : unitsInTiles(config, tiling);
  const turns = units.count / groups;
  if (!Number.isInteger(turns) || groups * channelThreads !== THREADS) {
    const loop = `for (var unit = value_group; unit < ${units.count}u; unit += ${groups}u) {
        ${units.load('unit', '')}
        ${units.multiply('unit', '')}
      }`;
    return { ahead: '', products: loop };
  }
  const atOnce = Math.max(1, Math.floor(LOADS_AHEAD / units.vectors));
  const unit = (turn: number) => `value_group + ${turn * groups}u`;
  const batches = range(Math.ceil(turns / atOnce)).map((batch) => {
    const own = range(turns).slice(batch * atOnce, (batch + 1) * atOnce);
    return {
      loads: own.map((turn) => units.load(unit(turn), `_${turn}`)).join('\n      '),
      products: own.map((turn) => units.multiply(unit(turn), `_${turn}`)).join('\n      '),
    };
  });
  const [first, ...rest] = batches as [(typeof batches)[number], ...typeof batches];
  return {
    ahead: first.loads,
    products: [first.products, ...rest.map(({ loads, products }) => `${loads}\n      ${products}`)].join('\n      '),
  };
}

/** A thread's sums into workgroup memory, in the place of a row of the batch. */
function leaveParts(config: PackedConfig, tiling: Tiling, r: number, place: number): string {
  const { channelThreads, channels, partWords } = tiling;
  const base = `${place * partWords}u + value_group * ${channelThreads * channels}u`;
  return accumulators(config, tiling, r)
    .flatMap((name, a) => {
      const words = config.layout === 'rows' ? ['x', 'y', 'z', 'w'].map((e) => `${name}.${e}`) : [name];
      return words.map((word, e) => {
        const at = (a * words.length + e) * channelThreads;
        return `sums[${base} + ${at}u + channel_thread] = bitcast<i32>(${word});`;
      });
    })
    .join(' ');
}

/** Rows' outputs, divided by their sums, into the records, a few rows at a time. */
function storeRows(config: PackedConfig, tiling: Tiling): string {
  const { rows, layout, headDimPadded, valueDimPadded, values } = config;
  const { rowsAtOnce, groups, channelThreads, channels, partWords } = tiling;
  const vectors = valueDimPadded / 4;
  const statistics = statisticsVectors(headDimPadded, valueDimPadded);
  const place = (e: number) =>
    layout === 'rows' ? `(4u * (quad % 2u) + ${e}u) * ${channelThreads}u + quad / 2u` : `4u * quad + ${e}u`;
  const sums = range(4).map(
    (e) => `x.${'xyzw'[e]} += bitcast<f32>(sums[at + group * ${channelThreads * channels}u + ${place(e)}]);`,
  );
  const scaled = values.scaled ? ` * value_scale(record + ${headDimPadded / 4}u + quad, P.chunks, 1)` : '';
  const smoothed = values.smoothed
    ? ` + select(vec4<f32>(), value_mean(record + ${headDimPadded / 4 + vectors}u + quad, P.chunks) * factor_v, row_sum[row] > 0.0)`
    : '';
  const head = readsStatistics(values)
    ? `
  let record = ((kv_head * P.sequences + sequence) * P.chunks) * ${statistics}u - P.partialBase;
  ${values.smoothed ? 'let factor_v = mean_factor(record, P.chunks);' : ''}`
    : '';
  const batches = range(Math.ceil(rows / rowsAtOnce))
    .map((batch) => {
      const own = range(rows).slice(batch * rowsAtOnce, (batch + 1) * rowsAtOnce);
      return `
  workgroupBarrier();
  if (value_group < ${groups}u) { ${own.map((r, i) => leaveParts(config, tiling, r, i)).join('\n    ')} }
  workgroupBarrier();
  for (var i = t; i < ${own.length * vectors}u; i += ${THREADS}u) {
    let row = i / ${vectors}u + ${own[0]}u;
    let quad = i % ${vectors}u;
    let at = i / ${vectors}u * ${partWords}u;
    var x = vec4<f32>();
    for (var group = 0u; group < ${groups}u; group++) { ${sums.join(' ')} }
    x = x * row_factor[row]${scaled}${smoothed};
    if (row < count) {
      let to = record_of(sequence, kv_head, first_row + row, group_z) + 4u * quad;
      records[to] = x.x; records[to + 1u] = x.y; records[to + 2u] = x.z; records[to + 3u] = x.w;
    }
  }`;
    })
    .join('');
  return `${head}${batches}`;
}

export function packedAttentionKernel(config: PackedConfig): string {
  const { rows, keys, layout, group, packedDot, dot, headDimPadded, valueDim, valueDimPadded } = config;
  const { values, mask, softcap, sinks, blocks } = config;
  const tiling = packedTiling(config, headDimPadded, valueDimPadded, layout);
  const { dims, lanesPerKey, channelThreads, quads, items, words } = tiling;
  const [R, I] = [range(rows), range(items)];
  const steps = I.map((item) => softmax(config, tiling, item));
  const weighted = multiplyWeights(config, tiling);
  const vectors = rowVectors(headDimPadded);
  const maximum = (item: number) => (softcap ? `m_${item}` : `m_${item} + constant_${item}`);
  const each = (f: (item: number) => string) => I.map(f).join('\n  ');
  return `
${packedDot ? 'requires packed_4x8_integer_dot_product;' : ''}
${params(0, attentionParams(config))}
${tables(1)}
@group(0) @binding(2) var<storage, read> query_rows: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> key_rows: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> value_rows: array<vec4<u32>>;
${scoreDeclarations(config)}${blocks ? HAS_COMPUTED : ''}
${dot}
${valueFunctions(statisticsVectors(headDimPadded, valueDimPadded), values)}
var<workgroup> tile_q: array<array<vec4<u32>, ${dims}>, ${rows}>;
// Parts of integer scores; at the end, bits of sums of P V.
var<workgroup> sums: array<i32, ${words}>;
var<workgroup> weights: array<vec4<f32>, ${rows * quads}>;
var<workgroup> maxima: array<f32, ${rows * quads}>;
var<workgroup> key_facts: array<vec2<u32>, ${keys}>;
var<workgroup> row_factor: array<f32, ${rows}>;
var<workgroup> row_sum: array<f32, ${rows}>;

fn head_of(kv_head: u32, packed_row: u32) -> u32 { return kv_head * ${group}u + packed_row % ${group}u; }
fn query_of(sequence: u32, kv_head: u32, packed_row: u32) -> u32 {
  return (head_of(kv_head, packed_row) * P.queryRowsPerHead + sequence_field(sequence, ${SEQUENCE.queryRow}u) + packed_row / ${group}u) * ${vectors}u - P.queryRowBase;
}
fn record_of(sequence: u32, kv_head: u32, packed_row: u32, split: u32) -> u32 {
  let element = sequence_field(sequence, ${SEQUENCE.output}u) + head_of(kv_head, packed_row) * P.outputHeadStride + packed_row / ${group}u * P.outputTokenStride;
  return (element / ${valueDim}u * P.splits + P.splitIndex + split) * ${recordFloats(valueDimPadded)}u - P.recordBase;
}

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let tile = P.tileStart + workgroup.x;
  let kv_head = P.headStart + workgroup.y;
  let group_z = workgroup.z;
  let sequence = tile_field(tile, 0u);
  let first_row = tile_field(tile, 1u);
  let count = tile_field(tile, 2u);
  let kv_row = kv_head * P.keyRowsPerHead + sequence_field(sequence, ${SEQUENCE.keyRow}u);
  // Rows beyond the last are the last one again, and are not stored.
  for (var i = t; i < ${rows * dims}u; i += ${THREADS}u) {
    tile_q[i / ${dims}u][i % ${dims}u] = query_rows[query_of(sequence, kv_head, first_row + min(i / ${dims}u, count - 1u)) + i % ${dims}u];
  }
  let length = i32(sequence_field(sequence, ${SEQUENCE.keyLength}u));
  let lower = i32(sequence_field(sequence, ${SEQUENCE.lower}u));
  let upper = i32(sequence_field(sequence, ${SEQUENCE.upper}u));
  let begin = i32(P.keyStart + group_z * P.keySpan);
  let key_begin = max(begin, max(0, lower + i32(first_row / ${group}u))) / ${KEY_BLOCK} * ${KEY_BLOCK};
  let key_end = min(min(length, begin + i32(P.keySpan)), upper + i32((first_row + count - 1u) / ${group}u) + 1);
  let last_key = u32(max(min(length, begin + i32(P.keySpan)) - 1, 0));
  let own_key = t / ${lanesPerKey}u;${
    blocks
      ? `
  let first_token = first_row / ${group}u;
  let last_token = (first_row + count - 1u) / ${group}u;
  let map_at = sequence * P.mapBatchStride + kv_head * ${group}u * P.mapHeadStride + P.mapOffset;`
      : ''
  }
  let key_lane = t % ${lanesPerKey}u;
  let value_group = t / ${channelThreads}u;
  let channel_thread = t % ${channelThreads}u;
  ${each(
    (
      item,
    ) => `let row_of_${item} = (t + ${item * THREADS}u) / ${quads}u; let quad_of_${item} = (t + ${item * THREADS}u) % ${quads}u;
  let packed_${item} = first_row + min(row_of_${item}, count - 1u);
  let token_${item} = i32(packed_${item} / ${group}u);
  let facts_${item} = query_rows[query_of(sequence, kv_head, packed_${item}) + ${dims}u];
  let scale_${item} = bitcast<f32>(facts_${item}.x); let constant_${item} = bitcast<f32>(facts_${item}.z);
  let low_${item} = max(begin, lower + token_${item}); let high_${item} = min(i32(last_key), upper + token_${item});
  ${blocks ? `let map_${item} = map_at + packed_${item} % ${group}u * P.mapHeadStride + u32(token_${item}) / P.blockRows * P.mapRowStride;` : ''}
  ${mask === undefined ? '' : `let mask_${item} = sequence_field(sequence, ${SEQUENCE.mask}u) - P.maskBase + head_of(kv_head, packed_${item}) * P.maskHeadStride + u32(token_${item}) * P.maskQueryStride;`}
  var m_${item} = ${EXCLUDED}; var l_${item} = 0.0; var poison_${item} = 0u;`,
  )}
  ${R.map((r) =>
    accumulators(config, tiling, r)
      .map((name) => `var ${name} = ${layout === 'rows' ? 'vec4<f32>()' : '0.0'};`)
      .join(' '),
  ).join('\n  ')}
  workgroupBarrier();

  for (var start = key_begin; start < key_end; start += ${keys}) {${blocks ? leaveOutHiddenOfGroup(keys, group) : ''}
    let first = u32(start);
    {${multiplyKeys(config, tiling)}
    }
    ${weighted.ahead}
    workgroupBarrier();
    ${steps.map(({ scores }) => scores).join('\n    ')}
    workgroupBarrier();
    ${steps.map(({ weights }) => weights).join('\n    ')}
    workgroupBarrier();
    if (value_group < ${tiling.groups}u) {
      ${R.map(
        (r) =>
          `{ let alpha = row_factor[${r}]; ${accumulators(config, tiling, r)
            .map((name) => `${name} *= alpha;`)
            .join(' ')} }`,
      ).join('\n      ')}
      ${weighted.products}
    }
  }

  workgroupBarrier();
  ${each(
    (item) => `if (poison_${item} != 0u || (l_${item} > 0.0 && facts_${item}.y != 0u)) { l_${item} = -1.0e30f; }
  if (row_of_${item} < ${rows}u) { maxima[row_of_${item} * ${quads}u + quad_of_${item}] = l_${item}; }`,
  )}
  workgroupBarrier();
  ${each(
    (item) => `if (row_of_${item} < ${rows}u && quad_of_${item} == 0u) {
    var sum = 0.0;
    for (var i = 0u; i < ${quads}u; i++) { sum += maxima[row_of_${item} * ${quads}u + i]; }
    row_sum[row_of_${item}] = sum;
    row_factor[row_of_${item}] = select(1.0 / max(sum, 1.0e-37f), 0.0, sum <= 0.0);
    if (row_of_${item} < count) {
      let to = record_of(sequence, kv_head, first_row + row_of_${item}, group_z) + ${valueDimPadded}u;
      records[to] = select(${maximum(item)}, ${EXCLUDED}, sum == 0.0);
      records[to + 1u] = sum;${sinks ? `\n      records[to + 3u] = bitcast<f32>(facts_${item}.w);` : ''}
    }
  }`,
  )}
${storeRows(config, tiling)}
}`;
}
