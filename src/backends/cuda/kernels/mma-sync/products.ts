/** Tensor-core products of a tile: Q K^T, and P V in its formats. */
import type { MmaShape } from '../../ptx/mma.ts';
import type { Reg } from '../../ptx/types.ts';
import { chunkAddresses } from '../parts/copies.ts';
import { at } from '../parts/lists.ts';
import { BLOCK_K } from './config.ts';
import type { Frame } from './frame.ts';
import type { Output, Scores, Seeds } from './state.ts';

/** S = Q K^T, of codes on top of the bits of 1.5 * 2^23. `query` and `key` are this lane's places in ldmatrix. */
export function multiplyKeys(
  frame: Frame,
  scores: Scores,
  { magic, zeroScores }: Seeds,
  query: Reg<'shared'>,
  key: Reg<'shared'>,
): void {
  const { b, config, tiles, rowTiles, keyTiles } = frame;
  const queryAt = chunkAddresses(b, tiles.query.layout, query);
  const keyAt = chunkAddresses(b, tiles.key.layout, key);
  for (let k = 0; k < config.qkRowBytes / 32; k++) {
    const [queryAddress, queryOffset] = queryAt(2 * k);
    const [keyAddress, keyOffset] = keyAt(2 * k);
    const q = Array.from({ length: rowTiles }, (_, m) =>
      b.ldmatrix('b32', 4, queryAddress, queryOffset + m * 16 * tiles.query.layout.rowBytes),
    );
    for (let pair = 0; pair < keyTiles / 2; pair++) {
      const keys = b.ldmatrix('b32', 4, keyAddress, keyOffset + pair * 16 * tiles.key.layout.rowBytes);
      for (let half = 0; half < 2; half++) {
        for (let m = 0; m < rowTiles; m++) {
          const d = at(at(scores.integers, m), 2 * pair + half);
          multiplyCodes(
            frame,
            d,
            at(q, m),
            keys.slice(2 * half, 2 * half + 2),
            k === 0 ? (frame.given === undefined ? magic : zeroScores) : d,
          );
        }
      }
    }
  }
}

function multiplyCodes(
  { b, config }: Frame,
  d: readonly Reg<'s32'>[],
  q: readonly Reg<'b32'>[],
  keys: readonly Reg<'b32'>[],
  c: readonly Reg<'s32'>[],
): void {
  const as = <K extends 's8x4' | 's4x8' | 'f16x2' | 'bf16x2'>(registers: readonly Reg<'b32'>[], kind: K) =>
    registers.map((register) => b.as(register, kind) as Reg<K>);
  const floats = (registers: readonly Reg<'s32'>[]) => registers.map((register) => b.as(register, 'f32'));
  if (config.qkFormat === 'f16') {
    b.mma('m16n8k16.row.col.f32.f16.f16.f32', floats(d), as(q, 'f16x2'), as(keys, 'f16x2'), floats(c));
    return;
  }
  if (config.qkFormat === 'bf16') {
    b.mma('m16n8k16.row.col.f32.bf16.bf16.f32', floats(d), as(q, 'bf16x2'), as(keys, 'bf16x2'), floats(c));
    return;
  }
  if (config.qkFormat === 's8') b.mma('m16n8k32.row.col.s32.s8.s8.s32', d, as(q, 's8x4'), as(keys, 's8x4'), c);
  else b.mma('m16n8k64.row.col.s32.s4.s4.s32', d, as(q, 's4x8'), as(keys, 's4x8'), c);
}

/**
 * O += P V. `base` is this lane's place in ldmatrix.
 *
 * @param scales of the lane's channels in this tile of FP8, those of the next eight 32 bytes behind; undefined: they are of the whole sequence
 */
export function multiplyValues(
  frame: Frame,
  weights: Scores,
  output: Output,
  seeds: Seeds,
  base: Reg<'shared'>,
  scales?: Reg<'shared'>,
): void {
  const { pvFormat, accumulate } = frame.config;
  const product: Product = { frame, weights, output, seeds, base, scales };
  if (pvFormat === 'e4m3') multiplyFp8(product);
  else if (pvFormat === 'e4m3-as-f16') multiplyUnpackedFp8(product);
  else if (accumulate === 'f16-per-tile') multiplyHalvesPerTile(product);
  else multiplyHalves(product);
}

interface Product {
  readonly frame: Frame;
  readonly weights: Scores;
  readonly output: Output;
  readonly seeds: Seeds;
  readonly base: Reg<'shared'>;
  readonly scales: Reg<'shared'> | undefined;
}

