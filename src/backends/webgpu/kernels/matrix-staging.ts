/**
 * How tiles of K and V get into workgroup memory where the device's products do not take them as they are stored:
 * converted, all of a thread's loads before its stores.
 */
import type { MatrixConfig } from '../capabilities.ts';
import { KEY_TILE } from './layout.ts';
import { range } from './storage.ts';

export interface StagingConfig {
  readonly threads: number;
  /** Keys of a step. */
  readonly keys: number;
  readonly headDimPadded: number;
  readonly valueDimPadded: number;
  readonly qk: MatrixConfig;
  /** Components between the rows of converted K. */
  readonly keyStride: number;
  /** A 32-bit word of the step's K or V: expressions of a tile of {@link KEY_TILE} keys and of a word in it. */
  keyWord(subtile: string, word: string): string;
  valueWord(subtile: string, word: string): string;
}

/** Statements over variables that the caller declares. */
interface Copies {
  readonly declare: string;
  readonly load: string;
  readonly store: string;
}

export interface Staging {
  /** Loads into registers, and stores from them into `tile_k` and `tile_v`. */
  readonly keys: Copies;
  readonly values: Copies;
}

export function stageTiles(config: StagingConfig): Staging {
  const { threads, keys, headDimPadded, valueDimPadded, qk, keyStride } = config;
  const subtiles = keys / KEY_TILE;
  const copies = (
    [name, type]: readonly [string, string],
    count: number,
    load: (subtile: string, word: string) => string,
    store: (i: string, x: string) => string,
  ): Copies => {
    const total = count * subtiles;
    const items = range(Math.ceil(total / threads));
    const at = (item: number) => (item === 0 ? 't' : `(t + ${item * threads}u)`);
    const within = (item: number, statement: string) =>
      (item + 1) * threads <= total ? statement : `if (${at(item)} < ${total}u) { ${statement} }`;
    const source = (i: string) => (subtiles === 1 ? load('0u', i) : load(`${i} / ${count}u`, `${i} % ${count}u`));
    return {
      declare: items.map((item) => `var ${name}_${item}: ${type};`).join(' '),
      load: items.map((item) => `${name}_${item} = ${source(at(item))};`).join(' '),
      store: items.map((item) => within(item, store(at(item), `${name}_${item}`))).join(' '),
    };
  };
  // Words of a tile of K: for each 32 channels, 8 words of each key.
  const convertedKey = (i: string, x: string) =>
    range(4)
      .map(
        (e) =>
          `tile_k[(${i} / ${8 * KEY_TILE * (headDimPadded / 32)}u * ${KEY_TILE}u + ${i} / 8u % ${KEY_TILE}u) * ${keyStride}u + ${i} / ${8 * KEY_TILE}u % ${headDimPadded / 32}u * 32u + ${i} % 8u * 4u + ${e}u] = ${qk.componentType}(extractBits(${x}, ${8 * e}u, 8u));`,
      )
      .join(' ');
  return {
    keys: copies(['word_k', 'i32'], (KEY_TILE * headDimPadded) / 4, config.keyWord, convertedKey),
    values: copies(
      ['word_v', 'u32'],
      (KEY_TILE * valueDimPadded) / 2,
      config.valueWord,
      (i, x) => `{ let y = unpack2x16float(${x}); tile_v[2u * ${i}] = y.x; tile_v[2u * ${i} + 1u] = y.y; }`,
    ),
  };
}
