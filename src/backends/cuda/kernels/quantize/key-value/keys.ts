/** K of the tile: maxima of its groups, INT8 rows, scales. */
import type { Reg } from '../../../ptx/types.ts';
import { offset } from '../../parts/addresses.ts';
import { KEY_EXPONENT_BIAS, MAGIC, MOST_KEY_EXPONENT, SMALLEST_GROUP_MAXIMUM } from '../../parts/constants.ts';
import { packBytes } from '../../parts/elements.ts';
import { at } from '../../parts/lists.ts';
import { centered, channelVector, largestOf, loaderOf } from './channels.ts';
import { KEY_VALUE_TILE } from './config.ts';
import { leaveOutFaults } from './faults.ts';
import type { Channels, Faults, Keys } from './records.ts';
import { leaveOutHidden, leaveOutUnseen, sharedAt, type Tile } from './tile.ts';

export function loadKeys(tile: Tile): Keys {
  const { b, config, thread, keyLayout, pointer, stride } = tile;
  const { perRow, rowsAtOnce, passes } = keyLayout;
  b.section('load K');
  const row = b.shr(thread, Math.log2(perRow));
  const column = b.and(thread, perRow - 1);
  const channels: Channels = { channel: b.shl(column, 3), span: perRow * 8 };
  const tokens = () => Array.from({ length: passes }, (_, pass) => b.add(row, pass * rowsAtOnce));
  const strides = [stride.keyBatch, stride.keyHead, stride.keyToken] as const;
  const packed = tokens().map(loaderOf(tile, pointer.k, strides, channels, config.headDim, config.keyLoadWidth));
  return { row, column, channels, packed, magnitudes: [], tokens };
}

/** Bits of floats that are apart by a factor of four: a key so much smaller than its group's largest is scaled apart. */
const FAR_APART = 2 * 2 ** 23;

/** K's mean, and the largest magnitudes of this thread's rows into shared memory. */
export function findKeyMaxima(tile: Tile, keys: Keys): { mean: Reg<'f32'>[] | undefined; faults: Faults } {
  const { b, config, shared, rowMaxima, keyLayout } = tile;
  const { perRow, rowsAtOnce, halfOf } = keyLayout;
  const { row, column } = keys;
  b.section('largest magnitudes of rows of K');
  const mean = config.smoothK ? channelVector(tile, 'keyMean', keys.channels, config.paddedDim) : undefined;
  const faults = b.constant('b32', 0);
  const wordAt = sharedAt(tile, shared, tile.thread, 2);
  const none = b.constant('u32', KEY_EXPONENT_BIAS);
  b.when(b.setp('lt', tile.thread, KEY_VALUE_TILE), () => b.st(none, wordAt, tile.exponents.base));
  const ofHalves = [b.constant('u32', 0), b.constant('u32', 0)];
  keys.packed.forEach((packed, pass) => {
    const largest = largestOf(tile, centered(tile, packed, mean));
    leaveOutHidden(tile, largest, b.add(row, pass * rowsAtOnce));
    leaveOutFaults(tile, faults, largest, pass);
    // A copy of a token may be of another group than that.
    leaveOutUnseen(tile, largest, b.add(row, pass * rowsAtOnce));
    keys.magnitudes.push(largest);
    const ofHalf = at(ofHalves, halfOf(pass));
    b.max(ofHalf, largest, ofHalf);
  });
  const rowMaximumAt = sharedAt(tile, shared, row, 2);
  ofHalves.forEach((ofHalf, half) => {
    let largest = ofHalf;
    for (let mask = 1; mask < perRow; mask *= 2) largest = b.max(largest, b.shflBfly(largest, mask));
    b.when(b.setp('eq', column, 0), () => b.st(largest, rowMaximumAt, rowMaxima.base + half * rowsAtOnce * 4));
  });
  return { mean, faults };
}

