/**
 * Attention with subgroup matrices: INT8 QK where the device has such a product, FP16 (or FP32) PV.
 *
 * Elements of a matrix cannot be reached, so scores go through workgroup memory, where lanes make weights of them
 * (matrix-softmax.ts), and come back as left matrices. How a workgroup divides the two products: matrix-tiling.ts. K and
 * V of a step are copied to workgroup memory once for all subgroups (matrix-copies.ts); a step's are read from storage
 * a whole step before, into registers, so that nothing waits for storage.
 *
 * A step, between barriers: lanes make weights of the scores, and write V of this step and K of the next one to
 * workgroup memory | if a row has outgrown its maximum, the output matrices are stored, scaled and loaded again |
 * matrices multiply: P V of this step, Q K^T of the next one. The last step multiplies its keys once more, for nothing.
 *
 * Result matrices are separate variables: an array of them indexed in a loop is not kept in registers. Offsets and
 * strides of matrices are constants and sums of `local_invocation_index` under + * / %, of which Dawn knows the range:
 * it selects others at run time, after which the driver loads matrices element by element. That subgroups are
 * consecutive threads is asked by value before the family is chosen (families/matrix-dialect.ts).
 */

import { MAP_AT, NOTHING_SEEN, nextTile, nextTileFrom } from './blocks.ts';
import { KEY_TILE, params, rowVectors, SEQUENCE, tables, VALUE_GROUP } from './layout.ts';
import { factsUnit, heldQueries, keyCopies, keyTileUnits, valueCopies } from './matrix-copies.ts';
import { grid, type MatrixMemory, unitsOf, workgroupUnits } from './matrix-operations.ts';
import { type MemoryPass, throughMemory } from './matrix-results.ts';
import { rowVariables, type SoftmaxConfig, SUM_ORIGIN, softmaxFunctions, softmaxStatements } from './matrix-softmax.ts';
import { type MatrixTiling, matrixTiling } from './matrix-tiling.ts';
import { valueFunctions } from './prepare.ts';
import { attentionParams, lseStatement, naturalLse, recordFloats, scoreDeclarations, storeChannels } from './scores.ts';
import { statisticsVectors } from './statistics.ts';
import { EXCLUDED, range } from './storage.ts';

export type MatrixKernelConfig = SoftmaxConfig;

const SCORES: MatrixMemory = { name: 'scores', element: 'vec4<f32>' };
const PROBABILITIES: MatrixMemory = { name: 'probabilities', element: 'vec4<u32>' };
const KEYS: MatrixMemory = { name: 'key_stage', element: 'vec4<u32>' };
const VALUES: MatrixMemory = { name: 'value_stage', element: 'vec4<u32>' };

/** Q K^T of the staged keys, stored as scores. */
function multiplyKeys(config: MatrixKernelConfig, tiling: MatrixTiling, queries: readonly (readonly string[])[]) {
  const { operations, qk, keys } = config;
  const { queryTiles, keyTiles, keySteps, keyUnits, scoreStride } = tiling;
  const [Q, N] = [range(queryTiles), range(keyTiles)];
  const sums = grid('s', queryTiles, keyTiles);
  const at = (rt: number, n: number) => (sums[rt] as readonly string[])[n] as string;
  const start = qk.resultComponentType === 'i32' ? `${SUM_ORIGIN.bits}i` : '0.0';
  const each = (f: (rt: number, n: number) => string) => N.flatMap((n) => Q.map((rt) => f(rt, n))).join(' ');
  const steps = range(keySteps).map((step) => {
    const channel = step * qk.K;
    const loads = N.map((n) => {
      const units = (Math.floor(channel / 32) * keys + n * qk.N) * keyUnits + unitsOf(qk.componentType, channel % 32);
      const offset = `qk_keys * ${keyTiles * qk.N * keyUnits}u + ${units}u`;
      return operations.loadRight(qk, `k_${n}_${step}`, KEYS, offset, keyUnits);
    });
    const products = each((rt, n) =>
      operations.multiplyAccumulate(qk, queries[rt]?.[step] as string, `k_${n}_${step}`, at(rt, n)),
    );
    return `${loads.join(' ')} ${products}`;
  });
  const stores = each((rt, n) =>
    operations.storeResult(
      qk,
      at(rt, n),
      SCORES,
      `(qk_rows * ${queryTiles * qk.M}u + ${rt * qk.M}u) * ${scoreStride}u + qk_keys * ${(keyTiles * qk.N) / 4}u + ${(n * qk.N) / 4}u`,
      scoreStride,
    ),
  );
  return `{
      ${each((rt, n) => `${operations.declareResult(qk, at(rt, n))} ${operations.fill(qk, at(rt, n), start)}`)}
      ${steps.join('\n      ')}
      ${stores}
    }`;
}

