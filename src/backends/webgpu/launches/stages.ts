/** From a problem to its launches: statistics of K and V, quantization, attention, merging of partial results. */
import {
  type AttentionProblem,
  bandOf,
  type OperandLayout,
  outputLayoutOf,
  outputShapeOf,
  sequencesOf,
} from '../../../attention/problem.ts';
import type { Granularity } from '../../../quantization/schemes.ts';
import { BYTES_PER_ELEMENT, type DType } from '../../../tensor/dtype.ts';
import { elementCount } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import type { Capabilities } from '../capabilities.ts';
import { encodeParams, type KeyValueLayout, rowVectors, SEQUENCE, SEQUENCE_WORDS, wrap32 } from '../kernels/layout.ts';
import { MERGE_PARAMS, MERGE_THREADS, mergeKernel } from '../kernels/merge.ts';
import {
  KEY_BLOCK,
  PREPARE_KEY_VALUE_PARAMS,
  PREPARE_QUERY_PARAMS,
  prepareKeyValueKernel,
  prepareQueryKernel,
  QUERY_BLOCK,
} from '../kernels/prepare.ts';
import { ATTENTION_PARAMS, naturalUnits, recordFloats, type ScoreConfig } from '../kernels/scores.ts';
import { STATISTICS_PARAMS, statisticsKernel, statisticsVectors } from '../kernels/statistics.ts';
import { type Access, roundUp } from '../kernels/storage.ts';
import { aligned, type Binding, type BufferName, type Launch, type Unit, unitsOf } from './launch.ts';

/** One sequence of a run: lengths, where its rows are in scratch, where its elements are in the tensors. */
interface SequenceRecord {
  readonly queryLength: number;
  readonly keyLength: number;
  readonly queryRow: number;
  readonly keyRow: number;
  readonly lower: number;
  readonly upper: number;
  readonly output: number;
  readonly lse: number;
  readonly mask: number;
  readonly qSource: number;
  readonly kSource: number;
  readonly vSource: number;
}

interface Tile {
  readonly sequence: number;
  readonly first: number;
  readonly count: number;
}

/** Quantized keys and values in scratch or in a cache: `[Hkv][rowsPerHead]` rows. */
export interface KeyValueShape {
  readonly dtype: DType;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly valueDim: number;
  readonly sequences: number;
  readonly rowsPerHead: number;
  /** First row of each sequence within a head. */
  readonly keyRows: readonly number[];
  /** Chunks of the statistics of each sequence. */
  readonly chunks: number;
  readonly smoothK: boolean;
  readonly smoothV: boolean;
  readonly scaleValues: boolean;
  readonly granularity: Granularity;
  readonly layout: KeyValueLayout;
}

export const padDim = (dim: number): number => roundUp(dim, 32);

/**
 * V's channels need scales: float16 values fit as they are, but for differences from a mean. Sums in float16 overflow less
 * where no value exceeds 1.
 */
const scalesValues = (dtype: DType, { smoothV, pvAccumDtype }: ValueChoice): boolean =>
  dtype !== 'float16' || smoothV || pvAccumDtype === 'fp16';

type ValueChoice = Pick<KernelChoice, 'smoothV' | 'pvAccumDtype'>;

export function keyValueBytes(shape: KeyValueShape): { keys: number; values: number; partials: number } {
  // Kernels bind whole tiles.
  const rows = Math.max(KEY_BLOCK, shape.kvHeads * shape.rowsPerHead);
  const records = Math.max(1, shape.kvHeads * shape.sequences * shape.chunks);
  return {
    keys: rows * rowVectors(padDim(shape.headDim)) * 16,
    values: rows * padDim(shape.valueDim) * 2,
    partials: records * statisticsVectors(padDim(shape.headDim), padDim(shape.valueDim)) * 16,
  };
}

