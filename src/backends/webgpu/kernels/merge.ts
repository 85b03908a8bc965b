/**
 * Joins the partial results of a row: its keys were split among workgroups or launches, or its output shares 32-bit
 * words with other rows (16-bit types with an odd Dv), which one thread per word writes here.
 */
import { params } from './layout.ts';
import { expOf, recordFloats, type ScoreConfig, scoresAreFloat } from './scores.ts';
import { JOIN_SINK } from './sinks.ts';
import { NAN_WORD, outputPacker } from './storage.ts';

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

/**
 * @param headsInner rows are in token-major order (NHD and varlen): row = (batch * tokens + token) * heads + head
 */
export function mergeKernel(config: ScoreConfig, headsInner: boolean): string {
  const { dtype, valueDim, valueDimPadded, returnLse, fp4, sinks } = config;
  // The output is divided by the sum of rounded weights, and the logsumexp is that of the weights before.
  const exact = fp4?.weights === true && returnLse;
  const floats = recordFloats(valueDimPadded);
  const unit = scoresAreFloat(config) ? ['log', '1.0'] : ['log2', '0.6931471805599453f'];
  const lseOf = (total: string) => `(m + ${unit[0]}(${total})) * ${unit[1]}`;
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

fn lse_index(row: u32) -> u32 {
  ${headsInner ? 'let outer = row / P.heads; return (outer / P.tokens * P.heads + row % P.heads) * P.tokens + outer % P.tokens;' : 'return row;'}
}

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
    ? `  if (channel == 0u) {
    let at = lse_index(row) - P.lseBase;
    if (poison) { lse[at] = 0x7fc00000u; }
    ${
      sinks
        ? `else { lse[at] = joined_lse(sink, sum, ${lseOf(exact ? 'exact' : 'sum')}); }`
        : `else if (sum == 0.0) { lse[at] = 0xff800000u; }
    else { lse[at] = bitcast<u32>(${lseOf(exact ? 'exact' : 'sum')}); }`
    }
  }`
    : ''
}
  return vec2<f32>(select(value / max(sum, 1.0e-37f)${sinks ? ` * join_sink(sink, ${lseOf('sum')}).x` : ''}, 0.0, sum <= 0.0), sum);
}

@compute @workgroup_size(${MERGE_THREADS})
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let word = P.wordStart + id.x;
  if (word >= P.wordEnd) { return; }
  ${store}
}`;
}