/** P V of the staged values. */
function multiplyValues(config: MatrixKernelConfig, tiling: MatrixTiling, outputs: readonly (readonly string[])[]) {
  const { operations, pv, keys, valueDimPadded } = config;
  const { outputRowTiles, outputTiles, valueUnits, probabilityStride } = tiling;
  const O = range(outputTiles);
  return range(keys / pv.K)
    .map((step) => {
      const key = step * pv.K;
      const groupAt = Math.floor(key / VALUE_GROUP) * valueDimPadded * valueUnits;
      const values = O.map((j) =>
        operations.loadRight(
          pv,
          `v_${step}_${j}`,
          VALUES,
          `pv_channels * ${outputTiles * pv.N * valueUnits}u + ${groupAt + j * pv.N * valueUnits + unitsOf(pv.componentType, key % VALUE_GROUP)}u`,
          valueUnits,
        ),
      );
      const rows = range(outputRowTiles).map((rt) => {
        const weights = operations.loadLeft(
          pv,
          `p_${rt}_${step}`,
          PROBABILITIES,
          `(pv_rows * ${outputRowTiles * pv.M}u + ${rt * pv.M}u) * ${probabilityStride}u + ${unitsOf(pv.componentType, key)}u`,
          probabilityStride,
        );
        const products = O.map((j) =>
          operations.multiplyAccumulate(pv, `p_${rt}_${step}`, `v_${step}_${j}`, outputs[rt]?.[j] as string),
        );
        return `{ ${weights} ${products.join(' ')} }`;
      });
      return `{ ${values.join(' ')}
      ${rows.join('\n      ')} }`;
    })
    .join('\n    ');
}

const throughScores = (
  config: MatrixKernelConfig,
  tiling: MatrixTiling,
  outputs: readonly (readonly string[])[],
  pass: MemoryPass,
): string =>
  throughMemory(
    {
      ...{ operations: config.operations, product: config.pv, lanes: config.lanes, memory: SCORES, names: outputs },
      rows: `pv_rows * ${tiling.outputRowTiles * config.pv.M}u`,
      channels: `pv_channels * ${tiling.outputTiles * config.pv.N}u`,
      atOnce: tiling.outputTilesAtOnce,
    },
    pass,
  );

/** The vectors of four elements in a unit of output, and a unit made of them. */
const unitOf = ({ pv }: MatrixKernelConfig) =>
  pv.resultComponentType === 'f32'
    ? { vectors: ['scores[place]'], from: (of: readonly string[]) => of[0] as string }
    : {
        vectors: ['xy', 'zw'].map((two) => {
          const words = `bitcast<vec4<u32>>(scores[place]).${two}`;
          return `vec4<f32>(unpack2x16float(${words}.x), unpack2x16float(${words}.y))`;
        }),
        from: (of: readonly string[]) =>
          `bitcast<vec4<f32>>(vec4<u32>(${of.flatMap((v) => [`pack2x16float(${v}.xy)`, `pack2x16float(${v}.zw)`]).join(', ')}))`,
      };

const rescale = (config: MatrixKernelConfig, tiling: MatrixTiling, outputs: readonly (readonly string[])[]) => {
  const { vectors, from } = unitOf(config);
  const scaled = vectors.map((vector, i) => `let y${i} = ${vector} * row_factor[row];`).join(' ');
  return throughScores(config, tiling, outputs, {
    each: `${scaled} scores[place] = ${from(vectors.map((_, i) => `y${i}`))};`,
    loadAgain: true,
  });
};

