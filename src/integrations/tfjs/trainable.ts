/** Attention with gradients on tensors of TensorFlow.js: models that hold it train with `model.fit`. */
import * as tf from '@tensorflow/tfjs-core';
import { createBackwardProblem, takeTrainableOptions, trainableProblem } from '../../attention/backward.ts';
import type { AttentionOptions } from '../../attention/options.ts';
import type { Tensor } from '../../tensor/tensor.ts';
import { tensor } from '../../tensor/tensor.ts';
import { requireTensor } from './attention.ts';

/** Options that say what is computed; the kernel is the WASM backend's accurate one. */
export interface TfTrainableOptions
  extends Pick<
    AttentionOptions,
    'tensorLayout' | 'isCausal' | 'causalAlignment' | 'smScale' | 'softcap' | 'windowSize'
  > {
  /** bool (true = attend) or additive float32, broadcastable to `[B,Hq,Lq,Lk]`. It gets no gradient. */
  readonly attnMask?: tf.Tensor;
}

/** Attention of float32 tensors; `tf.grads`, `tf.variableGrads` and optimizers differentiate it by q, k and v. */
export type TfTrainableAttention = (
  q: tf.Tensor,
  k: tf.Tensor,
  v: tf.Tensor,
  options?: TfTrainableOptions,
) => tf.Tensor4D;

/** tfjs' data as a tensor of this package, copied. */
function read(value: tf.Tensor): Tensor {
  const data = value.dataSync();
  return tensor(value.dtype === 'bool' ? new Uint8Array(data) : new Float32Array(data), value.shape);
}

const toTf = ({ data, shape }: Pick<Tensor, 'data' | 'shape'>): tf.Tensor4D =>
  tf.tensor4d(data as Float32Array, [...shape] as [number, number, number, number], 'float32');

/**
 * Loads the kernels, and gives attention that tfjs can differentiate. tfjs' gradients are synchronous, and so are its calls: they run
 * on the calling thread in WASM, whatever tfjs' backend, which must be one whose data can be read synchronously (`cpu`, `wasm`,
 * `webgl`).
 *
 * ```ts
 * const attention = await createTrainableAttention();
 * const gradients = tf.grads((q, k, v) => attention(q, k, v, { isCausal: true }).square().sum());
 * ```
 */
export async function createTrainableAttention(): Promise<TfTrainableAttention> {
  const { SynchronousWasm } = await import('../../backends/wasm/synchronous.ts');
  const wasm = await SynchronousWasm.create();
  return (q, k, v, options = {}) => {
    for (const [argument, value] of Object.entries({ q, k, v })) requireTensor(argument, value, ['float32']);
    const { attnMask, ...rest } = options;
    if (attnMask !== undefined) requireTensor('options.attnMask', attnMask, ['bool', 'float32']);
    const mask = attnMask && read(attnMask);
    const taken = takeTrainableOptions({ ...rest, ...(mask && { attnMask: mask }) });
    const attend = tf.customGrad((...args: (tf.Tensor | tf.GradSaveFunc)[]) => {
      const [ownQ, ownK, ownV, save] = args as [tf.Tensor, tf.Tensor, tf.Tensor, tf.GradSaveFunc];
      const inputs = { q: read(ownQ), k: read(ownK), v: read(ownV), ...(mask && { attnMask: mask }) };
      const problem = trainableProblem(inputs.q, inputs.k, inputs.v, taken, taken.forward);
      const { output, lse } = wasm.attend(problem, inputs) as { output: Tensor; lse: Tensor<'float32'> };
      const value = toTf(output);
      const saved = tf.tensor(lse.data, [...lse.shape], 'float32');
      save([ownQ, ownK, ownV, value, saved]);
      const gradFunc = (dy: tf.Tensor, tensors: tf.Tensor[]) => {
        const [q4, k4, v4, output4, lse4] = tensors.map(read) as [Tensor, Tensor, Tensor, Tensor, Tensor<'float32'>];
        const results = { output: output4, lse: lse4, dOutput: read(dy) };
        const backward = createBackwardProblem(problem, results, mask, {}, 'fp16');
        const all = { q: q4, k: k4, v: v4, ...results, ...(mask && { attnMask: mask }) };
        const { dq, dk, dv } = wasm.backward(backward, all) as { dq: Tensor; dk: Tensor; dv: Tensor };
        return [dq, dk, dv].map(toTf);
      };
      return { value, gradFunc };
    });
    return attend(q, k, v) as tf.Tensor4D;
  };
}
