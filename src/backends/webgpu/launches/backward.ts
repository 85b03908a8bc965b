/** Gradients of attention: the launches of a backward call. */
import { type BackwardProblem, gradientShapesOf, maskGradientSizes } from '../../../attention/backward.ts';
import { type AttentionProblem, sequencesOf } from '../../../attention/problem.ts';
import { BYTES_PER_ELEMENT, type DType } from '../../../tensor/dtype.ts';
import { elementCount, type OperandLayout } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import type { Capabilities } from '../capabilities.ts';
import { chooseGradients, type GradientKernel, type GradientVariant } from '../families/backward.ts';
import { type Forced, keyValueLayoutOf } from '../families/choose.ts';
import { GRADIENT_CODES_PARAMS, gradientCodesKernel } from '../kernels/backward/codes.ts';
import { GRADIENT_PARAMS } from '../kernels/backward/gradients.ts';
import {
  GRADIENT_BLOCK,
  type GradientDims,
  gradientKey,
  gradientRow,
  PLACE,
  PLACE_WORDS,
} from '../kernels/backward/layout.ts';
import { MASK_GRADIENT_PARAMS, maskGradientKernel } from '../kernels/backward/mask.ts';
import { NARROW_PARAMS, NARROW_WORDS, narrowKernel } from '../kernels/backward/narrow.ts';
import {
  GRADIENT_KEYS_PARAMS,
  GRADIENT_ROWS_PARAMS,
  gradientKeysKernel,
  gradientRowsKernel,
} from '../kernels/backward/prepare.ts';
import { SOFTMAX_AGAIN_PARAMS, softmaxAgainKernel } from '../kernels/backward/softmax.ts';
import { encodeParams, padDim } from '../kernels/layout.ts';
import { KEY_BLOCK } from '../kernels/prepare.ts';
import { type ScoreMeaning, scoresAreFloat } from '../kernels/scores.ts';
import { roundUp } from '../kernels/storage.ts';
import { inverseQuarterSoftcapOf, lseHeadStrideOf, scoreScaleOf } from './attention.ts';
import type { Binding, BufferName, Launch, Unit } from './launch.ts';
import { keyValueBytes, keyValueShapeOf, prepareLaunches, statisticsLaunches } from './quantize.ts';
import {
  accessOf,
  allOf,
  createStages,
  extent,
  keyHeads,
  keyValueRowBytes,
  launchesOf,
  operandSpan,
  partialSpan,
  queryRowBytes,
  rowSpan,
  type SequenceRecord,
  type Stages,
  type Tile,
  tablesBinding,
  tilesOf,
} from './stages.ts';
import { visibleKeysBytes, visibleKeysLaunches } from './visible-keys.ts';

/** The dispatches of a backward call, in order, and the buffers of its own that it needs. */
export interface BackwardLaunches {
  readonly launches: readonly Launch[];
  /** Names of the gradient kernels' variants. */
  readonly variants: Readonly<Record<'query' | 'key', string>>;
  /** Bytes of each buffer. */
  readonly sizes: Partial<Record<BufferName, number>>;
  /** Contents of the buffer `tables`. */
  readonly tables: Uint32Array<ArrayBuffer>;
}

type Placed = keyof typeof PLACE;
type GradientName = 'dq' | 'dk' | 'dv';

/** What the launches of a backward call share. */
interface Backward {
  readonly problem: BackwardProblem;
  readonly attention: AttentionProblem;
  readonly stages: Stages;
  readonly meaning: ScoreMeaning;
  readonly dims: GradientDims;
  /** First element of each sequence's part of each tensor. */
  readonly places: readonly Readonly<Record<Placed, number>>[];
  readonly placesAt: number;
  readonly layouts: Readonly<Record<Exclude<Placed, 'lse'>, OperandLayout>>;
  /** Heads of Q that share a head of K. */
  readonly groupSize: number;
  readonly queryTiles: (size: number) => Tile[];
  readonly keyTiles: (size: number) => Tile[];
}

