/** TensorFlow.js in Node: its own CPU and WASM backends, and the sentence encoder's shipped graph. */
import { createRequire } from 'node:module';
import path from 'node:path';
import * as tf from '@tensorflow/tfjs-core';
import '@tensorflow/tfjs-backend-cpu';
import { setWasmPaths } from '@tensorflow/tfjs-backend-wasm';
import { loadGraphModel } from '@tensorflow/tfjs-converter';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { readModelFile } from '../../../scripts/sentence-encoder-onnx.ts';
import { exactBackend } from '../../../test/support/exact-backend.ts';
import { Random, runSeed } from '../../../test/support/random.ts';
import { SENTENCES } from '../../../test/support/sentences.ts';
import { createProblem } from '../../attention/problem.ts';
import { disposeBackends, setBackend } from '../../backends/registry.ts';
import { createTokenizer } from '../../models/sentence-encoder/index.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { tensor } from '../../tensor/tensor.ts';
import { type ModelTopology, OPERATOR, rewriteTopology, sageattn, withSageAttention } from './index.ts';

const seed = runSeed();
beforeAll(() => {
  console.info(`seed ${seed}`);
  const require = createRequire(import.meta.url);
  setWasmPaths(`${path.dirname(require.resolve('@tensorflow/tfjs-backend-wasm'))}/`);
});
afterAll(disposeBackends);

describe.each(['cpu', 'wasm'])('sageattn on tfjs backend %s', (name) => {
  beforeAll(async () => {
    await tf.setBackend(name);
    await tf.ready();
  });

  it.each(['HND', 'NHD'] as const)(
    'attends, with a mask, in the layout %s, and leaves no tensor behind',
    async (tensorLayout) => {
      const random = new Random(seed);
      const shape = tensorLayout === 'HND' ? [2, 3, 70, 32] : [2, 70, 3, 32];
      const [q, k, v] = [0, 1, 2].map(() => tensor(random.normals(2 * 3 * 70 * 32), shape)) as [
        ReturnType<typeof tensor>,
        ReturnType<typeof tensor>,
        ReturnType<typeof tensor>,
      ];
      const bias = tensor(
        Float32Array.from({ length: 2 * 70 }, (_, i) => (i % 70 < 50 ? 0 : -1e9)),
        [2, 1, 1, 70],
      );
      const before = tf.memory().numTensors;
      const toTf = (value: typeof q) => tf.tensor(value.data as Float32Array, [...value.shape]);
      // Disposed by `tidy` before the promise settles: the inputs were read.
      let pending: Promise<tf.Tensor4D> | undefined;
      tf.tidy(() => {
        pending = sageattn(toTf(q), toTf(k), toTf(v), { attnMask: toTf(bias), isCausal: true, tensorLayout });
      });
      const output = (await pending) as tf.Tensor4D;
      expect(output.shape).toEqual(shape);
      const problem = createProblem(q, k, v, { attnMask: bias, isCausal: true, tensorLayout });
      const exact = attentionExact(problem, { q, k, v, attnMask: bias }).output;
      expect(compare(await output.data(), exact).cosineSimilarity).toBeGreaterThan(0.999);
      output.dispose();
      expect(tf.memory().numTensors).toBe(before);
    },
  );

  it('answers with booleans where a mask says so', async () => {
    const random = new Random(seed);
    const [q, k, v] = [0, 1, 2].map(() => tf.tensor(random.normals(2 * 5 * 8), [1, 2, 5, 8])) as [
      tf.Tensor,
      tf.Tensor,
      tf.Tensor,
    ];
    // The last query sees nothing.
    const attnMask = tf.tensor2d(
      [1, 1, 1, 1, 0].flatMap((row) => [1, 0, 1, 0, 1].map((key) => row * key)),
      [5, 5],
      'bool',
    );
    const output = await sageattn(q, k, v, { attnMask });
    const rows = (await output.array()) as number[][][][];
    expect(rows[0]?.map((head) => head[4])).toEqual([0, 1].map(() => new Array(8).fill(0)));
    expect(Math.abs(rows[0]?.[0]?.[0]?.[0] as number)).toBeGreaterThan(0);
    tf.dispose([q, k, v, attnMask, output]);
  });

  it('reads its inputs before the call returns', async () => {
    const source = Float32Array.from({ length: 8 }, () => 1);
    const [q, v] = [tf.ones([1, 1, 2, 4]), tf.tensor(source, [1, 1, 2, 4])];
    const pending = sageattn(q, q, v);
    source.fill(7);
    const output = await pending;
    for (const value of await output.data()) expect(value).toBeCloseTo(1, 3);
    tf.dispose([q, v, output]);
  });

  const one = () => tf.ones([1, 1, 2, 4]);
  it.each<[string, string, (q: tf.Tensor) => Promise<unknown>]>([
    ['integers', 'k', (q) => sageattn(q, tf.cast(q, 'int32'), q)],
    ['no tensor', 'v', (q) => sageattn(q, q, undefined as never)],
    ['an array', 'q', (q) => sageattn([1, 2] as never, q, q)],
    ['a mask of integers', 'options.attnMask', (q) => sageattn(q, q, q, { attnMask: tf.ones([2, 2], 'int32') })],
    ['a mask of another shape', 'options.attnMask', (q) => sageattn(q, q, q, { attnMask: tf.ones([3, 2]) })],
    ['a name that is no option', 'options.isCasual', (q) => sageattn(q, q, q, { isCasual: true } as never)],
    ['the logsumexp', 'options.returnLse', (q) => sageattn(q, q, q, { returnLse: true } as never)],
    ['a backend', 'options.backend', (q) => sageattn(q, q, q, { backend: 'webgpu' } as never)],
    ['three dimensions', 'q', (q) => sageattn(tf.squeeze(q), q, q)],
    ['no options', 'options', (q) => sageattn(q, q, q, null as never)],
  ])('refuses %s with a rejected promise, and leaves no tensor behind', async (_, argument, call) => {
    const before = tf.memory().numTensors;
    let pending: Promise<unknown> | undefined;
    tf.tidy(() => {
      pending = call(one());
    });
    await expect(pending).rejects.toMatchObject({
      name: 'InvalidArgumentError',
      argument: expect.stringMatching(`^${argument}`),
    });
    expect(tf.memory().numTensors).toBe(before);
  });
});

