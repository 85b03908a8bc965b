/**
 * Whether the matrix kernel's shape for a problem comes out right on a device, found by value before its first use: a
 * driver's compiler or its memory may be at fault with one shape and right with another, which no device tells, and a
 * wrong output is a fast one.
 */
import { attentionOutputs } from '../../attention/outputs.ts';
import { type AttentionProblem, createProblem } from '../../attention/problem.ts';
import { ExecutionError } from '../../errors.ts';
import { Random } from '../../measure/random.ts';
import { attentionExact } from '../../reference/exact.ts';
import { fromFloat32, toFloat32 } from '../../tensor/access.ts';
import type { Tensor } from '../../tensor/tensor.ts';
import type { KernelChoice } from '../backend.ts';
import type { GpuContext } from './device.ts';
import { chooseVariant, type Forced } from './families/choose.ts';
import type { AttentionVariant } from './families/family.ts';
import { shapeKey } from './families/matrix-shapes.ts';
import { type KeyValueLayout, padDim } from './kernels/layout.ts';
import { planLaunches } from './launches/plan.ts';
import { Program } from './program.ts';
import { runProgram, takeInputs } from './run.ts';

/** Queries and keys of a trial: every subgroup has rows, every step's part of the loop runs, and neither is whole. */
const QUERIES = 131;
const KEYS = 133;

/** Relative L1 that no right kernel has here, with float16 sums neither. */
const WRONG_FROM = 0.1;

type Trial = (context: GpuContext, problem: AttentionProblem, kernel: KernelChoice, forced: Forced) => Promise<boolean>;

const keyOf = (variant: AttentionVariant, { headDim, valueDim }: AttentionProblem, { pvAccumDtype }: KernelChoice) =>
  shapeKey(variant.name, padDim(headDim), padDim(valueDim), pvAccumDtype === 'fp16');

/** The shape that a problem gets and that was not tried yet; undefined where there is nothing to try. */
function untried(
  context: GpuContext,
  problem: AttentionProblem,
  kernel: KernelChoice,
  forced: Forced,
  layout: KeyValueLayout | undefined,
) {
  if (forced.emulateMatrices !== undefined || Math.min(problem.headDim, problem.valueDim) === 0) return undefined;
  const variant = chooseVariant(context.capabilities, problem, kernel, forced, layout);
  if (variant.family !== 'matrix') return undefined;
  const key = keyOf(variant, problem, kernel);
  return context.rightShapes.has(key) ? undefined : { key, variant: variant.name };
}

/** Whether {@link tryShapes} would have something to do. */
export const needsTrial = (
  context: GpuContext,
  problem: AttentionProblem,
  kernel: KernelChoice,
  forced: Forced,
): boolean => untried(context, problem, kernel, forced, undefined) !== undefined;

/**
 * Tries the shape that a problem gets, once for a device and head dims; one that comes out wrong is not used there,
 * and the next best is tried. Afterwards the device's capabilities name no shape for the problem but a right one.
 *
 * @param layout of keys and values that are quantized already; default: any
 */
export async function tryShapes(
  context: GpuContext,
  problem: AttentionProblem,
  kernel: KernelChoice,
  forced: Forced,
  { layout, trial = comesOutRight }: { readonly layout?: KeyValueLayout; readonly trial?: Trial } = {},
): Promise<void> {
  for (let next = untried(context, problem, kernel, forced, layout); next !== undefined; ) {
    const { key, variant } = next;
    if (await trial(context, problem, kernel, { ...forced, family: 'matrix', variant })) context.rightShapes.add(key);
    else context.excludeShape(key);
    next = untried(context, problem, kernel, forced, layout);
  }
}

/** One head in the problem's type and head dims, of keys that grow: rows outgrow their maxima, so outputs are rescaled. */
export async function comesOutRight(
  context: GpuContext,
  { dtype, headDim, valueDim }: AttentionProblem,
  kernel: KernelChoice,
  forced: Forced,
): Promise<boolean> {
  // Always the same numbers, between -1 and 1.
  const random = new Random(1);
  const made = (tokens: number, dim: number, sizeOf: (token: number) => number) => {
    const data = Float32Array.from(
      { length: tokens * dim },
      (_, i) => random.uniform(-1, 1) * sizeOf(Math.floor(i / dim)),
    );
    return fromFloat32(data, [1, 1, tokens, dim], dtype);
  };
  const q = made(QUERIES, headDim, () => 3);
  const k = made(KEYS, headDim, (token) => 0.1 + (6 * token) / KEYS);
  const v = made(KEYS, valueDim, () => 1);
  const small = createProblem(q, k, v, {});
  const { launches, sizes, tables } = planLaunches(context.capabilities, small, kernel, forced);
  let program: Program;
  try {
    program = await Program.create(context, launches, sizes, tables);
  } catch (error) {
    // A kernel that does not compile is not the device's.
    if (error instanceof ExecutionError && error.code === 'execution-failed') return false;
    throw error;
  }
  try {
    const planned = { location: 'cpu', outputs: attentionOutputs(small) } as const;
    const { output } = await runProgram(context, program, planned, takeInputs(context, { q, k, v }), {});
    const actual = toFloat32(output as Tensor);
    const exact = attentionExact(small, { q, k, v }).output;
    const error = exact.reduce((sum, x, i) => sum + Math.abs(x - (actual[i] as number)), 0);
    // NaN is wrong too.
    return error < WRONG_FROM * exact.reduce((sum, x) => sum + Math.abs(x), 0);
  } finally {
    program.dispose();
  }
}
