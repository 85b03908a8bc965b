/**
 * The configurations that are assembled in tests and reports: what `planLaunches` asks for over targets, kernels, head
 * dims and features, by kernel family. They come from planning real problems, so that exactly the kernels that run are checked.
 */
import { type BackwardPrecision, createBackwardProblem } from '../../../attention/backward.ts';
import { type AttentionProblem, createProblem } from '../../../attention/problem.ts';
import { settleSparsity } from '../../../attention/sparsity.ts';
import type { DType } from '../../../tensor/dtype.ts';
import { emptyTensor, tensor } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import { CUDA_KERNELS, type CudaKernelDescriptor, descriptorOf, type Family, lackedBy } from '../kernel-table.ts';
import { WGMMA_VARIANTS, type WgmmaTuning } from '../kernels/wgmma/table.ts';
import type { SimulatableModule } from '../launches/arguments.ts';
import { planBackward } from '../launches/backward.ts';
import { planBlockMap } from '../launches/block-map.ts';
import { planLaunches } from '../launches/plan.ts';
import { capabilityOf } from '../launches/scheme.ts';
import { TARGET_FEATURES, TARGETS, type Target } from '../ptx/targets.ts';
import type { Kernel } from '../ptx/types.ts';

export interface Configuration {
  readonly family: Family;
  /** `attention qk-int8-pv-fp16-cuda fp32 D128 causal sm_90a` */
  readonly name: string;
  readonly kernel: () => Kernel;
  /** An attention kernel whose speed counts: the default accumulator, D = Dv, no rare feature. It must not spill. */
  readonly main: boolean;
  /** Bytes that ptxas may spill of another attention kernel: a register or two of 255, outside the products. */
  readonly spillLimit: number;
  /** Remarks of ptxas that the kernel may draw; default none on wgmma, all on mma.sync. */
  readonly mayDraw?: RegExp;
}

interface Features {
  readonly name: string;
  readonly dtype?: DType;
  readonly causal?: boolean;
  readonly mask?: 'bool' | DType;
  readonly softcap?: number;
  readonly lse?: boolean;
  readonly smoothV?: boolean;
  readonly perWarp?: boolean;
  /** One query over so many keys; default 256 over 256. */
  readonly decoding?: number;
  /** Heads of Q over the one of K; default 1. */
  readonly heads?: number;
  readonly windowSize?: readonly [number, number];
  readonly sinks?: DType;
  readonly blockMask?: boolean;
  /** Default 128, a multiple of the tiles'. */
  readonly blockRows?: number;
  /** Of gradients; default `fp16`. */
  readonly precision?: BackwardPrecision;
}

/** D and Dv. */
type Dims = readonly [number, number];
const DIMS: readonly Dims[] = [
  [64, 64],
  [128, 128],
  [192, 128],
  [256, 256],
  [80, 80],
  // Odd Dv: only the first of the last two channels of a row is stored.
  [64, 61],
];

const PLAIN: readonly Features[] = [{ name: 'full' }, { name: 'causal', causal: true }];

/** Features that are generated with the default accumulator at D = 128 only. */
const RARE: readonly Features[] = [
  { name: 'boolean mask', mask: 'bool' },
  { name: 'additive mask, LSE', mask: 'float16', lse: true },
  { name: 'softcap, causal', softcap: 30, causal: true },
  { name: 'decoding', decoding: 4096, dtype: 'float16' },
  { name: 'decoding, grouped heads in a window', decoding: 4096, heads: 8, windowSize: [1000, 0] },
  { name: 'smooth V, float32', smoothV: true, dtype: 'float32' },
  { name: 'sinks, smooth V, LSE', sinks: 'bfloat16', smoothV: true, lse: true },
  { name: 'decoding, grouped heads, sinks', decoding: 4096, heads: 8, sinks: 'float32' },
  { name: 'block mask', blockMask: true },
  { name: 'block mask, causal, LSE', blockMask: true, causal: true, lse: true },
  { name: 'block mask, boolean mask', blockMask: true, mask: 'bool' },
  { name: 'block mask, additive mask, causal', blockMask: true, mask: 'float16', causal: true },
];
/** Nothing is smoothed, nor wider, where nothing is quantized. */
const EXACT_RARE: readonly Features[] = [
  ...RARE.filter(({ dtype, smoothV }) => dtype !== 'float32' && smoothV !== true),
  { name: 'sinks, LSE', sinks: 'bfloat16', lse: true },
];

