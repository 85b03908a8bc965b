/** Joining the partial results of rows. */
import { type AttentionProblem, outputShapeOf } from '../../../attention/problem.ts';
import { BYTES_PER_ELEMENT } from '../../../tensor/dtype.ts';
import { elementCount } from '../../../tensor/tensor.ts';
import { encodeParams, padDim } from '../kernels/layout.ts';
import {
  MERGE_PARAMS,
  MERGE_ROW_SPLITS,
  MERGE_ROW_THREADS,
  MERGE_ROWS_PARAMS,
  MERGE_THREADS,
  mergeKernel,
  mergeRowsKernel,
} from '../kernels/merge.ts';
import { recordFloats, type ScoreConfig } from '../kernels/scores.ts';
import type { Binding, Launch, Unit } from './launch.ts';
import { allOf, type KeySplits, launchesOf, type Stages } from './stages.ts';

/** Bytes of the partial results of a problem. */
export const recordsBytes = (problem: AttentionProblem, splits: KeySplits): number =>
  (elementCount(outputShapeOf(problem)) / problem.valueDim) * splits.count * recordFloats(padDim(problem.valueDim)) * 4;

/** From this many parts of a row on, a workgroup to a row is faster than a thread to a word, which waits for one after the other. */
const MANY_SPLITS = 8;

/** Whether a row's parts are joined by a workgroup of its own: no other row's elements lie in its words. */
const mergedByRows = (
  { problem }: Stages,
  { fp4, returnLse, sinks, valueDimPadded }: ScoreConfig,
  { count }: KeySplits,
) =>
  count >= MANY_SPLITS &&
  count <= MERGE_ROW_SPLITS &&
  valueDimPadded / 4 <= MERGE_ROW_THREADS &&
  (problem.dtype === 'float32' || problem.valueDim % 2 === 0) &&
  !(fp4?.weights === true && (returnLse || sinks));

/** Where a row's parts lie, and its logsumexp. */
function recordsOf({ problem, capabilities }: Stages, { valueDimPadded }: ScoreConfig, { count }: KeySplits) {
  const { tensorLayout, sequences, queryLength, batch } = problem;
  const recordBytes = recordFloats(valueDimPadded) * 4 * count;
  const alignment = leastCommonMultiple(recordBytes, capabilities.bindingAlignment);
  return {
    recordBytes,
    /** Records are bound from a whole number of them, so that a row's index stays an integer. */
    bindingStart: (firstRow: number) => Math.floor((firstRow * recordBytes) / alignment) * alignment,
    headsInner: sequences !== undefined || tensorLayout === 'NHD',
    tokens: sequences === undefined ? queryLength : (sequences.cuSeqlensQ[batch] as number),
  };
}

/** Joins partial results, a workgroup to a row. */
function mergeRowsLaunches(stages: Stages, config: ScoreConfig, splits: KeySplits): Launch[] {
  const { problem } = stages;
  const { valueDim, queryHeads, dtype } = problem;
  const bytes = BYTES_PER_ELEMENT[dtype];
  const rows = elementCount(outputShapeOf(problem)) / valueDim;
  const { recordBytes, bindingStart, headsInner, tokens } = recordsOf(stages, config, splits);
  const spansOf = ({ tiles: [from, to] }: Unit): Binding[] => [
    { slot: 1, buffer: 'records', start: bindingStart(from), end: to * recordBytes },
    { slot: 6, buffer: 'output', start: from * valueDim * bytes, end: to * valueDim * bytes },
    ...(config.returnLse ? [{ slot: 7, buffer: 'lse' as const, start: 0, end: rows * 4 }] : []),
  ];
  const each = Array.from({ length: rows }, (_, row) => row);
  return launchesOf(
    stages,
    'merge rows',
    mergeRowsKernel(config, headsInner),
    allOf(each, 1),
    spansOf,
    ({ tiles: [rowStart] }, base) =>
      encodeParams(MERGE_ROWS_PARAMS, {
        rowStart,
        splits: splits.count,
        heads: queryHeads,
        tokens,
        rowBase: base('records') / recordBytes,
        outputBase: base('output') / bytes,
        lseBase: base('lse') / 4,
      }),
  );
}

/** Joins partial results; words of the output take the place of tiles, in batches of one workgroup. */
export function mergeLaunches(stages: Stages, config: ScoreConfig, splits: KeySplits): Launch[] {
  if (mergedByRows(stages, config, splits)) return mergeRowsLaunches(stages, config, splits);
  const { problem } = stages;
  const { valueDim, queryHeads, dtype } = problem;
  const elements = elementCount(outputShapeOf(problem));
  const { recordBytes, bindingStart, headsInner, tokens } = recordsOf(stages, config, splits);
  const perWord = 4 / BYTES_PER_ELEMENT[dtype];
  const words = Math.ceil(elements / perWord);
  const batches = Array.from({ length: Math.ceil(words / MERGE_THREADS) }, (_, i) => i);
  const wordsOf = (unit: Unit) =>
    [unit.tiles[0] * MERGE_THREADS, Math.min(words, unit.tiles[1] * MERGE_THREADS)] as const;
  const spansOf = (unit: Unit): Binding[] => {
    const [start, end] = wordsOf(unit);
    const firstRow = Math.floor((start * perWord) / valueDim);
    const lastRow = Math.floor((Math.min(elements, end * perWord) - 1) / valueDim);
    return [
      { slot: 1, buffer: 'records', start: bindingStart(firstRow), end: (lastRow + 1) * recordBytes },
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
    });
  });
}

function leastCommonMultiple(a: number, b: number): number {
  let [x, y] = [a, b];
  while (y !== 0) [x, y] = [y, x % y];
  return (a / x) * b;
}
