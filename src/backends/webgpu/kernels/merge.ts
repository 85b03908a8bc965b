/**
 * Joins the partial results of a row: its keys were split among workgroups or launches, or its output shares 32-bit
 * words with other rows (16-bit types with an odd Dv), which one thread per word writes here.
 */
import { params } from './layout.ts';
import { expOf, recordFloats, type ScoreConfig, scoresAreFloat, storeChannels } from './scores.ts';
import { JOIN_SINK } from './sinks.ts';
import { NAN_WORD, outputPacker, range } from './storage.ts';

export const MERGE_PARAMS = [
  'wordStart',
  'wordEnd',
  'elements',
  'splits',
  'heads',
  'tokens',
  'rowBase',
  'outputWordBase',
  'lseBase',
] as const;

export const MERGE_THREADS = 64;

/** Threads of a workgroup that joins the partial results of one row, and the most that it joins. */
export const MERGE_ROW_THREADS = 256;
export const MERGE_ROW_SPLITS = 512;
/** Parts that a thread of it loads at once. */
const MERGE_ROW_LOADS = 4;

export const MERGE_ROWS_PARAMS = ['rowStart', 'splits', 'heads', 'tokens', 'rowBase', 'outputBase', 'lseBase'] as const;

/** Index of a row's logsumexp. */
const lseIndex = (headsInner: boolean) => `
fn lse_index(row: u32) -> u32 {
  ${headsInner ? 'let outer = row / P.heads; return (outer / P.tokens * P.heads + row % P.heads) * P.tokens + outer % P.tokens;' : 'return row;'}
}`;

/** A logsumexp of a row with maximum `m` and a sum of weights. */
const lseFrom = (config: ScoreConfig, total: string): string => {
  const [log, unit] = scoresAreFloat(config) ? ['log', '1.0'] : ['log2', '0.6931471805599453f'];
  return `(m + ${log}(${total})) * ${unit}`;
};

/** Writes the logsumexp of a row. */
const storeLse = (config: ScoreConfig, poison: string, sum: string, total: string): string => `
    let at = lse_index(row) - P.lseBase;
    if (${poison}) { lse[at] = 0x7fc00000u; }
    ${
      config.sinks
        ? `else { lse[at] = joined_lse(sink, ${sum}, ${lseFrom(config, total)}); }`
        : `else if (${sum} == 0.0) { lse[at] = 0xff800000u; }
    else { lse[at] = bitcast<u32>(${lseFrom(config, total)}); }`
    }`;

/**
 * The same for many parts of few rows (decoding), a workgroup to a row: parts are weighed side by side, and groups of
 * threads add up every so many of them. No two rows share a word of the output.
 */
export function mergeRowsKernel(config: ScoreConfig, headsInner: boolean): string {
  const { dtype, valueDim, valueDimPadded, returnLse, sinks } = config;
  const vectors = recordFloats(valueDimPadded) / 4;
  const quads = valueDimPadded / 4;
  const groups = Math.floor(MERGE_ROW_THREADS / quads);
  const loads = range(MERGE_ROW_LOADS);
  /** Joins the threads' parts into the first, always in the same order. */
  const reduced = (statement: string) => `for (var stride = ${MERGE_ROW_THREADS / 2}u; stride > 0u; stride /= 2u) {
    workgroupBarrier();
    if (t < stride) { ${statement} }
  }
  workgroupBarrier();`;
  const facts = (s: string) => `records[first + ${s} * ${vectors}u + ${quads}u]`;
  return `
${params(0, MERGE_ROWS_PARAMS)}
@group(0) @binding(1) var<storage, read> records: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> output: array<u32>;
${returnLse ? '@group(0) @binding(7) var<storage, read_write> lse: array<u32>;' : ''}
${outputPacker(dtype)}${sinks ? JOIN_SINK : ''}
var<workgroup> part: array<vec4<f32>, ${MERGE_ROW_THREADS}>;
var<workgroup> weights: array<f32, ${MERGE_ROW_SPLITS}>;
${lseIndex(headsInner)}

@compute @workgroup_size(${MERGE_ROW_THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let row = P.rowStart + group.x;
  let first = (row - P.rowBase) * P.splits * ${vectors}u;
  // A sum below 0 marks a NaN row; it is left out of the others.
  var largest = -3.4028234e38f;
  var nan = 0.0;
  for (var s = t; s < P.splits; s += ${MERGE_ROW_THREADS}u) {
    largest = max(largest, ${facts('s')}.x);
    if (${facts('s')}.y < 0.0) { nan = 1.0; }
  }
  part[t] = vec4<f32>(largest, nan, 0.0, 0.0);
  ${reduced('part[t] = max(part[t], part[t + stride]);')}
  let m = part[0].x;
  nan = part[0].y;
  var own = 0.0;
  for (var s = t; s < P.splits; s += ${MERGE_ROW_THREADS}u) {
    let l = ${facts('s')}.y;
    let weight = select(0.0, l * ${expOf(config, `${facts('s')}.x - m`)}, l > 0.0);
    weights[s] = weight;
    own += weight;
  }
  workgroupBarrier();
  part[t].x = own;
  ${reduced('part[t].x += part[t + stride].x;')}
  let sum = part[0].x;
  let quad = t % ${quads}u;
  let member = t / ${quads}u;
  var value = vec4<f32>();
  if (member < ${groups}u) {
    // Several loads are under way at once. A NaN row's parts may be anything.
    for (var s = member; s < P.splits; s += ${MERGE_ROW_LOADS * groups}u) {
      ${loads.map((i) => `let s_${i} = min(s + ${i * groups}u, P.splits - 1u); let x_${i} = records[first + s_${i} * ${vectors}u + quad];`).join('\n      ')}
      ${loads.map((i) => `value = fma(vec4<f32>(select(0.0, weights[s_${i}], s + ${i * groups}u < P.splits)), x_${i}, value);`).join('\n      ')}
    }
  }
  workgroupBarrier();
  part[t] = value;
  workgroupBarrier();
  let poison = nan > 0.0;
  ${sinks ? `let sink = ${facts('0u')}.w;` : ''}
  if (t < ${quads}u) {
    for (var i = 1u; i < ${groups}u; i++) { value += part[t + i * ${quads}u]; }
    let scale = select(1.0 / max(sum, 1.0e-37f)${sinks ? ` * join_sink(sink, ${lseFrom(config, 'sum')}).x` : ''}, 0.0, sum <= 0.0);
    let at = row * ${valueDim}u - P.outputBase;
    ${storeChannels(config, 'at', '(4u * t)', 'value * scale', 'poison')}
  }
  ${returnLse ? `if (t == 0u) {${storeLse(config, 'poison', 'sum', 'sum')} }` : ''}
}`;
}

