/**
 * Attention with subgroup matrices: INT8 QK where the device has such a product, FP16 (or FP32) PV.
 *
 * A workgroup owns `subgroups * rowTiles * M` queries; each subgroup owns whole rows and keeps their output in result
 * matrices. Elements of a matrix cannot be reached, so scores go through workgroup memory, where the lanes of a
 * subgroup (lanes / M of them to a row) scale, mask and exponentiate them, and P comes back as left matrices.
 *
 * A result matrix cannot be scaled by row either. The running maximum therefore stays where it is until a row outgrows
 * it by `2^headroom`; only then are the output matrices stored, rescaled and loaded again. P then reaches 2^headroom,
 * which float16 holds.
 *
 * Result matrices are separate variables: an array of them indexed in a loop is not kept in registers. K and V lie in
 * storage so that each matrix of theirs is one run of bytes (KEY_TILE in layout.ts): gathering one out of rows takes a
 * memory transaction for each row. Several matrices are loaded before the first of them is used, since each load waits
 * for memory.
 *
 * Matrices in workgroup memory: once offset and stride are constants, drivers read them 16 bytes at a time, and WGSL
 * does not see to it that an array of scalars lies at a multiple of 16 bytes (on an H200 one came back shifted by 8
 * bytes, behind an array of two words). Every array in workgroup memory is therefore a multiple of 16 bytes long, as is
 * every offset and stride (Vulkan: VUID-RuntimeSpirv-OpCooperativeMatrixLoadKHR-08986); a test reads it off all
 * generated code, and the probe of families/matrix-dialect.ts tries it on the device.
 */
import type { MatrixConfig } from '../capabilities.ts';
import {
  FLAG_OWN_SCALES,
  FLAG_UNSMOOTHED,
  KEY_TILE,
  POISON,
  params,
  rowVectors,
  SEQUENCE,
  tables,
  VALUE_GROUP,
} from './layout.ts';
import { type MatrixMemory, type MatrixOperations, workgroupArray } from './matrix-operations.ts';
import { stageTiles } from './matrix-staging.ts';
import { valueFunctions } from './prepare.ts';
import {
  ATTENTION_PARAMS,
  expOf,
  lseStatement,
  naturalLse,
  recordFloats,
  type ScoreConfig,
  scoreDeclarations,
  scoreStatements,
  scoresAreFloat,
  storeChannels,
} from './scores.ts';
import { statisticsVectors } from './statistics.ts';
import { EXCLUDED, EXCLUDED_BELOW, range } from './storage.ts';

/** Sizes and strategies of a matrix kernel. */
export interface MatrixShape {
  readonly subgroups: number;
  /** Result tiles of M rows that each subgroup owns. */
  readonly rowTiles: number;
  /** Keys of a step: 32 or 64. */
  readonly keys: number;
  /** Load K of the next step, and some of V, before they are needed: registers for time. */
  readonly ahead: boolean;
  /** Powers of two by which a row may outgrow its maximum before the output is rescaled; 0: always exact maximum. */
  readonly headroom: number;
}

export interface MatrixKernelConfig extends ScoreConfig, MatrixShape {
  readonly operations: MatrixOperations;
  /** Q K^T: components i8 (result i32), or f16 or f32 (result f32). */
  readonly qk: MatrixConfig;
  /** P V: components f16 or f32. Same M as `qk`. */
  readonly pv: MatrixConfig;
  /** Lanes of a subgroup. */
  readonly lanes: number;
  readonly subgroupId: boolean;
}

const bytesOf = (component: string) => (component === 'i8' ? 1 : component === 'f16' ? 2 : 4);

/** Matrices of K or V that are loaded before the first of them is used. */
const BATCH = 8;

/**
 * Rows in workgroup memory are this many bytes longer than their contents: neighbouring rows then start in other banks.
 */
const ROW_PADDING = 16;

/** Quantized rows are converted in workgroup memory where the product takes no INT8, and V where it takes no FP16. */
const stages = ({ qk, pv }: Pick<MatrixKernelConfig, 'qk' | 'pv'>) => ({
  query: qk.componentType !== 'i8',
  keys: qk.componentType !== 'i8',
  values: pv.componentType !== 'f16',
});

