import type { DebugPlan } from '../../../debug.ts';
import type { KernelChoice } from '../../backend.ts';
import type { LaunchSequence } from './launch.ts';

/**
 * The printed description of a sequence of launches; the id of the attention kernel's module holds its configuration,
 * and with it the tile.
 */
export function debugPlanOf({ descriptor, ...choice }: KernelChoice, sequence: LaunchSequence): DebugPlan {
  const attention = sequence.launches.find(({ name }) => name === 'attention')?.module.id;
  const config = attention?.slice(attention.indexOf(':') + 1);
  return {
    backend: 'cuda',
    kernel: descriptor.name,
    settings: { ...choice, ...(config?.startsWith('{') ? (JSON.parse(config) as object) : {}) },
    launches: sequence.launches.map(({ name, module, grid, sharedBytes }) => ({
      name,
      grid,
      sharedBytes,
      language: 'ptx',
      source: module.ptx,
    })),
    scratchBytes: Object.values(sequence.scratch).reduce((sum, bytes) => sum + bytes, 0),
  };
}
