/** Q, K and V of a head of a trained model, which the page has with it: the first screen loads no weights. */
import { toFloat32 } from '../src/tensor/access.ts';
import { tensor } from '../src/tensor/tensor.ts';
import type { Head } from './lab.ts';

/** As `write-head.ts` writes it. */
export const ENCODER_HEAD = { length: 96, dim: 64 } as const;

export async function fetchEncoderHead(): Promise<Head> {
  const response = await fetch(new URL('encoder-head.bin', document.baseURI));
  const bytes = await response.arrayBuffer();
  const { length, dim } = ENCODER_HEAD;
  const count = length * dim;
  if (!response.ok || bytes.byteLength !== 3 * 2 * count)
    throw new Error('the head of the encoder could not be loaded');
  const part = (i: number) => {
    const bits = new Uint16Array(bytes, 2 * i * count, count);
    return toFloat32(tensor(bits, [count], { dtype: 'float16' }));
  };
  return { q: part(0), k: part(1), v: part(2), length, dim };
}