/** Bytes of workgroup memory that the kernel takes. */
export function matrixWorkgroupBytes(
  config: MatrixShape & Pick<MatrixKernelConfig, 'qk' | 'pv'>,
  headDimPadded: number,
  valueDimPadded: number,
): number {
  const { subgroups, rowTiles, keys, qk, pv } = config;
  const rows = subgroups * rowTiles * qk.M;
  const staged = stages(config);
  const row = headDimPadded * bytesOf(qk.componentType) + ROW_PADDING;
  return (
    (staged.query ? rows * row : 0) +
    (staged.keys ? keys * row : 0) +
    (staged.values ? keys * valueDimPadded * bytesOf(pv.componentType) : 0) +
    rows * (keys * 4 + ROW_PADDING) +
    rows * (keys * bytesOf(pv.componentType) + ROW_PADDING) +
    subgroups * pv.M * pv.N * bytesOf(pv.resultComponentType) +
    rows * 4 +
    2 * valueDimPadded * 4 +
    64
  );
}

/** Where each matrix is, for matrix operations and for single elements. */
function placesOf(config: MatrixKernelConfig, scoreStride: number, probabilityStride: number) {
  const { qk, pv, rowTiles, headDimPadded, valueDimPadded } = config;
  const staged = stages(config);
  const rowWords = rowVectors(headDimPadded) * 4;
  const scoreType = qk.resultComponentType;
  const component = (name: string) => name as MatrixMemory['component'];
  /** An element of one of several blocks that follow one another in an array. */
  const inBlock = (name: string, block: string, length: number, index: string) =>
    `${name}[${block} * ${length}u + ${index}]`;
  const ownRows = rowTiles * qk.M;
  const keyTile = (subtile: number | string) => `(key_tile + ${subtile}${typeof subtile === 'number' ? 'u' : ''})`;
  const keyWord = (subtile: number | string, word: string) =>
    inBlock('key_tiles', keyTile(subtile), KEY_TILE * rowWords, word);
  const scoreAt = (index: string) => inBlock('scores', 'subgroup', ownRows * scoreStride, index);
  const probabilityAt = (index: string) => inBlock('probabilities', 'subgroup', ownRows * probabilityStride, index);
  const outputAt = (index: string) => inBlock('output_tile', 'subgroup', pv.M * pv.N, index);
  const base = (block: string, length: number) => `${block} * ${length}u`;
  const memory = {
    query: { name: staged.query ? 'tile_q' : 'query_rows', component: component(qk.componentType) },
    keys: (subtile: number): MatrixMemory =>
      staged.keys
        ? { name: 'tile_k', component: component(qk.componentType) }
        : {
            name: 'key_tiles',
            component: component(qk.componentType),
            base: base(keyTile(subtile), KEY_TILE * rowWords * 4),
          },
    values: (subtile: number): MatrixMemory =>
      staged.values
        ? { name: 'tile_v', component: component(pv.componentType) }
        : {
            name: 'value_tiles',
            component: component(pv.componentType),
            base: base(keyTile(subtile), KEY_TILE * valueDimPadded),
          },
    scores: { name: 'scores', component: component(scoreType), base: base('subgroup', ownRows * scoreStride) },
    probabilities: {
      name: 'probabilities',
      component: component(pv.componentType),
      base: base('subgroup', ownRows * probabilityStride),
    },
    output: {
      name: 'output_tile',
      component: component(pv.resultComponentType),
      base: base('subgroup', pv.M * pv.N),
    },
  } as const;
  return { inBlock, keyTile, keyWord, scoreAt, probabilityAt, outputAt, memory };
}

/** The word of a tile where the facts of its keys start. */
const factsOffset = (headDimPadded: number) => (KEY_TILE * headDimPadded) / 4;

/** Statements for each halving of a power of two. */
const halvings = (n: number) => range(Math.log2(n));

