/**
 * The lanes' part of the matrix kernel: a row's scores of a step, out of workgroup memory, to its weights, back into it.
 *
 * INT8 sums start at the bits of 12582912 (1.5 * 2^23), so that the integer s, read as a float, is 12582912 + s: there
 * is nothing to convert while |s| is below 2^22, which it is up to D 256. Where nothing but one scale lies between a
 * row's sums and its scores (`plain`: no mask, all keys in every row's band, no flagged key), the largest sum belongs to
 * the largest score, and one multiplication and addition gives the exponent of two: Q's scales are not negative
 * (prepare.ts). What that rounds, the same for a row's keys of a block, is at most 0.75 of an integer sum.
 *
 * A matrix cannot be scaled by row, so a row's maximum stays where it is until a row outgrows it by `2^headroom`
 * (lazy rescaling; P then reaches 2^headroom, which float16 holds).
 */

import { isHidden } from './blocks.ts';
import { FLAG_OWN_SCALES, FLAG_UNSMOOTHED, POISON } from './layout.ts';
import type { MatrixMemory, MatrixOperations } from './matrix-operations.ts';
import { type MatrixProducts, type MatrixShape, type MatrixTiling, SCORES_AT_ONCE } from './matrix-tiling.ts';
import { expOf, type ScoreConfig, scoreStatements, scoresAreFloat } from './scores.ts';
import { EXCLUDED, EXCLUDED_BELOW, range } from './storage.ts';

export interface SoftmaxConfig extends ScoreConfig, MatrixShape, MatrixProducts {
  readonly operations: MatrixOperations;
  readonly lanes: number;
}

/** What INT8 sums start at: as an i32, and as the f32 of the same bits. */
export const SUM_ORIGIN = { bits: 0x4b400000, value: 12582912 } as const;

/** A scale of integer sums from which on their rounding with the origin could be seen. */
const LARGEST_PLAIN_SCALE = '0.0625f';

const LOG2E = '1.4426950408889634f';
const COMPONENTS = ['x', 'y', 'z', 'w'] as const;

const isInteger = ({ qk }: MatrixProducts) => qk.componentType === 'i8';

/** Whether steps may be plain at all. */
const hasPlainSteps = (config: SoftmaxConfig) =>
  config.sharedScale && config.mask === undefined && !scoresAreFloat(config);

/**
 * `finished_scores`: four sums as scores, with everything that may lie between; excluded ones as EXCLUDED. `facts` is
 * the unit of storage with the first key's facts.
 */
export function softmaxFunctions(config: SoftmaxConfig): string {
  const origin = isInteger(config) ? ` - ${SUM_ORIGIN.value}.0` : '';
  const statements = COMPONENTS.map((c, i) =>
    scoreStatements(
      config,
      `f.${c}`,
      { constant: 'row.constant', mask: 'row.mask', poison: '(*poison)' },
      `(key + ${i})`,
    ),
  );
  const masked = statements.map(({ mask }, i) =>
    mask === '' ? '' : `if (f.${COMPONENTS[i]} > ${EXCLUDED_BELOW}) { ${mask} }`,
  );
  const facts = (field: number, type: string) =>
    `vec4<u32>(${range(4)
      .map((i) => `key_tiles[facts + ${i}u].${COMPONENTS[field]}`)
      .join(', ')})`.replace(/^/, type === 'f32' ? 'bitcast<vec4<f32>>(' : '') + (type === 'f32' ? ')' : '');
  const ownScales = `scales = row.scale * ${facts(0, 'f32')};`;
  return `
struct Row { scale: f32, constant: f32, low: i32, high: i32, mask: u32${config.blocks ? ', map: u32' : ''} }
fn finished_scores(sums: vec4<f32>, key: i32, facts: u32, key_scale: f32, key_flags: u32, edge: bool, row: Row, poison: ptr<function, u32>) -> vec4<f32> {
  var scales = vec4<f32>(row.scale * key_scale);
  var flags = vec4<u32>();
  ${config.sharedScale ? `if ((key_flags & ${FLAG_OWN_SCALES}u) != 0u) { ${ownScales} }` : ownScales}
  if ((key_flags & ${FLAG_UNSMOOTHED | POISON}u) != 0u) { flags = ${facts(1, 'u32')}; }
  var f = (sums${origin}) * scales;
  f -= select(vec4<f32>(), vec4<f32>(row.constant), (flags & vec4<u32>(${FLAG_UNSMOOTHED}u)) != vec4<u32>());
  ${statements.map(({ softcap }) => softcap).join('\n  ')}
  if (edge) {
    let keys = vec4<i32>(key) + vec4<i32>(0, 1, 2, 3);
    f = select(f, vec4<f32>(${EXCLUDED}), (keys < vec4<i32>(row.low)) | (keys > vec4<i32>(row.high)));
  }
  ${masked.join('\n  ')}${
    config.blocks
      ? `
  if (${isHidden('row.map', 'key')}) { f = vec4<f32>(${EXCLUDED}); }`
      : ''
  }
  let faults = select(vec4<u32>(), flags & vec4<u32>(${POISON}u), f > vec4<f32>(${EXCLUDED_BELOW}));
  *poison |= faults.x | faults.y | faults.z | faults.w;
  return f;
}`;
}

/** The variables of a lane's row; with a block mask the kernel has `map_at` and `first_row`. */
export function rowVariables(r: number, mask: string, blocks: boolean): string {
  return `var m_${r} = ${EXCLUDED}; var l_${r} = 0.0; var poison_${r} = 0u;
  let own_${r} = Row(bitcast<f32>(facts_${r}.x), bitcast<f32>(facts_${r}.z), lower + i32(row_${r}), min(length - 1, upper + i32(row_${r})), ${mask}${blocks ? `, map_at + (first_row + row_${r}) / P.blockRows * P.mapRowStride` : ''});`;
}

