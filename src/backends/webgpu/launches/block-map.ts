/** The dispatches that choose which blocks of scores a call computes. */
import { blockShapeOf } from '../../../attention/block-choice.ts';
import { type AttentionProblem, sequencesOf } from '../../../attention/problem.ts';
import type { SettledSparsity } from '../../../attention/sparsity.ts';
import { BYTES_PER_ELEMENT } from '../../../tensor/dtype.ts';
import type { Capabilities } from '../capabilities.ts';
import {
  CHOOSE_PARAMS,
  chooseKernel,
  MEAN_PARAMS,
  meanKernel,
  PACK_PARAMS,
  PACK_THREADS,
  POOL_PARAMS,
  packKernel,
  pooledVectors,
  poolKernel,
  VISIBLE_BLOCKS_PARAMS,
  visibleBlocksKernel,
} from '../kernels/block-map.ts';
import { encodeParams } from '../kernels/layout.ts';
import { MAXIMA_ROWS } from '../kernels/visible-keys.ts';
import type { BufferName, Launch, Unit } from './launch.ts';
import {
  accessOf,
  allOf,
  extent,
  keyHeads,
  launchesOf,
  operandSpan,
  recordsOf,
  rowSpan,
  type SequenceRecord,
  type Stages,
  Tables,
  type Tile,
  tablesBinding,
  tilesOf,
} from './stages.ts';
import { maskSizes, maximaLaunches } from './visible-keys.ts';

export interface BlockMapLaunches {
  readonly launches: readonly Launch[];
  /** Bytes of each buffer. */
  readonly sizes: Partial<Record<BufferName, number>>;
  /** Contents of the buffer `tables`. */
  readonly tables: Uint32Array<ArrayBuffer>;
}

/** What the dispatches share. */
interface Choosing extends Omit<Stages, 'keyValue'> {
  readonly sparsity: SettledSparsity;
  readonly similarities: boolean;
  readonly rowBlocks: number;
  readonly keyBlocks: number;
}

/** One of q and k, in blocks. */
interface Pooled {
  readonly operand: 'q' | 'k';
  readonly buffer: 'pooledQueries' | 'pooledKeys';
  readonly heads: number;
  readonly blocks: number;
  readonly blockRows: number;
  readonly tiles: readonly Tile[];
}

const lineBytesOf = ({ problem }: Choosing) => pooledVectors(problem.headDim) * 16;

/** Span of the pooled lines of some heads, those of all their sequences. */
const pooledSpan = (
  choosing: Choosing,
  slot: number,
  { buffer, blocks }: Pick<Pooled, 'buffer' | 'blocks'>,
  heads: readonly [number, number],
) => {
  const perHead = choosing.problem.batch * blocks;
  return rowSpan(slot, buffer, lineBytesOf(choosing), perHead, heads, [0, perHead]);
};

const meanSpan = (choosing: Choosing, heads: readonly [number, number]) =>
  rowSpan(4, 'keyMean', lineBytesOf(choosing), choosing.problem.batch, heads, [0, choosing.problem.batch]);

function poolLaunches(choosing: Choosing, pooled: Pooled, shifted: boolean): Launch[] {
  const { problem, tables, sequencesAt, similarities } = choosing;
  const { operand, buffer, heads, blocks, blockRows, tiles } = pooled;
  const layout = problem[operand];
  const code = poolKernel({
    dtype: problem.dtype,
    access: accessOf(problem.dtype, [layout], [problem.headDim]),
    headDim: problem.headDim,
    operand,
    // Of K after its mean was subtracted: in a second pass.
    similarities: similarities && (operand === 'q' || shifted),
    shifted,
  });
  const tilesAt = tables.tiles(tiles);
  const spansOf = (unit: Unit) => [
    tablesBinding(choosing),
    operandSpan(choosing, 2, operand, tiles, unit),
    pooledSpan(choosing, 3, pooled, unit.heads),
    ...(shifted ? [meanSpan(choosing, unit.heads)] : []),
  ];
  const label = shifted ? `similarities of ${operand}` : `pool ${operand}`;
  return launchesOf(choosing, label, code, allOf(tiles, heads), spansOf, (unit, base) => {
    const elements = base(operand) / (problem.dtype === 'float32' ? 4 : 2);
    return encodeParams(POOL_PARAMS, {
      ...{ tileStart: unit.tiles[0], headStart: unit.heads[0], sequencesAt, tilesAt },
      ...{ headStride: layout.headStride, tokenStride: layout.tokenStride, sourceBase: elements },
      ...{ sequences: problem.batch, blocks, blockRows },
      pooledBase: base(buffer) / 16,
      meanBase: base('keyMean') / 16,
    });
  });
}