/** A row's sum over its lanes: its factor for the output, and its logsumexp or its part of a record. */
function finishRow(config: MatrixKernelConfig, { lanesPerRow, rowsAtOnce }: MatrixTiling, r: number): string {
  const { operations, valueDimPadded, softcap, result, returnLse, sinks } = config;
  const joins = sinks && result === 'final';
  const sink = `bitcast<f32>(facts_${r}.w)`;
  const [m, l, row] = [`m_${r}`, `l_${r}`, `row_${r}`];
  const sums = range(Math.log2(lanesPerRow)).map((s) => operations.shuffleAdd(l, rowsAtOnce << s));
  const maximum = softcap ? m : `${m} + own_${r}.constant`;
  const record = `let record = ${recordAt(config, `(first_row + ${row})`)};
      records[record + ${valueDimPadded}u] = select(${maximum}, ${EXCLUDED}, ${l} == 0.0);
      records[record + ${valueDimPadded + 1}u] = ${l};
      ${sinks ? `records[record + ${valueDimPadded + 3}u] = ${sink};` : ''}`;
  const written =
    result === 'partial'
      ? record
      : returnLse
        ? lseStatement(config, `(first_row + ${row})`, m, l, `own_${r}.constant`, sink)
        : '';
  return `
  if (poison_${r} != 0u || (${l} > 0.0 && facts_${r}.y != 0u)) { ${l} = -1.0e30f; }
  ${sums.join(' ')}
  if (part == 0u) {
    ${joins ? `let keep = join_sink(${sink}, ${naturalLse(config, m, l, `own_${r}.constant`)}).x;` : ''}
    // The sign carries NaN: a sum is positive, and 0 for a row that attends to nothing.
    row_factor[${row}] = select(select(1.0 / max(${l}, 1.0e-37f)${joins ? ' * keep' : ''}, 0.0, ${l} == 0.0), -1.0, ${l} < 0.0);
    ${written === '' ? '' : `if (${row} < count) { ${written} }`}
  }`;
}

const rowElement = (row: string) =>
  `(sequence_field(sequence, ${SEQUENCE.output}u) + head * P.outputHeadStride + ${row} * P.outputTokenStride)`;

const recordAt = ({ valueDim, valueDimPadded }: MatrixKernelConfig, row: string) =>
  `(${rowElement(row)} / ${valueDim}u * P.splits + P.splitIndex + group.z) * ${recordFloats(valueDimPadded)}u - P.recordBase`;

/** Where V's scales, and its means, lie in the values' memory when all products are done: vectors of four channels. */
const scaleAt = (vector: string) => `bitcast<vec4<f32>>(${VALUES.name}[${vector}])`;

/** V's scales and means, into memory that no product needs any more. */
function loadValueScales({ headDimPadded, valueDimPadded, values }: MatrixKernelConfig, threads: number): string {
  if (!values.scaled) return '';
  const record = `((head / P.groupSize * P.sequences + sequence) * P.chunks) * ${statisticsVectors(headDimPadded, valueDimPadded)}u - P.partialBase`;
  const mean = `${VALUES.name}[i + ${valueDimPadded / 4}u] = bitcast<vec4<u32>>(value_mean(value_record + ${(headDimPadded + valueDimPadded) / 4}u + i, P.chunks) * mean_factor(value_record, P.chunks));`;
  return `let value_record = ${record};
  for (var i = t; i < ${valueDimPadded / 4}u; i += ${threads}u) {
    ${VALUES.name}[i] = bitcast<vec4<u32>>(value_scale(value_record + ${headDimPadded / 4}u + i, P.chunks, 1));
    ${values.smoothed ? mean : ''}
  }`;
}

/** The output matrices to the output, or to the records of partial results. */
function storeOutput(config: MatrixKernelConfig, tiling: MatrixTiling, outputs: readonly (readonly string[])[]) {
  const { values, valueDimPadded, result } = config;
  const store = (vector: string, i: number) => {
    const c = i === 0 ? 'channel' : `(channel + ${4 * i}u)`;
    const scaled = values.scaled ? ` * ${scaleAt(`${c} / 4u`)}` : '';
    const smoothed = values.smoothed
      ? ` + select(vec4<f32>(), ${scaleAt(`${c} / 4u + ${valueDimPadded / 4}u`)}, factor > 0.0)`
      : '';
    const y = `${vector} * factor${scaled}${smoothed}`;
    return result === 'final'
      ? storeChannels(config, 'at', c, y, 'factor < 0.0')
      : `{ let y = ${y}; let to = ${recordAt(config, '(first_row + row)')} + ${c};
          records[to] = y.x; records[to + 1u] = y.y; records[to + 2u] = y.z; records[to + 3u] = y.w; }`;
  };
  const at = result === 'final' ? `let at = ${rowElement('(first_row + row)')} - P.outputBase;` : '';
  return throughScores(config, tiling, outputs, {
    each: `if (row < count) { let factor = row_factor[row]; ${at} ${unitOf(config).vectors.map(store).join(' ')} }`,
    loadAgain: false,
  });
}

