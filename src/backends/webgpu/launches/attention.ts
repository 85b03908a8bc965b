/** Attention over quantized keys: its splits, its kernel's configuration, its launches. */
import { type AttentionProblem, outputLayoutOf, outputShapeOf } from '../../../attention/problem.ts';
import { BYTES_PER_ELEMENT } from '../../../tensor/dtype.ts';
import { elementCount } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import { chooseVariant, type Forced } from '../families/choose.ts';
import type { AttentionKernel, AttentionVariant } from '../families/family.ts';
import { encodeParams, padDim, rowVectors } from '../kernels/layout.ts';
import { KEY_BLOCK } from '../kernels/prepare.ts';
import { ATTENTION_PARAMS, recordFloats, type ScoreConfig, scoresAreFloat } from '../kernels/scores.ts';
import { roundUp } from '../kernels/storage.ts';
import type { Binding, BufferName, Launch, Unit } from './launch.ts';
import { mergeLaunches, recordsBytes } from './merge.ts';
import { prepareQueryLaunches } from './quantize.ts';
import {
  allOf,
  extent,
  type KeySplits,
  keyHeads,
  launchesOf,
  partialSpan,
  rowSpan,
  type SequenceRecord,
  type Stages,
  tablesBinding,
  tilesOf,
} from './stages.ts';

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

const LARGEST_FLOAT32 = 3.4e38;

/** Below this many workgroups the keys are split among more of them (a decoder's single query). */
const ENOUGH_WORKGROUPS = 128;
/** A split has at least this many blocks of keys: less is not worth its share of merging. */
const BLOCKS_PER_SPLIT = 4;

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
    if (config.values.scaled) bindings.push(partialSpan(stages, 8, kv));
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
        inverseSoftcap: problem.softcap > 0 ? Math.min(1 / problem.softcap, LARGEST_FLOAT32) : 0,
      }),
  ).filter(() => queryLength > 0);
}

const lseHeadStrideOf = ({ sequences, batch, queryLength }: AttentionProblem) =>
  sequences === undefined ? queryLength : (sequences.cuSeqlensQ[batch] as number);

/** What a problem's attention kernels are configured with. */
export function scoreConfigOf(stages: Stages, splits: KeySplits): ScoreConfig {
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
    values: stages.keyValue.values,
    sharedScale: stages.keyValue.sharedScale,
    result: splits.count > 1 || sharesWords ? 'partial' : 'final',
  };
}

/** What Q's scales are multiplied with: the caller's scale, and log2(e) where scores are in base 2. */
export function scoreScaleOf(problem: AttentionProblem, config: ScoreConfig): number {
  const scale = problem.smScale * (scoresAreFloat(config) ? 1 : Math.LOG2E);
  return Math.max(-LARGEST_FLOAT32, Math.min(LARGEST_FLOAT32, scale));
}

/** The stages of attention over keys that are in scratch or in a cache. */
export interface AttentionParts {
  readonly launches: readonly Launch[];
  readonly sizes: Partial<Record<BufferName, number>>;
  readonly variant: AttentionVariant;
  readonly keySplits: number;
}

/** Launches for Q, attention and merging, and the scratch that they take. */
export function attentionParts(stages: Stages, choice: KernelChoice, options: Forced): AttentionParts {
  const { problem, capabilities } = stages;
  const variant = chooseVariant(capabilities, problem, choice, options);
  const splits = keySplitsOf(stages, variant.kernel.rows);
  const config = scoreConfigOf(stages, splits);
  const empty = elementCount(outputShapeOf(problem)) === 0;
  const launches = empty
    ? []
    : [
        ...prepareQueryLaunches(stages, scoreScaleOf(problem, config)),
        ...attentionLaunches(stages, config, variant.kernel, splits),
        ...(config.result === 'partial' ? mergeLaunches(stages, config, splits) : []),
      ];
  const sizes: Partial<Record<BufferName, number>> = {
    queryRows: problem.queryHeads * stages.rowsPerQueryHead * rowVectors(padDim(problem.headDim)) * 16,
    ...(config.result === 'partial' ? { records: recordsBytes(problem, splits) } : {}),
  };
  return { launches, sizes, variant, keySplits: splits.count };
}
