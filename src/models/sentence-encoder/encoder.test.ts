import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import path from 'node:path';
import * as tf from '@tensorflow/tfjs';
import { beforeAll, describe, expect, it } from 'vitest';
import { createProblem } from '../../attention/problem.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { tensor } from '../../tensor/tensor.ts';
import { type AttentionFunction, loadSentenceModel, MODEL_PACKAGE, readWeights, type SentenceModel } from './index.ts';

const folder = path.join(
  path.dirname(createRequire(import.meta.url).resolve(`${MODEL_PACKAGE.name}/package.json`)),
  MODEL_PACKAGE.folder,
);
const readModelFile = (name: string) => readFile(path.join(folder, name));

const exact: AttentionFunction = async ({ q, k, v, attnMask, smScale }) => {
  const options = { tensorLayout: 'NHD', smScale, ...(attnMask && { attnMask }) } as const;
  const { output } = attentionExact(createProblem(q, k, v, options), { q, k, v, attnMask });
  return tensor(Float32Array.from(output), q.shape);
};

const SENTENCES = [
  'How old are you?',
  'What is your age?',
  'Attention is the part of a transformer whose cost grows with the square of the length.',
  'x',
  'The naïve café owner paid 12½ € — 日本語 and 🙂 are unknown to her.',
  // Longer than the 128 tokens that the model takes.
  'It was the best of times, it was the worst of times, it was the age of wisdom, '.repeat(12),
];

describe('sentence encoder', () => {
  let model: SentenceModel;
  let graph: tf.GraphModel;

  beforeAll(async () => {
    model = await loadSentenceModel(readModelFile);
    const json = JSON.parse(await readFile(path.join(folder, 'model.json'), 'utf8'));
    const [{ paths, weights: weightSpecs }] = json.weightsManifest;
    const shards: Buffer[] = await Promise.all(paths.map(readModelFile));
    const bytes = Buffer.concat(shards);
    const weightData = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length) as ArrayBuffer;
    await tf.setBackend('cpu');
    graph = await tf.loadGraphModel({
      load: async () => ({ modelTopology: json.modelTopology, weightSpecs, weightData }),
    });
  });

  /** The shipped graph, run by TensorFlow.js. */
  async function runGraph(sequences: readonly (readonly number[])[]): Promise<Float32Array[]> {
    const indices = sequences.flatMap((ids, sentence) => ids.map((_, position) => [sentence, position]));
    const inputs = {
      indices: tf.tensor2d(indices, [indices.length, 2], 'int32'),
      values: tf.tensor1d(sequences.flat(), 'int32'),
    };
    const output = (await graph.executeAsync(inputs)) as tf.Tensor2D;
    const rows = await output.array();
    tf.dispose([inputs.indices, inputs.values, output]);
    return rows.map((row) => Float32Array.from(row));
  }

  it('computes what TensorFlow.js computes from the shipped graph', async () => {
    const sequences = SENTENCES.map((sentence) => model.tokenizer.encode(sentence));
    expect(sequences.map((ids) => ids.length).filter((length) => length > 128)).toHaveLength(1);
    const [actual, expected] = [await model.encoder.encode(sequences, exact), await runGraph(sequences)];
    expect(expected).toHaveLength(SENTENCES.length);
    for (const [i, embedding] of actual.entries()) {
      const accuracy = compare(embedding, expected[i] as Float32Array);
      // Components are about 1/sqrt(512) = 0.04; TensorFlow.js rounds every sum to float32.
      expect(accuracy.maxAbsoluteError, SENTENCES[i] as string).toBeLessThan(1e-6);
      expect(accuracy.cosineSimilarity).toBeGreaterThan(1 - 1e-9);
    }
  });

  it('gives a sentence the same embedding alone and in a padded batch', async () => {
    const sequences = SENTENCES.map((sentence) => model.tokenizer.encode(sentence));
    const batch = await model.encoder.encode(sequences, exact);
    for (const i of [0, 3]) {
      const [alone] = await model.encoder.encode([sequences[i] as number[]], exact);
      expect(compare(alone as Float32Array, batch[i] as Float32Array).maxAbsoluteError).toBeLessThan(1e-7);
    }
  });

  it('finds sentences of one meaning closer than others', async () => {
    const [a, b, c] = (await model.encoder.encode(
      SENTENCES.slice(0, 3).map((sentence) => model.tokenizer.encode(sentence)),
      exact,
    )) as [Float32Array, Float32Array, Float32Array];
    expect(compare(a, b).cosineSimilarity).toBeGreaterThan(0.7);
    expect(compare(a, c).cosineSimilarity).toBeLessThan(0.3);
  });

  it('takes more tokens than it was trained with when told so', async () => {
    const ids = model.tokenizer.encode(SENTENCES[5] as string);
    const layers: number[] = [];
    const [long] = await model.encoder.encode([ids], exact, {
      maxLength: Number.POSITIVE_INFINITY,
      onLayer: (_, hidden) => layers.push(hidden.length),
    });
    const [clipped] = await model.encoder.encode([ids], exact);
    expect(layers).toEqual([ids.length * 512, ids.length * 512]);
    expect(compare(long as Float32Array, clipped as Float32Array).maxAbsoluteError).toBeGreaterThan(1e-4);
  });

  it('embeds an empty text as the graph would: the last layer of a mean of 0', async () => {
    const { output } = await readWeights(readModelFile);
    const [alone] = await model.encoder.encode([[]], exact);
    const norm = Math.hypot(...output.bias.map(Math.tanh));
    const expected = output.bias.map((value) => Math.tanh(value) / norm);
    expect(compare(alone as Float32Array, expected).maxAbsoluteError).toBeLessThan(1e-6);
    expect(await model.encoder.encode([], exact)).toEqual([]);
  });

  it('refuses ids outside the vocabulary and weights of another model', async () => {
    await expect(model.encoder.encode([[1, 8002]], exact)).rejects.toThrow(/token ids from 0 to 8001, received 8002/);
    const empty = new TextEncoder().encode(JSON.stringify({ weightsManifest: [] }));
    await expect(readWeights(async () => empty)).rejects.toThrow(/a weight named/);
  });
});
