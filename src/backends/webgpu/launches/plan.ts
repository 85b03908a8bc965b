/** From a problem and a kernel choice to dispatches, as pure data: no device is touched. */
import { type AttentionProblem, outputShapeOf } from '../../../attention/problem.ts';
import { elementCount } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import type { Capabilities } from '../capabilities.ts';
import { type Forced, keyValueLayoutOf } from '../families/choose.ts';
import type { AttentionVariant } from '../families/family.ts';
import { attentionParts } from './attention.ts';
import type { BufferName, Launch } from './launch.ts';
import { keyValueBytes, keyValueShapeOf, statisticsLaunches } from './quantize.ts';
import { createStages } from './stages.ts';
import { visibleKeysBytes, visibleKeysLaunches } from './visible-keys.ts';

/** The dispatches of a whole call, in order, and the buffers of its own that it needs. */
export interface LaunchSequence {
  readonly launches: readonly Launch[];
  readonly variant: AttentionVariant;
  readonly keySplits: number;
  /** Bytes of each buffer. */
  readonly sizes: Partial<Record<BufferName, number>>;
  /** Contents of the buffer `tables`. */
  readonly tables: Uint32Array<ArrayBuffer>;
}

/** @throws {UnsupportedOptionError} a forced family or variant that the device cannot run */
export function planLaunches(
  capabilities: Capabilities,
  problem: AttentionProblem,
  kernel: KernelChoice,
  forced: Forced = {},
): LaunchSequence {
  const layout = keyValueLayoutOf(capabilities, problem, kernel, forced);
  const keyValue = keyValueShapeOf(problem, kernel, capabilities, layout);
  const stages = createStages(problem, capabilities, keyValue);
  const empty = elementCount(outputShapeOf(problem)) === 0;
  const statistics = empty ? [] : [...visibleKeysLaunches(stages), ...statisticsLaunches(stages)];
  const parts = attentionParts(stages, kernel, forced);
  return {
    launches: [...statistics, ...parts.launches],
    variant: parts.variant,
    keySplits: parts.keySplits,
    sizes: { ...keyValueBytes(keyValue), ...visibleKeysBytes(stages), ...parts.sizes },
    tables: stages.tables.bytes,
  };
}
