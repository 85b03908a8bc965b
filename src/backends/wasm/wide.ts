/**
 * Vectors of 256 bits, where WebAssembly has 128: the compiler of V8 makes one operation of two that lie beside each other if a flag tells it
 * to, which V8 calls experimental. Nothing rests on it before it has been tried by value.
 */
import { createProblem } from '../../attention/problem.ts';
import { type Tensor, type TensorView, tensor } from '../../tensor/tensor.ts';
import type { Arithmetic } from './calls.ts';
import { CallerExecutor } from './executor.ts';
import type { Simd } from './geometry.ts';
import { compileUnshared, type KernelSources } from './modules.ts';
import { NO_WIDE_ENGINE } from './not-wide.ts';
import { SynchronousWasm } from './synchronous.ts';

const FLAG = 'experimental-wasm-revectorize';
/** The first major version of V8 (Node 24) with which this was tried. */
const FIRST_V8 = 13;

/** One of each way to compute, in whole tiles and in cut ones. */
const SHAPES = [
  { queries: 70, keys: 150, headDim: 64, valueDim: 64, isCausal: true },
  { queries: 13, keys: 203, headDim: 72, valueDim: 40, isCausal: false },
];
const ARITHMETICS: readonly Arithmetic[] = (['integer', 'accurate', 'exact', 'fp4'] as const).map((precision) => ({
  precision,
  smoothK: precision !== 'exact',
  smoothV: false,
  smoothQ: false,
}));

/** Numbers of about a normal distribution, the same everywhere. */
function values(length: number, seed: number): Float32Array<ArrayBuffer> {
  let state = seed;
  return Float32Array.from({ length }, () => {
    let sum = 0;
    for (let i = 0; i < 4; i++) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      sum += state / 2 ** 32 - 0.5;
    }
    return 1.7 * sum;
  });
}

const bitsOf = (output: TensorView): string => {
  const { buffer, byteOffset, byteLength } = (output as Tensor).data;
  return String(new Uint32Array(buffer, byteOffset, byteLength / 4));
};

/** The outputs of every way to compute, by kernels that no other module of the process shares code with. */
async function outputsOf(simd: Simd, sources: KernelSources | undefined, stamp: string): Promise<string[]> {
  const executor = await CallerExecutor.create(await compileUnshared(simd, sources, stamp), 'a trial of wide vectors');
  const kernels = SynchronousWasm.on(executor, simd);
  return SHAPES.flatMap(({ queries, keys, headDim, valueDim, isCausal }) => {
    const of = (length: number, dim: number, seed: number) =>
      tensor(values(2 * length * dim, seed), [1, 2, length, dim]);
    const [q, k, v] = [of(queries, headDim, 1), of(keys, headDim, 2), of(keys, valueDim, 3)];
    const problem = createProblem(q, k, v, { isCausal });
    return ARITHMETICS.map((arithmetic) => bitsOf(kernels.attend(problem, { q, k, v }, arithmetic).output));
  });
}

/**
 * Lets V8 compile to vectors of 256 bits from now on, in the whole process, if kernels compiled so give the bits of others.
 *
 * @returns what became of it, for `doctor`
 */
export async function widen(simd: Simd, sources: KernelSources | undefined): Promise<string> {
  const { process } = globalThis;
  const foreign = 'Deno' in globalThis || 'Bun' in globalThis;
  if (foreign || !(Number.parseInt(process?.versions?.v8 ?? '', 10) >= FIRST_V8)) {
    return NO_WIDE_ENGINE;
  }
  const { setFlagsFromString } = process.getBuiltinModule('node:v8');
  const narrow = await outputsOf(simd, sources, 'narrow');
  setFlagsFromString(`--${FLAG}`);
  // Straight to the compiler that widens: it would come to a function only after many calls.
  setFlagsFromString('--no-liftoff');
  let same = false;
  try {
    const wide = await outputsOf(simd, sources, 'wide');
    same = wide.every((bits, i) => bits === narrow[i]);
  } finally {
    setFlagsFromString('--liftoff');
    if (!same) setFlagsFromString(`--no-${FLAG}`);
  }
  return same ? `256 bits where V8 finds pairs (--${FLAG})` : '128 bits: this V8 computes wrongly with more';
}
