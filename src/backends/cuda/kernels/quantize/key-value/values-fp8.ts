/**
 * V in FP8: a warp takes `octets` times eight channels of `words` times four tokens, which lie side by side in permuted order,
 * so that packing transposes them; shared memory gathers the 128 tokens of each channel.
 */
import { TOKEN_PERMUTATION } from '../../../../../quantization/value-fp8.ts';
import { rowMajor } from '../../../ptx/layouts.ts';
import type { Reg } from '../../../ptx/types.ts';
import { offset } from '../../parts/addresses.ts';
import { at } from '../../parts/lists.ts';
import { centered, scaled } from './channels.ts';
import { KEY_VALUE_TILE } from './config.ts';
import type { ValueOrder, Values } from './records.ts';
import { sharedAt, type Tile } from './tile.ts';

const E4M3_MAX = 448;
/** Exponents of a tile's scale lie in this range, so that the ratio of two moves sums neither to infinity nor out of reach. */
const TILE_SCALE_EXPONENTS = { least: -30, most: 60 } as const;
/** A tile whose largest code would be no smaller than this share of E4M3's largest does without a scale. */
const SMALLEST_UNSCALED = 2 ** -6;

const floatBits = (value: number) => new Uint32Array(new Float32Array([value]).buffer)[0] as number;

type Quad = [Reg<'f32'>, Reg<'f32'>, Reg<'f32'>, Reg<'f32'>];

/** How a tile's elements are dealt out to the warps, and where a thread's lie. */
interface Parts {
  readonly octets: number;
  readonly wordParts: number;
  readonly partsAtOnce: number;
  /** Warps that are left over, or have no more tokens, load what others load and store nothing. */
  readonly allBusy: boolean;
  readonly codesAt: Reg<'shared'>;
  readonly octet: Reg<'u32'>;
  readonly channel: Reg<'u32'>;
  readonly firstPart: Reg<'u32'>;
  /** Which four permuted tokens a thread takes in each round. */
  readonly words: readonly Reg<'u32'>[];
}

export function orderTransposed(tile: Tile): ValueOrder {
  const { b, config } = tile;
  const parts = dealOut(tile);
  const tokens = parts.words.flatMap((word) => {
    // Position 4w + i of 16 holds token TOKEN_PERMUTATION[4w + i] = 2w + TOKEN_PERMUTATION[i].
    const firstOfWord = b.add(b.shl(b.shr(word, 2), 4), b.shl(b.and(word, 3), 1));
    return TOKEN_PERMUTATION.slice(0, 4).map((later) => b.add(firstOfWord, later));
  });
  const store = (values: Values) => {
    const factors = writeTileScale(tile, values);
    quantize(tile, parts, values, factors);
    b.barSync();
    storeRows(tile, parts);
  };
  return { channels: { channel: parts.channel, span: config.paddedValueDim }, tokens, store };
}

function dealOut(tile: Tile): Parts {
  const { b, config, lane, warp, warps, shared } = tile;
  const { paddedValueDim } = config;
  const octets = (paddedValueDim / 8) % 8 === 0 ? 8 : 4;
  const words = 32 / octets;
  const channelParts = paddedValueDim / 8 / octets;
  const wordParts = 32 / words;
  const partsAtOnce = Math.min(Math.floor(warps / channelParts), wordParts);
  const rounds = Math.ceil(wordParts / partsAtOnce);
  const codeTile = b.shared('V, transposed', paddedValueDim, rowMajor(KEY_VALUE_TILE));
  const codesAt = b.add(shared, codeTile.base);
  const part = b.rem(warp, channelParts);
  const octet = b.mad(part, octets, b.and(lane, octets - 1));
  const channel = b.shl(octet, 3);
  const firstPart = b.div(warp, channelParts);
  const allBusy = partsAtOnce * channelParts === warps && rounds * partsAtOnce === wordParts;
  const wordOf = (round: number) => {
    const wordPart = b.add(firstPart, round * partsAtOnce);
    const clamped = allBusy ? wordPart : b.min(wordPart, wordParts - 1);
    return b.mad(clamped, words, b.shr(lane, Math.log2(octets)));
  };
  const ofRounds = Array.from({ length: rounds }, (_, round) => wordOf(round));
  return { octets, wordParts, partsAtOnce, allBusy, codesAt, octet, channel, firstPart, words: ofRounds };
}

/** The 16-byte chunks of a channel are permuted so that the lanes of a warp write different banks. */
function chunkMask({ b }: Tile, { octets }: Parts, ofOctet: Reg<'u32'>): Reg<'u32'> {
  return octets === 8 ? b.and(ofOctet, 7) : b.shl(b.and(ofOctet, 3), 1);
}

