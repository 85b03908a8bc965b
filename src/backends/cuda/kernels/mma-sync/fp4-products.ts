/**
 * Tensor-core products of NVFP4 operands: block-scaled where the tensor core takes them (12.x), else unpacked to FP16,
 * which holds the product of a code and its scale exactly. Both multiply the same numbers.
 *
 * With V in NVFP4 rows of K lie so that the accumulator of MMA j of 32 keys, value v, lane t, is key 8t + 2j + v: a
 * lane's eight values of a row are eight neighbouring keys, which is one register of P's operand; two neighbouring
 * lanes share a block of 16.
 */

import type { SharedTile } from '../../ptx/layouts.ts';
import { NVFP4_MMA } from '../../ptx/mma.ts';
import type { Reg } from '../../ptx/types.ts';
import { inversePower, roundPositive, scaleHalves, unpackCodes } from '../fp4/e2m1.ts';
import { chunkAddresses } from '../parts/copies.ts';
import { at } from '../parts/lists.ts';
import { BLOCK_K } from './config.ts';
import { staged } from './copies.ts';
import type { Frame } from './frame.ts';
import type { Parked } from './parked.ts';
import type { Output, Scores, Seeds, SoftmaxState } from './state.ts';

/** Four codes of 1, twice, and four scales of 1. */
const ONES = 0x22222222;
const UNIT_SCALES = 0x38383838;
/** Two ones in FP16. */
const HALF_ONES = 0x3c003c00;

const GROUPS = BLOCK_K / 32;

/** Fragments of Q or P in FP16 for 32 channels or keys: two steps of 16. */
type Halves = readonly (readonly Reg<'f16x2'>[])[];

export class Fp4Products {
  readonly #frame: Frame;
  readonly #parked: Parked;
  readonly #position: Reg<'s32'>;

  /** @param position of the tile among those that are taken */
  constructor(frame: Frame, parked: Parked, position: Reg<'s32'>) {
    this.#frame = frame;
    this.#parked = parked;
    this.#position = position;
  }

