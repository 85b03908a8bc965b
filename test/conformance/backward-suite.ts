/**
 * The conformance suite of backward passes: gradients of the forward suite's cases, on any backend, compared with exact ones in
 * float64. It knows no test runner, as `suite.ts`.
 */
import fc from 'fast-check';
import type { BackwardPrecision } from '../../src/attention/backward.ts';
import type { AttentionOptions } from '../../src/attention/options.ts';
import {
  type AttentionProblem,
  createProblem,
  createVarlenProblem,
  outputShapeOf,
} from '../../src/attention/problem.ts';
import { attentionBackward, type KernelName, sageattnTrainable, type Tensor } from '../../src/index.ts';
import {
  BACKWARD_ALGORITHM,
  type BackwardAlgorithm,
  backwardExact,
  backwardQuantized,
  type ReferenceGradients,
} from '../../src/reference/backward.ts';
import { attentionExact } from '../../src/reference/exact.ts';
import { attentionQuantized, type QuantizedAlgorithm } from '../../src/reference/quantized.ts';
import { fromFloat32, toFloat32 } from '../../src/tensor/access.ts';
import type { DType } from '../../src/tensor/dtype.ts';
import { contiguousStrides, elementCount, tensor } from '../../src/tensor/tensor.ts';
import { Random } from '../support/random.ts';
import { place, snapshot } from '../support/tensors.ts';
import { arbitraryCase, CASES, type CaseInputs, type ConformanceCase } from './cases.ts';
import { type ConformanceTest, checkMeasured, type Measured } from './suite.ts';

/** A backward pass with one setting of its options, and the accuracy that it must reach. */
export interface BackwardTarget {
  readonly name: string;
  readonly backend: 'wasm' | 'webgpu' | 'cuda';
  readonly kernel: KernelName;
  readonly precision: BackwardPrecision;
  /** Largest relative L2 of each gradient on ordinary inputs; of 8-bit gradients, or twice what the reference's algorithm loses on them. */
  readonly relativeL2: number;
  /** Of the forward pass, for inputs on which quantization itself loses more. */
  readonly algorithm: QuantizedAlgorithm;
  /** Format of dO and V in dP; default float16. */
  readonly valueFormat?: BackwardAlgorithm['valueFormat'];
  /** Cases with a larger V, or with more multiply-adds, are left out. */
  readonly largestV?: number;
  readonly maxWork?: number;
  /** Random problems to try; default 20. */
  readonly randomCases?: number;
  /** It refuses some problems, typed: they are left out. Default false. */
  readonly partial?: boolean;
}

/** Gradients are sums of products of V with others: beyond it they overflow float32 on the way. */
export const LARGEST_V = 1e30;

const NAMES = ['dq', 'dk', 'dv'] as const;
type Name = (typeof NAMES)[number];

/** A kernel may lose this much more than the algorithm does in plain TypeScript: tilings and orders of summation differ. */
const ALGORITHM_SLACK = 2;
/** Rounding of gradients, and of the output that they are computed from, to the dtype of the inputs. */
const ROUNDING = { float32: 0, float16: 2 ** -10, bfloat16: 2 ** -7 } as const;

function check(condition: boolean, message: () => string): asserts condition {
  if (!condition) throw new Error(message());
}

const problemOf = ({ q, k, v, options, cuSeqlens }: CaseInputs): AttentionProblem =>
  cuSeqlens === undefined
    ? createProblem(q, k, v, options)
    : createVarlenProblem(q, k, v, cuSeqlens.q, cuSeqlens.k, options);

/** A normal gradient of the output, in storage that is NaN elsewhere. */
function gradientOfOutput(problem: AttentionProblem, random: Random): Tensor {
  const shape = outputShapeOf(problem);
  const strides = contiguousStrides(shape.map((size, i) => (i === shape.length - 1 ? size + 3 : size)));
  return place(random.normals(elementCount(shape)), shape, problem.dtype, strides, 5);
}

/** What gradients are made of, by size: error is taken relative to it where they cancel to almost nothing. */
function ordinarySizes(problem: AttentionProblem, { q, k, v }: CaseInputs): Record<Name, number> {
  const rms = (x: Tensor) => {
    const values = toFloat32(x).filter(Number.isFinite);
    return Math.sqrt(values.reduce((sum, value) => sum + value ** 2, 0) / Math.max(1, values.length));
  };
  const { queryLength, keyLength, valueDim, smScale, queryHeads, kvHeads } = problem;
  const dS = rms(v) * Math.sqrt(valueDim) * Math.abs(smScale);
  const perKey = Math.sqrt(((queryLength / Math.max(1, keyLength)) * queryHeads) / Math.max(1, kvHeads));
  return { dq: dS * rms(k), dk: dS * rms(q) * perKey, dv: perKey };
}