/** Where the rows of the keys of a problem's sequences are when they are laid end to end, each from a new block. */
export function keyValueShapeOf(
  problem: AttentionProblem,
  choice: Pick<KernelChoice, 'smoothK' | 'qkQuantGran'> & ValueChoice,
  capabilities: Capabilities,
  layout: KeyValueLayout,
): KeyValueShape {
  const keyRows: number[] = [];
  let rows = 0;
  for (const { keyLength } of sequencesOf(problem)) {
    keyRows.push(rows);
    rows += roundUp(keyLength, KEY_BLOCK);
  }
  const { dtype, kvHeads, headDim, valueDim, batch, keyLength, k, v } = problem;
  // A chunk must fit a binding; more chunks than 16 only cost the kernels that add them up.
  const spanned = keyLength * Math.max(k.tokenStride, v.tokenStride) * BYTES_PER_ELEMENT[dtype];
  const chunks = Math.max(
    Math.min(16, Math.ceil(keyLength / KEY_BLOCK)),
    Math.ceil((2 * spanned) / capabilities.bindingBytes),
    1,
  );
  return {
    dtype,
    kvHeads,
    headDim,
    valueDim,
    sequences: batch,
    rowsPerHead: rows,
    keyRows,
    chunks,
    smoothK: choice.smoothK,
    smoothV: choice.smoothV,
    scaleValues: scalesValues(dtype, choice),
    granularity: choice.qkQuantGran,
    layout,
  };
}

const tilesOf = (lengths: readonly number[], size: number): Tile[] =>
  lengths.flatMap((length, sequence) =>
    Array.from({ length: Math.ceil(length / size) }, (_, i) => ({
      sequence,
      first: i * size,
      count: Math.min(size, length - i * size),
    })),
  );

/** Tables under construction: sequences and tiles in one buffer of 32-bit words. */
export class Tables {
  readonly #words: number[] = [];

  sequences(records: readonly SequenceRecord[]): number {
    const at = this.#words.length;
    for (const record of records) {
      const words = new Array<number>(SEQUENCE_WORDS).fill(0);
      for (const [field, index] of Object.entries(SEQUENCE))
        words[index] = wrap32(record[field as keyof SequenceRecord]);
      this.#words.push(...words);
    }
    return at;
  }

  tiles(tiles: readonly Tile[]): number {
    const at = this.#words.length;
    for (const { sequence, first, count } of tiles) this.#words.push(sequence, first, count);
    return at;
  }