/** V in FP16, [token, channel]. */
function multiplyHalves(product: Product): void {
  const { rowTiles, channelTiles } = product.frame;
  const load = halfLoader(product);
  for (let k = 0; k < BLOCK_K / 16; k++) {
    const p = Array.from({ length: rowTiles }, (_, m) => halfFragment(product, m, k));
    for (let pair = 0; pair < channelTiles / 2; pair++) {
      const v = load(k, pair);
      for (let m = 0; m < rowTiles; m++) {
        for (let half = 0; half < 2; half++) {
          mmaHalf(product, m, 2 * pair + half, at(p, m), v.slice(2 * half, 2 * half + 2));
        }
      }
    }
  }
}

/** V in FP16, with FP16 sums of one tile. */
function multiplyHalvesPerTile(product: Product): void {
  const { frame, seeds } = product;
  const { b, rowTiles, channelTiles } = frame;
  const load = halfLoader(product);
  const steps = BLOCK_K / 16;
  const p = Array.from({ length: rowTiles }, (_, m) =>
    Array.from({ length: steps }, (__, k) => halfFragment(product, m, k)),
  );
  for (let pair = 0; pair < channelTiles / 2; pair++) {
    const sums = Array.from({ length: rowTiles * 2 }, () => b.regs('f16x2', 2));
    for (let k = 0; k < steps; k++) {
      const v = load(k, pair);
      for (let m = 0; m < rowTiles; m++) {
        for (let half = 0; half < 2; half++) {
          const d = at(sums, 2 * m + half);
          const ofChannels = v.slice(2 * half, 2 * half + 2);
          b.mma('m16n8k16.row.col.f16.f16.f16.f16', d, at(at(p, m), k), ofChannels, k === 0 ? seeds.zeroHalves : d);
        }
      }
    }
    for (let m = 0; m < rowTiles; m++) {
      for (let half = 0; half < 2; half++) promote(product, m, 2 * pair + half, at(sums, 2 * m + half));
    }
  }
}

/** Loads 16 tokens of 16 channels of V in FP16 as two B fragments. */
function halfLoader({ frame, base }: Product) {
  const { b, tiles } = frame;
  const valueAt = chunkAddresses(b, tiles.value.layout, base);
  return (k: number, pair: number): Reg<'f16x2'>[] => {
    const [address, byte] = valueAt(2 * pair);
    return b.ldmatrix('f16x2', 4, address, byte + k * 16 * tiles.value.layout.rowBytes, true);
  };
}

/**
 * V in FP8, [channel, permuted token], converted to FP16. One ldmatrix brings 16 tokens of 32 channels: a word holds
 * tokens 2t, 2t + 1, 2t + 8 and 2t + 9 of a channel, just what a B fragment takes.
 */
function multiplyUnpackedFp8(product: Product): void {
  const { b, tiles, rowTiles, channelTiles } = product.frame;
  const { layout } = tiles.value;
  const valueAt = chunkAddresses(b, layout, product.base);
  for (let k = 0; k < BLOCK_K / 16; k++) {
    const p = Array.from({ length: rowTiles }, (_, m) => halfFragment(product, m, k));
    const [address, byte] = valueAt(k);
    for (let n = 0; n < channelTiles; n += 4) {
      b.ldmatrix('b32', 4, address, byte + n * 8 * layout.rowBytes).forEach((word, i) => {
        const v = b.unpack(word, 'e4m3x2').map((pair) => b.cvt('f16x2', pair));
        for (let m = 0; m < rowTiles; m++) mmaHalf(product, m, n + i, at(p, m), v);
      });
    }
  }
}

