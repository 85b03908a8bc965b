/**
 * The caller's 16-bit operands on their way to shared memory, whatever their strides. Rows beyond a sequence and channels
 * beyond D are zeros there.
 */
import type { SharedTile } from '../../ptx/layouts.ts';
import type { Reg } from '../../ptx/types.ts';
import { offset, offset64 } from '../parts/addresses.ts';
import { nextPowerOfTwo } from '../parts/constants.ts';
import { laneOffset } from '../parts/copies.ts';
import { type LoadWidth, loadEightPacked } from '../parts/elements.ts';
import type { Frame, KeyPlace, Work } from './frame.ts';

/** Rows of one of the caller's tensors. */
interface GivenRows {
  /** Of the head's first token that counts, and bytes from one token to the next. */
  readonly base: Reg<'global'>;
  readonly stride: Reg<'u64'>;
  /** The tile's first token, and how many the sequence has. */
  readonly first: Reg<'u32'>;
  readonly length: Reg<'u32'>;
  /** Channels, and the same padded. */
  readonly dim: number;
  readonly paddedDim: number;
  readonly width: LoadWidth;
}

function copyRows(frame: Frame, tile: SharedTile, into: Reg<'shared'>, rows: GivenRows, thread: Reg<'u32'>): void {
  const { b, config, threads } = frame;
  const { base, stride, first, length, dim, paddedDim, width } = rows;
  const chunks = paddedDim / 8;
  const columns = nextPowerOfTwo(chunks);
  const index = b.mov(thread);
  const dtype = config.qkFormat === 'f16' ? 'float16' : 'bfloat16';
  b.loop(
    () => b.setp('lt', index, tile.rows * columns),
    () => {
      const [row, chunk] = [b.shr(index, Math.log2(columns)), b.and(index, columns - 1)];
      const token = b.add(first, row);
      const channel = b.shl(chunk, 3);
      const inside = b.andPred(b.setp('lt', token, length), b.setp('lt', channel, dim));
      const destination = b.add(into, laneOffset(b, tile.layout, row, chunk));
      const source = offset(b, offset64(b, base, token, stride), channel, 2);
      const copy = () => {
        if (width === 8) {
          b.if(
            inside,
            () => b.cpAsync16(destination, source),
            () => {
              const zero = b.constant('b32', 0);
              b.stVector([zero, zero, zero, zero], destination);
            },
          );
          return;
        }
        const insideAt = (at: number) => (at === 0 ? inside : b.andPred(inside, b.setp('lt', b.add(channel, at), dim)));
        b.stVector(loadEightPacked(b, dtype, width, source, insideAt), destination);
      };
      if (chunks === columns) copy();
      else b.if(b.setp('lt', chunk, chunks), copy);
      b.add(index, threads, index);
    },
  );
}

/** The CTA's rows of Q. */
export function copyGivenQuery(frame: Frame, { sequence, head, queryStart, queryLength, firstRow }: Work): void {
  const { b, config, pointer, given, tiles } = frame;
  if (given === undefined || config.given === undefined) return;
  let base = offset64(b, b.loadPointer(pointer.query), sequence, b.loadParameter(given.queryBatch));
  base = offset64(b, base, head, b.loadParameter(given.queryHead));
  const stride = b.loadParameter(given.queryToken);
  base = offset64(b, base, queryStart, stride);
  const { headDim, loadWidths } = config.given;
  const size = { dim: headDim, paddedDim: config.queryRowBytes / 2, width: loadWidths.query };
  const rows = { base, stride, first: firstRow, length: queryLength, ...size };
  copyRows(frame, tiles.query, b.sharedAddress(tiles.query.base), rows, b.special('%tid.x'));
}

/** @param position the tile's place among those that are taken, which says what buffer it goes to */
export function copyGivenKeys(
  frame: Frame,
  which: 'key' | 'value',
  { sequence, keyHead, paddedKeyStart, length, thread }: KeyPlace,
  tile: Reg<'s32'>,
  position: Reg<'s32'>,
): void {
  const { b, config, pointer, given, tiles } = frame;
  if (given === undefined || config.given === undefined) return;
  const { headDim, loadWidths } = config.given;
  const buffer = tiles[which];
  const stages = which === 'key' ? config.keyStages : config.valueStages;
  let base = offset64(b, b.loadPointer(pointer[which]), sequence, b.loadParameter(given[`${which}Batch`]));
  base = offset64(b, base, keyHead, b.loadParameter(given[`${which}Head`]));
  const stride = b.loadParameter(given[`${which}Token`]);
  base = offset64(b, base, paddedKeyStart, stride);
  const start = frame.own(buffer.base);
  const into =
    stages === 1 ? start : b.as(b.mad(b.as(b.and(position, 1), 'u32'), buffer.bytes, b.as(start, 'u32')), 'shared');
  const size =
    which === 'key'
      ? { dim: headDim, paddedDim: config.qkRowBytes / 2 }
      : { dim: config.valueDim, paddedDim: config.paddedValueDim };
  const rows = { base, stride, first: b.as(b.shl(tile, 6), 'u32'), length: b.as(length, 'u32') };
  const width = loadWidths[which];
  copyRows(frame, buffer, into, { ...rows, ...size, width }, thread ?? frame.thread());
}