const dimOf = ({ headDim, valueDim }: AttentionProblem, name: Name) => (name === 'dv' ? valueDim : headDim);

interface Run {
  readonly problem: AttentionProblem;
  readonly inputs: CaseInputs;
  readonly dOutput: Tensor;
  readonly exact: ReferenceGradients;
}

function prepare(testCase: ConformanceCase, seed: number): Run {
  const random = new Random(seed);
  const inputs = testCase.make(random);
  const problem = problemOf(inputs);
  const dOutput = gradientOfOutput(problem, random);
  const exact = backwardExact(problem, { ...inputs, attnMask: inputs.options.attnMask as Tensor | undefined, dOutput });
  return { problem, inputs, dOutput, exact };
}

/** Largest magnitude of each dtype; gradients beyond it are not compared. */
const LARGEST: Readonly<Record<DType, number>> = { float32: 3e38, float16: 65504, bfloat16: 3e38 };
/** What may be lost at the bottom of a format, absolute. */
const UNDERFLOW: Readonly<Record<DType, number>> = { float32: 2 ** -126, float16: 2 ** -25, bfloat16: 2 ** -126 };

/** Relative L2, over elements that are finite in the exact gradient, with a floor for what cancels. */
function errorOf(actual: ArrayLike<number>, exact: Float64Array, size: number, dtype: DType): number {
  let [error, square, count] = [0, 0, 0];
  for (let i = 0; i < exact.length; i++) {
    const expected = exact[i] as number;
    if (!Number.isFinite(expected) || Math.abs(expected) > LARGEST[dtype]) continue;
    error += Math.max(0, Math.abs((actual[i] as number) - expected) - UNDERFLOW[dtype]) ** 2;
    square += expected ** 2;
    count++;
  }
  return error === 0 ? 0 : Math.sqrt(error / Math.max(square, count * (0.1 * size) ** 2, 1e-70));
}

/**
 * Root mean square over tokens of each one's relative L2, at most 1. Beside a key a hundred times as large as the others the whole
 * norm is that of the one or two rows whose weights are near a tie between it and others, and says nothing of the rest.
 */
function errorOfTokens(
  actual: ArrayLike<number>,
  exact: Float64Array,
  dim: number,
  size: number,
  dtype: DType,
): number {
  const tokens = exact.length / dim;
  let sum = 0;
  for (let token = 0; token < tokens; token++) {
    const [from, to] = [token * dim, (token + 1) * dim];
    const own = Array.prototype.slice.call(actual, from, to) as number[];
    sum += Math.min(1, errorOf(own, exact.subarray(from, to), size, dtype)) ** 2;
  }
  return Math.sqrt(sum / Math.max(1, tokens));
}

/** How far gradients are from the exact ones. */
type ErrorMeasure = (actual: ArrayLike<number>, exact: Float64Array, dim: number, size: number, dtype: DType) => number;

/** What the algorithm loses on these inputs. */
function lossOf(
  target: BackwardTarget,
  { problem, inputs, dOutput, exact }: Run,
  measure: ErrorMeasure,
): Record<Name, number> {
  const own = { ...inputs, attnMask: inputs.options.attnMask as Tensor | undefined };
  const smoothK = inputs.options.smoothK ?? target.algorithm.smoothK;
  const algorithm = { ...target.algorithm, smoothK };
  const { output, lse } = attentionQuantized(problem, own, algorithm);
  const forward = {
    output: fromFloat32(Float32Array.from(output), outputShapeOf(problem), problem.dtype),
    lse: tensor(Float32Array.from(lse), [lse.length]),
  };
  const gradients = backwardQuantized(problem, { ...own, ...forward, dOutput }, algorithm, {
    ...BACKWARD_ALGORITHM,
    precision: target.precision,
    ...(target.valueFormat && { valueFormat: target.valueFormat }),
  });
  const sizes = ordinarySizes(problem, inputs);
  return Object.fromEntries(
    NAMES.map((name) => [
      name,
      measure(gradients[name], exact[name], dimOf(problem, name), sizes[name], problem.dtype),
    ]),
  ) as Record<Name, number>;
}

