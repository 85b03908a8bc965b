/** Configurations of the Hopper kernel that are assembled in tests and reports: what planning real problems asks for, and the variants. */
import { createProblem } from '../../../attention/problem.ts';
import type { DType } from '../../../tensor/dtype.ts';
import { emptyTensor, tensor } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import { CUDA_KERNELS } from '../kernel-table.ts';
import { HOPPER_VARIANTS, type HopperTuning } from '../kernels/wgmma/table.ts';
import type { SimulatableModule } from '../launches/arguments.ts';
import { planLaunches } from '../launches/plan.ts';
import type { Kernel } from '../ptx/types.ts';

export interface HopperConfiguration {
  readonly name: string;
  readonly kernel: () => Kernel;
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
  /** One query, four heads over one, many keys. */
  readonly decoding?: boolean;
}

const FEATURES: readonly Features[] = [
  { name: 'full' },
  { name: 'causal', causal: true },
  { name: 'decoding', decoding: true },
  { name: 'boolean mask', mask: 'bool' },
  { name: 'additive mask, LSE', mask: 'float16', lse: true },
  { name: 'softcap, causal, LSE', softcap: 30, causal: true, lse: true },
  { name: 'per warp, float16', perWarp: true, dtype: 'float16' },
  { name: 'smooth V, float32', smoothV: true, dtype: 'float32' },
];
const DIMS = [
  [128, 128],
  [64, 64],
  [256, 256],
  [192, 128],
  [80, 80],
] as const;

function launchesOf(
  choice: KernelChoice,
  [d, dv]: readonly [number, number],
  features: Features,
  tuning: Partial<HopperTuning>,
): readonly { readonly name: string; readonly module: SimulatableModule }[] {
  const dtype = features.dtype ?? 'bfloat16';
  const [heads, lq, lk] = features.decoding ? [4, 1, 8192] : [1, 256, 256];
  const storage = emptyTensor([Math.max(lk, heads * lq) * Math.max(d, dv)], dtype).data;
  const operand = (count: number, length: number, dim: number) => tensor(storage, [1, count, length, dim], { dtype });
  const problem = createProblem(operand(heads, lq, d), operand(1, lk, d), operand(1, lk, dv), {
    isCausal: features.causal ?? false,
    softcap: features.softcap ?? 0,
    returnLse: features.lse ?? false,
    ...(features.mask === undefined
      ? {}
      : { attnMask: { location: 'cpu', dtype: features.mask, shape: [lq, lk], strides: [lk, 1], offset: 0 } }),
  });
  const device = { target: 'sm_90a', multiprocessors: 132 } as const;
  const { launches } = planLaunches(problem, choice, device, { overrides: tuning });
  return launches.map(({ name, module }) => ({ name, module: module as SimulatableModule }));
}

/**
 * @param thorough every accumulator, head dim, feature and variant; otherwise each kernel at D = 128, full and causal, and the
 * features of its default accumulator; the kernels that quantize for them once each
 */
export function hopperConfigurations(thorough: boolean): HopperConfiguration[] {
  const found = new Map<string, HopperConfiguration>();
  const add = (name: string, ...of: Parameters<typeof launchesOf>) => {
    for (const { name: launch, module } of launchesOf(...of)) {
      const key = launch === 'attention' ? name : module.id;
      if (!found.has(key))
        found.set(key, { name: launch === 'attention' ? name : `${launch}, ${name}`, kernel: module.kernel });
    }
  };
  for (const descriptor of CUDA_KERNELS.filter(({ family }) => family === 'wgmma')) {
    for (const [rank, pvAccumDtype] of descriptor.pvAccumDtype.entries()) {
      for (const dims of thorough ? DIMS : DIMS.slice(0, 1)) {
        const rare = rank === 0 && dims === DIMS[0];
        for (const features of rare ? FEATURES : FEATURES.slice(0, 3)) {
          const choice: KernelChoice = {
            descriptor,
            qkQuantGran: features.perWarp ? 'per-warp' : 'per-thread',
            pvAccumDtype,
            smoothK: true,
            smoothV: features.smoothV ?? false,
            smoothQ: false,
          };
          const name = `${descriptor.name} ${pvAccumDtype} D${dims.join('/')} ${features.name}`;
          add(name, choice, dims, features, {});
          if (!thorough || !rare || features.name !== 'full' || descriptor.pvFormat !== 'e4m3') continue;
          for (const [variant, tuning] of Object.entries(HOPPER_VARIANTS)) {
            add(`${name} [${variant}]`, choice, dims, features, tuning);
          }
        }
      }
    }
  }
  return [...found.values()];
}