const WGMMA_RARE: readonly Features[] = [
  { name: 'boolean mask', mask: 'bool' },
  { name: 'additive mask, LSE', mask: 'float16', lse: true },
  { name: 'softcap, causal, LSE', softcap: 30, causal: true, lse: true },
  { name: 'per warp, float16', perWarp: true, dtype: 'float16' },
  { name: 'smooth V, float32', smoothV: true, dtype: 'float32' },
  { name: 'sinks, LSE', sinks: 'bfloat16', lse: true },
  { name: 'block mask', blockMask: true },
  { name: 'block mask, causal', blockMask: true, causal: true },
  { name: 'block mask of 32 rows', blockMask: true, blockRows: 32 },
];
const WGMMA_DECODING: Features = { name: 'decoding', decoding: 8192, heads: 4 };

function problemOf([d, dv]: Dims, features: Features): AttentionProblem {
  const { dtype = 'bfloat16', decoding, heads = 1, windowSize, mask, sinks, blockMask, blockRows = 128 } = features;
  const [lq, lk] = decoding === undefined ? [256, 256] : [1, decoding];
  const storage = emptyTensor([Math.max(lk, heads * lq) * Math.max(d, dv)], dtype).data;
  const operand = (length: number, dim: number, count = 1) => tensor(storage, [1, count, length, dim], { dtype });
  return createProblem(operand(lq, d, heads), operand(lk, d), operand(lk, dv), {
    causalAlignment: 'bottom-right',
    ...(windowSize === undefined ? {} : { windowSize }),
    ...(sinks === undefined ? {} : { sinks: emptyTensor([heads], sinks) }),
    ...(blockMask
      ? {
          blockMask: { rows: blockRows, keys: 64, map: tensor(new Uint8Array(1024 / blockRows), [256 / blockRows, 4]) },
        }
      : {}),
    isCausal: features.causal ?? false,
    softcap: features.softcap ?? 0,
    returnLse: features.lse ?? false,
    ...(mask === undefined
      ? {}
      : { attnMask: { location: 'cpu', dtype: mask, shape: [lq, lk], strides: [lk, 1], offset: 0 } }),
  });
}

interface NamedModule {
  readonly name: string;
  readonly module: SimulatableModule;
}

const named = (launches: readonly { readonly name: string; readonly module: object }[]): NamedModule[] =>
  launches.map(({ name, module }) => ({ name, module: module as SimulatableModule }));

function modulesOf(
  choice: KernelChoice,
  target: Target,
  dims: Dims,
  features: Features,
  overrides: Partial<WgmmaTuning> = {},
): NamedModule[] {
  const problem = problemOf(dims, features);
  const device = { target, multiprocessors: 132 };
  const chosen = features.blockMask ? ([{ threshold: 0.6 }, { topK: 0.5 }] as const) : [];
  return named([
    ...planLaunches(problem, choice, device, { overrides }).launches,
    ...chosen.flatMap((sparsity) =>
      planBlockMap(problem, settleSparsity(sparsity), device).launches.map(({ name, module }) => ({
        name: `${name} by ${Object.keys(sparsity)[0]}`,
        module,
      })),
    ),
  ]);
}

/** Kernels of the backward pass that the forward pass does not have. */
function backwardModulesOf(target: Target, dims: Dims, features: Features): NamedModule[] {
  const { dtype = 'bfloat16', precision = 'fp16' } = features;
  const attention = problemOf(dims, { ...features, lse: true });
  const results = {
    output: emptyTensor([1, 1, 256, dims[1]], dtype),
    lse: emptyTensor([1, 1, 256], 'float32'),
    dOutput: emptyTensor([1, 1, 256, dims[1]], dtype),
  };
  const isAdditive = features.mask !== undefined && features.mask !== 'bool';
  const mask = isAdditive ? emptyTensor([1, 256], 'float32') : undefined;
  const problem = createBackwardProblem(attention, results, mask, { maskGradient: isAdditive }, precision);
  const [choice] = choicesOf(descriptorOf('qk-int8-pv-fp16-cuda')) as [KernelChoice];
  const { launches } = planBackward(problem, choice, { target, multiprocessors: 132 });
  return named(launches).filter(({ name }) => /^(gradients|copy|prepare|transpose|NaN)/.test(name));
}

/** A kernel's choices, the default accumulator first. */
const choicesOf = (descriptor: CudaKernelDescriptor): KernelChoice[] =>
  descriptor.pvAccumDtype.map((pvAccumDtype) => ({
    descriptor,
    ...(descriptor.qkQuantGran[0] === undefined ? {} : { qkQuantGran: descriptor.qkQuantGran[0] }),
    pvAccumDtype,
    smoothK: true,
    smoothV: false,
    smoothQ: descriptor.smoothQ[0],
  }));

