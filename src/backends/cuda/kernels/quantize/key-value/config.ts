/** Configurations and parameters of `quantizeKeyValue`. */
import type { DType } from '../../../../../tensor/dtype.ts';
import type { Target } from '../../../ptx/targets.ts';
import type { LoadWidth } from '../../parts/elements.ts';
import type { HiddenKeys } from '../visible-keys.ts';

export interface QuantizeKeyValueConfig {
  readonly target: Target;
  readonly dtype: DType;
  readonly valueFormat: 'e4m3' | 'f16';
  /** D and Dv, and padded to multiples of 32; Dv in FP16 to one of 16. */
  readonly headDim: number;
  readonly paddedDim: number;
  readonly valueDim: number;
  readonly paddedValueDim: number;
  readonly keyLoadWidth: LoadWidth;
  readonly valueLoadWidth: LoadWidth;
  /** Scales of 64 keys: 1, or 4 by (token % 8) / 2. */
  readonly keyScales: 1 | 4;
  /** Subtract `keyMean`. */
  readonly smoothK: boolean;
  /** Subtract `valueMean`. */
  readonly smoothV: boolean;
  /** Keys that a mask hides from every row count in no scale. */
  readonly hiddenKeys: HiddenKeys;
}

/** Keys of a CTA. */
export const KEY_VALUE_TILE = 128;
/** Keys that scales of K, bits of faults and the padding of sequences are counted in. */
export const HALF_TILE = KEY_VALUE_TILE / 2;

export const QUANTIZE_KEY_VALUE_POINTERS = [
  'sequences',
  'k',
  'v',
  'keyMean',
  'valueMean',
  'valueScale',
  'key',
  'keyScale',
  'keyFaults',
  'keyExponents',
  'value',
  'valueTileScale',
  'visibleKeys',
] as const;
export const QUANTIZE_KEY_VALUE_INTEGERS = ['heads', 'tiles', 'paddedTokens'] as const;

/** Threads: enough for each to hold 32 bytes of registers for every 64 elements at most. */
export const quantizeKeyValueThreads = ({
  paddedDim,
  paddedValueDim,
}: Pick<QuantizeKeyValueConfig, 'paddedDim' | 'paddedValueDim'>) =>
  Math.max(paddedDim, paddedValueDim) <= 128 ? 256 : 512;
