/**
 * `sageattention kernel NAME`: the kernels that a problem gets, as launches, source, listing or register pressure. No
 * GPU is asked.
 */

import { chooseOptions } from '../backends/choice.ts';
import { CUDA_KERNELS } from '../backends/cuda/kernel-table.ts';
import type { SimulatableModule } from '../backends/cuda/launches/arguments.ts';
import type { KernelLaunch } from '../backends/cuda/launches/launch.ts';
import { planLaunches } from '../backends/cuda/launches/plan.ts';
import { listing, registerPressure } from '../backends/cuda/ptx/inspect.ts';
import type { Target } from '../backends/cuda/ptx/targets.ts';
import type { Capabilities } from '../backends/webgpu/capabilities.ts';
import type { Family } from '../backends/webgpu/families/names.ts';
import { KERNELS as WEBGPU_KERNELS } from '../backends/webgpu/kernel-table.ts';
import type { Launch } from '../backends/webgpu/launches/launch.ts';
import { planLaunches as planDispatches } from '../backends/webgpu/launches/plan.ts';
import type { TensorView } from '../tensor/tensor.ts';
import { UserError } from './errors.ts';
import { type AttentionOptions, createProblem, type KernelName } from './library.ts';
import { print, table } from './terminal.ts';

export interface KernelOptions {
  readonly target: Target;
  readonly family: Family;
  readonly headDim: number;
  readonly valueDim?: number;
  readonly length: number;
  readonly keyLength?: number;
  readonly heads: number;
  readonly kvHeads?: number;
  readonly dtype: 'float16' | 'bfloat16' | 'float32';
  readonly causal: boolean;
  readonly accumulate?: NonNullable<AttentionOptions['pvAccumDtype']>;
  readonly multiprocessors: number;
  readonly launch: string;
  readonly ptx?: true;
  readonly wgsl?: true;
  readonly listing?: true;
  readonly pressure?: true;
}

/** A device that offers everything up to a family, with the limits that every WebGPU device has. */
function capabilitiesFor(family: Family): Capabilities {
  const subgroups = family !== 'base';
  return {
    adapter: `any device of family ${family}`,
    isSoftware: false,
    shaderF16: subgroups,
    subgroups,
    subgroupSize: subgroups ? [32, 32] : [0, 0],
    matrixConfigs:
      family === 'matrix'
        ? [
            { componentType: 'i8', resultComponentType: 'i32', M: 16, N: 16, K: 32 },
            { componentType: 'f16', resultComponentType: 'f32', M: 16, N: 16, K: 16 },
            { componentType: 'f16', resultComponentType: 'f16', M: 16, N: 16, K: 16 },
          ]
        : [],
    matrixFeature: family === 'matrix' ? 'subgroup-matrix' : undefined,
    matrixDialect: { majorness: 'template', unit: 'elements' },
    packedDot: subgroups,
    subgroupId: subgroups,
    timestamps: false,
    workgroupBytes: family === 'matrix' ? 49_152 : 16_384,
    workgroupThreads: family === 'matrix' ? 1024 : 256,
    storageBuffers: 8,
    bindingBytes: 2 ** 27,
    bufferBytes: 2 ** 28,
    bindingAlignment: 256,
    dispatch: 65_535,
  };
}

function problemOf({ heads, length, headDim, causal, dtype, ...options }: KernelOptions) {
  const { kvHeads = heads, keyLength = length, valueDim = headDim } = options;
  if (heads % kvHeads !== 0) throw new UserError(`--heads ${heads} is not a multiple of --kv-heads ${kvHeads}`);
  const operand = (count: number, tokens: number, dim: number): TensorView => ({
    location: 'cpu',
    dtype,
    shape: [1, count, tokens, dim],
    strides: [count * tokens * dim, tokens * dim, dim, 1],
    offset: 0,
  });
  return createProblem(
    operand(heads, length, headDim),
    operand(kvHeads, keyLength, headDim),
    operand(kvHeads, keyLength, valueDim),
    {
      isCausal: causal,
    },
  );
}