/**
 * With a block mask the Hopper kernel spills what it holds where a tile is cut, if it looks at the map there: its list takes registers
 * that its scores have taken.
 *
 * Bytes that some main kernels spill since tiles whose keys have exponents of their own have a path, which few calls take: a debt.
 * An H200 measured the Hopper one no slower (1024 tokens, causal: 0.500 ms before and after).
 */
const DEBTS: Readonly<Record<string, number>> = {
  'attention qk-int8-pv-fp8-cuda fp32+fp16 D128 full sm_120a': 12,
  'attention qk-int8-pv-fp8-cuda fp32+fp16 D128 causal sm_120a': 12,
  'qk-int8-pv-fp8-cuda-sm90 fp32+fp32 D128/128 causal': 20,
  'qk-int8-pv-fp8-cuda-sm90 fp32+fp32 D128/128 block mask, causal': 16,
  'qk-int8-pv-fp8-cuda-sm90 fp32+fp32 D128/128 block mask of 32 rows': 68,
};

/** @param rank of the accumulator, the default one first */
function dimsOf({ descriptor }: KernelChoice, rank: number, thorough: boolean): readonly Dims[] {
  if (!thorough) return DIMS.filter(([d]) => rank === 0 && d === 128);
  return rank === 0 && descriptor.maxHeadDim > 256 ? [...DIMS, [512, 512]] : DIMS;
}

/** Bytes that a kernel without a debt may spill. */
function spillLimitOf(name: string, [dim]: Dims, isMain: boolean, isPlain: boolean): number {
  // 128 rows of 512 channels are all registers of a multiprocessor.
  if (name === 'quantize Q' && dim > 256) return 288;
  if (isMain || name !== 'attention') return 0;
  return isPlain ? 16 : 128;
}

/** On every target that can run a kernel. Kernels without scales per thread are others with coarser scales. */
function configurationsOf(family: Family, thorough: boolean): Configuration[] {
  const found = new Map<string, Configuration>();
  const add = (choice: KernelChoice, isDefault: boolean, target: Target, dims: Dims, features: Features) => {
    for (const { name, module } of modulesOf(choice, target, dims, features)) {
      if (found.has(module.id)) continue;
      const attention = name === 'attention';
      const plain = PLAIN.includes(features);
      const main = attention && plain && isDefault && dims[0] === dims[1];
      const { descriptor, pvAccumDtype } = choice;
      const label = [name, descriptor.name, pvAccumDtype, sizesOf(dims), features.name, target].join(' ');
      const otherwise = spillLimitOf(name, dims, main || family === 'exact', plain);
      const spillLimit = DEBTS[label] ?? otherwise;
      found.set(module.id, { family, name: label, kernel: module.kernel, main, spillLimit });
    }
  };
  // For 12.x a kernel's PTX is the same as for sm_120a unless it has code of its own.
  for (const target of TARGETS.filter((target) => thorough || target !== 'sm_120f')) {
    const kernels = CUDA_KERNELS.filter(
      (row) =>
        row.family === family &&
        row.qkQuantGran[0] !== 'per-block' &&
        lackedBy(row.name, capabilityOf(target)) === undefined,
    );
    for (const [rank, choice] of kernels.flatMap((descriptor) => [...choicesOf(descriptor).entries()])) {
      const dimsHere = dimsOf(choice, rank, thorough);
      for (const dims of dimsHere) for (const features of PLAIN) add(choice, rank === 0, target, dims, features);
      const isHopper = family === 'exact' && target === 'sm_90a';
      if (rank > 0 || !(thorough || target === 'sm_89' || isHopper)) continue;
      for (const features of family === 'exact' ? EXACT_RARE : RARE) {
        add({ ...choice, smoothV: features.smoothV ?? false }, true, target, [128, 128], features);
      }
    }
  }
  return [...found.values()];
}