/** Bytes of a row of the gradient kernels' buffers. */
const gradientRowBytes = ({ dims }: Pick<Backward, 'dims'>) => gradientRow(dims).vectors * 16;
const gradientKeyBytes = ({ dims }: Pick<Backward, 'dims'>) => gradientKey(dims).vectors * 16;

function createBackward(problem: BackwardProblem, stages: Stages, dims: GradientDims): Backward {
  const { attention } = problem;
  const gradients = gradientShapesOf(attention);
  const layouts = {
    output: problem.output,
    dOutput: problem.dOutput,
    dq: gradients.dq.layout,
    dk: gradients.dk.layout,
    dv: gradients.dv.layout,
  };
  const places = sequencesOf(attention).map(({ index, queryStart, keyStart }, i) => {
    const at = ({ offset, batchStride, tokenStride }: OperandLayout, token: number) =>
      offset + index * batchStride + token * tokenStride;
    return {
      output: at(layouts.output, queryStart),
      dOutput: at(layouts.dOutput, queryStart),
      lse: problem.lseOffset + (stages.records[i] as SequenceRecord).lse,
      dq: at(layouts.dq, queryStart),
      dk: at(layouts.dk, keyStart),
      dv: at(layouts.dv, keyStart),
    };
  });
  const words = places.flatMap((place) => {
    const record = new Array<number>(PLACE_WORDS).fill(0);
    for (const [name, index] of Object.entries(PLACE)) record[index] = place[name as Placed];
    return record;
  });
  const { records } = stages;
  return {
    problem,
    attention,
    stages,
    meaning: {
      mask: attention.keyLength === 0 ? undefined : attention.mask?.dtype,
      softcap: attention.softcap > 0,
    },
    dims,
    places,
    placesAt: stages.tables.words(words),
    layouts,
    groupSize: attention.queryHeads / Math.max(1, attention.kvHeads),
    queryTiles: (size) =>
      tilesOf(
        records.map(({ queryLength }) => queryLength),
        size,
      ),
    keyTiles: (size) =>
      tilesOf(
        records.map(({ keyLength }) => keyLength),
        size,
      ),
  };
}

/** Span of a tensor's elements that the tiles of some heads reach. */
function placedSpan(
  { places, layouts }: Backward,
  slot: number,
  name: Exclude<Placed, 'lse'>,
  buffer: BufferName,
  dim: number,
  bytes: number,
  tiles: readonly Tile[],
  unit: Unit,
): Binding {
  const { headStride, tokenStride } = layouts[name];
  const [low, high] = extent(tiles, unit.tiles, ({ sequence, first, count }) => {
    const start = (places[sequence] as Record<Placed, number>)[name] + first * tokenStride;
    return [start, start + (count - 1) * tokenStride + dim];
  });
  const [h0, h1] = unit.heads;
  return { slot, buffer, start: (low + h0 * headStride) * bytes, end: (high + (h1 - 1) * headStride) * bytes };
}

/** Rows of some heads of queries, from each tile's first to the end of its block; or of all of its sequence's. */
const queryRowSpan = (
  { stages }: Backward,
  slot: number,
  buffer: BufferName,
  rowBytes: number,
  heads: readonly [number, number],
  tiles: readonly Tile[],
  unit: Unit,
  whole: boolean,
) =>
  rowSpan(
    slot,
    buffer,
    rowBytes,
    stages.rowsPerQueryHead,
    heads,
    extent(tiles, unit.tiles, ({ sequence, first, count }) => {
      const { queryRow, queryLength } = stages.records[sequence] as SequenceRecord;
      return whole
        ? [queryRow, queryRow + roundUp(Math.max(1, queryLength), GRADIENT_BLOCK)]
        : [queryRow + first, queryRow + roundUp(first + count, GRADIENT_BLOCK)];
    }),
  );

