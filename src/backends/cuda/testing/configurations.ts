/**
 * The configurations that are assembled in tests: what `planLaunches` asks for over targets, kernels, head dims and
 * features. They come from planning real problems, so that what is checked is what runs.
 */
import { createProblem } from '../../../attention/problem.ts';
import type { DType } from '../../../tensor/dtype.ts';
import { emptyTensor, tensor } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import { CUDA_KERNELS, lackedBy } from '../kernel-table.ts';
import type { SimulatableModule } from '../launches/arguments.ts';
import { planLaunches } from '../launches/plan.ts';
import { capabilityOf } from '../launches/scheme.ts';
import { TARGETS, type Target } from '../ptx/targets.ts';
import type { Kernel } from '../ptx/types.ts';

export interface Configuration {
  /** `attention qk-int8-pv-fp16-cuda fp32 D128 causal sm_90a` */
  readonly name: string;
  readonly kernel: () => Kernel;
  /** An attention kernel whose speed counts: the default accumulator, D = Dv, no rare feature. It must not spill. */
  readonly main: boolean;
  /** Bytes that ptxas may spill of another attention kernel: a register or two of 255, outside the products. */
  readonly spillLimit: number;
}

/** D and Dv. */
const DIMS = [
  [64, 64],
  [128, 128],
  [192, 128],
  [256, 256],
  [80, 80],
] as const;

interface Features {
  readonly name: string;
  readonly dtype?: DType;
  readonly causal?: boolean;
  readonly mask?: 'bool' | DType;
  readonly softcap?: number;
  readonly lse?: boolean;
  readonly smoothV?: boolean;
  /** Few queries over many keys. */
  readonly decoding?: boolean;
  /** Heads of Q over the one of K; default 1. */
  readonly heads?: number;
  readonly windowSize?: readonly [number, number];
}

const PLAIN: readonly Features[] = [{ name: 'full' }, { name: 'causal', causal: true }];
const RARE: readonly Features[] = [
  { name: 'boolean mask', mask: 'bool' },
  { name: 'additive mask, LSE', mask: 'float16', lse: true },
  { name: 'softcap, causal', softcap: 30, causal: true },
  { name: 'decoding', decoding: true, dtype: 'float16' },
  { name: 'decoding, grouped heads in a window', decoding: true, heads: 8, windowSize: [1000, 0] },
  { name: 'smooth V, float32', smoothV: true, dtype: 'float32' },
];

function modulesOf(
  choice: KernelChoice,
  target: Target,
  [d, dv]: readonly [number, number],
  features: Features,
): { name: string; module: SimulatableModule }[] {
  const dtype = features.dtype ?? 'bfloat16';
  const [lq, lk] = features.decoding ? [1, 4096] : [256, 256];
  const storage = emptyTensor([lk * Math.max(d, dv)], dtype).data;
  const operand = (length: number, dim: number, heads = 1) => tensor(storage, [1, heads, length, dim], { dtype });
  const { mask, windowSize } = features;
  const problem = createProblem(operand(lq, d, features.heads), operand(lk, d), operand(lk, dv), {
    causalAlignment: 'bottom-right',
    ...(windowSize === undefined ? {} : { windowSize }),
    isCausal: features.causal ?? false,
    softcap: features.softcap ?? 0,
    returnLse: features.lse ?? false,
    ...(mask === undefined
      ? {}
      : { attnMask: { location: 'cpu', dtype: mask, shape: [lq, lk], strides: [lk, 1], offset: 0 } }),
  });
  const { launches } = planLaunches(problem, choice, { target, multiprocessors: 132 });
  return launches.map(({ name, module }) => ({ name, module: module as SimulatableModule }));
}

/** The kernels that a target can run, with every accumulator. The portable one is another with coarser scales. */
function choicesOf(target: Target): KernelChoice[] {
  return CUDA_KERNELS.filter(
    ({ name, family, qkQuantGran }) =>
      // Those on wgmma are in configurations-wgmma.ts.
      family !== 'wgmma' && qkQuantGran.includes('per-thread') && lackedBy(name, capabilityOf(target)) === undefined,
  ).flatMap((descriptor) =>
    descriptor.pvAccumDtype.map((pvAccumDtype) => ({
      descriptor,
      qkQuantGran: descriptor.qkQuantGran[0] ?? 'per-thread',
      pvAccumDtype,
      smoothK: true,
      smoothV: false,
      smoothQ: descriptor.smoothQ === 'always',
    })),
  );
}

/**
 * @param thorough every accumulator and head dim on every target; otherwise each kernel's default accumulator at D = 128 and
 * the rare features on one target
 */
export function configurations(thorough: boolean): Configuration[] {
  const found = new Map<string, Configuration>();
  const add = (choice: KernelChoice, target: Target, dims: readonly [number, number], features: Features) => {
    for (const { name, module } of modulesOf(choice, target, dims, features)) {
      if (found.has(module.id)) continue;
      const attention = name === 'attention';
      const isDefault = choice.pvAccumDtype === choice.descriptor.pvAccumDtype[0];
      const plain = PLAIN.includes(features);
      const main = attention && plain && isDefault && dims[0] === dims[1];
      const label = [
        name,
        choice.descriptor.name,
        choice.pvAccumDtype,
        dims[0] === dims[1] ? `D${dims[0]}` : `D${dims[0]}/${dims[1]}`,
        features.name,
        target,
      ].join(' ');
      const spillLimit = main || !attention ? 0 : plain ? 16 : 128;
      found.set(module.id, { name: label, kernel: module.kernel, main, spillLimit });
    }
  };
  for (const target of TARGETS) {
    for (const choice of choicesOf(target)) {
      const isDefault = choice.pvAccumDtype === choice.descriptor.pvAccumDtype[0];
      for (const dims of DIMS) {
        if (!thorough && !(isDefault && dims[0] === 128)) continue;
        for (const features of PLAIN) add(choice, target, dims, features);
      }
      const rareHere = thorough || target === 'sm_89';
      if (isDefault && rareHere)
        for (const features of RARE)
          add({ ...choice, smoothV: features.smoothV ?? false }, target, [128, 128], features);
    }
  }
  return [...found.values()];
}
