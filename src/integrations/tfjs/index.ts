/**
 * SageAttention for TensorFlow.js: `sageattn` on `tf.Tensor`, and GraphModels whose attention it runs.
 *
 * @packageDocumentation
 */
export { sageattn, type TfAttentionOptions } from './attention.ts';
export {
  type ModelTopology,
  OPERATOR,
  type RewrittenTopology,
  rewriteTopology,
  withSageAttention,
} from './graph-model.ts';