  /** S = Q K^T. `query` and `key` are this lane's places in ldmatrix. */
  multiplyKeys(scores: Scores, seeds: Seeds, query: Reg<'shared'>, key: Reg<'shared'>): void {
    if (this.#frame.config.qkFormat === 'e2m1') this.#multiplyKeyCodes(scores, seeds, query, key);
    else this.#multiplyKeyHalves(scores, seeds, query, key);
  }

  /**
   * O += P V, and the sums of P where it is NVFP4 too.
   *
   * @param rows whose sums grow with P in NVFP4
   * @param unit what this tile of V was divided by
   * @param base this lane's place in ldmatrix
   */
  multiplyValues(weights: Scores, output: Output, rows: SoftmaxState, unit: Reg<'f32'>, base: Reg<'shared'>): void {
    this.#moveToUnit(output, unit);
    if (this.#frame.config.pvFormat === 'e2m1') this.#multiplyValueCodes(weights, output, rows, base);
    else this.#multiplyValueHalves(weights, output, rows, base);
  }

  /** This thread's lane, as a byte offset in 32 words: the word of row 8t + g (`column`), or of row g. */
  #lane() {
    const { b } = this.#frame;
    const thread = this.#parked.threadNow();
    const [g, t] = [b.shr(b.and(thread, 31), 2), b.and(thread, 3)];
    return { thread, g, t };
  }

  /** Where the words of a stage of scales begin. */
  #scales(tile: SharedTile | undefined, stages: 1 | 2): Reg<'shared'> {
    if (tile === undefined) throw new Error('no such scales');
    const base = this.#frame.own(tile.base);
    return stages === 2 ? staged(this.#frame, base, tile, this.#position) : base;
  }

  #multiplyKeyCodes({ floats }: Scores, { zeros }: Seeds, query: Reg<'shared'>, key: Reg<'shared'>): void {
    const { b, config, tiles, rowTiles } = this.#frame;
    const { thread, g, t } = this.#lane();
    const warpRow = b.mul(b.shr(thread, 5), config.rowsPerWarp);
    const rowWords = b.add(
      this.#scales(tiles.queryScales, 1),
      b.as(b.shl(b.add(warpRow, b.add(g, b.shl(b.and(t, 1), 3))), 2), 'shared'),
    );
    const columnWords = b.add(this.#scales(tiles.keyScales, 2), b.as(b.shl(b.add(b.shl(t, 3), g), 2), 'shared'));
    const rows = tiles.query.rows;
    const [queryAt, keyAt] = [chunkAddresses(b, tiles.query.layout, query), chunkAddresses(b, tiles.key.layout, key)];
    for (let k = 0; k < config.qkRowBytes / 32; k++) {
      const [queryAddress, queryOffset] = queryAt(2 * k);
      const [keyAddress, keyOffset] = keyAt(2 * k);
      const q = Array.from({ length: rowTiles }, (_, m) => ({
        codes: b.ldmatrix('e2m1x8', 4, queryAddress, queryOffset + m * 16 * tiles.query.layout.rowBytes),
        scales: b.ld('b32', rowWords, (k * rows + 16 * m) * 4),
      }));
      for (let group = 0; group < GROUPS; group++) {
        const scales = b.ld('b32', columnWords, (k * BLOCK_K + 32 * group) * 4);
        for (let pair = 2 * group; pair < 2 * group + 2; pair++) {
          const keys = b.ldmatrix('e2m1x8', 4, keyAddress, keyOffset + pair * 16 * tiles.key.layout.rowBytes);
          for (let half = 0; half < 2; half++) {
            const n = 2 * pair + half;
            for (let m = 0; m < rowTiles; m++) {
              const d = at(at(floats, m), n);
              const { codes, scales: ofRows } = at(q, m);
              const [a, bb] = [
                { register: ofRows, thread: 0 },
                { register: scales, thread: n & 3 },
              ];
              b.mmaBlockScaled(NVFP4_MMA, d, codes, keys.slice(2 * half, 2 * half + 2), a, bb, k === 0 ? zeros : d);
            }
          }
        }
      }
    }
  }

  #multiplyKeyHalves({ floats }: Scores, { zeros }: Seeds, query: Reg<'shared'>, key: Reg<'shared'>): void {
    const { b, config, tiles, rowTiles } = this.#frame;
    const { g, t } = this.#lane();
    const words = b.add(this.#scales(tiles.keyScales, 2), b.as(b.shl(g, 2), 'shared'));
    const shift = b.shl(b.shr(t, 1), 3);
    const [queryAt, keyAt] = [chunkAddresses(b, tiles.query.layout, query), chunkAddresses(b, tiles.key.layout, key)];
    const chunks = config.qkRowBytes / 16;
    // A word has the scales of 64 channels of a key, two chunks. Beside the sums of wide V there are no registers for both.
    const atOnce = config.paddedValueDim > 128 ? 1 : 2;
    for (let first = 0; first < chunks; first += atOnce) {
      const own = Array.from({ length: atOnce }, (_, i) => first + i);
      const q = own.map((chunk) =>
        Array.from({ length: rowTiles }, (_, m) =>
          [0, 1].map((step) => {
            const [address, byte] = queryAt(4 * chunk + 2 * step);
            return b.ldmatrix('f16x2', 4, address, byte + m * 16 * tiles.query.layout.rowBytes);
          }),
        ),
      );
      for (let group = 0; group < GROUPS; group++) {
        const keys = own.map((chunk) => {
          const [address, byte] = keyAt(chunk);
          return b.ldmatrix('b32', 4, address, byte + group * 32 * tiles.key.layout.rowBytes);
        });
        for (let i = 0; i < 4; i++) {
          const n = 4 * group + i;
          const word = b.ld('b32', words, ((first >> 1) * BLOCK_K + 8 * n) * 4);
          const scales = scaleHalves(b, first % 2 === 0 ? word : b.shr(word, 16), shift);
          for (const [j, chunk] of own.entries()) {
            const halves = unpackCodes(b, config.codeOrder, at(at(keys, j), i), at(scales, j));
            this.#multiplyColumns(at(q, j), halves, (m) => at(at(floats, m), n), chunk === 0 ? zeros : undefined);
          }
        }
      }
    }
  }

  /**
   * Products of rows with eight unpacked columns, in two steps of 16 channels or keys.
   *
   * @param rows of each 16-row tile
   * @param first what the first step starts from in place of the sums
   */
  #multiplyColumns(
    rows: readonly Halves[],
    columns: readonly Reg<'f16x2'>[],
    sums: (m: number) => readonly Reg<'f32'>[],
    first?: readonly Reg<'f32'>[],
  ): void {
    const { b } = this.#frame;
    for (let step = 0; step < 2; step++) {
      for (const [m, steps] of rows.entries()) {
        const d = sums(m);
        const c = step === 0 && first !== undefined ? first : d;
        b.mma('m16n8k16.row.col.f32.f16.f16.f32', d, at(steps, step), columns.slice(2 * step, 2 * step + 2), c);
      }
    }
  }

