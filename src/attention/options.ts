import { InvalidArgumentError, reading, takeOptions, textOf } from '../errors.ts';
import { SCALE_SEARCHES, type ScaleSearch } from '../quantization/fp4-blocks.ts';
import type { Granularity, PvAccumDtype, QuerySmoothing } from '../quantization/schemes.ts';
import type { TensorView } from '../tensor/tensor.ts';
import { KERNEL_NAMES, type KernelName } from './kernels.ts';
import { isSparsity, SPARSITY_PHRASE, type Sparsity } from './sparsity.ts';

export type BackendName = 'wasm' | 'webgpu' | 'cuda';

/** A CUDA stream, the library's own or the caller's: `CudaStream` of `sageattention/cuda` is one. */
export interface StreamHandle {
  /** The driver's handle (`CUstream`). */
  readonly handle: bigint;
  /** Ordinal of its device. */
  readonly device: number;
}

/** `HND`: `[B,H,L,D]`; `NHD`: `[B,L,H,D]`. */
export type TensorLayout = 'HND' | 'NHD';

/**
 * Where the diagonal of a causal mask (and of a window) starts when Lq != Lk. `top-left`: row i sees keys up to i
 * (torch's `is_causal`). `bottom-right`: up to i + Lk - Lq (decoding with a cache).
 */
export type CausalAlignment = 'top-left' | 'bottom-right';

/** Which blocks of scores are computed; the others are never attended, as if a mask hid them. */
export interface BlockMask {
  /** Rows of a block of queries, a multiple of 16. Block i has rows `i * rows` to `(i + 1) * rows` of a sequence. */
  readonly rows: number;
  /** Keys of a block of keys, a multiple of 16. */
  readonly keys: number;
  /**
   * bool `[B,Hq,ceil(Lq/rows),ceil(Lk/keys)]`, nonzero = compute; B and Hq may be 1 or missing, and count for all then.
   * Varlen: of the longest sequences, of which each uses the top left part.
   */
  readonly map: TensorView;
}

/** Options of `sageattn` and of every kernel's own function. Python's names in camelCase. */
export interface AttentionOptions {
  /** Default `'auto'`: where the tensors live; for CPU tensors the fastest backend that is available. */
  readonly backend?: BackendName | 'auto';
  /** Default `'auto'`: the backend's table decides. */
  readonly kernel?: KernelName | 'auto';
  /** Default `'HND'`. Applies to q, k, v and the output. Not taken by `sageattnVarlen`. */
  readonly tensorLayout?: TensorLayout;
  /** Default false. */
  readonly isCausal?: boolean;
  /** Default `'top-left'`. */
  readonly causalAlignment?: CausalAlignment;
  /** Scale of the scores; default 1/sqrt(D). */
  readonly smScale?: number;
  /** Scores become `softcap * tanh(score / softcap)` before masking; default 0, which means none. */
  readonly softcap?: number;
  /** Keys that a row may see to the left and right of its diagonal; -1 or Infinity: no limit. Default none. */
  readonly windowSize?: readonly [left: number, right: number];
  /** bool (nonzero = attend) or additive float, broadcastable to `[B,Hq,Lq,Lk]` (varlen: the largest lengths). */
  readonly attnMask?: TensorView;
  /**
   * `[Hq]`, float16, bfloat16 or float32: an extra logit of each head that is part of the softmax's sum and of nothing else, as in
   * gpt-oss; the logsumexp includes it. Not scaled by `smScale`. -Infinity: none. A row that sees no key gives 0 and its sink.
   */
  readonly sinks?: TensorView;
  /** Blocks of scores to compute, beside what mask, causality and window leave. Default: all. */
  readonly blockMask?: BlockMask;
  /**
   * Blocks of scores are chosen by the means of their rows and keys, and only these computed. Not together with `blockMask`. What
   * `attnMask` hides is chosen like the rest.
   */
  readonly sparsity?: Sparsity;
  /** Subtract K's mean over its tokens before quantizing; exact (softmax is unchanged). Default true. */
  readonly smoothK?: boolean;
  /** Subtract V's channel mean before quantizing, and add it to the output. Default false. */
  readonly smoothV?: boolean;
  /**
   * Subtract Q's mean before quantizing, and add its share to the scores: the mean of each block of rows (`'block'`,
   * which `true` means) or of the whole sequence (`'sequence'`). Default: the kernel's first; `'block'` where QK has 4
   * bits, else false.
   */
  readonly smoothQ?: boolean | QuerySmoothing;
  /**
   * Python's name for what `smoothQ` says with FP4: true is `'block'`, false `'sequence'`. Not together with `smoothQ`.
   */
  readonly perBlockMean?: boolean;
  /**
   * FP4 only: how the scale of each block of 16 is found. `'mse'` (default) takes the one of eight that errs least,
   * `'four-over-six'` of two or three, `'none'` the largest magnitude over 6.
   */
  readonly scaleSearch?: ScaleSearch;
  /** Default: the kernel's first. */
  readonly qkQuantGran?: Granularity;
  /** Default: the kernel's first. */
  readonly pvAccumDtype?: PvAccumDtype;
  /** Also return the logsumexp of each row; default false. */
  readonly returnLse?: boolean;
  /**
   * Tensor on the CPU that the output is written into and that is returned: the output's shape and dtype, contiguous. It may be
   * one of the inputs. After a call that failed it holds anything. Not for tensors on a GPU.
   */
  readonly out?: TensorView;
  /** Stops the call; the promise rejects with the signal's reason. */
  readonly signal?: AbortSignal;
  /** CUDA only: the stream to enqueue on; default: the library's own. CUDA outputs are ready in its order. */
  readonly stream?: StreamHandle;
}