/** V in FP8, [channel, permuted token]. One ldmatrix brings 64 tokens of eight channels. */
function multiplyFp8(product: Product): void {
  const { frame, output, seeds, base } = product;
  const { b, config, tiles, rowTiles, channelTiles } = frame;
  const p = Array.from({ length: rowTiles }, (_, m) => [fp8Fragment(product, m, 0), fp8Fragment(product, m, 1)]);
  for (let n = 0; n < channelTiles; n++) {
    const words = b.ldmatrix('b32', 4, base, n * 8 * tiles.value.layout.rowBytes);
    const v = words.map((word) => b.as(word, 'e4m3x4'));
    const ofTile = tileScales(product, n);
    for (let m = 0; m < rowTiles; m++) {
      const operands = [0, 1].map((k) => [at(at(p, m), k), v.slice(2 * k, 2 * k + 2)] as const);
      if (config.accumulate === 'f16-per-tile') {
        const d = b.regs('f16x2', 2);
        for (const [k, [a, ofChannels]] of operands.entries()) {
          b.mma('m16n8k32.row.col.f16.e4m3.e4m3.f16', d, a, ofChannels, k === 0 ? seeds.zeroHalves : d);
        }
        promote(product, m, n, d);
        continue;
      }
      const shape: MmaShape = 'm16n8k32.row.col.f32.e4m3.e4m3.f32';
      const perTile = config.accumulate !== 'f32';
      const d = perTile ? b.regs('f32', 4) : at(at(output.floats, m), n);
      for (const [k, [a, ofChannels]] of operands.entries()) {
        b.mma(shape, d, a, ofChannels, perTile && k === 0 ? seeds.zeros : d);
      }
      if (perTile) promote(product, m, n, d, ofTile);
    }
  }
}

/** This tile's scales of the lane's two channels among eight; undefined where V has none by tile. */
const tileScales = ({ frame: { b }, scales }: Product, n: number): Reg<'f32'>[] | undefined =>
  scales && b.ldVector('f32', 2, scales, n * 32);

/** P of one 16-row tile and 16 keys as the A fragment of mma.m16n8k16; in BF16 where V is, whatever the registers are called. */
function halfFragment({ frame, weights }: Product, m: number, k: number): Reg<'f16x2'>[] {
  const [left, right] = [at(at(weights.floats, m), 2 * k), at(at(weights.floats, m), 2 * k + 1)];
  const { b, config } = frame;
  const pair = (fragment: readonly Reg<'f32'>[], i: number): Reg<'f16x2'> => {
    const both = [at(fragment, i), at(fragment, i + 1)] as const;
    return config.pvFormat === 'bf16' ? b.as(b.cvtPack('bf16x2', ...both), 'f16x2') : b.cvtPack('f16x2', ...both);
  };
  return [pair(left, 0), pair(left, 2), pair(right, 0), pair(right, 2)];
}

/**
 * P of one 16-row tile and 32 keys as the A fragment of mma.m16n8k32; the order of V's tokens makes it the thread's
 * own.
 */
function fp8Fragment({ frame, weights }: Product, m: number, k: number): Reg<'e4m3x4'>[] {
  const { b } = frame;
  const pair = (n: number, i: number) => {
    const fragment = at(at(weights.floats, m), n);
    return b.cvtPack('e4m3x2', at(fragment, i), at(fragment, i + 1));
  };
  const word = (n: number, i: number) => b.pack('e4m3x4', pair(n, i), pair(n + 1, i));
  return [word(4 * k, 0), word(4 * k, 2), word(4 * k + 2, 0), word(4 * k + 2, 2)];
}

/** One step of the product in FP16, into FP32 or FP16 sums. */
function mmaHalf(
  { frame, output }: Product,
  m: number,
  n: number,
  p: readonly Reg<'f16x2'>[],
  v: readonly Reg<'f16x2'>[],
): void {
  const { b, config } = frame;
  if (config.pvFormat === 'bf16') {
    const brains = (halves: readonly Reg<'f16x2'>[]) => halves.map((half) => b.as(half, 'bf16x2'));
    b.mma('m16n8k16.row.col.f32.bf16.bf16.f32', at(at(output.floats, m), n), brains(p), brains(v));
  } else if (config.accumulate === 'f16') b.mma('m16n8k16.row.col.f16.f16.f16.f16', at(at(output.halves, m), n), p, v);
  else b.mma('m16n8k16.row.col.f32.f16.f16.f32', at(at(output.floats, m), n), p, v);
}

/** Adds a tile's FP32 or FP16 sums to the output; `scales` of two channels, which FP32 sums are multiplied by. */
function promote(
  { frame, output }: Product,
  m: number,
  n: number,
  sums: readonly (Reg<'f32'> | Reg<'f16x2'>)[],
  scales?: readonly Reg<'f32'>[],
): void {
  const { b } = frame;
  const into = at(at(output.floats, m), n);
  sums.forEach((register, i) => {
    if (register.kind === 'f32') {
      if (scales === undefined) b.add(at(into, i), register, at(into, i));
      else b.fma(register, at(scales, i & 1), at(into, i), at(into, i));
      return;
    }
    b.unpack(register, 'f16').forEach((half, j) => {
      const target = at(into, 2 * i + j);
      b.add(target, b.cvt('f32', half), target);
    });
  });
}
