/**
 * Writes `public/encoder-head.bin`: Q, K and V, `[96, 64]` float16 each, of the first head of the sentence encoder's first layer on the
 * first words of Alice's Adventures in Wonderland. `tsx playground/write-head.ts`
 */
import { readFile, writeFile } from 'node:fs/promises';
import { openSentenceModel } from '../src/cli/model.ts';
import { exactOutput } from '../src/measure/accuracy.ts';
import { fromFloat32, toFloat32 } from '../src/tensor/access.ts';
import { bitsOf, slice, type Tensor, tensor } from '../src/tensor/tensor.ts';
import { ENCODER_HEAD } from './real-head.ts';

const { tokenizer, encoder } = await openSentenceModel();
const text = await readFile(new URL('../src/cli/alice-chapter-1.txt', import.meta.url), 'utf8');
const ids = tokenizer.encode(text.slice(0, 2000)).slice(0, ENCODER_HEAD.length);
const parts: Uint8Array[] = [];
await encoder.encode([ids], async (call) => {
  if (call.layer === 0) {
    for (const view of [call.q, call.k, call.v]) {
      const head = toFloat32(slice(view as Tensor, 2, 0, 1));
      const { data } = fromFloat32(head, [head.length], 'float16');
      const bits = data instanceof Uint16Array ? data : bitsOf(data);
      parts.push(new Uint8Array(bits.buffer, bits.byteOffset, bits.byteLength));
    }
  }
  return tensor(await exactOutput({ ...call, tensorLayout: 'NHD' }, () => {}), call.q.shape);
});
await writeFile(new URL('./public/encoder-head.bin', import.meta.url), Buffer.concat(parts));