/** The same of keys. */
const keyRowSpan = (
  { stages }: Backward,
  slot: number,
  buffer: BufferName,
  rowBytes: number,
  heads: readonly [number, number],
  tiles: readonly Tile[],
  unit: Unit,
  whole: boolean,
) =>
  rowSpan(
    slot,
    buffer,
    rowBytes,
    stages.keyValue.rowsPerHead,
    heads,
    extent(tiles, unit.tiles, ({ sequence, first, count }) => {
      const { keyRow, keyLength } = stages.records[sequence] as SequenceRecord;
      return whole
        ? [keyRow, keyRow + roundUp(Math.max(1, keyLength), KEY_BLOCK)]
        : [keyRow + first, keyRow + roundUp(first + count, GRADIENT_BLOCK)];
    }),
  );

/** Span of the mask that some heads' queries have; all of their keys. */
function maskSpan(
  { stages, attention }: Backward,
  heads: readonly [number, number],
  tiles: readonly Tile[],
  unit: Unit,
  whole: boolean,
) {
  const { mask } = attention;
  if (mask === undefined) return [];
  const [, headStride, queryStride, keyStride] = mask.strides;
  const [low, high] = extent(tiles, unit.tiles, ({ sequence, first, count }) => {
    const { mask: start, keyLength, queryLength } = stages.records[sequence] as SequenceRecord;
    const [from, to] = whole ? [0, queryLength] : [first, first + count];
    const row = start + from * queryStride;
    return [row, row + Math.max(0, to - from - 1) * queryStride + Math.max(0, keyLength - 1) * keyStride + 1];
  });
  const bytes = BYTES_PER_ELEMENT[mask.dtype];
  const start = (low + heads[0] * headStride) * bytes;
  return [{ slot: 5, buffer: 'mask' as const, start, end: (high + (heads[1] - 1) * headStride) * bytes }];
}

/** Values of the parameters that every kernel with scores computed anew has. */
const rowParams = ({ stages }: Backward, base: (buffer: BufferName) => number) => ({
  sequencesAt: stages.sequencesAt,
  queryRowsPerHead: stages.rowsPerQueryHead,
  keyRowsPerHead: stages.keyValue.rowsPerHead,
  queryRowBase: base('queryRows') / 16,
  keyRowBase: base('keys') / 16,
  gradientRowBase: base('gradientRows') / 16,
});

const maskParams = ({ attention: { mask, softcap } }: Backward, base: (buffer: BufferName) => number) => ({
  maskHeadStride: mask?.strides[1] ?? 0,
  maskQueryStride: mask?.strides[2] ?? 0,
  maskKeyStride: mask?.strides[3] ?? 0,
  maskBase: mask === undefined ? 0 : base('mask') / BYTES_PER_ELEMENT[mask.dtype],
  softcap,
  inverseQuarterSoftcap: inverseQuarterSoftcapOf(softcap),
});

