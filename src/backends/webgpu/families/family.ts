/** What every kernel family is: how it reads K and V, whether a device can run it, and its kernel for a problem. */
import type { KernelName } from '../../../attention/kernels.ts';
import type { AttentionProblem } from '../../../attention/problem.ts';
import { UnsupportedOptionError } from '../../../errors.ts';
import type { PvAccumDtype } from '../../../quantization/schemes.ts';
import type { Capabilities } from '../capabilities.ts';
import type { ValueFormat } from '../kernel-table.ts';
import type { KeyValueLayout } from '../kernels/layout.ts';
import type { ScoreConfig } from '../kernels/scores.ts';
import type { Family } from './names.ts';

/** The attention kernel to launch: its source for a score configuration and its query rows per workgroup. */
export interface AttentionKernel {
  readonly label: string;
  readonly rows: number;
  /** Query heads whose rows it packs: row `i` of a key head is query `i / pack` of its head `i % pack`. Default 1: rows of one head. */
  readonly pack?: number;
  source(config: ScoreConfig): string;
}

/** A family's kernel with its tiles settled. */
export interface AttentionVariant {
  readonly family: Family;
  readonly name: string;
  readonly kernel: AttentionKernel;
}

export type HeadDims = Pick<AttentionProblem, 'headDim' | 'valueDim'>;

/** What of a call decides about its tiles. */
export interface VariantRequest {
  readonly headDimPadded: number;
  readonly valueDimPadded: number;
  /** Length of the longest query. */
  readonly queryLength: number;
  readonly kernel: KernelName;
  readonly pvAccumDtype: PvAccumDtype | undefined;
  /** A variant by name, for tests and tuning. Default: the best that fits. */
  readonly variant: string | undefined;
}

export interface KernelFamily {
  readonly name: Family;
  /** How its kernels read K and V. */
  readonly layout: KeyValueLayout;
  /** Best first. */
  readonly variants: readonly { readonly name: string }[];
  /** What V may be multiplied in. */
  readonly values: readonly ValueFormat[];
  /** Why the device cannot run it; `undefined` where it can. */
  support(capabilities: Capabilities): string | undefined;
  /** Why a device that can run it cannot for these head dims. */
  unfit(capabilities: Capabilities, dims: HeadDims): string | undefined;
  /** Names of the variants that fit a device and a problem, best first. */
  fitting(capabilities: Capabilities, request: VariantRequest): readonly string[];
  /** @throws {UnsupportedOptionError} no variant fits, or not the one that was asked for */
  kernel(capabilities: Capabilities, request: VariantRequest): AttentionVariant;
}

export const unsupportedAccumulation = (received: string) =>
  new UnsupportedOptionError(
    'qk-int8-pv-fp16',
    'options.pvAccumDtype',
    "'fp32', or family 'matrix'",
    `'fp16' on ${received}`,
  );