const largestDifference = (a: readonly number[], b: readonly number[]) =>
  a.reduce((most, value, i) => Math.max(most, Math.abs(value - (b[i] as number))), 0);

interface Artifacts {
  readonly modelTopology: ModelTopology;
  readonly weightsManifest: readonly { readonly paths: string[]; readonly weights: tf.io.WeightsManifestEntry[] }[];
}

describe('the sentence encoder as tfjs runs it', () => {
  it('embeds the same with SageAttention and without', async () => {
    await tf.setBackend('wasm');
    const artifacts = JSON.parse(new TextDecoder().decode(await readModelFile('model.json'))) as Artifacts;
    const paths = artifacts.weightsManifest.flatMap((group) => group.paths);
    const shards = await Promise.all(paths.map(readModelFile));
    const common = {
      weightSpecs: artifacts.weightsManifest.flatMap((group) => group.weights),
      weightData: new Uint8Array(Buffer.concat(shards)).buffer,
    };
    const open = (modelTopology: object) => loadGraphModel(tf.io.fromMemory({ ...common, modelTopology }));
    const { taken, left } = rewriteTopology(artifacts.modelTopology);
    expect([taken.length, left]).toEqual([2, []]);
    const rewritten = withSageAttention(artifacts.modelTopology);
    expect(rewritten.node.filter(({ op }) => op === 'Softmax' || op === 'BatchMatMul')).toEqual([]);
    expect(rewritten.node.filter(({ op }) => op === OPERATOR)).toHaveLength(2);
    const plain = await open(artifacts.modelTopology);
    const sage = await open(withSageAttention(artifacts.modelTopology, { kernel: 'qk-int8-pv-fp16' }));

    const tokenizer = createTokenizer(JSON.parse(new TextDecoder().decode(await readModelFile('vocab.json'))));
    const sequences = SENTENCES.map((sentence) => tokenizer.encode(sentence));
    const indices = tf.tensor2d(
      sequences.flatMap((ids, b) => ids.map((_, i) => [b, i])),
      undefined,
      'int32',
    );
    const values = tf.tensor1d(sequences.flat(), 'int32');
    const embed = async (model: typeof plain) => {
      const output = (await model.executeAsync({ indices, values })) as tf.Tensor2D;
      const rows = await output.array();
      output.dispose();
      return rows;
    };
    const similarities = (rows: number[][]) =>
      rows.flatMap((a) => rows.map((b) => a.reduce((sum, x, i) => sum + x * (b[i] as number), 0)));
    const expected = similarities(await embed(plain));
    expect(expected[1]).toBeGreaterThan((expected[2] as number) + 0.2);
    const before = tf.memory().numTensors;
    const actual = similarities(await embed(sage));
    expect(tf.memory().numTensors).toBe(before);
    // INT8 on sentences of 8 tokens, where one rounded score weighs an eighth: 1.1e-3 was seen.
    expect(largestDifference(actual, expected)).toBeLessThan(2e-3);
    // With an exact backend in its place, what remains is float32.
    const backend = exactBackend();
    const previous = await setBackend(backend);
    expect(largestDifference(similarities(await embed(sage)), expected)).toBeLessThan(1e-5);
    expect(backend.calls).toBe(2);
    if (previous !== undefined) await setBackend(previous);
    for (const value of [indices, values]) value.dispose();
  });

  it('leaves what is no attention, and says so', () => {
    const node = (name: string, op: string, ...input: string[]) => ({ name, op, input });
    const products = [node('a', 'Placeholder'), node('qk', 'BatchMatMulV2', 'a', 'a'), node('v', 'Placeholder')];
    const end = [node('p', 'Softmax', 's'), node('o', 'BatchMatMulV2', 'p', 'v')];
    const capped = rewriteTopology({
      node: [...products, node('m', 'AddV2', 'qk', 'a'), node('s', 'Tanh', 'm'), ...end],
    });
    expect(capped.taken).toEqual([]);
    expect(capped.left).toHaveLength(1);
    const read = rewriteTopology({ node: [...products, node('s', 'Identity', 'qk'), ...end, node('out', 'Sum', 'p')] });
    expect(read.taken).toEqual([]);
    expect(read.topology.node.map(({ op }) => op)).not.toContain(OPERATOR);
  });
});