/** Rows of Q and dO, and how each row's weights come from its logsumexp. */
function gradientRowsLaunches(self: Backward): Launch[] {
  const { stages, attention, layouts, dims, meaning, places, problem } = self;
  const { dtype, headDim, valueDim, queryHeads } = attention;
  const tiles = self.queryTiles(GRADIENT_BLOCK);
  const tilesAt = stages.tables.tiles(tiles);
  const bytes = BYTES_PER_ELEMENT[dtype];
  const lseHeadStride = lseHeadStrideOf(attention);
  const code = gradientRowsKernel({
    ...dims,
    dtype,
    queryAccess: accessOf(dtype, [attention.q], [headDim]),
    outputAccess: accessOf(dtype, [problem.output], [valueDim]),
    headDim,
    valueDim,
    softcap: meaning.softcap,
    natural: scoresAreFloat(meaning),
  });
  return launchesOf(
    stages,
    'gradient rows',
    code,
    allOf(tiles, queryHeads),
    (unit) => {
      const [low, high] = extent(tiles, unit.tiles, ({ sequence, first, count }) => {
        const start = (places[sequence] as Record<Placed, number>).lse + first;
        return [start, start + count];
      });
      const [h0, h1] = unit.heads;
      return [
        tablesBinding(stages),
        operandSpan(stages, 2, 'q', tiles, unit),
        placedSpan(self, 3, 'dOutput', 'dOutput', valueDim, bytes, tiles, unit),
        placedSpan(self, 4, 'output', 'output', valueDim, bytes, tiles, unit),
        { slot: 5, buffer: 'lse', start: (low + h0 * lseHeadStride) * 4, end: (high + (h1 - 1) * lseHeadStride) * 4 },
        queryRowSpan(self, 6, 'queryRows', queryRowBytes(stages.keyValue), unit.heads, tiles, unit, false),
        queryRowSpan(self, 7, 'gradientRows', gradientRowBytes(self), unit.heads, tiles, unit, false),
      ];
    },
    (unit, base) =>
      encodeParams(GRADIENT_ROWS_PARAMS, {
        tileStart: unit.tiles[0],
        headStart: unit.heads[0],
        sequencesAt: stages.sequencesAt,
        tilesAt,
        placesAt: self.placesAt,
        qHeadStride: attention.q.headStride,
        qTokenStride: attention.q.tokenStride,
        qBase: base('q') / bytes,
        outputHeadStride: layouts.output.headStride,
        outputTokenStride: layouts.output.tokenStride,
        outputBase: base('output') / bytes,
        dOutputHeadStride: layouts.dOutput.headStride,
        dOutputTokenStride: layouts.dOutput.tokenStride,
        dOutputBase: base('dOutput') / bytes,
        lseHeadStride,
        lseBase: base('lse') / 4,
        rowsPerHead: stages.rowsPerQueryHead,
        queryRowBase: base('queryRows') / 16,
        gradientRowBase: base('gradientRows') / 16,
      }),
  );
}

/** Rows of K and V. */
function gradientKeysLaunches(self: Backward): Launch[] {
  const { stages, attention, dims, meaning } = self;
  const { keyValue } = stages;
  const { dtype, headDim, valueDim, kvHeads, k, v } = attention;
  const tiles = self.keyTiles(GRADIENT_BLOCK);
  const tilesAt = stages.tables.tiles(tiles);
  const bytes = BYTES_PER_ELEMENT[dtype];
  // A cap bends the scores: rows of dS do not add up to 0 then, and the mean counts.
  const smoothed = keyValue.smoothK && !meaning.softcap;
  const access = accessOf(dtype, [k, v], [headDim, valueDim]);
  return launchesOf(
    stages,
    'gradient keys',
    gradientKeysKernel({ ...dims, dtype, access, headDim, valueDim, smoothed }),
    allOf(tiles, kvHeads),
    (unit) => [
      tablesBinding(stages),
      operandSpan(stages, 2, 'k', tiles, unit),
      operandSpan(stages, 3, 'v', tiles, unit),
      ...(smoothed ? [partialSpan(stages, 4, unit.heads)] : []),
      keyRowSpan(self, 5, 'gradientKeys', gradientKeyBytes(self), unit.heads, tiles, unit, false),
      ...(dims.half
        ? [keyRowSpan(self, 6, 'keys', keyValueRowBytes(keyValue).keys, unit.heads, tiles, unit, false)]
        : []),
    ],
    (unit, base) =>
      encodeParams(GRADIENT_KEYS_PARAMS, {
        tileStart: unit.tiles[0],
        headStart: unit.heads[0],
        sequences: keyValue.sequences,
        chunks: keyValue.chunks,
        sequencesAt: stages.sequencesAt,
        tilesAt,
        kHeadStride: k.headStride,
        kTokenStride: k.tokenStride,
        kBase: base('k') / bytes,
        vHeadStride: v.headStride,
        vTokenStride: v.tokenStride,
        vBase: base('v') / bytes,
        rowsPerHead: keyValue.rowsPerHead,
        partialBase: base('partials') / 16,
        keyRowBase: base('keys') / 16,
        gradientKeyBase: base('gradientKeys') / 16,
      }),
  );
}