/** Options that decide what is computed, not how: the ones that exact attention takes. */
export const EXACT_OPTIONS = [
  'tensorLayout',
  'isCausal',
  'causalAlignment',
  'smScale',
  'softcap',
  'windowSize',
  'attnMask',
  'sinks',
  'blockMask',
  'returnLse',
] as const satisfies readonly (keyof AttentionOptions)[];

/** What `rows` and `keys` of a block mask are multiples of: the smallest tile of any kernel. */
export const BLOCK_MULTIPLE = 16;

type Check = (value: unknown) => boolean;
/** What an option's value must satisfy, and a phrase for it. */
export type OptionCheck = readonly [Check, string];
const isBoolean: Check = (value) => typeof value === 'boolean';
export const oneOf = (...values: readonly string[]): OptionCheck => [
  (value) => values.includes(value as string),
  values.map((value) => `'${value}'`).join(', '),
];
const isWindowSide = (value: unknown) =>
  value === Number.POSITIVE_INFINITY || (Number.isSafeInteger(value) && (value as number) >= -1);

const isTensor: Check = (value) => typeof value === 'object' && value !== null && 'shape' in value;
export const isBlockSize = (value: unknown) =>
  Number.isSafeInteger(value) && (value as number) > 0 && (value as number) % BLOCK_MULTIPLE === 0;
const isBlockMask: Check = (value) => {
  if (typeof value !== 'object' || value === null) return false;
  const { rows, keys, map } = value as BlockMask;
  return isBlockSize(rows) && isBlockSize(keys) && isTensor(map);
};