/** Codes of K, once all rows' maxima are known. */
export function quantizeKeys(tile: Tile, keys: Keys, mean: readonly Reg<'f32'>[] | undefined): void {
  const { b, config, pointer, firstRow, keyLayout } = tile;
  const { rowsAtOnce, halfOf } = keyLayout;
  const { row, channels } = keys;
  const { paddedDim } = config;
  b.section('quantize K');
  const ownGroup = b.shr(b.and(row, 7), 1);
  const maxima = [0, 1].map((half) => groupMaximum(tile, ownGroup, b.constant('u32', half)));
  const reciprocals = maxima.map((maximum) => {
    const reciprocal = b.divF32(b.constant('f32', 127), maximum);
    b.when(b.setp('eq', maximum, 0), () => b.set(reciprocal, 0));
    return reciprocal;
  });
  const destination = b.add(
    offset(b, b.loadPointer(pointer.key), b.add(firstRow, row), paddedDim),
    b.as(b.cvt('u64', channels.channel), 'global'),
  );
  const magic = b.constant('f32', MAGIC);
  const stored = b.setp('lt', channels.channel, paddedDim);
  const store = (reciprocalOf: (pass: number) => Reg<'f32'>) => {
    keys.packed.forEach((packed, pass) => {
      const reciprocal = reciprocalOf(pass);
      // Adding 1.5 * 2^23 rounds to the nearest even integer and leaves it in the low bits.
      const rounded = centered(tile, packed, mean).map((float) => b.as(b.fma(float, reciprocal, magic), 'b32'));
      const codes = packBytes(b, rounded);
      b.when(stored, () => b.stVector(codes, destination, pass * rowsAtOnce * paddedDim));
    });
  };
  b.if(
    b.voteAny(anyFarApart(tile, keys, maxima)),
    () =>
      store((pass) => b.mul(at(reciprocals, halfOf(pass)), giveExponent(tile, keys, pass, at(maxima, halfOf(pass))))),
    () => store((pass) => at(reciprocals, halfOf(pass))),
  );
}

/** Whether one of the rows that lanes of this warp share may be far smaller than the largest of its group. */
function anyFarApart({ b, keyLayout }: Tile, { magnitudes }: Keys, maxima: readonly Reg<'f32'>[]): Reg<'pred'> {
  // A row is near if any of its threads says so; bits of all passes are joined at once.
  const limits = maxima.map((maximum) => b.mul(maximum, 1 / 4));
  const near = b.constant('b32', 0);
  magnitudes.forEach((magnitude, pass) => {
    const isNear = b.setp('ge', b.as(magnitude, 'f32'), at(limits, keyLayout.halfOf(pass)));
    b.when(isNear, () => b.or(near, 2 ** pass, near));
  });
  for (let lanes = 1; lanes < keyLayout.perRow && lanes < 32; lanes *= 2) b.or(near, b.shflBfly(near, lanes), near);
  return b.setp('ne', near, 2 ** magnitudes.length - 1);
}

/** Chooses a row's exponent, and writes it where it is not 0; returns what its codes are multiplied by. */
function giveExponent(tile: Tile, keys: Keys, pass: number, maximum: Reg<'f32'>): Reg<'f32'> {
  const { b, shared, exponents, keyLayout } = tile;
  const { perRow, rowsAtOnce } = keyLayout;
  const largest = b.mov(at(keys.magnitudes, pass));
  for (let lanes = 1; lanes < perRow && lanes < 32; lanes *= 2) b.max(largest, b.shflBfly(largest, lanes), largest);
  const apart = b.sub(b.as(maximum, 'u32'), largest);
  const exponent = b.min(b.shr(apart, 23), MOST_KEY_EXPONENT);
  const counts = b.setp('ge', b.as(largest, 'f32'), SMALLEST_GROUP_MAXIMUM);
  const given = b.andPred(counts, b.setp('gt', apart, FAR_APART));
  b.when(given, () => b.set(exponent, 0), true);
  const stored = b.sub(b.constant('u32', KEY_EXPONENT_BIAS), exponent);
  const exponentAt = sharedAt(tile, shared, b.add(keys.row, pass * rowsAtOnce), 2);
  b.when(b.andPred(given, b.setp('eq', keys.column, 0)), () => b.st(stored, exponentAt, exponents.base));
  return b.as(b.shl(b.add(exponent, KEY_EXPONENT_BIAS), 23), 'f32');
}

