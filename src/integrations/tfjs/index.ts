/**
 * SageAttention for TensorFlow.js: `sageattn` on `tf.Tensor`, and GraphModels whose attention it runs.
 *
 * @module sageattention/tfjs
 */
export { sageattn, type TfAttentionOptions } from './attention.ts';
export {
  type GraphModelOptions,
  type RewrittenTopology,
  rewriteTopology,
  withSageAttention,
} from './graph-model.ts';
export { OPERATOR } from './operator.ts';
export type { ModelTopology } from './topology.ts';
export { createTrainableAttention, type TfTrainableAttention, type TfTrainableOptions } from './trainable.ts';