/** The tile's scale; returns what a thread's channels are multiplied by. */
function writeTileScale({ b, warps, shared, valueMaxima, pointer, thread, firstRow }: Tile, { toCodes }: Values) {
  b.section('scale of the tile of V');
  const ofWarps = Array.from({ length: warps / 4 }, (_, i) => b.ldVector('u32', 4, shared, valueMaxima.base + 16 * i));
  const tileScale = tileScaleOf(
    b,
    ofWarps.flat().reduce((x, y) => b.max(x, y)),
  );
  const scaleAt = offset(b, b.loadPointer(pointer.valueTileScale), b.shr(firstRow, 6), 4);
  b.when(b.setp('eq', thread, 0), () => b.st(tileScale, scaleAt));
  // The reciprocal of a power of two.
  const inverse = b.as(b.sub(b.constant('u32', 0x7f000000), tileScale), 'f32');
  return (toCodes as readonly Reg<'f32'>[]).map((ofChannel) => b.mul(ofChannel, inverse));
}

/** Bits of the power of two that brings a tile's largest code into E4M3's range; 1 where it is there. */
function tileScaleOf(b: Tile['b'], largest: Reg<'u32'>): Reg<'u32'> {
  const share = b.mul(b.as(largest, 'f32'), 1 / E4M3_MAX);
  const up = b.and(b.add(b.as(share, 'u32'), 0x7fffff), 0x7f800000);
  const { least, most } = TILE_SCALE_EXPONENTS;
  const power = b.min(b.max(up, floatBits(2 ** least)), floatBits(2 ** most));
  const one = floatBits(1);
  const unscaled = b.andPred(b.setp('le', power, one), b.setp('ge', power, floatBits(SMALLEST_UNSCALED)));
  b.when(b.orPred(unscaled, b.setp('eq', largest, 0)), () => b.set(power, one));
  return power;
}

function quantize(tile: Tile, parts: Parts, { packed, mean }: Values, factors: readonly Reg<'f32'>[]): void {
  const { b } = tile;
  const { codesAt, octet, channel, firstPart, partsAtOnce, wordParts, allBusy } = parts;
  b.section('quantize V into shared memory');
  const channelAt = sharedAt(tile, codesAt, channel, Math.log2(KEY_VALUE_TILE));
  parts.words.forEach((word, round) => {
    const chunk = b.xor(b.shr(word, 2), chunkMask(tile, parts, octet));
    const place = sharedAt(tile, sharedAt(tile, channelAt, chunk, 4), b.and(word, 3), 2);
    const codes = packed
      .slice(4 * round, 4 * round + 4)
      .map((eight) => scaled(tile, centered(tile, eight, mean), factors));
    const left = Math.min(partsAtOnce, wordParts - round * partsAtOnce);
    const busy = allBusy ? undefined : b.setp('lt', firstPart, left);
    for (let c = 0; c < 8; c++) {
      const [x, y, z, w] = codes.map((ofToken) => at(ofToken, c)) as Quad;
      const four = b.pack('e4m3x4', b.cvtPack('e4m3x2', x, y), b.cvtPack('e4m3x2', z, w));
      const write = () => b.st(four, place, c * KEY_VALUE_TILE);
      if (busy === undefined) write();
      else b.when(busy, write);
    }
  });
}

/** The tile from shared memory to the output: channels one behind the other, each with its 128 tokens. */
function storeRows(tile: Tile, parts: Parts): void {
  const { b, config, thread, threads, pointer, firstRow } = tile;
  b.section('store V');
  const chunks = config.paddedValueDim * (KEY_VALUE_TILE / 16);
  // The tile's first row, a multiple of 128.
  const destination = offset(b, b.loadPointer(pointer.value), firstRow, config.paddedValueDim);
  const own = b.add(destination, b.as(b.mulWide(thread, 16), 'global'));
  for (let done = 0; done < chunks; done += threads) {
    const index = b.add(thread, done);
    const ofChannel = b.shr(index, 3);
    const chunk = b.and(index, 7);
    const place = b.xor(chunk, chunkMask(tile, parts, b.shr(ofChannel, 3)));
    const from = sharedAt(tile, sharedAt(tile, parts.codesAt, ofChannel, Math.log2(KEY_VALUE_TILE)), place, 4);
    const store = () => b.stVector(b.ldVector('b32', 4, from), own, done * 16);
    if (done + threads > chunks) b.if(b.setp('lt', index, chunks), store);
    else store();
  }
}
