/** Trained models through onnxruntime, with SageAttention on the WASM backend and without. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import * as ortNode from 'onnxruntime-node';
import * as ortWeb from 'onnxruntime-web';
import { afterAll, describe, expect, it } from 'vitest';
import { readModelFile, sentenceEncoderModel } from '../../../scripts/sentence-encoder-onnx.ts';
import { Random, runSeed } from '../../../test/support/random.ts';
import { itNeeds } from '../../../test/support/requirement.ts';
import { SENTENCES } from '../../../test/support/sentences.ts';
import {
  missingFonts,
  readClasses,
  recognitionCharacters,
  recognitionModel,
  renderText,
} from '../../../test/support/text-recognition.ts';
import { disposeBackends } from '../../backends/registry.ts';
import { createTokenizer, readWeights } from '../../models/sentence-encoder/index.ts';
import { withSageAttention } from './index.ts';

ortWeb.env.wasm.numThreads = 1;
afterAll(disposeBackends);

const ENGINES = { 'onnxruntime-node': ortNode, 'onnxruntime-web': ortWeb as unknown as typeof ortNode } as const;

const TEXTS = [
  'The quick brown fox jumps over the lazy dog',
  'Attention is all you need',
  'Invoice 2026-11-23: 1,024.50 EUR',
  'SageAttention2++ runs in your browser',
  'https://arxiv.org/abs/2410.02367',
  'ABCDEFGHIJKLMNOPQRSTUVWXYZ',
  '0123456789 + 9876543210',
  'Please mind the gap between the train and the platform, and have a pleasant day',
];

/** Words and numbers in no order that anyone chose. */
function randomTexts(count: number, seed: number): string[] {
  const random = new Random(seed);
  const words = 'river stone quantum Paris 42 GPU matrix 7.5% Tuesday violet (see) key-value #13 harvest zebra'.split(
    ' ',
  );
  return Array.from({ length: count }, () =>
    Array.from({ length: random.integer(2, 7) }, () => random.pick(words)).join(' '),
  );
}

describe.each(Object.entries(ENGINES))('PaddleOCR recognition through %s', (_, ort) => {
  itNeeds(missingFonts)('reads the same text with and without', async () => {
    const seed = runSeed();
    console.info(`seed ${seed}`);
    const [bytes, characters] = await Promise.all([recognitionModel(), recognitionCharacters()]);
    const plain = await ort.InferenceSession.create(bytes);
    const sage = await withSageAttention(ort, { minTokens: 0 }).InferenceSession.create(bytes);
    const read = async (
      session: Pick<ortNode.InferenceSession, 'run' | 'inputNames' | 'outputNames'>,
      text: string,
    ) => {
      const { pixels, dims } = renderText(text);
      const results = await session.run({ [session.inputNames[0] as string]: new ort.Tensor('float32', pixels, dims) });
      const output = results[session.outputNames[0] as string] as ortNode.Tensor;
      return readClasses(output.data as Float32Array, output.dims[2] as number, characters);
    };
    let legible = 0;
    for (const text of [...TEXTS, ...randomTexts(24, seed)]) {
      const [expected, actual] = [await read(plain, text), await read(sage, text)];
      expect(actual).toBe(expected);
      if (expected.replaceAll(' ', '') === text.replaceAll(' ', '')) legible++;
    }
    // The comparison means something only if the model reads what was drawn.
    expect(legible).toBeGreaterThan(20);
    expect(sage.sageAttention.map(({ taken, heads, headDim }) => ({ taken, heads, headDim }))).toEqual(
      Array.from({ length: 2 }, () => ({ taken: true, heads: 8, headDim: 15 })),
    );
    await plain.release();
    await sage.release();
  });
});

describe.each(Object.entries(ENGINES))('sentence encoder through %s', (engine, ort) => {
  it('keeps similarities within 1e-3, from bytes and from a file', async () => {
    const bytes = sentenceEncoderModel(await readWeights(readModelFile));
    const tokenizer = createTokenizer(JSON.parse(new TextDecoder().decode(await readModelFile('vocab.json'))));
    const sequences = SENTENCES.map((sentence) => tokenizer.encode(sentence));
    const length = Math.max(...sequences.map((ids) => ids.length));
    const int64 = (value: (ids: number[], i: number) => number) =>
      new ort.Tensor(
        'int64',
        BigInt64Array.from(sequences.flatMap((ids) => Array.from({ length }, (__, i) => BigInt(value(ids, i))))),
        [sequences.length, length],
      );
    const feeds = {
      input_ids: int64((ids, i) => ids[i] ?? 0),
      attention_mask: int64((ids, i) => Number(i < ids.length)),
    };
    const folder = await mkdtemp(path.join(tmpdir(), 'sentence-encoder-'));
    const file = path.join(folder, 'model.onnx');
    await writeFile(file, bytes);
    try {
      const similarities = async (session: Pick<ortNode.InferenceSession, 'run'>) => {
        const { sentence_embedding: embedding } = await session.run(feeds, ['sentence_embedding']);
        const { data, dims } = embedding as { data: Float32Array; dims: readonly number[] };
        const size = dims[1] as number;
        const row = (i: number) => data.subarray(i * size, (i + 1) * size);
        return SENTENCES.flatMap((___, i) =>
          SENTENCES.map((____, j) => row(i).reduce((sum, x, c) => sum + x * (row(j)[c] as number), 0)),
        );
      };
      const plain = await ort.InferenceSession.create(bytes);
      const expected = await similarities(plain);
      // Sentences of the same meaning are closer than others, so the converted model is still the trained one.
      expect(expected[1]).toBeGreaterThan((expected[2] as number) + 0.2);
      const sageOrt = withSageAttention(ort, { minTokens: 0 });
      for (const source of [bytes, file]) {
        const sage = await sageOrt.InferenceSession.create(source);
        const actual = await similarities(sage);
        expect(sage.sageAttention.filter(({ taken }) => taken).length, engine).toBe(2);
        actual.forEach((value, i) => void expect(Math.abs(value - (expected[i] as number))).toBeLessThan(1e-3));
        await sage.release();
      }
      await plain.release();
    } finally {
      await rm(folder, { recursive: true });
    }
  });
});
