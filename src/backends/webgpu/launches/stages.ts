/**
 * What the stages of a computation share: sequences and tiles as tables, spans of buffers, launches over ranges of
 * them.
 */

import { bandOf, visibleKeys } from '../../../attention/band.ts';
import { type AttentionProblem, outputLayoutOf, sequencesOf } from '../../../attention/problem.ts';
import type { ScaleSearch } from '../../../quantization/fp4-blocks.ts';
import { BYTES_PER_ELEMENT, type DType } from '../../../tensor/dtype.ts';
import type { OperandLayout } from '../../../tensor/tensor.ts';
import type { Capabilities } from '../capabilities.ts';
import { fp4KeyWords, fp4QueryVectors, fp4ValueWords } from '../kernels/fp4.ts';
import { type KeyValueLayout, padDim, rowVectors, SEQUENCE, SEQUENCE_WORDS, wrap32 } from '../kernels/layout.ts';
import { KEY_BLOCK, QUERY_BLOCK, type ValueScaling } from '../kernels/prepare.ts';
import { statisticsVectors } from '../kernels/statistics.ts';
import { type Access, roundUp } from '../kernels/storage.ts';
import { aligned, type Binding, type BufferName, type Launch, type Unit, unitsOf } from './launch.ts';

/** One sequence of a run: lengths, where its rows are in scratch, where its elements are in the tensors. */
export interface SequenceRecord {
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
  readonly visibleFrom: number;
  readonly visibleTo: number;
}

export interface Tile {
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
  readonly values: ValueScaling;
  /** The keys of a block share a scale where their magnitudes allow it. */
  readonly sharedScale: boolean;
  readonly layout: KeyValueLayout;
  readonly format: 'int8' | 'fp4';
  /** How scales of FP4 blocks are found. */
  readonly scaleSearch?: ScaleSearch;
  /** For later queries: tokens may be added one at a time, and of FP4 only keys and values are in it. */
  readonly held: boolean;
}

/** Bytes of a token's row of quantized K and of V. */
export const keyValueRowBytes = ({ format, headDim, valueDim, values }: KeyValueShape) =>
  format === 'fp4'
    ? { keys: fp4KeyWords(padDim(headDim)) * 4, values: fp4ValueWords(padDim(valueDim)) * 4 }
    : { keys: rowVectors(padDim(headDim)) * 16, values: padDim(valueDim) * (values.integers ? 1 : 2) };

/** Bytes of a row of quantized Q. */
export const queryRowBytes = ({ format, headDim }: KeyValueShape): number =>
  (format === 'fp4' ? fp4QueryVectors(padDim(headDim)) : rowVectors(padDim(headDim))) * 16;

export const tilesOf = (lengths: readonly number[], size: number): Tile[] =>
  lengths.flatMap((length, sequence) =>
    Array.from({ length: Math.ceil(length / size) }, (_, i) => ({
      sequence,
      first: i * size,
      count: Math.min(size, length - i * size),
    })),
  );

/**
 * Tiles of the tokens from `first` on. None crosses a block: appended tokens fill the last block up first, as a group of their own.
 */
export const appendedTiles = (records: readonly SequenceRecord[], first: number): Tile[] =>
  records.flatMap(({ keyLength }, sequence) => {
    const list: Tile[] = [];
    for (let token = first; token < keyLength; ) {
      const end = Math.min(keyLength, (Math.floor(token / KEY_BLOCK) + 1) * KEY_BLOCK);
      list.push({ sequence, first: token, count: end - token });
      token = end;
    }
    return list;
  });

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

  /** Words of another table; offsets are taken modulo 2^32. */
  words(words: readonly number[]): number {
    const at = this.#words.length;
    for (const word of words) this.#words.push(wrap32(word));
    return at;
  }

  get bytes(): Uint32Array<ArrayBuffer> {
    return Uint32Array.from(this.#words.length === 0 ? [0] : this.#words);
  }
}

export const accessOf = (dtype: DType, layouts: readonly OperandLayout[], dims: readonly number[]): Access => {
  const bytes = BYTES_PER_ELEMENT[dtype];
  const whole = layouts.every(({ offset, batchStride, headStride, tokenStride }) =>
    [offset, batchStride, headStride, tokenStride].every((n) => (n * bytes) % 16 === 0),
  );
  return whole && dims.every((dim) => dim % 16 === 0) ? 'vector' : 'scalar';
};

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

/**
 * Records of a problem's sequences.
 *
 * @param keyRows first row of each sequence within a head of K in scratch
 * @param firstToken which token of each sequence is the first of `problem`'s k and v: 0 but for appends
 */