/** Scores of one row tile to probabilities, and the rows' maxima and sums. */
function softmaxStatements(
  config: MatrixKernelConfig,
  { keyWord, scoreAt, probabilityAt }: ReturnType<typeof placesOf>,
  rt: number,
  rows: {
    /** The lane's row within its subgroup, and within the workgroup. */
    readonly own: string;
    readonly group: string;
    readonly scoreStride: number;
    readonly probabilityStride: number;
  },
): string {
  const { qk, pv, lanes, keys, sharedScale, headroom, headDimPadded } = config;
  const lanesPerRow = lanes / qk.M;
  const C = range(keys / lanesPerRow);
  const factsWords = factsOffset(headDimPadded);
  // From row 8 on, neighbouring columns are swapped: otherwise two rows would share each bank.
  const column = (c: number) => `(${c * lanesPerRow}u + ${c % 2 === 0 ? 'lane_even' : 'lane_odd'})`;
  const natural = scoresAreFloat(config);
  const statements = C.map((c) =>
    scoreStatements(
      config,
      `f_${c}`,
      { constant: `constant_${rt}`, mask: `mask_${rt}`, poison: `poison_${rt}` },
      `(start + i32${column(c)})`,
    ),
  );
  const factAt = (c: number, word: number) =>
    keyWord(`${column(c)} / ${KEY_TILE}u`, `${factsWords + word}u + ${column(c)} % ${KEY_TILE}u * 4u`);
  const ownScale = (c: number) =>
    `f32(${scoreAt(`at + ${column(c)}`)}) * (scale_${rt} * bitcast<f32>(${factAt(c, 0)}))`;
  const scaled = (c: number) => (sharedScale ? `f32(${scoreAt(`at + ${column(c)}`)}) * step_scale` : ownScale(c));
  const flagsAt = (c: number) => `u32(${factAt(c, 1)})`;
  const masked = statements.map(({ mask: masking }, c) =>
    masking === '' ? '' : `if (f_${c} > ${EXCLUDED_BELOW}) ${masking.startsWith('{') ? masking : `{ ${masking} }`}`,
  );
  // The subtrahend of an empty row is so far above EXCLUDED that the difference is 0 to exp2; in natural units, where
  // masks may hold such values themselves and differences may overflow, it is a comparison instead.
  const probability = (c: number) =>
    natural
      ? `select(${expOf(config, `f_${c} - updated`)}, 0.0, f_${c} < ${EXCLUDED_BELOW})`
      : expOf(config, `f_${c} - subtrahend`);
  return `
    {
      let at = ${rows.own} * ${rows.scoreStride}u;
      ${sharedScale ? `let step_scale = scale_${rt} * key_scale;` : ''}
      ${C.map((c) => `var f_${c} = ${scaled(c)};`).join('\n      ')}
      ${sharedScale ? `if ((key_flags & ${FLAG_OWN_SCALES}u) != 0u) { ${C.map((c) => `f_${c} = ${ownScale(c)};`).join('\n        ')} }` : ''}
      if ((key_flags & ${FLAG_UNSMOOTHED}u) != 0u) {
        ${C.map((c) => `f_${c} -= select(0.0, constant_${rt}, (${flagsAt(c)} & ${FLAG_UNSMOOTHED}u) != 0u);`).join('\n        ')}
      }
      ${statements.map(({ softcap }) => softcap).join('\n      ')}
      if (edge) {
        ${C.map((c) => `{ let key = start + i32${column(c)}; if (key < low_${rt} || key > high_${rt}) { f_${c} = ${EXCLUDED}; } }`).join('\n        ')}
      }
      ${masked.join('\n      ')}
      if ((key_flags & ${POISON}u) != 0u) {
        ${C.map((c) => `if (f_${c} > ${EXCLUDED_BELOW}) { poison_${rt} |= ${flagsAt(c)} & ${POISON}u; }`).join('\n        ')}
      }
      var largest = ${C.slice(1).reduce((acc, c) => `max(${acc}, f_${c})`, 'f_0')};
      ${halvings(lanesPerRow)
        .map((s) => `largest = max(largest, subgroupShuffleXor(largest, ${1 << s}u));`)
        .join(' ')}
      let held = m_${rt} >= ${EXCLUDED_BELOW};
      let raised = largest >= ${EXCLUDED_BELOW} && (!held || largest > m_${rt} + ${natural ? (headroom * Math.LN2).toFixed(6) : `${headroom}.0`});
      let updated = select(m_${rt}, largest, raised);
      if (raised && held) {
        let alpha = ${expOf(config, `m_${rt} - updated`)};
        atomicStore(&moved[parity], 1u);
        l_${rt} *= alpha;
        if (lane_column == 0u) { row_factor[${rows.group}] = alpha; }
      }
      m_${rt} = updated;
      ${natural ? '' : 'let subtrahend = max(updated, -2.0e38f);'}
      let to = ${rows.own} * ${rows.probabilityStride}u;
      ${C.map(
        (c) => `{ let p = ${probability(c)}; l_${rt} += p;
        ${probabilityAt(`to + ${column(c)}`)} = ${pv.componentType}(p); }`,
      ).join('\n      ')}
    }`;
}

