/** The eight channels of a token that a thread takes at once: how they are loaded and converted. */
import type { Parameter, Reg } from '../../../ptx/types.ts';
import { offset, offset64 } from '../../parts/addresses.ts';
import { BYTES, type LoadWidth, loadEightFloats, loadEightPacked, unpackEight } from '../../parts/elements.ts';
import { at } from '../../parts/lists.ts';
import type { Channels } from './records.ts';
import { clampToSeen, type Tile } from './tile.ts';

/** Loads eight channels of each token; those beyond the interval of seen keys are copies of its ends. */
export function loaderOf(
  tile: Tile,
  input: Parameter<'u64'>,
  [batch, ofHead, token]: readonly [Parameter<'u64'>, Parameter<'u64'>, Parameter<'u64'>],
  { channel, span }: Channels,
  dim: number,
  width: LoadWidth,
): (inTile: Reg<'u32'>) => Reg<'b32'>[] {
  const { b, config, isSeen } = tile;
  let source = offset64(b, b.loadPointer(input), tile.sequence, b.loadParameter(batch));
  source = offset64(b, source, tile.head, b.loadParameter(ofHead));
  const stride = b.loadParameter(token);
  const firstToken = b.add(tile.keyStart, tile.firstToken);
  source = offset(b, offset64(b, source, firstToken, stride), channel, BYTES[config.dtype]);
  const inRow = (first: number) => (dim === span ? undefined : b.setp('lt', b.add(channel, first), dim));
  return (inTile) => {
    const seen = isSeen?.(inTile);
    const inside = (first: number) => {
      const guard = inRow(first);
      return seen === undefined || guard === undefined ? (guard ?? seen) : b.andPred(guard, seen);
    };
    return loadEightPacked(b, config.dtype, width, offset64(b, source, clampToSeen(b, tile, inTile), stride), inside);
  };
}

/** A thread's eight channels of a `[sequence, head, channel]` vector; those beyond the row are 0. */
export function channelVector(
  { b, pointer, sequenceHead }: Tile,
  name: 'keyMean' | 'valueMean' | 'valueScale',
  { channel, span }: Channels,
  padded: number,
): Reg<'f32'>[] {
  const vector = Array.from({ length: 8 }, () => b.constant('f32', 0));
  const load = () => {
    const from = offset(b, b.loadPointer(pointer[name]), b.mad(sequenceHead, padded, channel), 4);
    loadEightFloats(b, from).forEach((value, i) => {
      b.mov(value, vector[i]);
    });
  };
  if (span === padded) load();
  else b.if(b.setp('lt', channel, padded), load);
  return vector;
}

/** Packed channels as floats, less their mean. */
export function centered(
  { b, config }: Tile,
  packed: readonly Reg<'b32'>[],
  mean: readonly Reg<'f32'>[] | undefined,
): Reg<'f32'>[] {
  const floats = unpackEight(b, config.dtype, packed);
  return mean === undefined ? floats : floats.map((float, i) => b.sub(float, at(mean, i)));
}

export function scaled({ b }: Tile, floats: Reg<'f32'>[], factors: readonly Reg<'f32'>[] | undefined): Reg<'f32'>[] {
  return factors === undefined ? floats : floats.map((float, i) => b.mul(float, at(factors, i)));
}

/** Bits of the largest magnitude. */
export function largestOf({ b }: Tile, floats: readonly Reg<'f32'>[]): Reg<'u32'> {
  return floats.map((float) => b.and(b.as(float, 'u32'), 0x7fffffff)).reduce((x, y) => b.max(x, y));
}