function meanLaunches(choosing: Choosing, keys: Pooled): Launch[] {
  const { problem, sequencesAt } = choosing;
  const spansOf = (unit: Unit) => [
    tablesBinding(choosing),
    pooledSpan(choosing, 3, keys, unit.heads),
    meanSpan(choosing, unit.heads),
  ];
  const whole = allOf(sequencesOf(problem), keys.heads);
  return launchesOf(choosing, 'mean of k', meanKernel(problem.headDim), whole, spansOf, (unit, base) =>
    encodeParams(MEAN_PARAMS, {
      ...{ tileStart: unit.tiles[0], headStart: unit.heads[0], sequencesAt, sequences: problem.batch },
      ...{ blocks: keys.blocks, blockKeys: keys.blockRows },
      pooledBase: base('pooledKeys') / 16,
      meanBase: base('keyMean') / 16,
    }),
  );
}

/** Heads that a mask has of its own. */
const maskHeadsOf = ({ mask, queryHeads }: AttentionProblem) => (mask?.strides[1] === 0 ? 1 : queryHeads);

/** Span of what a mask leaves of the blocks: lines of some heads, from the first of some tiles to the last. */
const visibleSpan = ({ problem, rowBlocks, keyBlocks, sparsity }: Choosing, tiles: readonly Tile[], unit: Unit) => {
  const maskHeads = maskHeadsOf(problem);
  const [first, end] = maskHeads === 1 ? [0, 1] : unit.heads;
  const [low, high] = extent(tiles, unit.tiles, ({ sequence, first: row }) => {
    const line = (head: number) => (sequence * maskHeads + head) * rowBlocks + row / sparsity.rows;
    return [line(first), line(end - 1) + 1];
  });
  return { slot: 6, buffer: 'visibleBlocks' as const, start: low * keyBlocks * 4, end: high * keyBlocks * 4 };
};

/** What the mask leaves of each block; none without a mask. */
function visibleLaunches(choosing: Choosing, { tiles, blockRows }: Pooled, keys: Pooled): Launch[] {
  const { problem, records, tables, sequencesAt, rowsPerQueryHead, rowBlocks, keyBlocks } = choosing;
  const { mask } = problem;
  if (mask === undefined) return [];
  const additive = mask.dtype !== 'bool';
  const { rows } = maskSizes(problem, mask);
  const maximaTiles = tilesOf(
    records.map(({ queryLength }) => Math.min(rows, queryLength)),
    MAXIMA_ROWS,
  );
  const maxima = additive ? maximaLaunches(choosing, mask, maximaTiles, tables.tiles(maximaTiles)) : [];
  const tilesAt = tables.tiles(tiles);
  const maskHeads = maskHeadsOf(problem);
  const [, headStride, queryStride, keyStride] = mask.strides;
  const bytes = BYTES_PER_ELEMENT[mask.dtype];
  const spansOf = (unit: Unit) => {
    const [low, high] = extent(tiles, unit.tiles, ({ sequence, first, count }) => {
      const { mask: start, keyLength } = records[sequence] as SequenceRecord;
      const row = start + first * queryStride;
      return [row, row + (count - 1) * queryStride + Math.max(0, keyLength - 1) * keyStride + 1];
    });
    const [h0, h1] = unit.heads;
    const maskSpan = { start: (low + h0 * headStride) * bytes, end: (high + (h1 - 1) * headStride) * bytes };
    return [
      tablesBinding(choosing),
      ...(additive ? [rowSpan(4, 'maskMaxima', 4, rowsPerQueryHead, unit.heads, [0, rowsPerQueryHead])] : []),
      { slot: 5, buffer: 'mask' as const, ...maskSpan },
      visibleSpan(choosing, tiles, unit),
    ];
  };
  const code = visibleBlocksKernel({ mask: mask.dtype });
  const found = launchesOf(choosing, 'visible blocks', code, allOf(tiles, maskHeads), spansOf, (unit, base) =>
    encodeParams(VISIBLE_BLOCKS_PARAMS, {
      ...{ tileStart: unit.tiles[0], headStart: unit.heads[0], sequencesAt, tilesAt },
      ...{ maskHeadStride: headStride, maskQueryStride: queryStride, maskKeyStride: keyStride },
      ...{ maskHeads, rowBlocks, keyBlocks, blockRows, blockKeys: keys.blockRows },
      rowsPerHead: rowsPerQueryHead,
      // Where all rows have the same maximum only the first has one.
      maximaStep: rows > 1 ? 1 : 0,
      maskBase: base('mask') / bytes,
      maximaBase: base('maskMaxima') / 4,
      visibleBase: base('visibleBlocks') / 4,
    }),
  );
  return [...maxima, ...found];
}

