/** Sequence parallelism: attention over sequences that are divided among several ranks. */
export {
  createDeviceGroup,
  DeviceGroup,
  type DeviceGroupOptions,
  type ShardedTensor,
  type ShardOptions,
} from './group.ts';
export { type JointTokens, type ShardedOptions, type ShardedResult, sageattnSharded } from './sharded.ts';
export type { TokenOrder } from './shards.ts';
