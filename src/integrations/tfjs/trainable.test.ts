/** Gradients in TensorFlow.js on its CPU backend, against its own, and a model that trains. */
import * as tf from '@tensorflow/tfjs';
import { beforeAll, describe, expect, it } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { relativeL2 } from '../../reference/metrics.ts';
import { createTrainableAttention, type TfTrainableAttention } from './index.ts';

const seed = runSeed();
let attention: TfTrainableAttention;
beforeAll(async () => {
  console.info(`seed ${seed}`);
  await tf.setBackend('cpu');
  await tf.ready();
  attention = await createTrainableAttention();
});

/** Causal attention in tfjs' own operations. */
const exact = (q: tf.Tensor, k: tf.Tensor, v: tf.Tensor): tf.Tensor4D => {
  const [length, dim] = q.shape.slice(2) as [number, number];
  const hidden = tf.sub(1, tf.linalg.bandPart(tf.ones([length, length]), -1, 0)).mul(-1e9);
  return tf.matMul(tf.softmax(tf.matMul(q, k, false, true).div(Math.sqrt(dim)).add(hidden)), v) as tf.Tensor4D;
};

/** One layer of attention with its projections: what a transformer's block is made of. */
class Attention extends tf.layers.Layer {
  static className = 'TestAttention';
  static trained: TfTrainableAttention;
  private weights3: tf.LayerVariable | undefined;

  override build(shape: tf.Shape): void {
    const dim = shape[2] as number;
    const initializer = tf.initializers.glorotUniform({ seed: 1 });
    this.weights3 = this.addWeight('qkv', [dim, 3 * dim], 'float32', initializer);
    this.built = true;
  }

  override call(inputs: tf.Tensor | tf.Tensor[]): tf.Tensor {
    return tf.tidy(() => {
      const x = (Array.isArray(inputs) ? inputs[0] : inputs) as tf.Tensor3D;
      const [batch, length, dim] = x.shape;
      const projected = tf.matMul(x.reshape([batch * length, dim]), this.weights3?.read() as tf.Tensor2D);
      const heads = tf
        .split(projected.reshape([batch, length, 3 * dim]), 3, 2)
        .map((part) => part.reshape([batch, length, 2, dim / 2]).transpose([0, 2, 1, 3])) as [
        tf.Tensor,
        tf.Tensor,
        tf.Tensor,
      ];
      return Attention.trained(...heads, { isCausal: true })
        .transpose([0, 2, 1, 3])
        .reshape([batch, length, dim]);
    });
  }

  override computeOutputShape(shape: tf.Shape): tf.Shape {
    return shape;
  }
}

/** Losses of a model that learns the running mean of its inputs, which one layer of attention can. */
async function train(trained: TfTrainableAttention): Promise<number[]> {
  Attention.trained = trained;
  const random = new Random(7);
  const [count, length, dim] = [8, 24, 16];
  const x = tf.tensor3d(random.normals(count * length * dim), [count, length, dim]);
  const y = tf.div(tf.cumsum(x, 1), tf.range(1, length + 1).reshape([1, length, 1]));
  const model = tf.sequential();
  model.add(tf.layers.inputLayer({ inputShape: [length, dim] }));
  model.add(new Attention({}));
  model.add(tf.layers.dense({ units: dim, kernelInitializer: tf.initializers.glorotUniform({ seed: 2 }) }));
  model.compile({ optimizer: tf.train.adam(0.01), loss: 'meanSquaredError' });
  const { history } = await model.fit(x, y, { epochs: 25, batchSize: count, shuffle: false, verbose: 0 });
  return history.loss as number[];
}

describe(`attention with gradients in tfjs (seed ${seed})`, () => {
  it('has the gradients of attention in tfjs, and leaves no tensor behind', () => {
    const random = new Random(seed);
    const make = () => tf.tensor4d(random.normals(2 * 2 * 40 * 16), [2, 2, 40, 16]);
    const [q, k, v, dy] = [make(), make(), make(), make()];
    const gradientsOf = (of: typeof exact) => tf.grads((a, b, c) => of(a, b, c))([q, k, v], dy);
    const before = tf.memory().numTensors;
    const actual = gradientsOf((a, b, c) => attention(a, b, c, { isCausal: true }));
    expect(tf.memory().numTensors).toBe(before + 3);
    gradientsOf(exact).forEach((expected, i) => {
      expect(relativeL2((actual[i] as tf.Tensor).dataSync(), expected.dataSync())).toBeLessThan(0.02);
    });
  });

  it('trains a model with model.fit as exact attention does', async () => {
    const [ours, theirs] = [await train((q, k, v) => attention(q, k, v, { isCausal: true })), await train(exact)];
    expect(ours.at(-1)).toBeLessThan(0.7 * (ours[0] as number));
    // The two curves lie on each other.
    ours.forEach((loss, epoch) => {
      expect(Math.abs(loss / (theirs[epoch] as number) - 1)).toBeLessThan(0.02);
    });
  });
});
