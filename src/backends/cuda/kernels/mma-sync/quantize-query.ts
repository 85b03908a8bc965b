/**
 * Q quantized by the attention kernel itself, for decoding: up to eight rows, each with a scale of its own, by all warps of the CTA together.
 * INT8 codes as `quantize/tokens.ts` makes them, or FP16 in the order of `unpackCodes`.
 */
import type { Reg } from '../../ptx/types.ts';
import { inversePower, unitOf } from '../fp4/e2m1.ts';
import { offset, offset64 } from '../parts/addresses.ts';
import { INFINITY_BITS, MAGIC, SMALLEST_GROUP_MAXIMUM } from '../parts/constants.ts';
import { laneOffset } from '../parts/copies.ts';
import { BYTES, loadEight, loadEightFloats } from '../parts/elements.ts';
import { at } from '../parts/lists.ts';
import { blockQueries } from './config.ts';
import type { Frame, ThreadPlace, Work } from './frame.ts';

/** Lanes that hold a row, eight channels each. */
const ROW_LANES = 16;

/** What a thread holds of a row. */
interface RowPart {
  readonly row: Reg<'u32'>;
  readonly channel: Reg<'u32'>;
  readonly values: readonly Reg<'f32'>[];
}

/** Quantizes the tile's rows into shared memory, with their scales and biases; zeros for rows that do not exist. A barrier must follow. */
export function quantizeQuery(frame: Frame, work: Work): void {
  const { b, config, fused } = frame;
  if (fused === undefined) return;
  b.section('quantize Q');
  const thread = b.special('%tid.x');
  const lane = b.and(thread, 31);
  const rowsAtOnce = 2 * config.keyWarps;
  const passes = Math.ceil(blockQueries(config) / rowsAtOnce);
  const firstRow = b.add(b.shl(b.shr(thread, 5), 1), b.shr(lane, 4));
  const channel = b.shl(b.and(lane, ROW_LANES - 1), 3);
  // All loads are under way before the first is needed.
  const parts = Array.from({ length: passes }, (_, pass) =>
    loadPart(frame, work, b.add(firstRow, pass * rowsAtOnce), channel),
  );
  const mean = config.fusedQuery?.keyMean === true ? loadMean(frame, work, channel) : undefined;
  const isFirst = b.setp('eq', b.and(lane, ROW_LANES - 1), 0);
  for (const part of parts) {
    const bias = biasOf(frame, part, mean);
    const { scale, store } = config.qkFormat === 's8' ? codesOf(frame, part) : halvesOf(frame, part);
    const inTile = b.setp('lt', part.row, blockQueries(config));
    const isStored = b.andPred(inTile, b.setp('lt', channel, paddedDimOf(frame)));
    b.if(isStored, store);
    const place = b.add(b.sharedAddress(fused.rows.base), b.as(b.shl(part.row, 3), 'shared'));
    b.when(b.andPred(isFirst, inTile), () => b.stVector([scale, bias], place));
  }
}

/** The scale of a thread's row g, times the scale of all scores. */
export function quantizedScale(frame: Frame, { g }: ThreadPlace): Reg<'f32'> {
  const { b, fused } = frame;
  if (fused === undefined) throw new Error('Q is quantized elsewhere');
  const place = b.add(b.sharedAddress(fused.rows.base), b.as(b.shl(g, 3), 'shared'));
  return b.mul(b.ld('f32', place), b.loadParameter(frame.scoreScale));
}

const paddedDimOf = ({ config }: Frame) => (config.qkFormat === 's8' ? config.queryRowBytes : config.queryRowBytes / 2);

function loadPart(frame: Frame, work: Work, row: Reg<'u32'>, channel: Reg<'u32'>): RowPart {
  const { b, config, pointer, fused } = frame;
  if (fused === undefined || config.fusedQuery === undefined) throw new Error('Q is quantized elsewhere');
  const { dtype, headDim, loadWidth } = config.fusedQuery;
  const { queryBatch, queryHead, queryToken } = fused.parameters;
  const token = b.add(work.firstRow, row);
  const inside = b.setp('lt', token, work.queryLength);
  let source = offset64(b, b.loadPointer(pointer.query), work.sequence, b.loadParameter(queryBatch));
  source = offset64(b, source, work.head, b.loadParameter(queryHead));
  source = offset64(b, source, b.add(work.queryStart, token), b.loadParameter(queryToken));
  source = offset(b, source, channel, BYTES[dtype]);
  return { row, channel, values: loadEight(b, dtype, loadWidth, source, channel, headDim, inside) };
}