export function recordsOf(
  problem: AttentionProblem,
  keyRows: readonly number[],
  firstToken = 0,
): Pick<Stages, 'records' | 'rowsPerQueryHead'> {
  const output = outputLayoutOf(problem);
  let queryRow = 0;
  const total = problem.sequences?.cuSeqlensQ[problem.batch] ?? 0;
  const records = sequencesOf(problem).map((sequence): SequenceRecord => {
    const { index, queryStart, queryLength, keyStart, keyLength } = sequence;
    const at = ({ offset, batchStride, tokenStride }: OperandLayout, token: number) =>
      offset + index * batchStride + token * tokenStride;
    const [visibleFrom, visibleTo] = visibleKeys(problem, sequence);
    const from = Math.max(visibleFrom, firstToken);
    const record = {
      queryLength,
      keyLength,
      queryRow,
      keyRow: keyRows[index] as number,
      ...bandOf(problem, sequence),
      output: at(output, queryStart),
      lse: total > 0 || problem.sequences !== undefined ? queryStart : index * problem.queryHeads * queryLength,
      mask: problem.mask === undefined ? 0 : problem.mask.offset + index * problem.mask.strides[0],
      qSource: at(problem.q, queryStart),
      kSource: at(problem.k, keyStart - firstToken),
      vSource: at(problem.v, keyStart - firstToken),
      visibleFrom: from,
      visibleTo: Math.max(from, visibleTo),
    };
    queryRow += roundUp(queryLength, QUERY_BLOCK);
    return record;
  });
  return { records, rowsPerQueryHead: queryRow };
}

/** @param firstToken as of {@link recordsOf} */
export function createStages(
  problem: AttentionProblem,
  capabilities: Capabilities,
  keyValue: KeyValueShape,
  firstToken = 0,
): Stages {
  const tables = new Tables();
  const rows = recordsOf(problem, keyValue.keyRows, firstToken);
  return { problem, capabilities, keyValue, tables, ...rows, sequencesAt: tables.sequences(rows.records) };
}

/** Least and greatest of a function over some tiles. */
export function extent(
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

/** Rows within a head of the blocks of keys that a unit's tiles lie in. */
export const blockRows = ({ records }: Stages, tiles: readonly Tile[], unit: Unit) =>
  extent(tiles, unit.tiles, ({ sequence, first, count }) => {
    const { keyRow } = records[sequence] as SequenceRecord;
    const start = Math.floor(first / KEY_BLOCK) * KEY_BLOCK;
    return [keyRow + start, keyRow + roundUp(first + count, KEY_BLOCK)];
  });

/** Span of an operand's elements that the tiles of some heads reach. */
export function operandSpan(
  stages: Pick<Stages, 'problem' | 'records'>,
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

/** Where K and V lie, as kernels that quantize them are told: strides, and where their bindings begin, in elements. */
export function keyValueSources({ problem }: Pick<Stages, 'problem'>, base: (buffer: BufferName) => number) {
  const { k, v } = problem;
  const bytes = BYTES_PER_ELEMENT[problem.dtype];
  return {
    kHeadStride: k.headStride,
    kTokenStride: k.tokenStride,
    kBase: base('k') / bytes,
    vHeadStride: v.headStride,
    vTokenStride: v.tokenStride,
    vBase: base('v') / bytes,
  };
}

/** Span of scratch rows; `rowOf` gives a tile's rows within a head. */
export function rowSpan(
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

export function tablesBinding(stages: Pick<Stages, 'tables'>): Binding {
  return { slot: 1, buffer: 'tables', start: 0, end: stages.tables.bytes.byteLength };
}

/** Span of the statistics of some key heads and all their sequences. */
export function partialSpan(
  stages: Stages,
  slot: number,
  heads: readonly [number, number],
  buffer: BufferName = 'partials',
  { keyValue }: Pick<Stages, 'keyValue'> = stages,
): Binding {
  const record = statisticsVectors(padDim(keyValue.headDim), padDim(keyValue.valueDim)) * 16;
  const perHead = keyValue.sequences * keyValue.chunks * record;
  return { slot, buffer, start: heads[0] * perHead, end: heads[1] * perHead };
}

/** Launches of one stage: its units, each with its bindings aligned and their bases among the parameters. */
export function launchesOf(
  stages: Pick<Stages, 'capabilities'>,
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

export const allOf = (tiles: readonly unknown[], heads: number, splits = 1): Unit => ({
  tiles: [0, tiles.length],
  heads: [0, heads],
  splits: [0, splits],
});

export const keyHeads = ([start, end]: readonly [number, number], groupSize: number): readonly [number, number] => [
  Math.floor(start / groupSize),
  Math.floor((end - 1) / groupSize) + 1,
];

/** Key splits of a problem: every split covers `span` keys, a multiple of the key block. */
export interface KeySplits {
  readonly count: number;
  readonly span: number;
}