function chooseLaunches(choosing: Choosing, queries: Pooled, keys: Pooled): Launch[] {
  const { problem, sparsity, tables, sequencesAt, similarities, rowBlocks, keyBlocks } = choosing;
  const { queryHeads, kvHeads, batch } = problem;
  const { topK, mass, similarity, sinkBlocks, rows, keys: blockKeys } = sparsity;
  const masked = problem.mask !== undefined;
  const by = topK === undefined ? 'mass' : 'count';
  const code = chooseKernel({ headDim: problem.headDim, by, similarities, masked });
  // Lines beyond the end of a short sequence are written too: zeros.
  const tiles = choosing.records.flatMap(({ queryLength }, sequence) =>
    Array.from({ length: rowBlocks }, (_, i) => ({
      sequence,
      first: i * rows,
      count: Math.max(0, Math.min(rows, queryLength - i * rows)),
    })),
  );
  const tilesAt = tables.tiles(tiles);
  const groupSize = queryHeads / Math.max(1, kvHeads);
  const spansOf = (unit: Unit) => {
    const [low, high] = extent(tiles, unit.tiles, ({ sequence, first }) => {
      const line = (head: number) => (sequence * queryHeads + head) * rowBlocks + first / rows;
      return [line(unit.heads[0]), line(unit.heads[1] - 1) + 1];
    });
    return [
      tablesBinding(choosing),
      pooledSpan(choosing, 2, queries, unit.heads),
      pooledSpan(choosing, 3, keys, keyHeads(unit.heads, groupSize)),
      { slot: 4, buffer: 'blockWeights' as const, start: low * keyBlocks * 4, end: high * keyBlocks * 4 },
      { slot: 5, buffer: 'lines' as const, start: low * 16, end: high * 16 },
      ...(masked ? [visibleSpan(choosing, tiles, unit)] : []),
    ];
  };
  return launchesOf(choosing, 'choose blocks', code, allOf(tiles, queryHeads), spansOf, (unit, base) =>
    encodeParams(CHOOSE_PARAMS, {
      ...{ tileStart: unit.tiles[0], headStart: unit.heads[0], sequencesAt, tilesAt, sequences: batch },
      ...{ heads: queryHeads, headsPerKeyHead: groupSize, rowBlocks, keyBlocks, blockRows: rows, blockKeys },
      sinkBlocks: Math.min(sinkBlocks, keyBlocks),
      queryBase: base('pooledQueries') / 16,
      keyBase: base('pooledKeys') / 16,
      weightBase: base('blockWeights') / 4,
      lineBase: base('lines') / 16,
      maskHeads: maskHeadsOf(problem),
      visibleBase: base('visibleBlocks') / 4,
      scoreScale: problem.smScale * Math.LOG2E,
      wanted: topK ?? mass,
      leastSimilarity: similarity,
    }),
  );
}