/** Largest magnitude of a group of half a tile. */
function groupMaximum(tile: Tile, group: Reg<'u32'>, half: Reg<'u32'>): Reg<'f32'> {
  const { b, config, shared, rowMaxima, keyLayout } = tile;
  const { rowsAtOnce } = keyLayout;
  const base = b.add(shared, b.as(b.mad(half, rowsAtOnce * 4, rowMaxima.base), 'shared'));
  const members =
    config.keyScales === 1
      ? Array.from({ length: rowsAtOnce / 4 }, (_, i) => b.ldVector('u32', 4, base, 16 * i))
      : Array.from({ length: rowsAtOnce / 8 }, (_, i) => b.ldVector('u32', 2, sharedAt(tile, base, group, 3), 32 * i));
  const maximum = b.as(
    members.flat().reduce((x, y) => b.max(x, y)),
    'f32',
  );
  b.when(b.setp('lt', maximum, SMALLEST_GROUP_MAXIMUM), () => b.set(maximum, 0));
  return maximum;
}

/** Scales of K with their sign, exponents and bits of faults, by the first warp. */
export function writeKeyScales(tile: Tile): void {
  const { b, config, thread, pointer, shared, faultWords, warps, firstRow } = tile;
  const { keyScales } = config;
  b.if(b.setp('lt', thread, 32), () => {
    b.section('scales, exponents and faults');
    // Sixteen threads write four exponents each of a half; the first of them its scales and faults.
    const [half, ofHalf] = [b.shr(thread, 4), b.and(thread, 15)];
    const group = b.and(ofHalf, keyScales - 1);
    const scale = b.divF32(groupMaximum(tile, group, half), 127);
    const from = sharedAt(tile, shared, half, 3);
    const found = Array.from({ length: warps }, (_, i) => b.ldVector('b32', 2, from, faultWords.base + 16 * i));
    const [low, high] = [0, 1].map((word) => found.map((pair) => at(pair, word)).reduce((x, y) => b.or(x, y))) as [
      Reg<'b32'>,
      Reg<'b32'>,
    ];
    const slot = b.add(b.shr(firstRow, 6), half);
    const bits = b.as(scale, 'b32');
    const exponents = packExponents(tile, thread);
    const special = b.xor(exponents, KEY_EXPONENT_BIAS * 0x01010101);
    for (let lanes = 1; lanes < 16; lanes *= 2) b.or(special, b.shflBfly(special, lanes), special);
    b.when(b.setp('ne', b.or(b.or(low, high), special), 0), () => b.or(bits, 0x80000000, bits));
    const scaleAt = offset(b, b.loadPointer(pointer.keyScale), b.mad(slot, keyScales, group), 4);
    b.when(b.setp('lt', ofHalf, keyScales), () => b.st(bits, scaleAt));
    const faultsAt = offset(b, b.loadPointer(pointer.keyFaults), slot, 8);
    b.when(b.setp('eq', ofHalf, 0), () => b.stVector([low, high], faultsAt));
    const exponentsAt = offset(b, offset(b, b.loadPointer(pointer.keyExponents), firstRow, 1), thread, 4);
    b.st(exponents, exponentsAt);
  });
}

/** Exponents of four keys in a word. */
function packExponents(tile: Tile, fourth: Reg<'u32'>): Reg<'b32'> {
  const { b, shared, exponents } = tile;
  const words = b.ldVector('b32', 4, sharedAt(tile, shared, fourth, 4), exponents.base);
  return words.map((word, i) => b.shl(word, 8 * i)).reduce((x, y) => b.or(x, y));
}