/** NaN exactly where the exact gradient has it, and zeros where it has none but zeros for a token. */
function checkPlaces(
  name: Name | 'dMask',
  actual: Float32Array,
  exact: Float64Array,
  dim: number,
  largest: number,
): void {
  for (let row = 0; row < exact.length; row += dim) {
    const isZero = exact.subarray(row, row + dim).every((value) => value === 0);
    for (let i = row; i < row + dim; i++) {
      const [a, e] = [actual[i] as number, exact[i] as number];
      if (Math.abs(e) > largest && !Number.isNaN(e)) continue;
      const fits = Number.isFinite(e) === Number.isFinite(a);
      check(fits, () => `${name}[${i}] is ${a}, exact ${e}`);
      // With a single visible key dq and dk are exactly 0 too, up to roundings, so only dv tells which keys are not seen.
      if (isZero && (name === 'dv' || name === 'dMask')) {
        check(a === 0, () => `${name}[${i}] is ${a}, and no row sees it`);
      }
    }
  }
}

const trainableOptions = (target: BackwardTarget, { options, cuSeqlens }: CaseInputs) => {
  const { returnLse: _, tensorLayout, ...rest } = options;
  return {
    ...rest,
    backend: target.backend,
    kernel: target.kernel,
    backwardPrecision: target.precision,
    ...(cuSeqlens === undefined
      ? { tensorLayout: tensorLayout ?? 'HND' }
      : { cuSeqlensQ: cuSeqlens.q, cuSeqlensK: cuSeqlens.k }),
  } as const;
};

/** What {@link runBackwardCase} compares, for `margins.ts`; what must hold to the bit throws here already. */
export async function measureBackwardCase(
  target: BackwardTarget,
  testCase: ConformanceCase,
  seed: number,
): Promise<Measured[]> {
  const run = prepare(testCase, seed);
  const { problem, inputs, dOutput, exact } = run;
  const before = [inputs.q, inputs.k, inputs.v, dOutput].map(snapshot);
  const trainable = await sageattnTrainable(inputs.q, inputs.k, inputs.v, trainableOptions(target, inputs));
  const gradients = await trainable.backward(dOutput);
  trainable.dispose();
  [inputs.q, inputs.k, inputs.v, dOutput].forEach((view, i) => {
    const same = snapshot(view).every((byte, at) => byte === before[i]?.[at]);
    check(same, () => `input ${['q', 'k', 'v', 'dOutput'][i]} was written`);
  });
  const sizes = ordinarySizes(problem, inputs);
  const largest = LARGEST[problem.dtype];
  const isOrdinary = testCase.bound === 'kernel';
  const measureError: ErrorMeasure = isOrdinary
    ? (actual, expected, _, size, dtype) => errorOf(actual, expected, size, dtype)
    : errorOfTokens;
  // What 8-bit gradients lose depends on the lengths: few rows average out little.
  const loss = isOrdinary && target.precision === 'fp16' ? undefined : lossOf(target, run, measureError);
  const { lse } = attentionExact(problem, { ...inputs, attnMask: inputs.options.attnMask as Tensor | undefined });
  check(trainable.lse.data.length === lse.length, () => `lse of shape [${trainable.lse.shape}]`);
  return NAMES.map((name) => {
    const gradient = gradients[name];
    check(gradient.dtype === problem.dtype, () => `${name} is ${gradient.dtype}, expected ${problem.dtype}`);
    const actual = toFloat32(gradient);
    check(actual.length === exact[name].length, () => `${name} of shape [${gradient.shape}]`);
    checkPlaces(name, actual, exact[name], gradient.shape.at(-1) as number, largest);
    const limit = target.relativeL2 + 2 * ROUNDING[problem.dtype];
    return {
      what: `${name}: relative L2`,
      error: measureError(actual, exact[name], dimOf(problem, name), sizes[name], problem.dtype),
      limit: Math.max(limit, ALGORITHM_SLACK * (loss?.[name] ?? 0)),
    };
  });
}

export const runBackwardCase = (target: BackwardTarget, testCase: ConformanceCase, seed: number): Promise<void> =>
  checkMeasured((again) => measureBackwardCase(target, testCase, again), seed);