/** Softmax of the rows whose logsumexp does not serve. */
function softmaxAgainLaunches(self: Backward): Launch[] {
  const { stages, attention, dims, meaning, groupSize } = self;
  const tiles = self.queryTiles(GRADIENT_BLOCK);
  const tilesAt = stages.tables.tiles(tiles);
  const codes = { query: queryRowBytes(stages.keyValue), key: keyValueRowBytes(stages.keyValue).keys };
  return launchesOf(
    stages,
    'softmax again',
    softmaxAgainKernel({ ...meaning, ...dims, packedDot: stages.capabilities.packedDot }),
    allOf(tiles, attention.queryHeads),
    (unit) => [
      tablesBinding(stages),
      queryRowSpan(self, 2, 'queryRows', codes.query, unit.heads, tiles, unit, false),
      keyRowSpan(self, 3, 'keys', codes.key, keyHeads(unit.heads, groupSize), tiles, unit, true),
      queryRowSpan(self, 4, 'gradientRows', gradientRowBytes(self), unit.heads, tiles, unit, false),
      ...(meaning.mask === undefined ? [] : maskSpan(self, unit.heads, tiles, unit, false)),
    ],
    (unit, base) =>
      encodeParams(SOFTMAX_AGAIN_PARAMS, {
        tileStart: unit.tiles[0],
        headStart: unit.heads[0],
        groupSize,
        tilesAt,
        ...rowParams(self, base),
        ...maskParams(self, base),
      }),
  );
}

/** Codes of Q and dO, and of K, in the rows that there are. */
function gradientCodesLaunches(self: Backward): Launch[] {
  const { stages, attention, dims } = self;
  return (['query', 'key'] as const).flatMap((operands) => {
    const ofQueries = operands === 'query';
    const tiles = ofQueries ? self.queryTiles(GRADIENT_BLOCK) : self.keyTiles(GRADIENT_BLOCK);
    const tilesAt = stages.tables.tiles(tiles);
    const buffer = ofQueries ? 'gradientRows' : 'gradientKeys';
    const rowBytes = ofQueries ? gradientRowBytes(self) : gradientKeyBytes(self);
    return launchesOf(
      stages,
      `gradient codes, ${ofQueries ? 'Q and dO' : 'K'}`,
      gradientCodesKernel({ ...dims, operands }),
      allOf(tiles, ofQueries ? attention.queryHeads : attention.kvHeads),
      (unit) => [
        tablesBinding(stages),
        (ofQueries ? queryRowSpan : keyRowSpan)(self, 2, buffer, rowBytes, unit.heads, tiles, unit, false),
      ],
      (unit, base) =>
        encodeParams(GRADIENT_CODES_PARAMS, {
          tileStart: unit.tiles[0],
          headStart: unit.heads[0],
          sequencesAt: stages.sequencesAt,
          tilesAt,
          rowsPerHead: ofQueries ? stages.rowsPerQueryHead : stages.keyValue.rowsPerHead,
          rowBase: base(buffer) / 16,
          blockTokens: GRADIENT_BLOCK,
        }),
    );
  });
}

/** Where a gradient is written: its own buffer, or float32 that is narrowed afterwards. */
interface Target {
  readonly buffer: BufferName;
  readonly dtype: DType;
}

function targetOf({ problem, attention }: Backward, name: GradientName): Target {
  const dim = name === 'dv' ? attention.valueDim : attention.headDim;
  const dtype = problem.gradientDtype;
  // Two rows of 16-bit elements share a word when a row has an odd number.
  if (dtype === 'float32' || dim % 2 === 0) return { buffer: name, dtype };
  return { buffer: `${name}Wide`, dtype: 'float32' };
}

