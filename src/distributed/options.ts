/** Options of `sageattn` that mean the same where sequences are divided among ranks. */
import type { AttentionOptions } from '../attention/options.ts';

export const DIVIDED_OPTIONS = [
  'kernel',
  'isCausal',
  'causalAlignment',
  'windowSize',
  'smScale',
  'softcap',
  'smoothK',
  'smoothV',
  'smoothQ',
  'perBlockMean',
  'scaleSearch',
  'qkQuantGran',
  'pvAccumDtype',
  'signal',
] as const satisfies readonly (keyof AttentionOptions)[];