/** Every option with its check and a phrase for what it takes. */
const OPTIONS: Readonly<Record<keyof AttentionOptions, OptionCheck>> = {
  backend: oneOf('auto', 'wasm', 'webgpu', 'cuda'),
  kernel: oneOf('auto', ...KERNEL_NAMES),
  tensorLayout: oneOf('HND', 'NHD'),
  isCausal: [isBoolean, 'a boolean'],
  causalAlignment: oneOf('top-left', 'bottom-right'),
  smScale: [(value) => Number.isFinite(value), 'a finite number'],
  softcap: [(value) => Number.isFinite(value) && (value as number) >= 0, 'a finite number >= 0'],
  windowSize: [
    (value) => Array.isArray(value) && value.length === 2 && value.every(isWindowSide),
    '[left, right] of integers >= -1 or Infinity',
  ],
  attnMask: [isTensor, 'a tensor'],
  sinks: [isTensor, 'a tensor'],
  blockMask: [isBlockMask, `{ rows, keys, map } of two positive multiples of ${BLOCK_MULTIPLE} and a tensor`],
  sparsity: [(value) => isSparsity(value, isBlockSize), SPARSITY_PHRASE],
  smoothK: [isBoolean, 'a boolean'],
  smoothV: [isBoolean, 'a boolean'],
  smoothQ: [(value) => isBoolean(value) || value === 'block' || value === 'sequence', "a boolean, 'block', 'sequence'"],
  perBlockMean: [isBoolean, 'a boolean'],
  scaleSearch: oneOf(...SCALE_SEARCHES),
  qkQuantGran: oneOf('per-block', 'per-warp', 'per-thread'),
  pvAccumDtype: oneOf('fp32', 'fp16', 'fp16+fp32', 'fp32+fp32', 'fp32+fp16'),
  returnLse: [isBoolean, 'a boolean'],
  out: [isTensor, 'a tensor'],
  // By what it can do: an iframe, vm or jsdom has a class of its own.
  signal: [
    (value) =>
      typeof value === 'object' &&
      value !== null &&
      typeof (value as AbortSignal).aborted === 'boolean' &&
      typeof (value as AbortSignal).throwIfAborted === 'function',
    'an AbortSignal',
  ],
  stream: [
    (value) => typeof value === 'object' && value !== null && 'handle' in value && typeof value.handle === 'bigint',
    "a CudaStream of 'sageattention/cuda'",
  ],
};

const describe = (value: unknown) => (typeof value === 'string' ? `'${textOf(value)}'` : textOf(value));

/**
 * @throws {InvalidArgumentError} `invalid-option`
 */
export function checkOption(name: string, value: unknown, [check, expected]: OptionCheck): void {
  if (!reading(`options.${name}`, () => check(value), 'invalid-option')) {
    throw new InvalidArgumentError('invalid-option', `options.${name}`, expected, describe(value));
  }
}

/**
 * Checks names and values of options. An option that is `undefined` counts as absent.
 *
 * @param taken the options that this entry point takes
 * @returns the options that are present, each read once; what the caller changes later changes nothing
 * @throws {InvalidArgumentError} `unknown-option` or `invalid-option`
 */
export function validateOptions<T extends AttentionOptions>(options: T, taken: readonly string[] = OPTION_NAMES): T {
  const given = takeOptions(options, taken);
  for (const name in given) {
    checkOption(name, given[name], OPTIONS[name as keyof AttentionOptions]);
  }
  const { windowSize, perBlockMean, blockMask, sparsity } = given;
  if (perBlockMean !== undefined && given.smoothQ !== undefined) {
    throw new InvalidArgumentError(
      'invalid-option',
      'options.perBlockMean',
      'nothing beside options.smoothQ, of which it is another name',
      describe(perBlockMean),
    );
  }
  if (given.sparsity !== undefined && blockMask !== undefined) {
    const expected = 'nothing beside options.blockMask, which says itself what is computed';
    throw new InvalidArgumentError('invalid-option', 'options.sparsity', expected, describe(given.sparsity));
  }
  if (windowSize === undefined && perBlockMean === undefined && blockMask === undefined && sparsity === undefined) {
    return given;
  }
  const { perBlockMean: _, ...others } = given;
  return {
    ...others,
    ...(windowSize === undefined ? {} : { windowSize: [windowSize[0], windowSize[1]] }),
    ...(sparsity === undefined ? {} : { sparsity: { ...sparsity } }),
    ...(blockMask === undefined
      ? {}
      : { blockMask: { rows: blockMask.rows, keys: blockMask.keys, map: blockMask.map } }),
    ...(perBlockMean === undefined ? {} : { smoothQ: perBlockMean ? 'block' : 'sequence' }),
  } as AttentionOptions as T;
}

export const OPTION_NAMES = Object.keys(OPTIONS) as readonly (keyof AttentionOptions)[];

/** Names of the options of an entry point that takes all but these. */
export const optionNamesBut = (...others: readonly (keyof AttentionOptions)[]): readonly (keyof AttentionOptions)[] =>
  OPTION_NAMES.filter((name) => !others.includes(name));

/** What no plan is told: tensors beside q, k and v are among its specs, and the rest belongs to a run. */
export const UNPLANNED_OPTIONS = ['attnMask', 'sinks', 'blockMask', 'sparsity', 'signal', 'stream', 'out'] as const;