/** What lies between the sequence's first and last key that any row of the workgroup sees. */
const KEY_RANGE = (keys: number) => `
  let length = i32(sequence_field(sequence, ${SEQUENCE.keyLength}u));
  let lower = i32(sequence_field(sequence, ${SEQUENCE.lower}u)) + i32(first_row);
  let upper = i32(sequence_field(sequence, ${SEQUENCE.upper}u)) + i32(first_row);
  let begin = i32(P.keyStart + group.z * P.keySpan);
  let key_begin = max(begin, max(0, lower)) / ${keys} * ${keys};
  let key_end = min(min(length, begin + i32(P.keySpan)), upper + i32(count));`;

export function matrixAttentionKernel(config: MatrixKernelConfig): string {
  const { operations, qk, pv, lanes, rows, keys, keysFirst, headDimPadded, valueDimPadded, values, mask } = config;
  const tiling = matrixTiling(config, config, lanes, headDimPadded, valueDimPadded);
  if (tiling === undefined) throw new Error('the products do not divide the tiles of this variant');
  const { threads, rowsEach, rowsAtOnce, rowsInTurn, queryTiles, keySteps, outputRowTiles, outputTiles } = tiling;
  const R = range(rowsInTurn);
  const queries = grid('q', queryTiles, keySteps);
  const outputs = grid('o', outputRowTiles, outputTiles);
  const keyCopy = keyCopies(config, tiling, KEYS);
  const valueCopy = valueCopies(config, tiling, VALUES);
  const factsAt = (key: string) =>
    `(key_tile + ${key} / ${KEY_TILE}u) * ${keyTileUnits(headDimPadded)}u + ${factsUnit(headDimPadded)}u`;
  const maskRow = (r: number) =>
    mask === undefined
      ? '0u'
      : `sequence_field(sequence, ${SEQUENCE.mask}u) - P.maskBase + head * P.maskHeadStride + (first_row + row_${r}) * P.maskQueryStride`;
  const held = heldQueries(config, tiling, SCORES, queries);
  const scored = multiplyKeys(config, tiling, queries);
  const weighted = multiplyValues(config, tiling, outputs);
  const softmax = R.map((r) =>
    softmaxStatements(config, tiling, r, { scores: SCORES, probabilities: PROBABILITIES }),
  ).join('\n    ');

  // The steps of the loop over keys: `ahead` is the tile that is loaded, one before it is needed. With a block mask only tiles of
  // which a part is computed are steps.
  const steps = config.blocks
    ? {
        first: 'first_tile.start',
        declare: `let first_tile = ${nextTileFrom(NOTHING_SEEN, 'key_begin')};`,
        second: `var is_cut = first_tile.cut != 0u;
    var coming = ${nextTileFrom('first_tile', `first_tile.start + ${keys}`)};
    ahead = min(u32(coming.start), last);`,
        // Looked up early: the map comes while scores become weights.
        look: `let after = ${nextTileFrom('coming', `coming.start + ${keys}`)};`,
        general: ' || is_cut',
        third: `ahead = min(u32(after.start), last);`,
        increment: '',
        advance: 'start = coming.start; is_cut = coming.cut != 0u; coming = after;',
      }
    : {
        first: 'key_begin',
        declare: '',
        second: `ahead = min(ahead + ${keys}u, last);`,
        look: '',
        general: '',
        third: `ahead = min(ahead + ${keys}u, last);`,
        increment: `start += ${keys}`,
        advance: '',
      };

  const main = `
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let subgroup = t / ${lanes}u;
  let lane = t % ${lanes}u;
  let part = lane / ${rowsAtOnce}u;
  let qk_rows = subgroup / ${tiling.keyGroups}u;
  let qk_keys = subgroup % ${tiling.keyGroups}u;
  let pv_rows = subgroup / ${tiling.channelGroups}u;
  let pv_channels = subgroup % ${tiling.channelGroups}u;
  let tile = P.tileStart + group.x;
  let head = P.headStart + group.y;
  let sequence = tile_field(tile, 0u);
  let first_row = tile_field(tile, 1u);
  let count = tile_field(tile, 2u);
  let query_row = head * P.queryRowsPerHead + sequence_field(sequence, ${SEQUENCE.queryRow}u) + first_row;
  let kv_row = head / P.groupSize * P.keyRowsPerHead + sequence_field(sequence, ${SEQUENCE.keyRow}u);
  let key_tile = kv_row / ${KEY_TILE}u - P.keyRowBase / ${keyTileUnits(headDimPadded)}u;
${KEY_RANGE(keys)}${config.blocks ? `\n  ${MAP_AT}` : ''}
  ${R.map(
    (r) => `let row_${r} = subgroup * ${rowsEach}u + lane % ${rowsAtOnce}u + ${r * lanes}u;
  ${tiling.swapped ? `let swap_${r} = row_${r} / 4u % 2u;` : ''}
  let facts_${r} = query_rows[(query_row + row_${r}) * ${rowVectors(headDimPadded)}u + ${headDimPadded / 16}u - P.queryRowBase];
  ${rowVariables(r, maskRow(r), config.blocks)}
  row_factor[row_${r}] = 1.0;`,
  ).join('\n  ')}
  ${outputs.flatMap((own) => own.map((name) => operations.declareResult(pv, name))).join(' ')}
  ${steps.declare}
  if (${steps.first} < key_end) {
    let last = u32((key_end - 1) / ${keys} * ${keys});
    ${held}
    ${keyCopy.declare} ${valueCopy.declare}
    var ahead = u32(${steps.first});
    ${keyCopy.load('ahead')}
    ${keyCopy.store}
    // Facts of the step's first key; the tile's first key has the scale that all may share, and the flags of all.
    var facts = ${factsAt('ahead')} + ahead % ${KEY_TILE}u;
    var key_scale = bitcast<f32>(key_tiles[${factsAt('ahead')}].x);
    var key_flags = key_tiles[${factsAt('ahead')}].z;
    ${valueCopy.load('ahead')}
    ${steps.second}
    ${keyCopy.load('ahead')}
    workgroupBarrier();
    ${scored}
    var parity = 0u;
    for (var start = ${steps.first}; start < key_end; ${steps.increment}) {
      ${steps.look}
      workgroupBarrier();
      if (t == 0u) { atomicStore(&moved[1u - parity], 0u); }
      let edge = start + ${keys} > length || start < lower + ${rows - 1} || start + ${keys - 1} > upper;
      let general = edge || key_flags != 0u${steps.general};
      ${softmax}
      ${keyCopy.store}
      ${valueCopy.store}
      facts = ${factsAt('ahead')} + ahead % ${KEY_TILE}u;
      key_scale = bitcast<f32>(key_tiles[${factsAt('ahead')}].x);
      key_flags = key_tiles[${factsAt('ahead')}].z;
      ${valueCopy.load('ahead')}
      ${steps.third}
      ${keyCopy.load('ahead')}
      if (workgroupUniformLoad(&moved[parity]) != 0u) {
      ${rescale(config, tiling, outputs)}
      ${R.map((r) => `row_factor[row_${r}] = 1.0;`).join(' ')}
      }
      ${keysFirst ? `${scored}\n    ${weighted}` : `${weighted}\n    ${scored}`}
      parity = 1u - parity;
      ${steps.advance}
    }
  }
  workgroupBarrier();
${R.map((r) => finishRow(config, tiling, r)).join('')}
  ${loadValueScales(config, threads)}
  workgroupBarrier();
  ${storeOutput(config, tiling, outputs)}
}`;

  const functions = softmaxFunctions(config);
  return `
enable subgroups;
${[qk, pv].some((product) => [product.componentType, product.resultComponentType].includes('f16')) && operations.enable !== '' ? 'enable f16;' : ''}
${operations.enable}
${params(0, attentionParams(config))}
${tables(1)}
@group(0) @binding(2) var<storage, read> query_rows: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> key_tiles: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> value_tiles: array<vec4<u32>>;
${scoreDeclarations(config)}
${valueFunctions(statisticsVectors(headDimPadded, valueDimPadded), values)}
${workgroupUnits(SCORES, tiling.scores)}
${workgroupUnits(PROBABILITIES, tiling.probabilities)}
${workgroupUnits(KEYS, tiling.keyStage)}
${workgroupUnits(VALUES, tiling.valueStage)}
var<workgroup> row_factor: array<f32, ${rows}>;
var<workgroup> moved: array<atomic<u32>, 4>;
${operations.declarations(threads)}
${functions}
${config.blocks ? nextTile(keys) : ''}
${main}`;
}