  get bytes(): Uint32Array<ArrayBuffer> {
    return Uint32Array.from(this.#words.length === 0 ? [0] : this.#words);
  }
}

const accessOf = (dtype: DType, layouts: readonly OperandLayout[], dims: readonly number[]): Access => {
  const bytes = BYTES_PER_ELEMENT[dtype];
  const whole = layouts.every(({ offset, batchStride, headStride, tokenStride }) =>
    [offset, batchStride, headStride, tokenStride].every((n) => (n * bytes) % 16 === 0),
  );
  return whole && dims.every((dim) => dim % 16 === 0) ? 'vector' : 'scalar';
};

const BAND_LIMIT = 2 ** 30;
const clipBand = (value: number) => Math.max(-BAND_LIMIT, Math.min(BAND_LIMIT, value));

/** Everything that the stages share. */
export interface Stages {
  readonly problem: AttentionProblem;
  readonly capabilities: Capabilities;
  readonly keyValue: KeyValueShape;
  readonly tables: Tables;
  readonly records: readonly SequenceRecord[];
  readonly sequencesAt: number;
  readonly rowsPerQueryHead: number;
}

/** @param firstToken which token of each sequence is the first of `problem`'s k and v: 0 but for appends */
export function createStages(
  problem: AttentionProblem,
  capabilities: Capabilities,
  keyValue: KeyValueShape,
  firstToken = 0,
): Stages {
  const tables = new Tables();
  const output = outputLayoutOf(problem);
  let queryRow = 0;
  const total = problem.sequences?.cuSeqlensQ[problem.batch] ?? 0;
  const records = sequencesOf(problem).map((sequence): SequenceRecord => {
    const { index, queryStart, queryLength, keyStart, keyLength } = sequence;
    const band = bandOf(problem, queryLength, keyLength);
    const at = ({ offset, batchStride, tokenStride }: OperandLayout, token: number) =>
      offset + index * batchStride + token * tokenStride;
    const record = {
      queryLength,
      keyLength,
      queryRow,
      keyRow: keyValue.keyRows[index] as number,
      lower: clipBand(band.lower),
      upper: clipBand(band.upper),
      output: at(output, queryStart),
      lse: total > 0 || problem.sequences !== undefined ? queryStart : index * problem.queryHeads * queryLength,
      mask: problem.mask === undefined ? 0 : problem.mask.offset + index * problem.mask.strides[0],
      qSource: at(problem.q, queryStart),
      kSource: at(problem.k, keyStart - firstToken),
      vSource: at(problem.v, keyStart - firstToken),
    };
    queryRow += roundUp(queryLength, QUERY_BLOCK);
    return record;
  });
  return {
    problem,
    capabilities,
    keyValue,
    tables,
    records,
    sequencesAt: tables.sequences(records),
    rowsPerQueryHead: queryRow,
  };
}

/** Least and greatest of a function over some tiles. */
function extent(
  tiles: readonly Tile[],
  [from, to]: readonly [number, number],
  f: (tile: Tile) => readonly [number, number],
) {
  let low = Number.POSITIVE_INFINITY;
  let high = 0;
  for (let i = from; i < to; i++) {
    const [start, end] = f(tiles[i] as Tile);
    low = Math.min(low, start);
    high = Math.max(high, end);
  }
  return [low, high] as const;
}

/** Span of an operand's elements that the tiles of some heads reach. */
function operandSpan(
  stages: Stages,
  slot: number,
  buffer: 'q' | 'k' | 'v',
  tiles: readonly Tile[],
  unit: Unit,
): Binding {
  const { problem, records } = stages;
  const layout = problem[buffer];
  const dim = buffer === 'v' ? problem.valueDim : problem.headDim;
  const bytes = BYTES_PER_ELEMENT[problem.dtype];
  const [low, high] = extent(tiles, unit.tiles, ({ sequence, first, count }) => {
    const start = (records[sequence] as SequenceRecord)[`${buffer}Source`] + first * layout.tokenStride;
    return [start, start + (count - 1) * layout.tokenStride + dim];
  });
  const [h0, h1] = unit.heads;
  return {
    slot,
    buffer,
    start: (low + h0 * layout.headStride) * bytes,
    end: (high + (h1 - 1) * layout.headStride) * bytes,
  };
}

/** Span of scratch rows; `rowOf` gives a tile's rows within a head. */
function rowSpan(
  slot: number,
  buffer: BufferName,
  rowBytes: number,
  rowsPerHead: number,
  heads: readonly [number, number],
  [low, high]: readonly [number, number],
): Binding {
  return {
    slot,
    buffer,
    start: (heads[0] * rowsPerHead + low) * rowBytes,
    end: ((heads[1] - 1) * rowsPerHead + high) * rowBytes,
  };
}

function tablesBinding(stages: Stages): Binding {
  return { slot: 1, buffer: 'tables', start: 0, end: stages.tables.bytes.byteLength };
}

/** Span of the statistics of some key heads and all their sequences. */
function partialSpan(stages: Stages, slot: number, heads: readonly [number, number]): Binding {
  const { keyValue } = stages;
  const record = statisticsVectors(padDim(keyValue.headDim), padDim(keyValue.valueDim)) * 16;
  const perHead = keyValue.sequences * keyValue.chunks * record;
  return { slot, buffer: 'partials', start: heads[0] * perHead, end: heads[1] * perHead };
}

/** Launches of one stage: its units, each with its bindings aligned and their bases among the parameters. */
function launchesOf(
  stages: Stages,
  label: string,
  code: string,
  whole: Unit,
  spansOf: (unit: Unit) => readonly Binding[],
  paramsOf: (unit: Unit, base: (buffer: BufferName) => number) => ArrayBuffer,
): Launch[] {
  const { capabilities } = stages;
  return unitsOf(whole, spansOf, capabilities).map((unit) => {
    const bindings = spansOf(unit).map((span) => aligned(span, capabilities.bindingAlignment));
    const base = (buffer: BufferName) => bindings.find((binding) => binding.buffer === buffer)?.start ?? 0;
    const count = ([start, end]: readonly [number, number]) => end - start;
    return {
      label,
      code,
      params: paramsOf(unit, base),
      bindings,
      groups: [count(unit.tiles), count(unit.heads), count(unit.splits)] as const,
    };
  });
}

const allOf = (tiles: readonly unknown[], heads: number, splits = 1): Unit => ({
  tiles: [0, tiles.length],
  heads: [0, heads],
  splits: [0, splits],
});

/** Partial sums of K and maxima of V; none where neither is needed. */
export function statisticsLaunches(stages: Stages): Launch[] {
  const { problem, keyValue, records } = stages;
  const { dtype, headDim, valueDim, kvHeads } = problem;
  const { smoothK: keyMean, scaleValues: valueMax, smoothV: valueMean } = keyValue;
  if (!keyMean && !valueMax) return [];
  const { chunks } = keyValue;
  const items: Tile[] = records.flatMap(({ keyLength }, sequence) =>
    Array.from({ length: chunks }, (_, chunk) => {
      const each = Math.ceil(keyLength / chunks);
      const first = Math.min(keyLength, chunk * each);
      return { sequence, first, count: Math.max(1, Math.min(keyLength, first + each) - first) };
    }),
  );
  const [headDimPadded, valueDimPadded] = [padDim(headDim), padDim(valueDim)];
  const code = statisticsKernel({
    dtype,
    access: accessOf(
      dtype,
      [...(keyMean ? [problem.k] : []), ...(valueMax ? [problem.v] : [])],
      [...(keyMean ? [headDim] : []), ...(valueMax ? [valueDim] : [])],
    ),
    headDim,
    headDimPadded,
    valueDim,
    valueDimPadded,
    keyMean,
    valueMax,
    valueMean,
  });
  const bytes = BYTES_PER_ELEMENT[dtype];
  if (records.every(({ keyLength }) => keyLength === 0)) return [];
  return launchesOf(
    stages,
    'statistics',
    code,
    allOf(items, kvHeads),
    (unit) => [
      tablesBinding(stages),
      ...(keyMean ? [operandSpan(stages, 2, 'k', items, unit)] : []),
      ...(valueMax ? [operandSpan(stages, 3, 'v', items, unit)] : []),
      partialSpan(stages, 4, unit.heads),
    ],
    (unit, base) =>
      encodeParams(STATISTICS_PARAMS, {
        itemStart: unit.tiles[0],
        headStart: unit.heads[0],
        sequences: keyValue.sequences,
        chunks,
        sequencesAt: stages.sequencesAt,
        tilesAt: 0,
        kHeadStride: problem.k.headStride,
        kTokenStride: problem.k.tokenStride,
        kBase: base('k') / bytes,
        vHeadStride: problem.v.headStride,
        vTokenStride: problem.v.tokenStride,
        vBase: base('v') / bytes,
        partialBase: base('partials') / 16,
      }),
  );
}

/** Quantization of K and conversion of V, of tokens `first` to the end of each sequence. */
export function prepareKeyValueLaunches(stages: Stages, first = 0): Launch[] {
  const { problem, keyValue, records, tables } = stages;
  const { dtype, headDim, valueDim, kvHeads } = problem;
  const [headDimPadded, valueDimPadded] = [padDim(headDim), padDim(valueDim)];
  // A tile never crosses a block: appended tokens fill the last block up first, as a group of their own.
  const tiles = records.flatMap(({ keyLength }, sequence) => {
    const list: Tile[] = [];
    for (let token = first; token < keyLength; ) {
      const end = Math.min(keyLength, (Math.floor(token / KEY_BLOCK) + 1) * KEY_BLOCK);
      list.push({ sequence, first: token, count: end - token });
      token = end;
    }
    return list;
  });
  const tilesAt = tables.tiles(tiles);
  const { scaleValues, smoothV } = keyValue;
  const needsPartials = keyValue.smoothK || scaleValues;
  const code = prepareKeyValueKernel({
    dtype,
    access: accessOf(dtype, [problem.k, problem.v], [headDim, valueDim]),
    granularity: keyValue.granularity,
    headDim,
    headDimPadded,
    valueDim,
    valueDimPadded,
    smoothK: keyValue.smoothK,
    scaleValues,
    smoothV,
    layout: keyValue.layout,
  });
  const keyBytes = rowVectors(headDimPadded) * 16;
  const valueBytes = valueDimPadded * 2;
  const bytes = BYTES_PER_ELEMENT[dtype];
  return launchesOf(
    stages,
    'prepare key value',
    code,
    allOf(tiles, kvHeads),
    (unit) => {
      const rows = extent(tiles, unit.tiles, (tile) => {
        const { keyRow } = records[tile.sequence] as SequenceRecord;
        const block = keyRow + Math.floor(tile.first / KEY_BLOCK) * KEY_BLOCK;
        return [block, block + KEY_BLOCK];
      });
      return [
        tablesBinding(stages),
        operandSpan(stages, 2, 'k', tiles, unit),
        operandSpan(stages, 3, 'v', tiles, unit),
        ...(needsPartials ? [partialSpan(stages, 4, unit.heads)] : []),
        rowSpan(5, 'keys', keyBytes, keyValue.rowsPerHead, unit.heads, rows),
        rowSpan(6, 'values', valueBytes, keyValue.rowsPerHead, unit.heads, rows),
      ];
    },
    (unit, base) =>
      encodeParams(PREPARE_KEY_VALUE_PARAMS, {
        tileStart: unit.tiles[0],
        headStart: unit.heads[0],
        sequences: keyValue.sequences,
        chunks: keyValue.chunks,
        sequencesAt: stages.sequencesAt,
        tilesAt,
        kHeadStride: problem.k.headStride,
        kTokenStride: problem.k.tokenStride,
        kBase: base('k') / bytes,
        vHeadStride: problem.v.headStride,
        vTokenStride: problem.v.tokenStride,
        vBase: base('v') / bytes,
        rowsPerHead: keyValue.rowsPerHead,
        kRowBase: base('keys') / 16,
        vRowBase: base('values') / 16,
        partialBase: base('partials') / 16,
      }),
  );
}

/** Quantization of Q. `scoreScale` is what a product of integers and scales is multiplied with to be a score. */
export function prepareQueryLaunches(
  stages: Stages,
  granularity: Granularity,
  scoreScale: number,
  rowConstant: boolean,
): Launch[] {
  const { problem, keyValue, records, tables } = stages;
  const { dtype, headDim, valueDim, queryHeads, kvHeads } = problem;
  const headDimPadded = padDim(headDim);
  const tiles = tilesOf(
    records.map(({ queryLength }) => queryLength),
    QUERY_BLOCK,
  );
  const tilesAt = tables.tiles(tiles);
  const needsMean = rowConstant && keyValue.smoothK;
  const code = prepareQueryKernel({
    dtype,
    access: accessOf(dtype, [problem.q], [headDim]),
    granularity,
    headDim,
    headDimPadded,
    valueDim,
    valueDimPadded: padDim(valueDim),
    smoothK: keyValue.smoothK,
    rowConstant,
  });
  const groupSize = queryHeads / Math.max(1, kvHeads);
  return launchesOf(
    stages,
    'prepare query',
    code,
    allOf(tiles, queryHeads),
    (unit) => [
      tablesBinding(stages),
      operandSpan(stages, 2, 'q', tiles, unit),
      rowSpan(
        3,
        'queryRows',
        rowVectors(headDimPadded) * 16,
        stages.rowsPerQueryHead,
        unit.heads,
        extent(tiles, unit.tiles, ({ sequence, first, count }) => {
          const row = (records[sequence] as SequenceRecord).queryRow + first;
          return [row, row + count];
        }),
      ),
      ...(needsMean ? [partialSpan(stages, 4, keyHeads(unit.heads, groupSize))] : []),
    ],
    (unit, base) =>
      encodeParams(PREPARE_QUERY_PARAMS, {
        tileStart: unit.tiles[0],
        headStart: unit.heads[0],
        groupSize,
        sequences: keyValue.sequences,
        chunks: keyValue.chunks,
        sequencesAt: stages.sequencesAt,
        tilesAt,
        headStride: problem.q.headStride,
        tokenStride: problem.q.tokenStride,
        base: base('q') / BYTES_PER_ELEMENT[dtype],
        rowsPerHead: stages.rowsPerQueryHead,
        rowBase: base('queryRows') / 16,
        partialBase: base('partials') / 16,
        scoreScale,
      }),
  );
}

const keyHeads = ([start, end]: readonly [number, number], groupSize: number): readonly [number, number] => [
  Math.floor(start / groupSize),
  Math.floor((end - 1) / groupSize) + 1,
];

/** Key splits of a problem: every split covers `span` keys, a multiple of the key block. */
export interface KeySplits {
  readonly count: number;
  readonly span: number;
}

/** As few splits as bindings allow, and as many as give a short query's launch enough workgroups. */
export function keySplitsOf(stages: Stages, rowsPerTile: number): KeySplits {
  const { problem, keyValue, capabilities, records } = stages;
  const rowBytes = Math.max(rowVectors(padDim(keyValue.headDim)) * 16, padDim(keyValue.valueDim) * 2);
  const blocks = Math.ceil(problem.keyLength / KEY_BLOCK);
  const blocksPerBinding = Math.max(
    1,
    Math.floor((capabilities.bindingBytes - capabilities.bindingAlignment) / (rowBytes * KEY_BLOCK)),
  );
  const workgroups =
    problem.queryHeads * records.reduce((sum, { queryLength }) => sum + Math.ceil(queryLength / rowsPerTile), 0);
  const wanted = workgroups === 0 || workgroups >= ENOUGH_WORKGROUPS ? 1 : Math.floor(ENOUGH_WORKGROUPS / workgroups);
  const parallel = Math.max(1, Math.min(wanted, Math.floor(blocks / BLOCKS_PER_SPLIT)));
  const span = Math.min(blocksPerBinding, Math.ceil(blocks / parallel)) * KEY_BLOCK;
  return {
    count: Math.max(1, Math.ceil(problem.keyLength / Math.max(span, KEY_BLOCK))),
    span: Math.max(span, KEY_BLOCK),
  };
}

/** Below this many workgroups the keys are split among more of them (a decoder's single query). */
const ENOUGH_WORKGROUPS = 128;
/** A split has at least this many blocks of keys: less is not worth its share of merging. */
const BLOCKS_PER_SPLIT = 4;

/** The attention kernel to launch: its source for a score configuration and its query rows per workgroup. */
export interface AttentionKernel {
  readonly label: string;
  readonly rows: number;
  source(config: ScoreConfig): string;
}

export function attentionLaunches(
  stages: Stages,
  config: ScoreConfig,
  kernel: AttentionKernel,
  splits: KeySplits,
): Launch[] {
  const { problem, keyValue, records, tables } = stages;
  const { queryHeads, kvHeads, queryLength, mask } = problem;
  const output = outputLayoutOf(problem);
  const tiles = tilesOf(
    records.map(({ queryLength: length }) => length),
    kernel.rows,
  );
  const tilesAt = tables.tiles(tiles);
  const groupSize = queryHeads / Math.max(1, kvHeads);
  const queryBytes = rowVectors(config.headDimPadded) * 16;
  const valueBytes = config.valueDimPadded * 2;
  const outputBytes = BYTES_PER_ELEMENT[problem.dtype];
  const lseHeadStride = lseHeadStrideOf(problem);
  const recordBytes = recordFloats(config.valueDimPadded) * 4;
  const final = config.result === 'final';

  const spansOf = (unit: Unit): Binding[] => {
    const [h0, h1] = unit.heads;
    const kv = keyHeads(unit.heads, groupSize);
    const keyRange = extent(tiles, unit.tiles, ({ sequence }) => {
      const { keyRow, keyLength } = records[sequence] as SequenceRecord;
      const first = Math.min(keyLength, unit.splits[0] * splits.span);
      const last = Math.min(keyLength, unit.splits[1] * splits.span);
      return [keyRow + first, keyRow + roundUp(Math.max(last, first + 1), KEY_BLOCK)];
    });
    const outputRange = extent(tiles, unit.tiles, ({ sequence, first, count }) => {
      const start = (records[sequence] as SequenceRecord).output + first * output.tokenStride;
      return [start, start + (count - 1) * output.tokenStride + problem.valueDim];
    });
    const outputStart = outputRange[0] + h0 * output.headStride;
    const outputEnd = outputRange[1] + (h1 - 1) * output.headStride;
    const bindings: Binding[] = [
      tablesBinding(stages),
      rowSpan(
        2,
        'queryRows',
        queryBytes,
        stages.rowsPerQueryHead,
        unit.heads,
        // Rows are read by whole tiles.
        extent(tiles, unit.tiles, ({ sequence, first }) => {
          const row = (records[sequence] as SequenceRecord).queryRow + first;
          return [row, row + kernel.rows];
        }),
      ),
      rowSpan(3, 'keys', queryBytes, keyValue.rowsPerHead, kv, keyRange),
      rowSpan(4, 'values', valueBytes, keyValue.rowsPerHead, kv, keyRange),
    ];
    if (config.mask !== undefined && mask !== undefined) {
      const [, headStride, queryStride, keyStride] = mask.strides;
      const [low, high] = extent(tiles, unit.tiles, ({ sequence, first, count }) => {
        const { mask: start, keyLength } = records[sequence] as SequenceRecord;
        const row = start + first * queryStride;
        return [
          row + Math.min(keyLength, unit.splits[0] * splits.span) * keyStride,
          row +
            (count - 1) * queryStride +
            Math.max(0, Math.min(keyLength, unit.splits[1] * splits.span) - 1) * keyStride +
            1,
        ];
      });
      const bytes = BYTES_PER_ELEMENT[mask.dtype];
      bindings.push({
        slot: 5,
        buffer: 'mask',
        start: (low + h0 * headStride) * bytes,
        end: (high + (h1 - 1) * headStride) * bytes,
      });
    }
    if (final) {
      bindings.push({ slot: 6, buffer: 'output', start: outputStart * outputBytes, end: outputEnd * outputBytes });
      if (config.returnLse) {
        const [low, high] = extent(tiles, unit.tiles, ({ sequence, first, count }) => {
          const start = (records[sequence] as SequenceRecord).lse + first;
          return [start, start + count];
        });
        bindings.push({
          slot: 7,
          buffer: 'lse',
          start: (low + h0 * lseHeadStride) * 4,
          end: (high + (h1 - 1) * lseHeadStride) * 4,
        });
      }
    } else {
      const row = recordBytes * splits.count;
      bindings.push({
        slot: 6,
        buffer: 'records',
        start: (outputStart / problem.valueDim) * row,
        end: Math.ceil(outputEnd / problem.valueDim) * row,
      });
    }
    if (config.scaleValues) bindings.push(partialSpan(stages, 8, kv));
    return bindings;
  };

  return launchesOf(
    stages,
    kernel.label,
    kernel.source(config),
    allOf(tiles, queryHeads, splits.count),
    spansOf,
    (unit, base) =>
      encodeParams(ATTENTION_PARAMS, {
        tileStart: unit.tiles[0],
        headStart: unit.heads[0],
        groupSize,
        sequences: keyValue.sequences,
        chunks: keyValue.chunks,
        sequencesAt: stages.sequencesAt,
        tilesAt,
        queryRowsPerHead: stages.rowsPerQueryHead,
        keyRowsPerHead: keyValue.rowsPerHead,
        queryRowBase: base('queryRows') / 16,
        keyRowBase: base('keys') / 16,
        valueRowBase: base('values') / 8,
        partialBase: base('partials') / 16,
        outputHeadStride: output.headStride,
        outputTokenStride: output.tokenStride,
        outputBase: base('output') / outputBytes,
        lseHeadStride,
        lseBase: base('lse') / 4,
        maskHeadStride: mask?.strides[1] ?? 0,
        maskQueryStride: mask?.strides[2] ?? 0,
        maskKeyStride: mask?.strides[3] ?? 0,
        maskBase: mask === undefined ? 0 : base('mask') / BYTES_PER_ELEMENT[mask.dtype],
        keyStart: unit.splits[0] * splits.span,
        keySpan: splits.span,
        splitIndex: unit.splits[0],
        splits: splits.count,
        recordBase: base('records') / 4,
        softcap: problem.softcap,
      }),
  ).filter(() => queryLength > 0);
}

const lseHeadStrideOf = ({ sequences, batch, queryLength }: AttentionProblem) =>
  sequences === undefined ? queryLength : (sequences.cuSeqlensQ[batch] as number);

/** Bytes of the partial results of a problem. */
export const recordsBytes = (problem: AttentionProblem, splits: KeySplits): number =>
  (elementCount(outputShapeOf(problem)) / problem.valueDim) * splits.count * recordFloats(padDim(problem.valueDim)) * 4;

/** Joins partial results; words of the output take the place of tiles, in batches of one workgroup. */
export function mergeLaunches(stages: Stages, config: ScoreConfig, splits: KeySplits): Launch[] {
  const { problem, capabilities } = stages;
  const { valueDim, queryHeads, queryLength, tensorLayout, sequences, batch, dtype } = problem;
  const elements = elementCount(outputShapeOf(problem));
  const headsInner = sequences !== undefined || tensorLayout === 'NHD';
  const perWord = 4 / BYTES_PER_ELEMENT[dtype];
  const words = Math.ceil(elements / perWord);
  const recordBytes = recordFloats(config.valueDimPadded) * 4 * splits.count;
  const batches = Array.from({ length: Math.ceil(words / MERGE_THREADS) }, (_, i) => i);
  const wordsOf = (unit: Unit) =>
    [unit.tiles[0] * MERGE_THREADS, Math.min(words, unit.tiles[1] * MERGE_THREADS)] as const;
  const tokens = sequences === undefined ? queryLength : (sequences.cuSeqlensQ[batch] as number);
  // Records are bound from a whole number of them, so that a row's index stays an integer.
  const recordAlignment = leastCommonMultiple(recordBytes, capabilities.bindingAlignment);
  const spansOf = (unit: Unit): Binding[] => {
    const [start, end] = wordsOf(unit);
    const firstRow = Math.floor((start * perWord) / valueDim);
    const lastRow = Math.floor((Math.min(elements, end * perWord) - 1) / valueDim);
    const from = Math.floor((firstRow * recordBytes) / recordAlignment) * recordAlignment;
    return [
      { slot: 1, buffer: 'records', start: from, end: (lastRow + 1) * recordBytes },
      { slot: 6, buffer: 'output', start: start * 4, end: end * 4 },
      ...(config.returnLse ? [{ slot: 7, buffer: 'lse' as const, start: 0, end: (elements / valueDim) * 4 }] : []),
    ];
  };
  return launchesOf(stages, 'merge', mergeKernel(config, headsInner), allOf(batches, 1), spansOf, (unit, base) => {
    const [start, end] = wordsOf(unit);
    return encodeParams(MERGE_PARAMS, {
      wordStart: start,
      wordEnd: end,
      elements,
      splits: splits.count,
      heads: queryHeads,
      tokens,
      rowBase: base('records') / recordBytes,
      outputWordBase: base('output') / 4,
      lseBase: base('lse') / 4,
      softcap: problem.softcap,
    });
  });
}

function leastCommonMultiple(a: number, b: number): number {
  let [x, y] = [a, b];
  while (y !== 0) [x, y] = [y, x % y];
  return (a / x) * b;
}

/** What a problem's attention kernels are configured with. */
export function scoreConfigOf(stages: Stages, splits: KeySplits, keyScale: 'token' | 'tile'): ScoreConfig {
  const { problem } = stages;
  const { dtype, headDim, valueDim, mask, keyLength, softcap, returnLse } = problem;
  // Two rows of 16-bit elements share a word when Dv is odd; the merging kernel writes words from partial results.
  const sharesWords = dtype !== 'float32' && valueDim % 2 === 1;
  return {
    dtype,
    headDimPadded: padDim(headDim),
    valueDim,
    valueDimPadded: padDim(valueDim),
    mask: keyLength === 0 ? undefined : mask?.dtype,
    softcap: softcap > 0,
    returnLse,
    scaleValues: stages.keyValue.scaleValues,
    smoothV: stages.keyValue.smoothV,
    keyScale,
    result: splits.count > 1 || sharesWords ? 'partial' : 'final',
  };
}

/** What Q's scales are multiplied with: the caller's scale, and log2(e) where scores are in base 2. */
export const scoreScaleOf = (problem: AttentionProblem, config: ScoreConfig): number =>
  problem.smScale * (naturalUnits(config) ? 1 : Math.LOG2E);