/** An ordinary case by its name, for tests of more than gradients' values. */
const caseOf = (part: string): ConformanceCase => {
  const found = CASES.find(({ group, name }) => `${group}: ${name}`.includes(part));
  check(found !== undefined, () => `no case '${part}'`);
  return found;
};

/** A problem whose mask gets a gradient: lengths of each sequence, and options besides the mask. */
interface MaskCase {
  readonly name: string;
  readonly mask: 'rows' | 'keys' | 'heads' | 'whole' | 'columns' | 'one';
  /** Size of an ordinary sum, where the exact one is 0: what is added to all keys of a row changes nothing. */
  readonly size?: number;
  readonly packed?: true;
  /** Holds a NaN. */
  readonly spoiled?: 'dO' | 'v';
  /** Default 70. */
  readonly keyLength?: number;
  /** No row sees a key. */
  readonly hidden?: true;
  readonly options?: AttentionOptions;
}

const MASK_CASES: readonly MaskCase[] = [
  { name: '[Lq,Lk], softcap', mask: 'rows', options: { softcap: 2 } },
  { name: '[b,1,1,Lk]', mask: 'keys' },
  { name: '[h,1,Lk]', mask: 'heads' },
  { name: '[b,h,Lq,Lk], a NaN in dO', mask: 'whole', spoiled: 'dO' },
  { name: '[b,h,Lq,Lk], a NaN in V', mask: 'whole', spoiled: 'v' },
  { name: '[b,h,Lq,Lk], packed', mask: 'whole', packed: true },
  { name: '[b,1,Lq,1]', mask: 'columns', size: 3 },
  { name: '[1,1]', mask: 'one', size: 30 },
  { name: '[Lq,Lk], all hidden', mask: 'rows', hidden: true },
  { name: '[b,1,Lq,1], no keys', mask: 'columns', keyLength: 0 },
];

/** The gradient of a broadcast mask is the sum over the broadcast dimensions. */
async function checkMaskGradient(target: BackwardTarget, testCase: MaskCase, seed: number): Promise<void> {
  const { mask, packed, spoiled, hidden, options, size = 0, keyLength: lk = 70 } = testCase;
  const random = new Random(seed);
  const [b, h, lq, d] = [2, 2, 33, 16] as const;
  const normal = (...shape: number[]) => tensor(random.normals(elementCount(shape)), shape);
  // Heads of Q share one of K. Packed sequences of 12 and 33 queries, 70 and 40 keys.
  const cuSeqlens = packed && { q: [0, 12, 45], k: [0, 70, 110] };
  const [q, k, v, dOutput] = packed
    ? [normal(45, h, d), normal(110, 1, d), normal(110, 1, d), normal(45, h, d)]
    : [normal(b, h, lq, d), normal(b, 1, lk, d), normal(b, 1, lk, d), normal(b, h, lq, d)];
  if (spoiled !== undefined) ((spoiled === 'v' ? v : dOutput).data as Float32Array)[20 * d + 3] = Number.NaN;
  const shape = {
    ...{ rows: [lq, lk], keys: [b, 1, 1, lk], heads: [h, 1, lk], whole: [b, h, lq, lk] },
    ...{ columns: [b, 1, lq, 1], one: [1, 1] },
  }[mask];
  const attnMask = normal(...shape);
  if (hidden) (attnMask.data as Float32Array).fill(Number.NEGATIVE_INFINITY);
  const forward = { isCausal: true, causalAlignment: 'bottom-right', attnMask, ...options } as const;
  const trainable = await sageattnTrainable(q, k, v, {
    ...forward,
    ...(cuSeqlens === undefined ? {} : { cuSeqlensQ: cuSeqlens.q, cuSeqlensK: cuSeqlens.k }),
    ...{ backend: target.backend, kernel: target.kernel, backwardPrecision: target.precision, maskGradient: true },
  });
  const { dMask } = await trainable.backward(dOutput);
  trainable.dispose();
  const problem = problemOf({ q, k, v, options: forward, ...(cuSeqlens === undefined ? {} : { cuSeqlens }) });
  const exact = backwardExact(problem, { q, k, v, attnMask, dOutput }, true);
  const sums = new Float64Array(elementCount(shape));
  const full = [1, 1, 1, 1].map((_, i) => shape[i - (4 - shape.length)] ?? 1);
  const strides = contiguousStrides(full).map((stride, i) => (full[i] === 1 ? 0 : stride));
  (exact.dMask as Float64Array).forEach((value, at) => {
    const index = [Math.floor(at / (h * lq * lk)), Math.floor(at / (lq * lk)) % h, Math.floor(at / lk) % lq, at % lk];
    const to = index.reduce((sum, position, i) => sum + position * (strides[i] as number), 0);
    sums[to] = (sums[to] as number) + value;
  });
  check(dMask !== undefined && `${dMask.shape}` === `${shape}`, () => `dMask of shape [${dMask?.shape}]`);
  const actual = toFloat32(dMask);
  if (size === 0) checkPlaces('dMask', actual, sums, 1, 3e38);
  const error = errorOf(actual, sums, size, 'float32');
  check(error < 2 * target.relativeL2, () => `dMask [${shape}]: relative L2 ${error}`);
}