function packLaunches(choosing: Choosing, elements: number): Launch[] {
  const words = Math.ceil(elements / 4);
  const batches = Array.from({ length: Math.ceil(words / PACK_THREADS) }, (_, i) => i);
  const wordsOf = ({ tiles: [start, end] }: Unit) =>
    [start * PACK_THREADS, Math.min(words, end * PACK_THREADS)] as const;
  const spansOf = (unit: Unit) => {
    const [start, end] = wordsOf(unit);
    return [
      { slot: 4, buffer: 'blockWeights' as const, start: start * 16, end: Math.min(elements, end * 4) * 4 },
      { slot: 6, buffer: 'map' as const, start: start * 4, end: end * 4 },
    ];
  };
  return launchesOf(choosing, 'pack map', packKernel(), allOf(batches, 1), spansOf, (unit, base) => {
    const [wordStart, wordEnd] = wordsOf(unit);
    const bases = { weightBase: base('blockWeights') / 4, mapBase: base('map') / 4 };
    return encodeParams(PACK_PARAMS, { wordStart, wordEnd, elements, ...bases });
  });
}

/** Buffers `q`, `k` and `mask` in, `map` and `lines` of `blockMapOutputs` out. */
export function planBlockMapLaunches(
  capabilities: Capabilities,
  problem: AttentionProblem,
  sparsity: SettledSparsity,
): BlockMapLaunches {
  const { batch, queryHeads, kvHeads, mask } = problem;
  const [, , rowBlocks, keyBlocks] = blockShapeOf(problem, sparsity);
  const tables = new Tables();
  const { records, rowsPerQueryHead } = recordsOf(
    problem,
    sequencesOf(problem).map(() => 0),
  );
  const choosing: Choosing = {
    ...{ problem, sparsity, capabilities, tables, records, rowsPerQueryHead, rowBlocks, keyBlocks },
    sequencesAt: tables.sequences(records),
    similarities: sparsity.similarity > -1,
  };
  const lengths = (of: 'queryLength' | 'keyLength') => records.map((record) => record[of]);
  const queries: Pooled = {
    ...{ operand: 'q', buffer: 'pooledQueries', heads: queryHeads, blocks: rowBlocks, blockRows: sparsity.rows },
    tiles: tilesOf(lengths('queryLength'), sparsity.rows),
  };
  const keys: Pooled = {
    ...{ operand: 'k', buffer: 'pooledKeys', heads: kvHeads, blocks: keyBlocks, blockRows: sparsity.keys },
    tiles: tilesOf(lengths('keyLength'), sparsity.keys),
  };
  const lineBytes = lineBytesOf(choosing);
  const lines = batch * queryHeads * rowBlocks;
  const launches = [
    ...poolLaunches(choosing, queries, false),
    ...poolLaunches(choosing, keys, false),
    ...(choosing.similarities ? [...meanLaunches(choosing, keys), ...poolLaunches(choosing, keys, true)] : []),
    ...visibleLaunches(choosing, queries, keys),
    ...chooseLaunches(choosing, queries, keys),
    ...packLaunches(choosing, lines * keyBlocks),
  ];
  return {
    launches,
    sizes: {
      pooledQueries: lines * lineBytes,
      pooledKeys: batch * kvHeads * keyBlocks * lineBytes,
      blockWeights: lines * keyBlocks * 4,
      ...(choosing.similarities && { keyMean: batch * kvHeads * lineBytes }),
      ...(mask && { visibleBlocks: batch * maskHeadsOf(problem) * rowBlocks * keyBlocks * 4 }),
      ...(mask && mask.dtype !== 'bool' && { maskMaxima: maskHeadsOf(problem) * rowsPerQueryHead * 4 }),
    },
    tables: tables.bytes,
  };
}