/** dQ, or dK and dV. */
function gradientLaunches(self: Backward, owner: 'query' | 'key', kernel: GradientKernel): Launch[] {
  const { stages, attention, dims, meaning, groupSize, layouts } = self;
  const { headDim, valueDim, queryHeads, kvHeads, smScale } = attention;
  const ownsQueries = owner === 'query';
  const tiles = ownsQueries ? self.queryTiles(kernel.own) : self.keyTiles(kernel.own);
  const tilesAt = stages.tables.tiles(tiles);
  const [name, first, value] = ownsQueries
    ? (['dq', targetOf(self, 'dq'), undefined] as const)
    : (['dk', targetOf(self, 'dk'), targetOf(self, 'dv')] as const);
  const codes = { query: queryRowBytes(stages.keyValue), key: keyValueRowBytes(stages.keyValue).keys };
  const heads = ({ heads: own }: Unit) => {
    const query = ownsQueries ? own : ([own[0] * groupSize, own[1] * groupSize] as const);
    return { query, key: ownsQueries ? keyHeads(own, groupSize) : own };
  };
  const code = kernel.source({
    ...meaning,
    ...dims,
    dtypes: [first.dtype, value?.dtype ?? first.dtype],
    headDim,
    valueDim,
  });
  const bytesOf = ({ dtype }: Target) => BYTES_PER_ELEMENT[dtype];
  return launchesOf(
    stages,
    `${ownsQueries ? 'dQ' : 'dK, dV'} ${kernel.name}`,
    code,
    allOf(tiles, ownsQueries ? queryHeads : kvHeads),
    (unit) => {
      const { query, key } = heads(unit);
      return [
        tablesBinding(stages),
        queryRowSpan(self, 2, 'queryRows', codes.query, query, tiles, unit, !ownsQueries),
        keyRowSpan(self, 3, 'keys', codes.key, key, tiles, unit, ownsQueries),
        queryRowSpan(self, 4, 'gradientRows', gradientRowBytes(self), query, tiles, unit, !ownsQueries),
        ...(meaning.mask === undefined ? [] : maskSpan(self, query, tiles, unit, !ownsQueries)),
        keyRowSpan(self, 6, 'gradientKeys', gradientKeyBytes(self), key, tiles, unit, ownsQueries),
        placedSpan(self, 7, name, first.buffer, headDim, bytesOf(first), tiles, unit),
        ...(value === undefined
          ? []
          : [placedSpan(self, 8, 'dv', value.buffer, valueDim, bytesOf(value), tiles, unit)]),
      ];
    },
    (unit, base) =>
      encodeParams(GRADIENT_PARAMS, {
        tileStart: unit.tiles[0],
        headStart: unit.heads[0],
        groupSize,
        tilesAt,
        placesAt: self.placesAt,
        ...rowParams(self, base),
        gradientKeyBase: base('gradientKeys') / 16,
        ...maskParams(self, base),
        firstHeadStride: layouts[name].headStride,
        firstTokenStride: layouts[name].tokenStride,
        firstBase: base(first.buffer) / bytesOf(first),
        valueHeadStride: layouts.dv.headStride,
        valueTokenStride: layouts.dv.tokenStride,
        valueBase: value === undefined ? 0 : base(value.buffer) / bytesOf(value),
        smScale,
        codeVectors: codes.query / 16 - 1,
        valueVectors: dims.valueDimPadded / 4,
        passingThreads: kernel.passingThreads ?? 0,
      }),
  );
}

/** Where a unit's part of the mask, or of its gradient, is: `axes` are its first and last index of each dimension. */
const maskExtent = (strides: readonly number[], axes: readonly (readonly [number, number])[]) =>
  ([0, 1] as const).map((end) =>
    axes.reduce((sum, [first, last], i) => sum + (end === 0 ? first : last) * (strides[i] as number), 0),
  ) as [number, number];