/** The Hopper kernels, with the variants of their tuning at D = 128. Only the kernels of {@link DEBTS} may spill. */
function wgmmaConfigurations(thorough: boolean): Configuration[] {
  const found = new Map<string, Configuration>();
  const add = (name: string, isDefault: boolean, ...of: Parameters<typeof modulesOf>) => {
    for (const { name: launch, module } of modulesOf(...of)) {
      const attention = launch === 'attention';
      const key = attention ? name : module.id;
      const label = attention ? name : `${launch}, ${name}`;
      const main = attention && isDefault && of[2][0] === of[2][1] && PLAIN.includes(of[3]);
      if (found.has(key)) continue;
      const spillLimit = DEBTS[label] ?? 0;
      found.set(key, { family: 'wgmma', name: label, kernel: module.kernel, main, spillLimit });
    }
  };
  const kernels = CUDA_KERNELS.filter(({ family }) => family === 'wgmma');
  for (const [rank, choice] of kernels.flatMap((descriptor) => [...choicesOf(descriptor).entries()])) {
    const label = (dims: Dims, feature: string) =>
      `${choice.descriptor.name} ${choice.pvAccumDtype} D${dims.join('/')} ${feature}`;
    for (const dims of thorough ? DIMS : DIMS.filter(([d]) => d === 128)) {
      const rare = rank === 0 && dims[0] === 128 ? WGMMA_RARE : [];
      for (const features of [...PLAIN, WGMMA_DECODING, ...rare]) {
        const own: KernelChoice = {
          ...choice,
          qkQuantGran: features.perWarp ? 'per-warp' : 'per-thread',
          smoothV: features.smoothV ?? false,
        };
        add(label(dims, features.name), rank === 0, own, 'sm_90a', dims, features);
      }
    }
    const isFp8 = kernels.some(({ name, pvFormat }) => name === choice.descriptor.name && pvFormat === 'e4m3');
    if (!thorough || rank > 0 || !isFp8) continue;
    for (const [variant, tuning] of Object.entries(WGMMA_VARIANTS)) {
      const [full] = PLAIN as [Features];
      add(`${label([128, 128], full.name)} [${variant}]`, false, choice, 'sm_90a', [128, 128], full, tuning);
    }
  }
  return [...found.values()];
}

/** Features that gradients are generated with at D = 128 only. */
const GRADIENT_FEATURES: readonly Features[] = [
  { name: 'additive mask', mask: 'float16' },
  { name: 'softcap, causal', softcap: 30, causal: true },
  { name: 'float32', dtype: 'float32' },
];

/** In codes. */
const INT8_GRADIENTS: readonly Features[] = [
  { name: 'int8', precision: 'int8' },
  { name: 'int8, causal', precision: 'int8', causal: true },
];
const FP8_GRADIENTS: readonly Features[] = [
  { name: 'fp8', precision: 'fp8' },
  { name: 'fp8, causal', precision: 'fp8', causal: true },
];

/** `D128`, or `D192/128` where V's differs. */
const sizesOf = ([d, dv]: Dims): string => (d === dv ? `D${d}` : `D${d}/${dv}`);

const gradientFeaturesOf = ([d]: Dims, target: Target, thorough: boolean): readonly Features[] => [
  ...PLAIN,
  ...(d === 128 && (thorough || target === 'sm_80') ? GRADIENT_FEATURES : []),
  ...(thorough || target === 'sm_80' ? INT8_GRADIENTS : []),
  ...(TARGET_FEATURES[target].fp8Mma ? FP8_GRADIENTS : []),
];

/**
 * The kernels of the backward pass.
 *
 * @param thorough every head dim on every target; otherwise D = 64 and 128 on the targets whose code differs
 */
export function gradientConfigurations(thorough: boolean): Configuration[] {
  const cases = TARGETS.filter((target) => thorough || !/^sm_(86|120a|120f)$/.test(target)).flatMap((target) =>
    (thorough ? DIMS : DIMS.slice(0, 2)).flatMap((dims) =>
      gradientFeaturesOf(dims, target, thorough).map((features) => ({ target, dims, features })),
    ),
  );
  const found = new Map<string, Configuration>();
  for (const { target, dims, features } of cases) {
    const isMain =
      [...PLAIN, ...INT8_GRADIENTS, ...FP8_GRADIENTS].includes(features) && dims[0] <= 128 && dims[0] === dims[1];
    for (const { name, module } of backwardModulesOf(target, dims, features)) {
      if (found.has(module.id)) continue;
      found.set(module.id, {
        family: target === 'sm_90a' && features.precision === undefined ? 'wgmma' : 'mma-sync',
        name: `${name}, ${sizesOf(dims)} ${features.name} ${target}`,
        kernel: module.kernel,
        main: isMain,
        spillLimit: isMain ? 0 : 128,
      });
    }
  }
  return [...found.values()];
}

/**
 * The kernels of the forward pass.
 *
 * @param thorough every accumulator and head dim, on every target, and every variant; otherwise D = 128, with the rare
 *     features on one target; kernels that quantize for others once each
 * @param only one family; default all
 */
export function configurations(thorough: boolean, only?: Family): Configuration[] {
  const families = new Set(CUDA_KERNELS.map(({ family }) => family));
  return [...families]
    .filter((family) => only === undefined || family === only)
    .flatMap((family) => (family === 'wgmma' ? wgmmaConfigurations(thorough) : configurationsOf(family, thorough)));
}
