/** The scales of Q: loaded, or found while the kernel quantizes the caller's Q itself. */
import { fenceProxyAsync } from '../../ptx/tma.ts';
import type { Reg } from '../../ptx/types.ts';
import { offset, offset64 } from '../parts/addresses.ts';
import { INFINITY_BITS, LOG2_E, MAGIC, SMALLEST_GROUP_MAXIMUM } from '../parts/constants.ts';
import { BYTES, unpackPair } from '../parts/elements.ts';
import { at, maxOf } from '../parts/lists.ts';
import { quadMax, quadSum } from '../parts/quad.ts';
import type { WgmmaConfig } from './config.ts';
import { CONSUMER_ROWS, type Frame } from './frame.ts';
import { type ConsumerThread, eachRow, type Rows } from './rows.ts';
import type { Work } from './work.ts';

/** Scales of this thread's rows, times |smScale| * log2(e); one where they share it. */
export function loadQueryScales({ b, config, pointer, smScale }: Frame, rows: Rows): Reg<'f32'>[] {
  const [scaleRows, scaleCount] = config.queryScales;
  const toBase2 = b.mul(b.abs(b.loadParameter(smScale)), LOG2_E);
  const scaleOf = (r: number) => {
    const row = rows.padded(r);
    const set = b.shr(row, Math.log2(scaleRows));
    // Rows beyond the end repeat the last token, with its group.
    const index = scaleCount === 8 ? b.add(b.shl(set, 3), b.and(row, 7)) : set;
    const scale = b.ld('f32', offset(b, b.loadPointer(pointer.queryScale), index, 4), 0, { readOnly: true });
    return b.mul(scale, toBase2);
  };
  // Rows g and g + 8 of a warp lie in one group of 16 or more tokens, unless rows are heads.
  return config.packedHeads === 1 ? [scaleOf(0)] : eachRow(scaleOf);
}

/** Four channels in every 16 of a row. */
type RowValues = readonly (readonly Reg<'f32'>[])[];

/**
 * Quantizes this consumer's rows of the caller's Q into shared memory, and their products with the mean of K beside
 * them. Returns what {@link loadQueryScales} does; rows g and g + 8 of a warp share a scale, or have one each.
 */
export function quantizeQuery(frame: Frame, thread: ConsumerThread, work: Work, rows: Rows): Reg<'f32'>[] {
  const { b, config, smScale, warpgroup } = frame;
  b.section('quantize Q');
  const query = config.fusedQuery as NonNullable<WgmmaConfig['fusedQuery']>;
  const signed = b.mul(b.loadParameter(smScale), LOG2_E);
  // Threads of the group may still read the last item's.
  b.namedBarrier('bar.sync', b.add(warpgroup, 8), 128);
  const channelTerm = b.shl(thread.t, 2);
  const values = eachRow((r) => loadRow(frame, work, rows, r, channelTerm));
  const faulty: Reg<'pred'>[] = [];
  const rowMaxima = values.map((row) => {
    let own = b.constant('u32', 0);
    for (const value of row.flat()) own = b.max(own, b.and(b.as(value, 'u32'), 0x7fffffff));
    own = quadMax(b, own);
    const fault = b.setp('ge', own, INFINITY_BITS);
    b.when(fault, () => b.set(own, 0));
    faulty.push(fault);
    return own;
  });
  const groups = config.queryScalePerRow ? rowMaxima : [maxOf(rowMaxima, (x, y) => b.max(x, y))];
  const maxima = groups.map((largest) => {
    const maximum = b.as(largest, 'f32');
    b.when(b.setp('lt', maximum, SMALLEST_GROUP_MAXIMUM), () => b.set(maximum, 0));
    return maximum;
  });
  // The codes have the sign of smScale.
  const reciprocals = maxima.map((maximum) => {
    const signedLargest = b.selp(-127, b.constant('f32', 127), b.setp('lt', signed, 0));
    const reciprocal = b.divF32(signedLargest, maximum);
    b.when(b.setp('eq', maximum, 0), () => b.set(reciprocal, 0));
    return reciprocal;
  });
  const magic = b.constant('f32', MAGIC);
  values.forEach((row, r) => {
    const reciprocal = at(reciprocals, config.queryScalePerRow ? r : 0);
    storeCodes(frame, thread, r, row, channelTerm, (value) => b.fma(value, reciprocal, magic));
    let bias = b.constant('f32', 0);
    // Where only differences of a row's scores count, the mean key's share falls out.
    const sinksApart = config.split && !config.joins;
    const wholeScores = config.lse || sinksApart || config.softcap || config.sinks !== 'none';
    if (query.keyMean && wholeScores) {
      bias = meanScore(frame, thread, work, row, query.headDim, signed);
    }
    b.when(at(faulty, r), () => b.set(bias, Number.NaN));
    const biasAt = rows.biasAddress(r);
    b.when(b.setp('eq', thread.t, 0), () => b.st(bias, biasAt));
  });
  fenceProxyAsync(b);
  b.namedBarrier('bar.sync', b.add(warpgroup, 8), 128);
  return maxima.map((maximum) => b.mul(b.mul(maximum, 1 / 127), b.abs(signed)));
}