/** The gradient of the mask. */
function maskGradientLaunches(self: Backward, tile: GradientVariant): Launch[] {
  const { problem, stages, attention, dims, meaning, groupSize } = self;
  const { mask, queryHeads, batch, headDim, valueDim } = attention;
  if (problem.maskGradient === undefined || mask === undefined) return [];
  const sizes = maskGradientSizes(problem.maskGradient);
  const [maskBatches, maskHeads, maskRows, maskKeys] = sizes;
  const [sumsRows, sumsKeys] = [maskRows === 1, maskKeys === 1];
  const strides = [maskHeads * maskRows * maskKeys, maskRows * maskKeys, maskKeys, 1];
  const codes = { query: queryRowBytes(stages.keyValue), key: keyValueRowBytes(stages.keyValue).keys };
  const maskBytes = BYTES_PER_ELEMENT[mask.dtype];
  const code = maskGradientKernel({
    ...meaning,
    ...dims,
    ...tile,
    ...{ headDim, valueDim, sumsRows, sumsKeys, packedDot: stages.capabilities.packedDot },
  });
  /** Last index of each dimension of the unit's elements. */
  const axesOf = ({ tiles, heads, splits }: Unit) => {
    const several = heads[1] - heads[0] > 1;
    const between = (span: readonly [number, number], size: number, whole: number) =>
      [span[0] * size, Math.min(span[1] * size, whole) - 1] as const;
    return [
      several ? ([0, maskBatches - 1] as const) : ([heads[0] % maskBatches, heads[0] % maskBatches] as const),
      [Math.floor(heads[0] / maskBatches), Math.floor((heads[1] - 1) / maskBatches)] as const,
      between(tiles, tile.own, maskRows),
      between(splits, tile.passing, maskKeys),
    ] as const;
  };
  const whole: Unit = {
    tiles: [0, Math.ceil(maskRows / tile.own)],
    heads: [0, maskHeads * maskBatches],
    splits: [0, Math.ceil(maskKeys / tile.passing)],
  };
  return launchesOf(
    stages,
    `dMask ${tile.name}`,
    code,
    whole,
    (unit) => {
      const axes = axesOf(unit);
      const query = maskHeads > 1 ? ([axes[1][0], axes[1][1] + 1] as const) : ([0, queryHeads] as const);
      const key = keyHeads(query, groupSize);
      const rows = [0, stages.rowsPerQueryHead] as const;
      const keyRows = [0, stages.keyValue.rowsPerHead] as const;
      const [maskFirst, maskLast] = maskExtent(mask.strides, axes);
      const [first, last] = maskExtent(strides, axes);
      return [
        tablesBinding(stages),
        rowSpan(2, 'queryRows', codes.query, rows[1], query, rows),
        rowSpan(3, 'keys', codes.key, keyRows[1], key, keyRows),
        rowSpan(4, 'gradientRows', gradientRowBytes(self), rows[1], query, rows),
        {
          slot: 5,
          buffer: 'mask' as const,
          start: (mask.offset + maskFirst) * maskBytes,
          end: (mask.offset + maskLast + 1) * maskBytes,
        },
        rowSpan(6, 'gradientKeys', gradientKeyBytes(self), keyRows[1], key, keyRows),
        { slot: 7, buffer: 'dMask' as const, start: first * 4, end: (last + 1) * 4 },
      ];
    },
    (unit, base) =>
      encodeParams(MASK_GRADIENT_PARAMS, {
        rowTileStart: unit.tiles[0],
        laneStart: unit.heads[0],
        keyTileStart: unit.splits[0],
        groupSize,
        sequences: batch,
        heads: queryHeads,
        ...{ maskBatches, maskHeads, maskRows, maskKeys },
        gradientBase: base('dMask') / 4,
        ...rowParams(self, base),
        gradientKeyBase: base('gradientKeys') / 16,
        ...maskParams(self, base),
        codeVectors: codes.query / 16 - 1,
        valueVectors: dims.valueDimPadded / 4,
      }),
  );
}

