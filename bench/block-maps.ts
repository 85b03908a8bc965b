/** Maps of blocks that benches of sparse attention take. */
import type { Random } from '../src/measure/random.ts';
import { type Tensor, tensor } from '../src/tensor/tensor.ts';

export interface MapSize {
  readonly heads: number;
  /** Blocks of rows and of keys. */
  readonly rowBlocks: number;
  readonly keyBlocks: number;
}

/** Exactly `share` of each line: at random places, or nearest the diagonal. */
export function blockMapOf({ heads, rowBlocks, keyBlocks }: MapSize, share: number, places: Random | 'bands'): Tensor {
  const map = new Uint8Array(heads * rowBlocks * keyBlocks);
  for (let line = 0; line < heads * rowBlocks; line++) {
    const diagonal = ((line % rowBlocks) + 0.5) * (keyBlocks / rowBlocks);
    const order = Array.from({ length: keyBlocks }, (_, j) => ({
      j,
      at: places === 'bands' ? Math.abs(j + 0.5 - diagonal) : places.uniform(),
    }));
    order.sort((a, b) => a.at - b.at);
    for (const { j } of order.slice(0, Math.round(keyBlocks * share))) map[line * keyBlocks + j] = 1;
  }
  return tensor(map, [1, heads, rowBlocks, keyBlocks]);
}
