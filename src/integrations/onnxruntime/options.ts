import { KERNEL_NAMES, type KernelName } from '../../attention/kernels.ts';
import { isBlockSize } from '../../attention/options.ts';
import { isSparsity, SPARSITY_PHRASE, type Sparsity } from '../../attention/sparsity.ts';
import { InvalidArgumentError } from '../../errors.ts';
import { VALIDATION_MODES, type ValidationMode } from './session/validation-mode.ts';

/** Options of `withSageAttention` and `installSageAttention`. */
export interface SageAttentionOptions {
  /** Attentions to replace, by node name; default all. */
  readonly include?: readonly (string | RegExp)[];
  /** Attentions to leave with onnxruntime, by node name; wins over `include`. */
  readonly exclude?: readonly (string | RegExp)[];
  /** Default `'auto'`: the backend's table decides. */
  readonly kernel?: KernelName | 'auto';
  /**
   * An attention is replaced where its queries and its keys are at least this many tokens; 0 replaces all. Default: what
   * was measured to pay off, per engine; see {@link DEFAULT_MIN_TOKENS}.
   */
  readonly minTokens?: number;
  /**
   * On WebGPU the model stays in one session, and attention is recorded into onnxruntime's own commands in the place of a marker, where
   * that was seen to work on the device; false cuts it into pieces as everywhere else. Default true.
   */
  readonly markers?: boolean;
  /**
   * How much onnxruntime-web checks of its WebGPU calls, where the session options do not say. `'wgpuOnly'` waits for no error scope at the end of a run;
   * errors of the device are then told by its `uncapturederror` alone. The mode is the device's: that of the first session
   * on it. Default: onnxruntime's own.
   */
  readonly validationMode?: ValidationMode;
  /**
   * `'fixed'` (default) uses `kernel`. `'adaptive'` compares, in the first runs, every kernel of the backend with
   * onnxruntime's own result on the real activations, and keeps for each attention the fastest one whose cosine
   * similarity never fell below `threshold`; where onnxruntime is faster, or no kernel is close enough, the attention
   * stays with it. Then it compares as many runs of the model in pieces and in one, and stays with the faster.
   * SageAttention, arXiv 2410.02367, section 4.5.
   */
  readonly policy?: 'fixed' | 'adaptive';
  /** Least cosine similarity that `'adaptive'` accepts; default 0.998. */
  readonly threshold?: number;
  /**
   * Shapes of inputs for which no attention is replaced run in one piece from their second run on. That session holds the
   * weights once more; false keeps such shapes in pieces, and the memory free. Default true.
   */
  readonly wholeFallback?: boolean;
  /**
   * Computes of each attention only the blocks of scores that matter, chosen in every run. Under `'adaptive'` an attention is computed so
   * only where that was faster and its cosine similarity did not fall below `threshold`. Markers are not used then. Default: all.
   * SpargeAttn, arXiv 2502.18137.
   */
  readonly sparsity?: Sparsity;
  /** Runs that `'adaptive'` compares; default 2. */
  readonly calibrationRuns?: number;
}

/**
 * Least tokens for which replacing attention was measured to be no slower than leaving it; see docs/integrations.md. The
 * CPU provider of onnxruntime-node was faster than the WASM backend at every length, so there the caller must ask for it.
 * WebGPU's, in pieces, was measured on an H200: 0.97 times as fast at 1024 tokens, 1.15 at 1536; what is shorter is decided by the times of a
 * model's first runs. A marker costs about what it replaces, so that length is no reason against one.
 */
export const DEFAULT_MIN_TOKENS = {
  'onnxruntime-web': 1024,
  'onnxruntime-node': Number.POSITIVE_INFINITY,
  webgpu: 1536,
  'webgpu-marker': 0,
} as const;

export const DEFAULT_THRESHOLD = 0.998;
export const DEFAULT_CALIBRATION_RUNS = 2;

const isNames = (value: unknown) =>
  Array.isArray(value) && value.every((entry) => typeof entry === 'string' || entry instanceof RegExp);
const isCount = (value: unknown) => Number.isSafeInteger(value) && (value as number) >= 0;

const CHECKS: Readonly<Record<keyof SageAttentionOptions, readonly [(value: unknown) => boolean, string]>> = {
  include: [isNames, 'an array of strings and regular expressions'],
  exclude: [isNames, 'an array of strings and regular expressions'],
  kernel: [(value) => ['auto', ...KERNEL_NAMES].includes(value as string), `'auto' or one of ${KERNEL_NAMES}`],
  minTokens: [(value) => value === Number.POSITIVE_INFINITY || isCount(value), 'an integer >= 0 or Infinity'],
  markers: [(value) => typeof value === 'boolean', 'a boolean'],
  validationMode: [(value) => VALIDATION_MODES.includes(value as ValidationMode), `one of ${VALIDATION_MODES}`],
  policy: [(value) => value === 'fixed' || value === 'adaptive', "'fixed' or 'adaptive'"],
  threshold: [(value) => typeof value === 'number' && value >= -1 && value <= 1, 'a number from -1 to 1'],
  sparsity: [(value) => isSparsity(value, isBlockSize), SPARSITY_PHRASE],
  wholeFallback: [(value) => typeof value === 'boolean', 'a boolean'],
  calibrationRuns: [(value) => isCount(value) && (value as number) > 0, 'an integer > 0'],
};

/** @throws {InvalidArgumentError} an unknown option or a wrong value */
export function validateSageAttentionOptions(options: SageAttentionOptions): void {
  for (const [name, value] of Object.entries(options)) {
    if (!Object.hasOwn(CHECKS, name)) {
      throw new InvalidArgumentError('unknown-option', `options.${name}`, `one of ${Object.keys(CHECKS)}`, `'${name}'`);
    }
    const [check, expected] = CHECKS[name as keyof SageAttentionOptions];
    if (value !== undefined && !check(value)) {
      throw new InvalidArgumentError('invalid-option', `options.${name}`, expected, String(value));
    }
  }
}

const matches = (patterns: readonly (string | RegExp)[], name: string) =>
  // Not `test`: it goes on where it stopped the last time if the expression is global.
  patterns.some((pattern) => (typeof pattern === 'string' ? pattern === name : name.search(pattern) >= 0));

/** Why the caller's choice leaves an attention alone; undefined where it does not. */
export function excludedBy(options: SageAttentionOptions, name: string): string | undefined {
  if (options.exclude !== undefined && matches(options.exclude, name)) return 'excluded by the options';
  if (options.include !== undefined && !matches(options.include, name)) return 'not included by the options';
  return undefined;
}
