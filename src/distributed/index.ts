/**
 * Sequence parallelism: attention over sequences that are divided among several ranks.
 *
 * @module sageattention/distributed
 */
export {
  type ShardedBackwardInputs,
  type ShardedBackwardOptions,
  type ShardedGradients,
  sageattnShardedBackward,
} from './backward.ts';
export {
  createDeviceGroup,
  createNcclId,
  DeviceGroup,
  type DeviceGroupOptions,
  type ProcessGroupOptions,
  type ShardedTensor,
  type ShardOptions,
} from './group.ts';
export { type Prediction, type PredictOptions, predictSharded, type Rates } from './predict.ts';
export type { Topology } from './schedule.ts';
export {
  gatherSequences,
  type PackedSequences,
  type SequencesOptions,
  type SequencesOutput,
  type ShardedSequences,
  sageattnVarlenSharded,
  shardSequences,
} from './sequences.ts';
export { type JointTokens, type ShardedOptions, type ShardedResult, sageattnSharded } from './sharded.ts';
export type { TokenOrder } from './shards.ts';