/** Means of a thread's eight channels of K; zeros beyond the row. */
function loadMean(frame: Frame, { sequence, keyHead }: Work, channel: Reg<'u32'>): Reg<'f32'>[] {
  const { b, integer, fused } = frame;
  if (fused === undefined) throw new Error('Q is quantized elsewhere');
  const paddedDim = paddedDimOf(frame);
  const keyHeads = b.div(b.loadParameter(integer.queryHeads), b.loadParameter(integer.headsPerKeyHead));
  // In pages one vector for each head serves all sequences.
  const ofHead = frame.pages === undefined ? b.mad(sequence, keyHeads, keyHead) : keyHead;
  const row = b.mad(ofHead, paddedDim, channel);
  const from = offset(b, b.loadPointer(fused.parameters.keyMean), row, 4);
  const mean = Array.from({ length: 8 }, () => b.constant('f32', 0));
  b.if(b.setp('lt', channel, paddedDim), () => {
    loadEightFloats(b, from).forEach((value, i) => {
      b.mov(value, mean[i]);
    });
  });
  return mean;
}

/** smScale * log2(e) * q . mean(K), 0 where nothing asks for it; NaN for a row that is not finite. */
function biasOf({ b, fused }: Frame, { values }: RowPart, mean: readonly Reg<'f32'>[] | undefined): Reg<'f32'> {
  if (fused === undefined) throw new Error('Q is quantized elsewhere');
  let dot = b.constant('f32', 0);
  values.forEach((value, i) => {
    dot = b.fma(value, mean === undefined ? 0 : at(mean, i), dot);
  });
  for (let lanes = 1; lanes < ROW_LANES; lanes *= 2) dot = b.add(dot, b.shflBfly(dot, lanes));
  const bias = b.mul(dot, b.loadParameter(fused.signedScale));
  // Infinity minus Infinity: an infinite element makes its row NaN too.
  return b.add(bias, b.mul(bias, 0));
}

/** A row's largest magnitude, 0 where it is not finite or too small to divide by. */
function largestOf({ b }: Frame, { values }: RowPart): Reg<'f32'> {
  let largest = b.constant('u32', 0);
  for (const value of values) largest = b.max(largest, b.and(b.as(value, 'u32'), 0x7fffffff));
  for (let lanes = 1; lanes < ROW_LANES; lanes *= 2) largest = b.max(largest, b.shflBfly(largest, lanes));
  b.when(b.setp('ge', largest, INFINITY_BITS), () => b.set(largest, 0));
  const maximum = b.as(largest, 'f32');
  b.when(b.setp('lt', maximum, SMALLEST_GROUP_MAXIMUM), () => b.set(maximum, 0));
  return maximum;
}

/** The sign of smScale is in what Q becomes: attention takes positive scales only. */
const isNegative = ({ b, fused }: Frame) =>
  b.setp('lt', b.loadParameter((fused as NonNullable<Frame['fused']>).signedScale), 0);

function codesOf(frame: Frame, part: RowPart) {
  const { b, tiles } = frame;
  const { row, channel, values } = part;
  const maximum = largestOf(frame, part);
  const reciprocal = b.divF32(b.selp(-127, b.constant('f32', 127), isNegative(frame)), maximum);
  b.when(b.setp('eq', maximum, 0), () => b.set(reciprocal, 0));
  const magic = b.constant('f32', MAGIC);
  const store = () => {
    const words = values.map((value) => b.as(b.fma(value, reciprocal, magic), 'b32'));
    const packed = [0, 4].map((i) =>
      b.prmt(
        b.prmt(at(words, i), at(words, i + 1), 0x0040),
        b.prmt(at(words, i + 2), at(words, i + 3), 0x0040),
        0x5410,
      ),
    );
    const own = b.add(laneOffset(b, tiles.query.layout, row, b.shr(channel, 4)), b.as(b.and(channel, 8), 'shared'));
    b.stVector(packed, b.add(b.sharedAddress(tiles.query.base), own));
  };
  return { scale: b.divF32(maximum, 127), store };
}

/** Values over the power of two that brings the largest into FP16's range. */
function halvesOf(frame: Frame, part: RowPart) {
  const { b, tiles } = frame;
  const { row, channel, values } = part;
  const maximum = largestOf(frame, part);
  const unit = unitOf(b, maximum);
  const factor = inversePower(b, unit);
  b.when(b.setp('eq', maximum, 0), () => b.set(factor, 0));
  b.when(isNegative(frame), () => b.neg(factor, factor));
  const store = () => {
    const halves = values.map((value) => b.mul(value, factor));
    const quarter = b.as(b.shr(b.and(channel, 24), 1), 'shared');
    const first = b.shl(b.shr(channel, 5), 2);
    for (let i = 0; i < 4; i++) {
      const own = b.add(laneOffset(b, tiles.query.layout, row, b.add(first, i)), quarter);
      b.st(b.cvtPack('f16x2', at(halves, i), at(halves, i + 4)), b.add(b.sharedAddress(tiles.query.base), own));
    }
  };
  return { scale: unit, store };
}