/**
 * @param headsInner rows are in token-major order (NHD and varlen): row = (batch * tokens + token) * heads + head
 */
export function mergeKernel(config: ScoreConfig, headsInner: boolean): string {
  const { dtype, valueDim, valueDimPadded, returnLse, fp4, sinks } = config;
  // The output is divided by the sum of rounded weights; the logsumexp, beside which a sink stands, is that of the weights before.
  const exact = fp4?.weights === true && (returnLse || sinks);
  const floats = recordFloats(valueDimPadded);
  const store =
    dtype === 'float32'
      ? `let x = merged(word);
  output[word - P.outputWordBase] = select(bitcast<u32>(x.x), ${NAN_WORD.float32}, x.y < 0.0);`
      : `let a = merged(2u * word);
  var b = vec2<f32>();
  if (2u * word + 1u < P.elements) { b = merged(2u * word + 1u); }
  let nan = select(0u, ${NAN_WORD[dtype]} & 0xffffu, a.y < 0.0) | select(0u, ${NAN_WORD[dtype]} & 0xffff0000u, b.y < 0.0);
  let keep = select(0xffffu, 0u, a.y < 0.0) | select(0xffff0000u, 0u, b.y < 0.0);
  output[word - P.outputWordBase] = (pack_output(a.x, b.x) & keep) | nan;`;
  return `
${params(0, MERGE_PARAMS)}
@group(0) @binding(1) var<storage, read> records: array<f32>;
@group(0) @binding(6) var<storage, read_write> output: array<u32>;
${returnLse ? '@group(0) @binding(7) var<storage, read_write> lse: array<u32>;' : ''}
${outputPacker(dtype)}${sinks ? JOIN_SINK : ''}
${lseIndex(headsInner)}

// The element's value, and its row's sum of exponentials: negative for a NaN row.
fn merged(element: u32) -> vec2<f32> {
  let row = element / ${valueDim}u;
  let channel = element % ${valueDim}u;
  let first = (row - P.rowBase) * P.splits * ${floats}u;
  var m = -3.4028234e38f;
  for (var s = 0u; s < P.splits; s++) { m = max(m, records[first + s * ${floats}u + ${valueDimPadded}u]); }
  var sum = 0.0;${exact ? '\n  var exact = 0.0;' : ''}
  var value = 0.0;
  var poison = false;
  for (var s = 0u; s < P.splits; s++) {
    let at = first + s * ${floats}u;
    let l = records[at + ${valueDimPadded + 1}u];
    if (l < 0.0) { poison = true; }
    if (l > 0.0) {
      let weight = l * ${expOf(config, `records[at + ${valueDimPadded}u] - m`)};
      sum += weight;${
        exact
          ? `
      exact += records[at + ${valueDimPadded + 2}u] * ${expOf(config, `records[at + ${valueDimPadded}u] - m`)};`
          : ''
      }
      value += weight * records[at + channel];
    }
  }
  if (poison) { sum = -1.0; }${sinks ? `\n  let sink = records[first + ${valueDimPadded + 3}u];` : ''}
${
  returnLse
    ? `  if (channel == 0u) {${storeLse(config, 'poison', 'sum', exact ? 'exact' : 'sum')}
  }`
    : ''
}
  return vec2<f32>(select(value / max(sum, 1.0e-37f)${sinks ? ` * join_sink(sink, ${lseFrom(config, exact ? 'exact' : 'sum')}).x` : ''}, 0.0, sum <= 0.0), sum);
}

@compute @workgroup_size(${MERGE_THREADS})
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let word = P.wordStart + id.x;
  if (word >= P.wordEnd) { return; }
  ${store}
}`;
}
