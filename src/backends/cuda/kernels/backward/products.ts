/** Tensor-core products of a tile. Addresses are this lane's places in ldmatrix. */
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { SharedTile } from '../../ptx/layouts.ts';
import type { Reg } from '../../ptx/types.ts';
import { MAGIC, MAGIC_BITS } from '../parts/constants.ts';
import { chunkAddresses } from '../parts/copies.ts';
import { at } from '../parts/lists.ts';
import { quadMaxNaN } from '../parts/quad.ts';
import { CODE_FORMATS, type CodePrecision, codeScalesOf, roundFour } from './codes.ts';
import { CODE_ROW_TOKENS } from './config.ts';
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
  const [ownValues, streamValues] = [own.values, stream.values] as [SharedTile, SharedTile];
  const ownAt = chunkAddresses(b, ownValues.layout, ownLane);
  const streamAt = chunkAddresses(b, streamValues.layout, streamLane);
  for (let k = 0; k < config.paddedValueDim / 16; k++) {
    const [ownAddress, ownOffset] = ownAt(2 * k);
    const [streamAddress, streamOffset] = streamAt(2 * k);
    const a = b.ldmatrix('bf16x2', 4, ownAddress, ownOffset);
    for (let pair = 0; pair < columnTiles / 2; pair++) {
      const columns = b.ldmatrix('bf16x2', 4, streamAddress, streamOffset + pair * 16 * streamValues.layout.rowBytes);
      for (let half = 0; half < 2; half++) {
        const n = 2 * pair + half;
        const d = at(sums, n);
        const c = k === 0 ? seed(n) : d;
        b.mma('m16n8k16.row.col.f32.bf16.bf16.f32', d, a, columns.slice(2 * half, 2 * half + 2), c);
      }
    }
  }
}

/** P or dS of rows g and g + 8 in codes, four columns of this thread a word, and the scale of each row. */
function roundRows({ b, config }: Frame, weights: readonly (readonly Reg<'f32'>[])[]) {
  const precision = config.precision as CodePrecision;
  return [0, 1].map((r) => {
    const own = weights.flatMap((fragment) => [at(fragment, 2 * r), at(fragment, 2 * r + 1)]);
    const largest = b.abs(at(own, 0));
    for (const weight of own.slice(1)) b.maxNaN(largest, b.abs(weight), largest);
    const { toCodes, toValues } = codeScalesOf(b, precision, quadMaxNaN(b, largest));
    const fours = Array.from({ length: config.streamTokens / 16 }, (_, i) => own.slice(4 * i, 4 * i + 4));
    return { words: fours.map((four) => roundFour(b, precision, four, toCodes)), scale: toValues };
  });
}

/**
 * sums += weights times the tokens that pass by, both in codes: P or dS, rounded with a scale for each own token of the tile, are the A
 * fragments as they are. Sums of a tile are scaled and added to the others in float32.
 *
 * @param streamScale of the codes that pass by
 */
export function multiplyTokenCodes(
  frame: Frame,
  sums: readonly (readonly Reg<'f32'>[])[],
  weights: readonly (readonly Reg<'f32'>[])[],
  tile: SharedTile,
  streamLane: Reg<'shared'>,
  streamScale: Reg<'f32'>,
): void {
  const { b, config } = frame;
  const rows = roundRows(frame, weights);
  const scales = rows.map(({ scale }) => b.mul(scale, streamScale));
  const product = codeProduct(b, config.precision as CodePrecision);
  const dim = sums.length * 8;
  const addPair = (pair: number) => {
    const ofTile = [product.sum(), product.sum()];
    for (let k = 0; k < config.streamTokens / CODE_ROW_TOKENS; k++) {
      const a = [2 * k, 2 * k + 1].flatMap((word) => rows.map(({ words }) => at(words, word)));
      const columns = b.ldmatrix('b32', 4, streamLane, (k * dim + pair * 16) * tile.layout.rowBytes);
      ofTile.forEach((sum, half) => {
        product.add(sum, a, columns.slice(2 * half, 2 * half + 2), k === 0);
      });
    }
    ofTile.forEach((sum, half) => {
      product.valuesOf(sum).forEach((value, i) => {
        const total = at(at(sums, 2 * pair + half), i);
        b.fma(value, at(scales, i >> 1), total, total);
      });
    });
  };
  // A condition that always holds: across it ptxas moves no product, and sums of all channels at once would spill.
  const always = b.setp('ne', b.loadParameter(frame.integer.tiles), 0);
  for (let first = 0; first < sums.length / 2; first += PAIRS_AT_ONCE) {
    b.if(always, () => {
      for (let pair = first; pair < Math.min(first + PAIRS_AT_ONCE, sums.length / 2); pair++) addPair(pair);
    });
  }
}

/** Of 16 channels each. */
const PAIRS_AT_ONCE = 4;

/** The tensor core's product of codes over 32 tokens, and its sums for eight channels. */
function codeProduct(b: KernelBuilder, precision: CodePrecision) {
  if (precision === 'fp8') {
    const zero = b.constant('f32', 0);
    const codes = (words: readonly Reg<'b32'>[]) => words.map((word) => b.as(word, 'e4m3x4'));
    return {
      sum: () => b.regs('f32', 4) as readonly Reg[],
      add(sum: readonly Reg[], a: readonly Reg<'b32'>[], columns: readonly Reg<'b32'>[], isFirst: boolean) {
        const d = sum as readonly Reg<'f32'>[];
        b.mma(CODE_FORMATS.fp8.mma, d, codes(a), codes(columns), isFirst ? [zero, zero, zero, zero] : d);
      },
      valuesOf: (sum: readonly Reg[]) => sum as readonly Reg<'f32'>[],
    };
  }
  // On top of 1.5 * 2^23 the integers, below 64 * 127^2 < 2^22, are floats without a conversion.
  const magic = b.constant('s32', MAGIC_BITS);
  const codes = (words: readonly Reg<'b32'>[]) => words.map((word) => b.as(word, 's8x4'));
  return {
    sum: () => b.regs('s32', 4) as readonly Reg[],
    add(sum: readonly Reg[], a: readonly Reg<'b32'>[], columns: readonly Reg<'b32'>[], isFirst: boolean) {
      const d = sum as readonly Reg<'s32'>[];
      b.mma(CODE_FORMATS.int8.mma, d, codes(a), codes(columns), isFirst ? [magic, magic, magic, magic] : d);
    },
    valuesOf: (sum: readonly Reg[]) => (sum as readonly Reg<'s32'>[]).map((of) => b.sub(b.as(of, 'f32'), MAGIC)),
  };
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
