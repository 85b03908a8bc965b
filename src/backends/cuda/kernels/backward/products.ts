/** Tensor-core products of a tile. Addresses are this lane's places in ldmatrix. */
import type { SharedTile } from '../../ptx/layouts.ts';
import type { Reg } from '../../ptx/types.ts';
import { chunkAddresses } from '../parts/copies.ts';
import { at } from '../parts/lists.ts';
import type { Frame } from './frame.ts';

/** S = own codes times those that pass by, from 0. */
export function multiplyCodes(
  frame: Frame,
  sums: readonly (readonly Reg<'s32'>[])[],
  ownLane: Reg<'shared'>,
  streamLane: Reg<'shared'>,
): void {
  const { b, config, own, stream, columnTiles } = frame;
  const ownAt = chunkAddresses(b, own.codes.layout, ownLane);
  const streamAt = chunkAddresses(b, stream.codes.layout, streamLane);
  const zero = b.constant('s32', 0);
  for (let k = 0; k < config.codeBytes / 32; k++) {
    const [ownAddress, ownOffset] = ownAt(2 * k);
    const [streamAddress, streamOffset] = streamAt(2 * k);
    const a = b.ldmatrix('s8x4', 4, ownAddress, ownOffset);
    for (let pair = 0; pair < columnTiles / 2; pair++) {
      const columns = b.ldmatrix('s8x4', 4, streamAddress, streamOffset + pair * 16 * stream.codes.layout.rowBytes);
      for (let half = 0; half < 2; half++) {
        const d = at(sums, 2 * pair + half);
        const c = k === 0 ? [zero, zero, zero, zero] : d;
        b.mma('m16n8k32.row.col.s32.s8.s8.s32', d, a, columns.slice(2 * half, 2 * half + 2), c);
      }
    }
  }
}

/**
 * dP = V dO^T, or dO V^T.
 *
 * @param seed what the sums of an 8-token tile start from
 */
export function multiplyValues(
  frame: Frame,
  sums: readonly (readonly Reg<'f32'>[])[],
  ownLane: Reg<'shared'>,
  streamLane: Reg<'shared'>,
  seed: (column: number) => readonly Reg<'f32'>[],
): void {
  const { b, config, own, stream, columnTiles } = frame;
  const ownAt = chunkAddresses(b, (own.values as SharedTile).layout, ownLane);
  const streamAt = chunkAddresses(b, stream.values.layout, streamLane);
  for (let k = 0; k < config.paddedValueDim / 16; k++) {
    const [ownAddress, ownOffset] = ownAt(2 * k);
    const [streamAddress, streamOffset] = streamAt(2 * k);
    const a = b.ldmatrix('bf16x2', 4, ownAddress, ownOffset);
    for (let pair = 0; pair < columnTiles / 2; pair++) {
      const columns = b.ldmatrix('bf16x2', 4, streamAddress, streamOffset + pair * 16 * stream.values.layout.rowBytes);
      for (let half = 0; half < 2; half++) {
        const n = 2 * pair + half;
        const d = at(sums, n);
        const c = k === 0 ? seed(n) : d;
        b.mma('m16n8k16.row.col.f32.bf16.bf16.f32', d, a, columns.slice(2 * half, 2 * half + 2), c);
      }
    }
  }
}

/** sums += weights times the tokens that pass by: P or dS, rounded to BF16, are the A fragments as they are. */
export function multiplyTokens(
  { b, config }: Frame,
  sums: readonly (readonly Reg<'f32'>[])[],
  weights: readonly (readonly Reg<'f32'>[])[],
  tile: SharedTile,
  streamLane: Reg<'shared'>,
): void {
  const streamAt = chunkAddresses(b, tile.layout, streamLane);
  for (let k = 0; k < config.streamTokens / 16; k++) {
    const [left, right] = [at(weights, 2 * k), at(weights, 2 * k + 1)];
    const pack = (fragment: readonly Reg<'f32'>[], i: number) =>
      b.cvtPack('bf16x2', at(fragment, i), at(fragment, i + 1));
    const a = [pack(left, 0), pack(left, 2), pack(right, 0), pack(right, 2)];
    for (let pair = 0; pair < sums.length / 2; pair++) {
      const [address, byte] = streamAt(2 * pair);
      const columns = b.ldmatrix('bf16x2', 4, address, byte + k * 16 * tile.layout.rowBytes, true);
      for (let half = 0; half < 2; half++) {
        const d = at(sums, 2 * pair + half);
        b.mma('m16n8k16.row.col.f32.bf16.bf16.f32', d, a, columns.slice(2 * half, 2 * half + 2));
      }
    }
  }
}
