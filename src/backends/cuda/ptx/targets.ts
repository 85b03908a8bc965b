/** What each target of the assembler can do. Facts of the PTX ISA (9.0) and of ptxas's code for each target. */
import type { Kernel } from './types.ts';

export const TARGETS = ['sm_80', 'sm_86', 'sm_89', 'sm_90a', 'sm_120a', 'sm_120f'] as const;
export type Target = (typeof TARGETS)[number];

export interface TargetFeatures {
  /** Shared memory that one CTA may use, in bytes. */
  readonly sharedBytesPerBlock: number;
  /** Shared memory of a multiprocessor; every resident CTA takes 1 KiB more than it asks for. */
  readonly sharedBytesPerMultiprocessor: number;
  /** Converts to and from E4M3. */
  readonly fp8Conversions: boolean;
  /**
   * `mma.sync` on E4M3 is an instruction. sm_90 accepts it and unpacks to FP16 on the way, which costs more than doing
   * so once.
   */
  readonly fp8Mma: boolean;
  /** `mma.sync` on S4 is an instruction. sm_90 and later accept it and emulate it with about a hundred others. */
  readonly int4Mma: boolean;
  /** Converts to and from E2M1, and multiplies it with a scale for each 16 elements. */
  readonly blockScaledMma: boolean;
}

export const TARGET_FEATURES: Readonly<Record<Target, TargetFeatures>> = {
  sm_80: {
    sharedBytesPerBlock: 166_912,
    sharedBytesPerMultiprocessor: 167_936,
    fp8Conversions: false,
    fp8Mma: false,
    int4Mma: true,
    blockScaledMma: false,
  },
  sm_86: {
    sharedBytesPerBlock: 101_376,
    sharedBytesPerMultiprocessor: 102_400,
    fp8Conversions: false,
    fp8Mma: false,
    int4Mma: true,
    blockScaledMma: false,
  },
  sm_89: {
    sharedBytesPerBlock: 101_376,
    sharedBytesPerMultiprocessor: 102_400,
    fp8Conversions: true,
    fp8Mma: true,
    int4Mma: true,
    blockScaledMma: false,
  },
  sm_90a: {
    sharedBytesPerBlock: 232_448,
    sharedBytesPerMultiprocessor: 233_472,
    fp8Conversions: true,
    fp8Mma: false,
    int4Mma: false,
    blockScaledMma: false,
  },
  sm_120a: {
    sharedBytesPerBlock: 101_376,
    sharedBytesPerMultiprocessor: 102_400,
    fp8Conversions: true,
    fp8Mma: true,
    int4Mma: false,
    blockScaledMma: false,
  },
  /**
   * The family of 12.x: RTX 50, RTX PRO, DGX Spark. It needs a driver of CUDA 12.9; `sm_120a` one of 12.8, and runs on
   * 12.0 only.
   */
  sm_120f: {
    sharedBytesPerBlock: 101_376,
    sharedBytesPerMultiprocessor: 102_400,
    fp8Conversions: true,
    fp8Mma: true,
    int4Mma: false,
    blockScaledMma: true,
  },
};

/** The lowest PTX version that a target, or an instruction, asks for. A driver's JIT accepts versions up to its own. */
const TARGET_VERSION: Readonly<Record<Target, number>> = {
  sm_80: 7.0,
  sm_86: 7.1,
  sm_89: 7.8,
  sm_90a: 8.0,
  sm_120a: 8.7,
  sm_120f: 8.8,
};

const INSTRUCTION_VERSIONS: readonly (readonly [pattern: RegExp, version: number])[] = [
  [/^cvt\..*e4m3x2/, 8.1],
  [/^cvt\..*e2m1x2/, 8.6],
  [/\.shared::cta/, 8.0],
  [/^mma\..*\.f32\.e4m3/, 8.4],
  [/^mma\..*\.f16\.e4m3/, 8.7],
];

/** PTX version with which a kernel must be declared. */
export function requiredVersion(kernel: Pick<Kernel, 'target' | 'instructions'>): number {
  let version = TARGET_VERSION[kernel.target as Target] ?? 8.7;
  for (const { opcode } of kernel.instructions) {
    for (const [pattern, needed] of INSTRUCTION_VERSIONS) {
      if (needed > version && pattern.test(opcode)) version = needed;
    }
  }
  return version;
}