/** What becomes of a row's sum, and of the output matrices, at the end. */
function finishStatements(config: MatrixKernelConfig, { outputAt, memory }: ReturnType<typeof placesOf>) {
  const { operations, pv, lanes, valueDim, valueDimPadded, result, returnLse, values, sinks } = config;
  const joins = sinks && result === 'final';
  const floats = recordFloats(valueDimPadded);
  const finishRow = (rt: number, row: string) => {
    const maximum = config.softcap ? `m_${rt}` : `m_${rt} + constant_${rt}`;
    return `
  if (poison_${rt} != 0u || (l_${rt} > 0.0 && flags_${rt} != 0u)) { l_${rt} = -1.0e30f; }
  ${halvings(lanes / config.qk.M)
    .map((s) => `l_${rt} += subgroupShuffleXor(l_${rt}, ${1 << s}u);`)
    .join(' ')}
  if (lane_column == 0u) {
    // The sign carries NaN: a sum is positive, and 0 for a row that attends to nothing.
    ${joins ? `let keep = join_sink(sink_${rt}, ${naturalLse(config, `m_${rt}`, `l_${rt}`, `constant_${rt}`)}).x;\n    ` : ''}row_factor[${row}] = select(select(1.0 / max(l_${rt}, 1.0e-37f)${joins ? ' * keep' : ''}, 0.0, l_${rt} == 0.0), -1.0, l_${rt} < 0.0);
    if (${row} < count) {
      ${result === 'final' && returnLse ? lseStatement(config, `(first_row + ${row})`, `m_${rt}`, `l_${rt}`, `constant_${rt}`, `sink_${rt}`) : ''}
      ${
        result === 'partial'
          ? `let record = ${recordAt(`(first_row + ${row})`)};
      records[record + ${valueDimPadded}u] = select(${maximum}, ${EXCLUDED}, l_${rt} == 0.0);
      records[record + ${valueDimPadded + 1}u] = l_${rt};${sinks ? ` records[record + ${valueDimPadded + 3}u] = sink_${rt};` : ''}`
          : ''
      }
    }
  }`;
  };
  const rowElement = (r: string) =>
    `(sequence_field(sequence, ${SEQUENCE.output}u) + head * P.outputHeadStride + ${r} * P.outputTokenStride)`;
  const recordAt = (r: string) =>
    `(${rowElement(r)} / ${valueDim}u * P.splits + P.splitIndex + group.z) * ${floats}u - P.recordBase`;
  /** Stores an output tile; `first` is its first row within the workgroup. */
  const storeTile = (rt: number, j: number, first: string) => `
  ${operations.storeResult(pv, `o_${rt}_${j}`, memory.output, '0u', `${pv.N}u`)}
  workgroupBarrier();
  for (var i = lane; i < ${(pv.M * pv.N) / 4}u; i += ${lanes}u) {
    let r = ${first} + i / ${pv.N / 4}u;
    let c = ${j * pv.N}u + i % ${pv.N / 4}u * 4u;
    let factor = row_factor[r];
    if (r < count) {
      let y = vec4<f32>(${range(4)
        .map((e) => `f32(${outputAt(`4u * i + ${e}u`)})`)
        .join(
          ', ',
        )}) * factor${values.scaled ? ' * value_scales[c / 4u]' : ''}${values.smoothed ? ' + select(vec4<f32>(), value_means[c / 4u], factor > 0.0)' : ''};
      ${
        result === 'final'
          ? `let at = ${rowElement('(first_row + r)')} - P.outputBase;
      ${storeChannels(config, 'at', 'c', 'y', 'factor < 0.0')}`
          : `let to = ${recordAt('(first_row + r)')} + c;
      records[to] = y.x; records[to + 1u] = y.y; records[to + 2u] = y.z; records[to + 3u] = y.w;`
      }
    }
  }
  workgroupBarrier();`;
  return { finishRow, storeTile };
}

