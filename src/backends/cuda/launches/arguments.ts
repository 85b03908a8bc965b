/** Makers of modules, kernel arguments and launches. */
import type { Band } from '../../../attention/band.ts';
import { type AttentionProblem, lseShapeOf, outputLayoutOf } from '../../../attention/problem.ts';
import { InvalidArgumentError } from '../../../errors.ts';
import type { DType } from '../../../tensor/dtype.ts';
import type { OperandLayout } from '../../../tensor/tensor.ts';
import { FLOAT32_MAX, LOG2_E } from '../kernels/parts/constants.ts';
import { BYTES } from '../kernels/parts/elements.ts';
import { SINK_PARAMETERS } from '../kernels/parts/sinks.ts';
import { printKernel } from '../ptx/printer.ts';
import type { Kernel } from '../ptx/types.ts';
import type { BufferName, KernelArgument, KernelLaunch, KernelModule } from './launch.ts';

/** A module that can also be inspected and simulated. */
export interface SimulatableModule extends KernelModule {
  readonly kernel: () => Kernel;
}

const modules = new Map<string, SimulatableModule>();
const makers = new Map<string, unknown>();

/**
 * One object for each configuration, so that devices load it once.
 *
 * @param name of the maker, and of no other: compiled code is kept under it, also where a bundler has renamed functions
 */
export function moduleOf<C extends object>(name: string, make: (config: C) => Kernel, config: C): SimulatableModule {
  const id = `${name}:${JSON.stringify(config)}`;
  let module = modules.get(id);
  if (module === undefined) {
    const known = makers.get(name) ?? make;
    if (known !== make) throw new RangeError(`two makers of kernels are called '${name}'`);
    makers.set(name, make);
    let made: Kernel | undefined;
    const kernel = () => {
      made ??= make(config);
      return made;
    };
    module = { id, kernel, ptx: () => printKernel(kernel()) };
    modules.set(id, module);
  }
  return module;
}

export const pointer = (buffer: BufferName | undefined, byteOffset = 0): KernelArgument =>
  buffer === undefined ? { kind: 'null' } : { kind: 'pointer', buffer, byteOffset };
export const u32 = (value: number): KernelArgument => ({ kind: 'u32', value });
export const s32 = (value: number): KernelArgument => ({ kind: 's32', value });
export const u64 = (value: number): KernelArgument => ({ kind: 'u64', value });
export const f32 = (value: number): KernelArgument => ({ kind: 'f32', value });

/** Arguments by name, in the order in which the kernel declares them; a pointer left out is null. */
export function inOrder<N extends string>(
  names: readonly N[],
  values: Partial<Record<N, KernelArgument>>,
): KernelArgument[] {
  return names.map((name) => values[name] ?? { kind: 'null' });
}

export function launch(
  name: string,
  module: SimulatableModule,
  entry: string,
  blocks: number,
  threads: number,
  sharedBytes: number,
  args: KernelArgument[],
): KernelLaunch {
  if (blocks >= 2 ** 31) {
    throw new InvalidArgumentError('unsupported-size', 'q', 'a grid of fewer than 2^31 blocks', String(blocks));
  }
  return { name, module, entry, grid: [blocks, 1, 1], block: [threads, 1, 1], sharedBytes, arguments: args };
}

export const strideBytes = (operand: OperandLayout, dtype: DType) =>
  [operand.batchStride, operand.headStride, operand.tokenStride].map((stride) => u64(stride * BYTES[dtype])) as [
    KernelArgument,
    KernelArgument,
    KernelArgument,
  ];

/**
 * Byte strides of output and LSE by the names of the kernels' parameters.
 *
 * @param channels of a head's output; more than the problem's where it is a part of the channels
 */
export function outputStridesOf(problem: AttentionProblem, channels = problem.valueDim) {
  const { dtype, queryHeads } = problem;
  const output = outputLayoutOf({ ...problem, valueDim: channels });
  const varlen = problem.sequences !== undefined;
  const lseLength = lseShapeOf(problem).at(-1) as number;
  return {
    outputBatch: u64(output.batchStride * BYTES[dtype]),
    outputHead: u64(output.headStride * BYTES[dtype]),
    outputToken: u64(output.tokenStride * BYTES[dtype]),
    lseBatch: u64(varlen ? 0 : queryHeads * lseLength * 4),
    lseHead: u64(lseLength * 4),
  };
}

/** The mask's pointer, null without one, and its byte strides by the names of the kernels' parameters. */
export function maskArgumentsOf({ mask }: AttentionProblem) {
  const bytes = mask === undefined ? 0 : mask.dtype === 'bool' ? 1 : BYTES[mask.dtype];
  const [batch, head, query, key] = mask?.strides ?? [0, 0, 0, 0];
  return {
    mask: mask === undefined ? pointer(undefined) : pointer('mask', mask.offset * bytes),
    strides: {
      maskBatch: u64(batch * bytes),
      maskHead: u64(head * bytes),
      maskQuery: u64(query * bytes),
      maskKey: u64(key * bytes),
    },
  };
}

/** How an attention kernel reads the mask. */
export const maskFormatOf = ({ mask }: AttentionProblem): 'none' | 'boolean' | DType =>
  mask === undefined ? 'none' : mask.dtype === 'bool' ? 'boolean' : mask.dtype;

/** Dtype of the sinks that a kernel adds. */
export const sinkFormatOf = ({ sinks }: AttentionProblem): 'none' | DType => sinks?.dtype ?? 'none';

/** The sinks as kernels take them that add them; no argument for others. */
export function sinkArgumentsOf({ sinks }: AttentionProblem): KernelArgument[] {
  if (sinks === undefined) return [];
  const bytes = BYTES[sinks.dtype];
  return inOrder(SINK_PARAMETERS, {
    sinks: pointer('sinks', sinks.offset * bytes),
    sinkStride: u64(sinks.stride * bytes),
  });
}

/** The band as the attention kernels take it: keys left and right of the diagonal, and where that starts. */
export const bandArguments = ({ lower, upper, align }: Band): KernelArgument[] => [
  s32(0 - lower),
  s32(upper),
  u32(align),
];

/** The softcap in base 2 and its reciprocal, within float32's range; how the kernels take it. */
export function softcapArguments({ softcap }: Pick<AttentionProblem, 'softcap'>): KernelArgument[] {
  const inBase2 = softcap * LOG2_E;
  return [f32(Math.min(inBase2, FLOAT32_MAX)), f32(Math.min(1 / inBase2, FLOAT32_MAX))];
}