  /** Moves the sums to the power of two that this tile of V was divided by; a tile of zeros has none. */
  #moveToUnit({ floats, unit: held }: Output, unit: Reg<'f32'>): void {
    const { b } = this.#frame;
    if (held === undefined) throw new Error('V is not NVFP4');
    const moves = b.andPred(b.setp('ne', unit, held), b.setp('gt', unit, 0));
    b.if(moves, () => {
      b.section('the sums move to the unit of this tile of V');
      const factor = b.mul(held, inversePower(b, unit));
      b.mov(unit, held);
      for (const fragments of floats) {
        for (const register of fragments.flat()) b.mul(register, factor, register);
      }
    });
  }

  #multiplyValueCodes(weights: Scores, { floats }: Output, rows: SoftmaxState, base: Reg<'shared'>): void {
    const { b, config, tiles, rowTiles, channelTiles } = this.#frame;
    const { g, t } = this.#lane();
    // Lanes 4g and 4g + 1 give the scales of rows g and g + 8.
    const selector = b.as(b.add(b.mul(b.and(t, 1), 0x1111), 0x6240), 'b32');
    const p = Array.from({ length: rowTiles }, (_, m) => ({
      codes: this.#weightCodes(weights, m),
      scales: this.#weightScales(weights, m, selector),
    }));
    const words = b.add(
      this.#scales(tiles.valueScales, config.valueStages),
      b.as(b.shl(b.add(b.shl(t, 3), g), 2), 'shared'),
    );
    const multiply = (n: number, v: readonly Reg<'e2m1x8'>[], register: Reg<'b32'>) => {
      for (const [m, { codes, scales }] of p.entries()) {
        const ofRows = { register: scales, thread: 0 };
        b.mmaBlockScaled(NVFP4_MMA, at(at(floats, m), n), codes, v, ofRows, { register, thread: n & 3 });
      }
    };
    const ones = b.as(b.constant('b32', ONES), 'e2m1x8');
    const unitScales = { register: b.constant('b32', UNIT_SCALES), thread: 0 };
    for (const [m, { codes, scales }] of p.entries()) {
      const ofRows = { register: scales, thread: 0 };
      const { d, c } = this.#sums(rows, m);
      b.mmaBlockScaled(NVFP4_MMA, d, codes, [ones, ones], ofRows, unitScales, c);
    }
    const valueAt = chunkAddresses(b, tiles.value.layout, base);
    const [address, byte] = valueAt(0);
    for (let group = 0; group < channelTiles / 4; group++) {
      const scales = b.ld('b32', words, 32 * group * 4);
      for (let pair = 2 * group; pair < 2 * group + 2; pair++) {
        const v = b.ldmatrix('e2m1x8', 4, address, byte + pair * 16 * tiles.value.layout.rowBytes);
        for (let half = 0; half < 2; half++) multiply(2 * pair + half, v.slice(2 * half, 2 * half + 2), scales);
      }
    }
  }

  /**
   * Fragments of the sums of P of a 16-row tile, as products with a channel of ones: all columns are alike, one is
   * kept.
   */
  #sums({ sum }: SoftmaxState, m: number) {
    const { b } = this.#frame;
    const [upper, lower] = [at(sum, 2 * m), at(sum, 2 * m + 1)];
    return { d: [upper, b.reg('f32'), lower, b.reg('f32')], c: [upper, upper, lower, lower] };
  }

  /** Codes of P: the A fragment of a 16-row tile. */
  #weightCodes({ floats }: Scores, m: number): Reg<'e2m1x8'>[] {
    const { b } = this.#frame;
    return [0, 1].flatMap((group) =>
      [0, 2].map((half) => {
        const bytes = at(floats, m)
          .slice(4 * group, 4 * group + 4)
          .map((fragment) => b.cvtPack('e2m1x2', at(fragment, half), at(fragment, half + 1)));
        return b.packBytes('e2m1x8', bytes);
      }),
    );
  }

  /**
   * Scales of P: four per row, in the lanes from which the product reads them. A lane has the scales of its own blocks,
   * its second neighbour the others.
   */
  #weightScales({ blocks }: Scores, m: number, selector: Reg<'b32'>): Reg<'b32'> {
    const { b } = this.#frame;
    const [first, second] = [0, 1].map((group) =>
      b.cvtPack('e4m3x2', at(at(blocks, 2 * m), group), at(at(blocks, 2 * m + 1), group)),
    ) as [Reg<'e4m3x2'>, Reg<'e4m3x2'>];
    const own = b.pack('b32', first, second);
    return b.prmt(own, b.shflBfly(own, 2), selector);
  }

  #multiplyValueHalves(weights: Scores, { floats }: Output, rows: SoftmaxState, base: Reg<'shared'>): void {
    const { b, config, tiles, rowTiles, channelTiles } = this.#frame;
    const { g, t } = this.#lane();
    const p = Array.from({ length: rowTiles }, (_, m) =>
      Array.from({ length: GROUPS }, (__, group) => this.#weightHalves(weights, m, group)),
    );
    const words = b.add(this.#scales(tiles.valueScales, config.valueStages), b.as(b.shl(g, 2), 'shared'));
    const shift = b.shl(b.shr(t, 1), 3);
    const valueAt = chunkAddresses(b, tiles.value.layout, base);
    for (let first = 0; first < channelTiles; first += 4) {
      const values = Array.from({ length: GROUPS }, (_, group) => {
        const [address, byte] = valueAt(group);
        return b.ldmatrix('b32', 4, address, byte + first * 8 * tiles.value.layout.rowBytes);
      });
      for (let i = 0; i < 4; i++) {
        const scales = scaleHalves(b, b.ld('b32', words, 8 * (first + i) * 4), shift);
        for (const [group, scale] of scales.entries()) {
          const halves = unpackCodes(b, config.codeOrder, at(at(values, group), i), scale);
          const rows = p.map((groups) => at(groups, group));
          this.#multiplyColumns(rows, halves, (m) => at(at(floats, m), first + i));
        }
      }
    }
    if (!config.quantizedWeights) return;
    const ones = b.as(b.constant('b32', HALF_ONES), 'f16x2');
    for (let group = 0; group < GROUPS; group++) {
      for (let step = 0; step < 2; step++) {
        for (let m = 0; m < rowTiles; m++) {
          const { d, c } = this.#sums(rows, m);
          b.mma('m16n8k16.row.col.f32.f16.f16.f32', d, at(at(at(p, m), group), step), [ones, ones], c);
        }
      }
    }
  }

  /** P of a 16-row tile and 32 keys, in the pairs of {@link unpackCodes}: elements i and i + 4 of the lane's eight. */
  #weightHalves({ floats, blocks }: Scores, m: number, group: number): Halves {
    const { b, config } = this.#frame;
    const fragments = at(floats, m).slice(4 * group, 4 * group + 4);
    const scales = config.quantizedWeights
      ? [0, 1].map((half) => {
          const scale = at(at(blocks, 2 * m + half), group);
          return b.cvtPack('f16x2', scale, scale);
        })
      : undefined;
    const pair = (i: number, half: number) => {
      const [j, v] = [i >> 1, 2 * half + (i & 1)];
      const [low, high] = [at(at(fragments, j), v), at(at(fragments, j + 2), v)];
      if (scales === undefined) return b.cvtPack('f16x2', low, high);
      return b.mul(b.cvtPack('f16x2', roundPositive(b, low), roundPositive(b, high)), at(scales, half));
    };
    return [0, 2].map((i) => [pair(i, 0), pair(i, 1), pair(i + 1, 0), pair(i + 1, 1)]);
  }
}