/** The loads of Q that last, and the products of one step. */
function productStatements(
  config: MatrixKernelConfig,
  memory: ReturnType<typeof placesOf>['memory'],
  qkStride: number,
  probabilityStride: number,
) {
  const { operations, qk, pv, rowTiles, keys, headDimPadded, valueDimPadded } = config;
  const staged = stages(config);
  const int8 = qk.componentType === 'i8';
  const rowWords = rowVectors(headDimPadded) * 4;
  const T = range(rowTiles);
  const S = range(keys / qk.N);
  const O = range(valueDimPadded / pv.N);
  const loadQuery = (rt: number, step: number) =>
    operations.loadLeft(
      qk,
      `q_${rt}_${step}`,
      memory.query,
      staged.query
        ? `${tileRowOf(config, rt)} * ${qkStride}u + ${step * qk.K}u`
        : `(query_row + ${tileRowOf(config, rt)}) * ${rowWords * 4}u - P.queryRowBase * 16u + ${step * qk.K}u`,
      `${staged.query ? qkStride : rowWords * 4}u`,
    );
  // In tiles, 32 channels of each key follow one another.
  const keyStride = int8 ? 32 : qkStride;
  const keyOffset = (n: number, step: number) => {
    const [key, channel] = [n * qk.N, step * qk.K];
    if (!int8) return key * keyStride + channel;
    return (Math.floor(channel / 32) * KEY_TILE + (key % KEY_TILE)) * keyStride + (channel % 32);
  };
  const valueOffset = (step: number, j: number) => {
    const key = step * pv.K;
    const group = Math.floor((staged.values ? key : key % KEY_TILE) / VALUE_GROUP);
    return (group * valueDimPadded + j * pv.N) * VALUE_GROUP + (key % VALUE_GROUP);
  };
  const subtileOf = (key: number) => Math.floor(key / KEY_TILE);

  const steps = range(headDimPadded / qk.K);
  // Operands that matrices are loaded from once are held in registers; staged ones would be too many of them.
  const heldQueries = staged.query ? [] : T.map((rt) => steps.map((step) => loadQuery(rt, step)));
  const loadKey = (step: number, n: number) =>
    operations.loadRight(
      qk,
      `k_${step}_${n}`,
      memory.keys(subtileOf(n * qk.N)),
      `${keyOffset(n, step)}u`,
      `${keyStride}u`,
      true,
    );
  const loadValue = (step: number, j: number) =>
    operations.loadRight(
      pv,
      `v_${step}_${j}`,
      memory.values(subtileOf(step * pv.K)),
      `${valueOffset(step, j)}u`,
      `${VALUE_GROUP}u`,
      true,
    );
  const loadProbability = (rt: number, step: number) =>
    operations.loadLeft(
      pv,
      `p_${rt}_${step}`,
      memory.probabilities,
      `${rt * qk.M * probabilityStride + step * pv.K}u`,
      `${probabilityStride}u`,
    );
  const keyProducts = steps.flatMap((step) => S.map((n) => ({ step, n, right: loadKey(step, n) })));
  const valueProducts = range(keys / pv.K).flatMap((step) => O.map((j) => ({ step, j, right: loadValue(step, j) })));

  const multiplyKey = ({ step, n, right }: (typeof keyProducts)[number]) =>
    T.map((rt) =>
      operations.multiplyAccumulate(qk, (heldQueries[rt]?.[step] ?? loadQuery(rt, step))[1], right[1], `s_${rt}_${n}`),
    ).join(' ');
  const multiplyValue = ({ step, j, right }: (typeof valueProducts)[number]) =>
    T.map((rt) => operations.multiplyAccumulate(pv, loadProbability(rt, step)[1], right[1], `o_${rt}_${j}`)).join(' ');
  const loads = (products: readonly { readonly right: readonly [string, unknown] }[]) =>
    products.map(({ right: [load] }) => load).join(' ');
  const inBatches = <P extends { readonly right: readonly [string, unknown] }>(
    products: readonly P[],
    multiply: (product: P) => string,
    loaded = 0,
  ) =>
    range(Math.ceil(products.length / BATCH))
      .map((batch) => {
        const part = products.slice(batch * BATCH, (batch + 1) * BATCH);
        return `${batch < loaded ? '' : loads(part)}\n    ${part.map(multiply).join(' ')}`;
      })
      .join('\n    ');

  const ahead = config.ahead && int8 && !staged.values;
  const queries = staged.query ? T.flatMap((rt) => steps.map((step) => loadQuery(rt, step)[0])).join(' ') : '';
  const probabilities = T.flatMap((rt) => range(keys / pv.K).map((step) => loadProbability(rt, step)[0])).join(' ');
  return {
    heldQueries,
    /** K of the first step, where the loop finds it loaded. */
    firstKeys: ahead ? loads(keyProducts).replaceAll('let ', 'var ') : '',
    multiplyKeys: `${queries} ${ahead ? keyProducts.map(multiplyKey).join(' ') : inBatches(keyProducts, multiplyKey)}`,
    /** Loads that are on their way during the softmax. */
    nextKeys: ahead ? loads(keyProducts).replaceAll('let ', '') : '',
    firstValues: ahead ? loads(valueProducts.slice(0, BATCH)) : '',
    multiplyValues: `${probabilities}\n    ${inBatches(valueProducts, multiplyValue, ahead ? 1 : 0)}`,
  };
}