/** From float32 to the gradient's own type, where that was not written at once. */
function narrowLaunches(self: Backward, counts: Readonly<Record<GradientName, number>>): Launch[] {
  return (['dq', 'dk', 'dv'] as const).flatMap((name) => {
    const { buffer } = targetOf(self, name);
    const count = counts[name];
    if (buffer === name) return [];
    const blocks = Array.from({ length: Math.ceil(count / 2 / NARROW_WORDS) });
    return launchesOf(
      self.stages,
      `narrow ${name}`,
      narrowKernel(self.problem.gradientDtype),
      allOf(blocks, 1),
      ({ tiles: [start, end] }) => [
        { slot: 1, buffer, start: start * NARROW_WORDS * 8, end: Math.min(count, end * NARROW_WORDS * 2) * 4 },
        { slot: 2, buffer: name, start: start * NARROW_WORDS * 4, end: Math.min(count, end * NARROW_WORDS * 2) * 2 },
      ],
      ({ tiles: [blockStart] }, base) =>
        encodeParams(NARROW_PARAMS, { blockStart, count, fromBase: base(buffer) / 4, toBase: base(name) / 4 }),
    );
  });
}

/**
 * Quantizes Q and K as the forward pass does, makes rows of what they are made of, and computes dQ, then dK and dV.
 *
 * @throws {UnsupportedOptionError} a forced family that the device cannot run
 */
export function planBackwardLaunches(
  capabilities: Capabilities,
  problem: BackwardProblem,
  kernel: KernelChoice,
  forced: Forced = {},
): BackwardLaunches {
  const { attention } = problem;
  // The codes of the family that attends, laid out in rows.
  const forward = keyValueShapeOf(
    attention,
    kernel,
    capabilities,
    keyValueLayoutOf(capabilities, attention, kernel, forced),
  );
  const keyValue = { ...forward, layout: 'rows' as const };
  const stages = createStages(attention, capabilities, keyValue);
  const dims = { headDimPadded: padDim(attention.headDim), valueDimPadded: padDim(attention.valueDim) };
  const kernels = chooseGradients(capabilities, dims, forced, problem.precision, problem.maskGradient !== undefined);
  const { half, codes } = kernels;
  const self = createBackward(problem, stages, { ...dims, half, codes });
  const shapes = gradientShapesOf(attention);
  const counts = {
    dq: elementCount(shapes.dq.shape),
    dk: elementCount(shapes.dk.shape),
    dv: elementCount(shapes.dv.shape),
  };
  // Where there is no query or no key, gradients are zeros, which new buffers hold.
  const queries = stages.records.some(({ queryLength }) => queryLength > 0);
  const keys = stages.records.some(({ keyLength }) => keyLength > 0);
  const empty = !queries || !keys || attention.queryHeads === 0;
  const launches = empty
    ? []
    : [
        ...visibleKeysLaunches(stages),
        ...statisticsLaunches(stages),
        ...prepareLaunches(stages, scoreScaleOf(attention, self.meaning)),
        ...gradientKeysLaunches(self),
        ...gradientRowsLaunches(self),
        ...softmaxAgainLaunches(self),
        ...(codes ? gradientCodesLaunches(self) : []),
        ...gradientLaunches(self, 'query', kernels.query),
        ...gradientLaunches(self, 'key', kernels.key),
        ...maskGradientLaunches(self, kernels.mask),
        ...narrowLaunches(self, counts),
      ];
  const wide = (['dq', 'dk', 'dv'] as const)
    .filter((name) => targetOf(self, name).buffer !== name)
    .map((name) => [targetOf(self, name).buffer, counts[name] * 4] as const);
  const sizes: Partial<Record<BufferName, number>> = {
    ...keyValueBytes(keyValue),
    ...visibleKeysBytes(stages),
    queryRows: attention.queryHeads * stages.rowsPerQueryHead * queryRowBytes(keyValue),
    gradientRows: attention.queryHeads * stages.rowsPerQueryHead * gradientRowBytes(self),
    gradientKeys: attention.kvHeads * keyValue.rowsPerHead * gradientKeyBytes(self),
    ...Object.fromEntries(wide),
  };
  const variants = { query: kernels.query.name, key: kernels.key.name };
  return { launches, variants, sizes, tables: stages.tables.bytes };
}