/** The same bits again, alone from what was saved, and float32 on request. */
async function checkCalls(target: BackwardTarget, seed: number): Promise<void> {
  const { inputs, dOutput } = prepare(caseOf('dtype and layout: float16 HND'), seed);
  const options = trainableOptions(target, inputs);
  const trainable = await sageattnTrainable(inputs.q, inputs.k, inputs.v, options);
  const { output, lse } = trainable;
  const first = await trainable.backward(dOutput);
  const { q, k, v } = inputs;
  const alone = await attentionBackward({ q, k, v, output, lse, dOutput }, options);
  const [again, other] = await Promise.all([trainable.backward(dOutput), trainable.backward(dOutput)]);
  const wide = await attentionBackward({ q, k, v, output, lse, dOutput }, { ...options, gradientDtype: 'float32' });
  for (const name of NAMES) {
    const expected = toFloat32(first[name]);
    for (const gradients of [alone, again, other]) {
      check(
        toFloat32(gradients[name]).every((value, i) => value === expected[i]),
        () => `${name} differs in another call`,
      );
    }
    check(wide[name].dtype === 'float32', () => `${name} is ${wide[name].dtype}, asked for float32`);
    const error = errorOf(toFloat32(wide[name] as Tensor), Float64Array.from(expected), 0, 'float32');
    check(error < 2 ** -10, () => `${name} in float32 is another: ${error}`);
  }
  trainable.dispose();
  const refused = await trainable.backward(dOutput).then(
    () => 'nothing',
    (error: { code?: string }) => error.code,
  );
  check(refused === 'disposed', () => `backward after dispose: ${refused}`);
  const signal = AbortSignal.abort(new Error('stopped'));
  const stopped = await attentionBackward({ q, k, v, output, lse, dOutput }, { ...options, signal }).catch(String);
  check(`${stopped}`.includes('stopped'), () => `an aborted call: ${stopped}`);
}

/** A NaN in dO stays with the row's keys. */
async function checkPoison(target: BackwardTarget, seed: number): Promise<void> {
  const random = new Random(seed);
  const normal = (...shape: number[]) => tensor(random.normals(elementCount(shape)), shape);
  const [q, k, v, dOutput] = [normal(1, 1, 40, 16), normal(1, 1, 40, 16), normal(1, 1, 40, 8), normal(1, 1, 40, 8)];
  (dOutput.data as Float32Array)[20 * 8 + 3] = Number.NaN;
  const options = { windowSize: [2, 0] } as const;
  const trainable = await sageattnTrainable(q, k, v, {
    ...options,
    ...{ backend: target.backend, kernel: target.kernel, backwardPrecision: target.precision },
  });
  const gradients = await trainable.backward(dOutput);
  const exact = backwardExact(createProblem(q, k, v, options), { q, k, v, dOutput });
  for (const name of NAMES) checkPlaces(name, toFloat32(gradients[name]), exact[name], name === 'dv' ? 8 : 16, 3e38);
}

/** What makes the logsumexp of rows useless to find their weights by: it is not a number, or so large that float32 has no fraction there. */
interface FarRows {
  /** Added by a mask to all keys that every third row sees; 0: no mask. */
  readonly lowest: number;
  /** In one channel of all keys: smoothing takes it away, and the row's scores and logsumexp keep it. */
  readonly offset: number;
  /** A value that is not a number, which weights do not depend on. */
  readonly spoiled: boolean;
  readonly isCausal: boolean;
}