/** The launch that was asked for by name. */
function named<L>(launches: readonly L[], nameOf: (launch: L) => string, asked: string): L {
  // WebGPU's attention is called after its family and tile: `attention subgroup 32x32`.
  const found = launches.find((launch) => nameOf(launch) === asked || nameOf(launch).startsWith(`${asked} `));
  if (found !== undefined) return found;
  const names = [...new Set(launches.map(nameOf))].map((name) => `'${name}'`).join(', ');
  throw new UserError(
    launches.length === 0 ? 'this problem needs no launch' : `no launch '${asked}'; there are ${names}`,
  );
}

function cudaLaunches(name: KernelName, options: KernelOptions): readonly KernelLaunch[] {
  const descriptor = CUDA_KERNELS.find((kernel) => kernel.name === name);
  if (descriptor === undefined) {
    throw new UserError(
      `${name} is a kernel of WebAssembly: all of those are one module, compiled from src/backends/wasm/assembly/, ` +
        "whose text a disassembler such as wabt's wasm2wat shows",
    );
  }
  const problem = problemOf(options);
  const { accumulate: pvAccumDtype, target, multiprocessors } = options;
  const choice = chooseOptions(descriptor, problem, pvAccumDtype === undefined ? {} : { pvAccumDtype });
  return planLaunches(problem, choice, { target, multiprocessors }).launches;
}

const kernelOf = ({ module }: KernelLaunch) => (module as SimulatableModule).kernel();

function cudaText(name: KernelName, options: KernelOptions): string {
  const launches = cudaLaunches(name, options);
  if (options.ptx || options.listing || options.pressure) {
    const launch = named(launches, (one) => one.name, options.launch);
    if (options.ptx) return launch.module.ptx();
    if (options.listing) return listing(kernelOf(launch));
    const { registers, predicates, byKind, section } = registerPressure(kernelOf(launch));
    const kinds = Object.entries(byKind).map(([kind, count]) => `${count} ${kind}`);
    return `${registers} registers and ${predicates} predicates at most\nin section '${section}': ${kinds.join(', ')}`;
  }
  return table(
    ['launch', 'entry', '>grid', '>block', '>shared', '>regs', '>instr'],
    launches.map((launch) => [
      launch.name,
      launch.entry,
      `${launch.grid[0]}`,
      `${launch.block[0]}`,
      `${launch.sharedBytes}`,
      `${registerPressure(kernelOf(launch)).registers}`,
      `${kernelOf(launch).instructions.length}`,
    ]),
  );
}

function wgslText(name: KernelName, options: KernelOptions): string {
  const descriptor = WEBGPU_KERNELS.find((kernel) => kernel.name === name);
  if (descriptor === undefined) {
    const names = WEBGPU_KERNELS.map((kernel) => kernel.name);
    throw new UserError(`the kernels of WebGPU are ${names.slice(0, -1).join(', ')} and ${names.at(-1)}, not ${name}`);
  }
  const problem = problemOf(options);
  const { accumulate: pvAccumDtype, family } = options;
  const choice = chooseOptions(descriptor, problem, pvAccumDtype === undefined ? {} : { pvAccumDtype });
  const { launches } = planDispatches(capabilitiesFor(family), problem, choice, { family });
  return named<Launch>(launches, ({ label }) => label, options.launch).code;
}

/** Prints what was asked for. */
export function showKernel(name: KernelName, options: KernelOptions): void {
  const forms = (['ptx', 'wgsl', 'listing', 'pressure'] as const).filter((form) => options[form] === true);
  if (forms.length > 1) throw new UserError(`choose one of ${forms.map((form) => `--${form}`).join(', ')}`);
  print(options.wgsl ? wgslText(name, options) : cudaText(name, options));
}