/** A row's channels of this thread: 4t to 4t + 3 of every 16; 0 beyond D and for a row that does not exist. */
function loadRow(
  { b, config, pointer, strides }: Frame,
  work: Work,
  rows: Rows,
  r: number,
  channelTerm: Reg<'u32'>,
): RowValues {
  const { dtype, headDim } = config.fusedQuery as NonNullable<WgmmaConfig['fusedQuery']>;
  const bytes = BYTES[dtype];
  const row = rows.row(r);
  const token = rows.token(row);
  const inside = b.setp('lt', token, work.queryLength);
  let source = offset64(b, b.loadPointer(pointer.query), work.sequence, b.loadParameter(strides.queryBatch));
  source = offset64(b, source, rows.head(row), b.loadParameter(strides.queryHead));
  source = offset64(b, source, b.add(work.queryStart, token), b.loadParameter(strides.queryToken));
  source = offset(b, source, channelTerm, bytes);
  return Array.from({ length: config.qkRowBytes / 16 }, (_, c) => {
    const words = b.regs('b32', bytes);
    for (const word of words) b.set(word, 0);
    if (16 * c < headDim) {
      const left = headDim - 16 * c;
      const guard = left >= 16 ? inside : b.andPred(inside, b.setp('lt', channelTerm, left));
      b.when(guard, () => b.ldVector('b32', bytes as 2 | 4, source, 16 * c * bytes, { readOnly: true, into: words }));
    }
    return dtype === 'float32'
      ? words.map((word) => b.as(word, 'f32'))
      : words.flatMap((word) => unpackPair(b, dtype, word));
  });
}

/** @param encode gives the code in the low byte */
function storeCodes(
  { b, plan, bytes }: Frame,
  thread: ConsumerThread,
  r: number,
  row: RowValues,
  channelTerm: Reg<'u32'>,
  encode: (value: Reg<'f32'>) => Reg<'f32'>,
): void {
  const { rowLayout } = plan;
  const inGroup = b.sub(b.add(thread.firstRow, 8 * r), b.mul(thread.group, CONSUMER_ROWS));
  const permutation = b.shl(b.and(b.shr(inGroup, rowLayout.rowShift), rowLayout.rowMask), 4);
  const rowAt = b.add(b.mul(inGroup, rowLayout.rowBytes), channelTerm);
  row.forEach((four, c) => {
    const words = four.map((value) => b.as(encode(value), 'b32'));
    const packed = b.prmt(
      b.prmt(at(words, 0), at(words, 1), 0x0040),
      b.prmt(at(words, 2), at(words, 3), 0x0040),
      0x5410,
    );
    const [block, chunk] = [Math.floor((16 * c) / rowLayout.rowBytes), (16 * c) % rowLayout.rowBytes];
    // The chunk's bits are zero in the row's address, so that adding and XORing them is the same.
    const place = b.add(thread.groupQuery, b.as(b.xor(b.add(rowAt, chunk), permutation), 'shared'));
    b.st(packed, place, block * bytes.queryBlock);
  });
}

/** smScale * log2(e) * q . mean(K), over the four lanes that hold a row. */
function meanScore(
  { b, config, integer, pointer }: Frame,
  { t }: ConsumerThread,
  { sequence, keyHead }: Work,
  row: RowValues,
  headDim: number,
  signed: Reg<'f32'>,
): Reg<'f32'> {
  const keyHeads = b.div(b.loadParameter(integer.queryHeads), b.loadParameter(integer.headsPerKeyHead));
  const means = b.loadPointer(pointer.keyMean);
  const channel = b.mad(b.mad(sequence, keyHeads, keyHead), config.qkRowBytes, b.shl(t, 2));
  const mean = offset(b, means, channel, 4);
  let dot = b.constant('f32', 0);
  row.forEach((four, c) => {
    if (16 * c >= headDim) return;
    const ofChunk = b.ldVector('f32', 4, mean, 64 * c, { readOnly: true });
    for (const [i, value] of four.entries()) dot = b.fma(value, at(ofChunk, i), dot);
  });
  return b.mul(quadSum(b, dot), signed);
}