/** The first row of a subgroup's row tile within the workgroup. */
const tileRowOf = ({ rowTiles, qk }: Pick<MatrixKernelConfig, 'rowTiles' | 'qk'>, rt: number) =>
  `(subgroup * ${rowTiles * qk.M}u + ${rt * qk.M}u)`;

function workgroupMemory(
  config: MatrixKernelConfig,
  qkStride: number,
  scoreStride: number,
  probabilityStride: number,
): string {
  const { qk, pv, subgroups, rowTiles, keys, valueDimPadded, values } = config;
  const staged = stages(config);
  const rows = subgroups * rowTiles * qk.M;
  const arrayOf = (name: string, type: string, elements: number) => workgroupArray(name, type, elements, bytesOf(type));
  return `${staged.query ? arrayOf('tile_q', qk.componentType, rows * qkStride) : ''}
${staged.keys ? arrayOf('tile_k', qk.componentType, keys * qkStride) : ''}
${staged.values ? arrayOf('tile_v', pv.componentType, keys * valueDimPadded) : ''}
${arrayOf('scores', qk.resultComponentType, rows * scoreStride)}
${arrayOf('probabilities', pv.componentType, rows * probabilityStride)}
${arrayOf('output_tile', pv.resultComponentType, subgroups * pv.M * pv.N)}
${arrayOf('row_factor', 'f32', rows)}
${values.scaled ? `var<workgroup> value_scales: array<vec4<f32>, ${valueDimPadded / 4}>;` : ''}
${values.smoothed ? `var<workgroup> value_means: array<vec4<f32>, ${valueDimPadded / 4}>;` : ''}
${workgroupArray('moved', 'atomic<u32>', 2, 4)}`;
}

/** Quantized queries, converted where the product takes no INT8. */
function stageQueries({ headDimPadded, subgroups, rowTiles, qk }: MatrixKernelConfig, threads: number, stride: number) {
  const rows = subgroups * rowTiles * qk.M;
  return `for (var i = t; i < ${(rows * headDimPadded) / 4}u; i += ${threads}u) {
      let r = i / ${headDimPadded / 4}u; let w = i % ${headDimPadded / 4}u;
      let word = query_rows[(query_row + r) * ${rowVectors(headDimPadded) * 4}u + w - P.queryRowBase * 4u];
      for (var e = 0u; e < 4u; e++) { tile_q[r * ${stride}u + 4u * w + e] = ${qk.componentType}(extractBits(word, e * 8u, 8u)); }
    }`;
}

/** V's scales and means into workgroup memory. */
function loadValueScales({ headDimPadded, valueDimPadded, values }: MatrixKernelConfig, threads: number): string {
  const record = `((head / P.groupSize * P.sequences + sequence) * P.chunks) * ${statisticsVectors(headDimPadded, valueDimPadded)}u - P.partialBase`;
  const mean = `value_means[i] = value_mean(value_record + ${(headDimPadded + valueDimPadded) / 4}u + i, P.chunks) * mean_factor(value_record, P.chunks);`;
  return `let value_record = ${record};
  for (var i = t; i < ${valueDimPadded / 4}u; i += ${threads}u) { value_scales[i] = value_scale(value_record + ${headDimPadded / 4}u + i, P.chunks, 1); ${values.smoothed ? mean : ''} }`;
}

/** The output matrices stored, each row multiplied with its factor, and loaded again. */
function rescaleStatements(config: MatrixKernelConfig, { outputAt, memory }: ReturnType<typeof placesOf>): string {
  const { operations, pv, lanes, rowTiles, valueDimPadded } = config;
  return range(rowTiles)
    .flatMap((rt) =>
      range(valueDimPadded / pv.N).map(
        (j) => `${operations.storeResult(pv, `o_${rt}_${j}`, memory.output, '0u', `${pv.N}u`)}
      workgroupBarrier();
      for (var i = lane; i < ${pv.M * pv.N}u; i += ${lanes}u) { ${outputAt('i')} *= ${pv.resultComponentType}(row_factor[${tileRowOf(config, rt)} + i / ${pv.N}u]); }
      workgroupBarrier();
      ${operations.loadResult(pv, `o_${rt}_${j}`, memory.output, '0u', `${pv.N}u`)}
      workgroupBarrier();`,
      ),
    )
    .join('\n      ');
}

