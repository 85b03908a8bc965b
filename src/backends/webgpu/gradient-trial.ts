/**
 * Whether a pair of gradient kernels with matrices comes out right on a device, found by value before its first use, as for attention
 * (matrix-trial.ts).
 */
import {
  type BackwardPrecision,
  type BackwardProblem,
  createBackwardProblem,
  gradientOutputs,
} from '../../attention/backward.ts';
import { createProblem } from '../../attention/problem.ts';
import { ExecutionError } from '../../errors.ts';
import { Random } from '../../measure/random.ts';
import { backwardExact } from '../../reference/backward.ts';
import { attentionExact } from '../../reference/exact.ts';
import { relativeL2 } from '../../reference/metrics.ts';
import { fromFloat32, toFloat32 } from '../../tensor/access.ts';
import type { DType } from '../../tensor/dtype.ts';
import { type Tensor, tensor } from '../../tensor/tensor.ts';
import type { KernelChoice } from '../backend.ts';
import type { GpuContext } from './device.ts';
import { matrixGradientKeys } from './families/backward.ts';
import type { Forced } from './families/choose.ts';
import { padDim } from './kernels/layout.ts';
import { planBackwardLaunches } from './launches/backward.ts';
import { Program } from './program.ts';
import { runProgram, takeInputs } from './run.ts';

/** Queries and keys of a trial: several tiles of each shape, the last of them not whole. */
const QUERIES = 147;
const KEYS = 149;

/** Relative L2 that no right kernel has here. */
const WRONG_FROM = 0.1;

export interface GradientErrors {
  readonly dq: number;
  readonly dk: number;
  readonly dv: number;
}

/**
 * Relative L2 of the gradients of one head, whose values and whose output's gradients grow from token to token, so that sums are
 * scaled anew.
 *
 * @throws {ExecutionError} kernels that do not compile or run
 */
export async function gradientErrors(
  context: GpuContext,
  { dtype, headDim, valueDim }: { readonly dtype: DType; readonly headDim: number; readonly valueDim: number },
  kernel: KernelChoice,
  forced: Forced,
  precision: BackwardPrecision = 'fp16',
): Promise<GradientErrors> {
  // Always the same numbers.
  const random = new Random(1);
  const made = (tokens: number, dim: number, sizeOf: (token: number) => number) =>
    fromFloat32(
      random.normals(tokens * dim).map((x, i) => x * sizeOf(Math.floor(i / dim))),
      [1, 1, tokens, dim],
      dtype,
    );
  const q = made(QUERIES, headDim, () => 1);
  const k = made(KEYS, headDim, () => 1);
  const v = made(KEYS, valueDim, (token) => 2 ** (token / 64));
  const dOutput = made(QUERIES, valueDim, (token) => 2 ** (token / 32 - 8));
  const attention = createProblem(q, k, v, {});
  const exact = attentionExact(attention, { q, k, v });
  const output = fromFloat32(Float32Array.from(exact.output), [1, 1, QUERIES, valueDim], dtype);
  const lse = tensor(Float32Array.from(exact.lse), [1, 1, QUERIES]);
  const options = { gradientDtype: 'float32' } as const;
  const problem = createBackwardProblem(attention, { output, lse, dOutput }, undefined, options, precision);
  const { launches, sizes, tables } = planBackwardLaunches(context.capabilities, problem, kernel, forced);
  const program = await Program.create(context, launches, sizes, tables);
  try {
    const planned = { location: 'cpu', outputs: gradientOutputs(problem) } as const;
    const inputs = takeInputs(context, { q, k, v, output, lse, dOutput });
    const gradients = await runProgram(context, program, planned, inputs, {});
    const wanted = backwardExact(attention, { q, k, v, dOutput });
    const error = (name: 'dq' | 'dk' | 'dv') => relativeL2(toFloat32(gradients[name] as Tensor), wanted[name]);
    return { dq: error('dq'), dk: error('dk'), dv: error('dv') };
  } finally {
    program.dispose();
  }
}

/** Tries the gradient kernels that a problem gets, until they are right: those with matrices that come out wrong are not used. */
export async function tryGradients(
  context: GpuContext,
  { attention, precision, maskGradient }: BackwardProblem,
  kernel: KernelChoice,
  forced: Forced,
): Promise<void> {
  const { dtype, headDim, valueDim } = attention;
  const dims = { headDimPadded: padDim(headDim), valueDimPadded: padDim(valueDim) };
  if (precision !== 'fp16' || forced.emulateMatrices !== undefined || maskGradient !== undefined) return;
  if (Math.min(headDim, valueDim) === 0) return;
  for (;;) {
    const keys = matrixGradientKeys(context.capabilities, dims, forced);
    if (keys === undefined || (context.rightShapes.has(keys.query) && context.rightShapes.has(keys.key))) return;
    const right = await whichAreRight(context, { dtype, headDim, valueDim }, kernel, forced);
    for (const owner of ['query', 'key'] as const) {
      if (right[owner]) context.rightShapes.add(keys[owner]);
      else context.excludeShape(keys[owner]);
    }
  }
}

async function whichAreRight(...given: Parameters<typeof gradientErrors>): Promise<Record<'query' | 'key', boolean>> {
  try {
    const { dq, dk, dv } = await gradientErrors(...given);
    // NaN is wrong too.
    return { query: dq < WRONG_FROM, key: dk < WRONG_FROM && dv < WRONG_FROM };
  } catch (error) {
    // Kernels that do not compile are not the device's.
    if (error instanceof ExecutionError && error.code === 'execution-failed') return { query: false, key: false };
    throw error;
  }
}