const largest = (values: readonly string[]) => values.reduce((a, b) => `max(${a}, ${b})`);

/**
 * Statements of a lane for its row `r` of a step. The kernel has the row's variables, `start`, `facts` (the unit of the
 * first key's facts), `key_scale`, `key_flags`, `edge`, `parity`.
 */
export function softmaxStatements(
  config: SoftmaxConfig,
  tiling: MatrixTiling,
  r: number,
  memory: { readonly scores: MatrixMemory; readonly probabilities: MatrixMemory },
): string {
  const { operations, headroom, pv } = config;
  const { pairs, lanesPerRow, rowsAtOnce, scoreStride, probabilityStride, swapped } = tiling;
  const natural = scoresAreFloat(config);
  const integer = isInteger(config);
  const I = range(pairs);
  const both = [0, 1] as const;
  const x = (i: number, e: number) => `${e === 0 ? 'a' : 'b'}_${i}`;
  const all = I.flatMap((i) => both.map((e) => x(i, e)));
  const pair = (i: number) => (lanesPerRow === 1 ? `${i}u` : `(part * ${pairs}u + ${i}u)`);
  /** Which of a pair's two units is read first; see SCORE_PADDING in matrix-tiling.ts. */
  const second = (e: number) => (swapped ? (e === 0 ? `swap_${r}` : `(1u - swap_${r})`) : `${e}u`);
  const keyOf = (i: number, e: number) => `(${pair(i)} * ${SCORES_AT_ONCE}u + ${second(e)} * 4u)`;
  const reads = I.map((i) =>
    both
      .map(
        (e) => `var ${x(i, e)} = ${memory.scores.name}[row_${r} * ${scoreStride}u + ${pair(i)} * 2u + ${second(e)}];`,
      )
      .join(' '),
  );
  const finished = I.map((i) =>
    both
      .map(
        (e) =>
          `${x(i, e)} = finished_scores(${x(i, e)}, start + i32(${keyOf(i, e)}), facts + ${keyOf(i, e)}, key_scale, key_flags, edge, own_${r}, &poison_${r});`,
      )
      .join(' '),
  ).join('\n        ');
  const topOf = `let w = ${largest(all)}; top = max(max(w.x, w.y), max(w.z, w.w));`;
  const scores = hasPlainSteps(config)
    ? `var factor = own_${r}.scale * key_scale;
      var origin = ${integer ? `${SUM_ORIGIN.value}.0` : '0.0'};
      if (general || factor > ${LARGEST_PLAIN_SCALE}) {
        ${finished}
        factor = 1.0;
        origin = 0.0;
      }
      { ${topOf} top = (top - origin) * factor; }`
    : `${finished}
      { ${topOf} }`;
  // The subtrahend of an empty row is so far above EXCLUDED that the difference is 0 to exp2; in natural units, where
  // masks may hold such values themselves and differences may overflow, it is a comparison instead.
  const shift = natural
    ? ''
    : hasPlainSteps(config)
      ? `let shift = -fma(origin, factor, max(m_${r}, -2.0e38f));`
      : `let shift = -max(m_${r}, -2.0e38f);`;
  const weights = (value: string) => {
    if (natural) {
      return `select(exp2((${value} - vec4<f32>(m_${r})) * ${LOG2E}), vec4<f32>(), ${value} < vec4<f32>(${EXCLUDED_BELOW}))`;
    }
    return hasPlainSteps(config)
      ? `exp2(fma(${value}, vec4<f32>(factor), vec4<f32>(shift)))`
      : `exp2(${value} + vec4<f32>(shift))`;
  };
  const probabilityAt = (i: number, unit?: string) =>
    `${memory.probabilities.name}[row_${r} * ${probabilityStride}u + ${unit === undefined ? pair(i) : `${pair(i)} * 2u + ${unit}`}]`;
  const halves = (p: string) => `vec2<u32>(pack2x16float(${p}.xy), pack2x16float(${p}.zw))`;
  const write = (i: number) => {
    if (pv.componentType === 'f32') {
      return both.map((e) => `${probabilityAt(i, second(e))} = bitcast<vec4<u32>>(p${e});`).join(' ');
    }
    const ordered = swapped ? `select(p01, p01.zwxy, swap_${r} == 1u)` : 'p01';
    return `let p01 = vec4<u32>(${halves('p0')}, ${halves('p1')}); ${probabilityAt(i)} = ${ordered};`;
  };
  return `{
      ${reads.join('\n      ')}
      var top: f32;
      ${scores}
      ${range(Math.log2(lanesPerRow))
        .map((s) => operations.shuffleMax('top', rowsAtOnce << s))
        .join(' ')}
      if (top > m_${r} + ${natural ? (headroom * Math.LN2).toFixed(6) : `${headroom}.0`}) {
        if (m_${r} >= ${EXCLUDED_BELOW}) {
          let alpha = ${expOf(config, `m_${r} - top`)};
          atomicStore(&moved[parity], 1u);
          l_${r} *= alpha;
          row_factor[row_${r}] = alpha;
        }
        m_${r} = top;
      }
      ${shift}
      ${I.map(
        (i) => `{ let p0 = ${weights(x(i, 0))}; let p1 = ${weights(x(i, 1))};
        let q = p0 + p1; l_${r} += (q.x + q.y) + (q.z + q.w);
        ${write(i)} }`,
      ).join('\n      ')}
    }`;
}