export function matrixAttentionKernel(config: MatrixKernelConfig): string {
  const { operations, qk, pv, lanes, subgroupId, subgroups, rowTiles, keys } = config;
  const { headDimPadded, valueDimPadded, sharedScale, values, mask, sinks } = config;
  const M = qk.M;
  const threads = subgroups * lanes;
  const rows = subgroups * rowTiles * M;
  const lanesPerRow = lanes / M;
  const staged = stages(config);
  const rowWords = rowVectors(headDimPadded) * 4;
  const factsWords = factsOffset(headDimPadded);
  const usesF16 = pv.componentType === 'f16' || qk.componentType === 'f16' || pv.resultComponentType === 'f16';
  const T = range(rowTiles);
  const S = range(keys / qk.N);
  const O = range(valueDimPadded / pv.N);

  // Strides in components.
  const padding = (component: string) => ROW_PADDING / bytesOf(component);
  const qkStride = headDimPadded + padding(qk.componentType);
  const scoreStride = keys + padding('i32');
  const probabilityStride = keys + padding(pv.componentType);
  const subtiles = keys / KEY_TILE;

  const places = placesOf(config, scoreStride, probabilityStride);
  const { inBlock, keyTile, keyWord, memory } = places;

  const keyTileOf = (start: string) =>
    `(kv_row + u32(${start})) / ${KEY_TILE}u - P.keyRowBase / ${KEY_TILE * (rowWords / 4)}u`;

  /** A row within its subgroup, and within the workgroup. */
  const ownRow = (rt: number) => `(${rt * M}u + lane_row)`;
  const tileRow = (rt: number) => tileRowOf(config, rt);
  const row = (rt: number) => `(${tileRow(rt)} + lane_row)`;

  const tiles = stageTiles({
    threads,
    keys,
    headDimPadded,
    valueDimPadded,
    qk,
    keyStride: qkStride,
    keyWord,
    valueWord: (subtile, word) => inBlock('value_tiles', keyTile(subtile), (KEY_TILE * valueDimPadded) / 2, word),
  });
  const copied = [...(staged.keys ? [tiles.keys] : []), ...(staged.values ? [tiles.values] : [])];
  const part = (name: 'declare' | 'load' | 'store') => copied.map((copies) => copies[name]).join(' ');

  const { heldQueries, firstKeys, multiplyKeys, nextKeys, firstValues, multiplyValues } = productStatements(
    config,
    memory,
    qkStride,
    probabilityStride,
  );

  const softmax = (rt: number) =>
    softmaxStatements(config, places, rt, { own: ownRow(rt), group: row(rt), scoreStride, probabilityStride });

  const { finishRow, storeTile } = finishStatements(config, places);
  const finish = T.map((rt) => O.map((j) => storeTile(rt, j, tileRow(rt))).join('')).join('');

  const main = `
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32, @builtin(subgroup_size) subgroup_lanes: u32, @builtin(subgroup_invocation_id) subgroup_lane: u32${subgroupId ? ', @builtin(subgroup_id) subgroup_index: u32' : ''}) {
  let t = ${subgroupId ? 'subgroup_index * subgroup_lanes + subgroup_lane' : 'lid'};
  let subgroup = t / ${lanes}u;
  let lane = t % ${lanes}u;
  let lane_row = lane / ${lanesPerRow}u;
  let lane_column = lane % ${lanesPerRow}u;
  let lane_even = lane_column + lane_row / 8u * ${lanesPerRow}u;
  let lane_odd = lane_column - lane_row / 8u * ${lanesPerRow}u;
  let tile = P.tileStart + group.x;
  let head = P.headStart + group.y;
  let sequence = tile_field(tile, 0u);
  let first_row = tile_field(tile, 1u);
  let count = tile_field(tile, 2u);
  let query_row = head * P.queryRowsPerHead + sequence_field(sequence, ${SEQUENCE.queryRow}u) + first_row;
  let kv_row = head / P.groupSize * P.keyRowsPerHead + sequence_field(sequence, ${SEQUENCE.keyRow}u);

  let length = i32(sequence_field(sequence, ${SEQUENCE.keyLength}u));
  let lower = i32(sequence_field(sequence, ${SEQUENCE.lower}u)) + i32(first_row);
  let upper = i32(sequence_field(sequence, ${SEQUENCE.upper}u)) + i32(first_row);
  let begin = i32(P.keyStart + group.z * P.keySpan);
  let key_begin = max(begin, max(0, lower)) / ${keys} * ${keys};
  let key_end = min(min(length, begin + i32(P.keySpan)), upper + i32(count));
  ${staged.query ? stageQueries(config, threads, qkStride) : ''}
  ${values.scaled ? loadValueScales(config, threads) : ''}
${T.map(
  (rt) => `  let facts_${rt} = (query_row + ${row(rt)}) * ${rowWords}u + ${rowWords - 4}u - P.queryRowBase * 4u;
  let scale_${rt} = bitcast<f32>(query_rows[facts_${rt}]); let flags_${rt} = u32(query_rows[facts_${rt} + 1u]); let constant_${rt} = bitcast<f32>(query_rows[facts_${rt} + 2u]);${sinks ? ` let sink_${rt} = bitcast<f32>(query_rows[facts_${rt} + 3u]);` : ''}
  var m_${rt} = ${EXCLUDED}; var l_${rt} = 0.0; var poison_${rt} = 0u;
  let low_${rt} = lower + i32(${row(rt)}); let high_${rt} = min(length - 1, upper + i32(${row(rt)}));
  ${mask === undefined ? '' : `let mask_${rt} = sequence_field(sequence, ${SEQUENCE.mask}u) - P.maskBase + head * P.maskHeadStride + (first_row + ${row(rt)}) * P.maskQueryStride;`}
  if (lane_column == 0u) { row_factor[${row(rt)}] = 1.0; }
  ${O.map((j) => operations.declareResult(pv, `o_${rt}_${j}`)).join(' ')}
  ${S.map((n) => operations.declareResult(qk, `s_${rt}_${n}`)).join(' ')}
  ${(heldQueries[rt] ?? []).map(([load]) => load).join(' ')}`,
).join('\n')}

  var parity = 0u;
  ${part('declare')}
  ${firstKeys === '' ? '' : `let key_tile = ${keyTileOf('key_begin')};`}
  ${firstKeys}
  for (var start = key_begin; start < key_end; start += ${keys}) {
    let key_tile = ${keyTileOf('start')};
    ${copied.length > 0 ? `${part('load')} workgroupBarrier(); ${part('store')} workgroupBarrier();` : ''}
    ${sharedScale ? `let key_scale = bitcast<f32>(${keyWord(0, `${factsWords}u`)});` : ''}
    let key_flags = u32(${range(subtiles)
      .map((subtile) => keyWord(subtile, `${factsWords + 2}u`))
      .join(' | ')});
    ${T.map((rt) => S.map((n) => operations.clear(qk, `s_${rt}_${n}`)).join(' ')).join('\n    ')}
    ${multiplyKeys}
    ${nextKeys === '' ? '' : `{ let key_tile = ${keyTileOf(`(start + ${keys})`)}; ${nextKeys} }`}
    ${firstValues}
    ${T.map((rt) => S.map((n) => operations.storeResult(qk, `s_${rt}_${n}`, memory.scores, `${rt * M * scoreStride + n * qk.N}u`, `${scoreStride}u`)).join('\n    ')).join('\n    ')}
    workgroupBarrier();
    if (t == 0u) { atomicStore(&moved[1u - parity], 0u); }
    let edge = start + ${keys} > length || start < lower + ${rows - 1} || start + ${keys - 1} > upper;
    ${T.map(softmax).join('')}
    if (workgroupUniformLoad(&moved[parity]) != 0u) {
      ${rescaleStatements(config, places)}
      ${T.map((rt) => `if (lane_column == 0u) { row_factor[${row(rt)}] = 1.0; }`).join(' ')}
    }
    ${multiplyValues}
    parity = 1u - parity;
  }
  workgroupBarrier();
${T.map((rt) => finishRow(rt, row(rt))).join('')}
  workgroupBarrier();
${finish}
}`;

  return `
enable subgroups;
${operations.enable}
${usesF16 ? 'enable f16;' : ''}
${subgroupId ? 'requires subgroup_id;' : ''}
${operations.enable === '' ? '' : `diagnostic(off, ${operations.enable.includes('chromium') ? 'chromium.' : ''}subgroup_matrix_uniformity);`}
${params(0, ATTENTION_PARAMS)}
${tables(1)}
@group(0) @binding(2) var<storage, read> query_rows: array<i32>;
@group(0) @binding(3) var<storage, read> key_tiles: array<i32>;
@group(0) @binding(4) var<storage, read> value_tiles: array<${staged.values ? 'u32' : 'f16'}>;
${scoreDeclarations(config)}
${valueFunctions(statisticsVectors(headDimPadded, valueDimPadded), values)}
${workgroupMemory(config, qkStride, scoreStride, probabilityStride)}
${operations.declarations()}
${main}`;
}