const FAR_ROWS = fc.record<FarRows>({
  lowest: fc.constantFrom(0, -1e4, -65504, -3.3895313892515355e38, -3.4028234663852886e38),
  offset: fc.constantFrom(0, 1000, 3e5),
  spoiled: fc.boolean(),
  isCausal: fc.boolean(),
});

/** Gradients of rows whose logsumexp does not give their weights are as accurate as others, and not a number only where they must be. */
async function checkFarRows(target: BackwardTarget, far: FarRows, seed: number): Promise<void> {
  const { lowest, offset, spoiled, isCausal } = far;
  const random = new Random(seed);
  // Not causal, every row sees the value that is not a number.
  const [heads, lq, lk, d, token] = [2, 21, 70, 64, isCausal ? 60 : 69];
  const normal = (...shape: number[]) => tensor(random.normals(elementCount(shape)), shape);
  const [q, k, v] = [normal(1, heads, lq, d), normal(1, heads, lk, d), normal(1, heads, lk, d)];
  const dOutput = normal(1, heads, lq, d);
  for (let at = 5; at < heads * lk * d; at += d) (k.data as Float32Array)[at] = offset;
  if (spoiled) (v.data as Float32Array)[token * d + 3] = Number.NaN;
  // A float32 mask on top of it would leave nothing of the rest in the scores themselves.
  const attnMask =
    lowest === 0
      ? undefined
      : tensor(
          Float32Array.from({ length: lq * lk }, (_, i) => (Math.floor(i / lk) % 3 === 0 ? lowest : 0)),
          [lq, lk],
        );
  const forward = { isCausal, causalAlignment: 'bottom-right', ...(attnMask && { attnMask }) } as const;
  const trainable = await sageattnTrainable(q, k, v, {
    ...forward,
    ...{ backend: target.backend, kernel: target.kernel, backwardPrecision: target.precision },
  });
  const gradients = await trainable.backward(dOutput);
  trainable.dispose();
  const exact = backwardExact(createProblem(q, k, v, forward), { q, k, v, attnMask, dOutput });
  const sizes = ordinarySizes(createProblem(q, k, v, forward), { q, k, v, options: forward });
  for (const name of NAMES) {
    const actual = toFloat32(gradients[name]);
    checkPlaces(name, actual, exact[name], d, 3e38);
    const error = errorOf(actual, exact[name], name === 'dq' && offset > 0 ? 1 : sizes[name], 'float32');
    check(error < 2 * target.relativeL2, () => `${name}: relative L2 ${error} of ${JSON.stringify(far)}, seed ${seed}`);
  }
}

/** All tests of one target. */
export function backwardTests(target: BackwardTarget, seed: number): ConformanceTest[] {
  const fits = ({ work, largestV }: ConformanceCase) =>
    work <= (target.maxWork ?? Number.POSITIVE_INFINITY) && largestV <= (target.largestV ?? LARGEST_V);
  const isRefused = (error: { code?: string }) => {
    if (target.partial !== true || error.code !== 'unsupported-option') throw error;
  };
  return [
    ...CASES.filter(fits).map((testCase) => ({
      name: `${testCase.group}: ${testCase.name}`,
      run: () => runBackwardCase(target, testCase, seed).catch(isRefused),
    })),
    { name: 'calls: again, alone, in float32, disposed, stopped', run: () => checkCalls(target, seed) },
    { name: 'a NaN in dO stays with the keys of its row', run: () => checkPoison(target, seed) },
    {
      name: 'rows whose logsumexp does not give their weights',
      run: () =>
        fc.assert(
          fc.asyncProperty(FAR_ROWS, fc.integer({ min: 0, max: 2 ** 31 - 1 }), (far, dataSeed) =>
            checkFarRows(target, far, dataSeed),
          ),
          { seed: seed | 0, numRuns: Math.min(6, target.randomCases ?? 6), endOnFailure: true },
        ),
    },
    ...MASK_CASES.map((maskCase) => ({
      name: `gradient of an additive mask: ${maskCase.name}`,
      run: () => checkMaskGradient(target, maskCase, seed),
    })),
    {
      name: 'random problems',
      run: () =>
        fc.assert(
          fc.asyncProperty(arbitraryCase, fc.integer({ min: 0, max: 2 ** 31 - 1 }), async (testCase, dataSeed) => {
            if (fits(testCase)) await runBackwardCase(target, testCase, dataSeed).catch(isRefused);
          }),
          { seed: seed | 0, numRuns: target.randomCases ?? 20 },
        ),
    },
  ];
}
