/**
 * The conformance suite: one list of tests, made for any backend and kernel. It knows no test runner, so that it runs
 * in vitest, in a browser, and in plain Node on a GPU machine; `vitest.ts` beside it is the wrapper for the first two.
 */
import fc from 'fast-check';
import type { AttentionOptions } from '../../src/attention/options.ts';
import { type AttentionProblem, createProblem, createVarlenProblem } from '../../src/attention/problem.ts';
import { getBackend } from '../../src/backends/registry.ts';
import {
  type AttentionResult,
  createAttention,
  type KernelName,
  prepareKeyValue,
  sageattn,
  sageattnVarlen,
  slice,
  type Tensor,
  tensor,
} from '../../src/index.ts';
import { INT_MAX } from '../../src/quantization/schemes.ts';
import { attentionExact, type ReferenceOutputs } from '../../src/reference/exact.ts';
import { attentionQuantized, type QuantizedAlgorithm } from '../../src/reference/quantized.ts';
import { fromFloat32, toFloat32 } from '../../src/tensor/access.ts';
import { Random } from '../support/random.ts';
import { snapshot } from '../support/tensors.ts';
import { arbitraryCase, CASES, type CaseInputs, type ConformanceCase } from './cases.ts';
import { classErrors } from './row-classes.ts';
import { SPARSE_CASES, sparseBehaviours } from './sparse.ts';
import { CACHE_EDITS, CACHE_PADDING, VISIBILITY_CASES, type VisibilityGroup } from './visibility-cases.ts';

/** A kernel with one setting of its options, and the accuracy that it must reach. */
export interface Target {
  readonly name: string;
  readonly backend: 'wasm' | 'webgpu' | 'cuda';
  readonly kernel: KernelName;
  /** Settings that make this target: granularity, accumulator, smoothing. */
  readonly options?: AttentionOptions;
  /** Largest relative L1 of the output on ordinary inputs, from the accuracy of the official kernel of this kind. */
  readonly relativeL1: number;
  /** The algorithm that the kernel carries out, for inputs on which quantization itself loses more. */
  readonly algorithm: QuantizedAlgorithm;
  /** Largest magnitude of V that the kernel's format takes without scaling; cases beyond are left out. Default none. */
  readonly largestV?: number;
  /** Where the kernel takes no float32: what inputs of it become. */
  readonly dtype?: 'float16' | 'bfloat16';
  /** Cases with more multiply-adds are left out (a simulator, a software GPU); default none. */
  readonly maxWork?: number;
  /** Random problems to try; default 40. */
  readonly randomCases?: number;
  /**
   * It refuses some problems, typed (head dims beyond a family's): random ones that it refuses are left out. Default
   * false.
   */
  readonly partial?: boolean;
  /** Kinds of {@link VISIBILITY_CASES} that this kernel does not pass yet; default none. */
  readonly exceptions?: readonly VisibilityGroup[];
}

/** An input as a target takes it: float32 in the target's dtype, everything else as it is. */
export function asTaken({ dtype }: Target, view: Tensor): Tensor {
  if (dtype === undefined || view.dtype !== 'float32') return view;
  const { data } = fromFloat32(view.data as Float32Array, [view.data.length], dtype);
  return { ...view, dtype, data } as Tensor;
}

const inputsAsTaken = <T extends Pick<CaseInputs, 'q' | 'k' | 'v'>>(target: Target, inputs: T): T => ({
  ...inputs,
  q: asTaken(target, inputs.q),
  k: asTaken(target, inputs.k),
  v: asTaken(target, inputs.v),
});

export interface ConformanceTest {
  readonly name: string;
  run(): Promise<void>;
}

/**
 * A kernel may lose this much more than the algorithm does in plain TypeScript: tilings and orders of summation differ.
 */
const ALGORITHM_SLACK = 1.5;

/**
 * Absolute error of a logsumexp of ordinary scores. INT8 rounds normal numbers in steps of about 3.5/127, which gives
 * each of q and k an error of 0.008 and their score an error of 0.011. The logsumexp of a row with a single key has the
 * error of that score. Six sigma.
 */
const LSE_TOLERANCE = 0.07;

/**
 * INT4 rounds Q and K in steps that are 127/7 times as wide; E2M1's step at its top is 2 of 6, and a quarter of that
 * near 0.
 */
const lseTolerance = ({ algorithm }: Target): number =>
  algorithm.qkFormat !== 'int8' ? (LSE_TOLERANCE * INT_MAX.int8) / INT_MAX.int4 : LSE_TOLERANCE;

/**
 * Where a row sees keys of hundreds, its scores are of thousands and their error a share of them: both operands'
 * roundings, of half a step of their largest element each, over the largest score.
 */
const LSE_SLOPE = { int8: 1 / INT_MAX.int8, int4: 1 / INT_MAX.int4, fp4: 1 / INT_MAX.int4 } as const;

function check(condition: boolean, message: () => string): asserts condition {
  if (!condition) throw new Error(message());
}

const optionsOf = (target: Target, options: AttentionOptions): AttentionOptions => ({
  ...target.options,
  ...options,
  backend: target.backend,
  kernel: target.kernel,
});

function problemOf({ q, k, v, options, cuSeqlens }: CaseInputs): AttentionProblem {
  return cuSeqlens === undefined
    ? createProblem(q, k, v, options)
    : createVarlenProblem(q, k, v, cuSeqlens.q, cuSeqlens.k, options);
}

async function attend(target: Target, inputs: CaseInputs): Promise<{ output: Tensor; lse?: Tensor }> {
  const { q, k, v, cuSeqlens } = inputs;
  const options = optionsOf(target, inputs.options);
  const result: Tensor | AttentionResult =
    cuSeqlens === undefined
      ? await sageattn(q, k, v, options)
      : await sageattnVarlen(q, k, v, cuSeqlens.q, cuSeqlens.k, options);
  return 'lse' in result ? result : { output: result };
}

const referenceInputs = ({ q, k, v, options }: CaseInputs) => ({
  q,
  k,
  v,
  attnMask: options.attnMask as Tensor | undefined,
  sinks: options.sinks as Tensor | undefined,
  blockMap: options.blockMask?.map as Tensor | undefined,
});

/**
 * Least number of rows for the algorithm's loss. A kernel rounds in other places than the algorithm in plain TypeScript,
 * so the error of a few rows says little about the kernel's error in the same rows. A case with fewer rows is repeated
 * with new inputs.
 */
const LOSS_ROWS = 128;
const MOST_DRAWS = 16;

/** By case and seed. */
const exactOutputs = new WeakMap<ConformanceCase, Map<string, ReferenceOutputs>>();
/** A case's draws in one run, and what is measured again. */
const MOST_REMEMBERED = 2 * MOST_DRAWS;

/** Exact attention, remembered: targets share cases and seeds, so their inputs too, and it is a third of the suite's time. */
function exactOf(
  testCase: ConformanceCase,
  problem: AttentionProblem,
  inputs: CaseInputs,
  seed: number,
): ReferenceOutputs {
  const bySeed = exactOutputs.get(testCase) ?? new Map<string, ReferenceOutputs>();
  exactOutputs.set(testCase, bySeed);
  const key = `${seed} ${problem.dtype}`;
  const exact = bySeed.get(key) ?? attentionExact(problem, referenceInputs(inputs));
  if (bySeed.size >= MOST_REMEMBERED) bySeed.clear();
  bySeed.set(key, exact);
  return exact;
}

/** Rows (of the last dimension) in which the exact result has a NaN or an infinity. */
function poisonedRows(values: Float64Array, width: number): Set<number> {
  const rows = new Set<number>();
  for (let i = 0; i < values.length; i++) if (!Number.isFinite(values[i])) rows.add(Math.floor(i / width));
  return rows;
}

/**
 * Error of an output relative to the exact one, over the rows that are finite there. Where rows cancel to almost
 * nothing (few channels, opposite values) the error is taken relative to a twentieth of V's mean magnitude instead.
 */
function outputError(
  actual: ArrayLike<number>,
  exact: Float64Array,
  { valueDim: width, dtype }: Pick<AttentionProblem, 'valueDim' | 'dtype'>,
  meanMagnitudeV: number,
): number {
  const poisoned = poisonedRows(exact, width);
  let error = 0;
  let magnitude = 0;
  let count = 0;
  for (let i = 0; i < exact.length; i++) {
    if (poisoned.has(Math.floor(i / width))) continue;
    const expected = exact[i] as number;
    error += Math.max(0, Math.abs((actual[i] as number) - expected) - UNDERFLOW[dtype]);
    magnitude += Math.abs(expected);
    count++;
  }
  if (count === 0 || error === 0) return 0;
  return error / Math.max(magnitude, 0.05 * meanMagnitudeV * count);
}

function meanMagnitude(values: Float32Array): number {
  let sum = 0;
  let count = 0;
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    sum += Math.abs(value);
    count++;
  }
  return count === 0 ? 0 : sum / count;
}

/** Rounding of the output to its own dtype, relative. */
const OUTPUT_ROUNDING = { float32: 1e-6, float16: 2 ** -11, bfloat16: 2 ** -8 } as const;

/**
 * What may be lost at the bottom of a format, absolute: float16's smallest step is rounded to; float32's subnormals,
 * which bfloat16 shares, may be flushed to zero, as WGSL allows.
 */
const UNDERFLOW = { float32: 2 ** -126, float16: 2 ** -25, bfloat16: 2 ** -126 } as const;

interface Limits {
  readonly output: number;
  readonly lse: (exact: number) => number;
}

/** What an algorithm loses on some inputs: the relative L1 of its output and the largest error of a logsumexp. */
interface Loss {
  readonly output: number;
  readonly lse: number;
}

/** What the algorithm makes of some inputs. */
function emulate(target: Target, problem: AttentionProblem, inputs: CaseInputs, isSmoothed = true): ReferenceOutputs {
  const smoothK = isSmoothed && (target.options?.smoothK ?? inputs.options.smoothK ?? target.algorithm.smoothK);
  return attentionQuantized(problem, referenceInputs(inputs), { ...target.algorithm, smoothK });
}

function lossOf(target: Target, problem: AttentionProblem, inputs: CaseInputs, exact: ReferenceOutputs): Loss {
  const emulated = emulate(target, problem, inputs);
  let lse = 0;
  for (let i = 0; i < exact.lse.length; i++) {
    const error = Math.abs((emulated.lse[i] as number) - (exact.lse[i] as number));
    if (Number.isFinite(error)) lse = Math.max(lse, error);
  }
  return {
    output: outputError(emulated.output, exact.output, problem, meanMagnitude(toFloat32(inputs.v))),
    lse,
  };
}

function limitsOf(
  target: Target,
  testCase: ConformanceCase,
  problem: AttentionProblem,
  inputs: CaseInputs,
  exact: ReferenceOutputs,
  seed: number,
): Limits {
  const output = target.relativeL1 + OUTPUT_ROUNDING[problem.dtype];
  const lse = (value: number) => lseTolerance(target) + 1e-5 * Math.abs(value);
  if (testCase.bound === 'kernel') return { output, lse };
  const lost = [lossOf(target, problem, inputs, exact)];
  const draws = Math.min(MOST_DRAWS, Math.ceil(LOSS_ROWS / Math.max(1, exact.lse.length)));
  for (let draw = 1; draw < draws; draw++) {
    const others = inputsAsTaken(target, testCase.make(new Random(seed + draw)));
    lost.push(lossOf(target, problem, others, exactOf(testCase, problem, others, seed + draw)));
  }
  const lseLost = Math.max(...lost.map((loss) => loss.lse));
  return {
    output: Math.max(output, ALGORITHM_SLACK * Math.max(...lost.map((loss) => loss.output))),
    lse: (value) => Math.max(lse(value), 2 * ALGORITHM_SLACK * lseLost),
  };
}

/**
 * The error of each class of rows (`rowClasses`), held to what the algorithm loses on rows that see the like.
 *
 * The algorithm in plain TypeScript smooths K by a class's own mean, a kernel by one vector for the whole sequence, which follows the
 * smaller keys where sizes are far apart. The larger class is then quantized with its own offset in it. With n the keys and o the
 * offset, of deviations 1 and 2 in the cases: a score's error is that of q, s_q / sqrt(12) |k|, and that of k, s_k / sqrt(12) |q|, over
 * sqrt(D), s the steps; without the mean |k| is sqrt(1 + 2^2) = 2.2 times as large and k's largest element about 1.7 times, so
 * the error is twice what the smoothed algorithm loses, which leaves of a limit of three times that a factor of 1.5 for the largest of many rows.
 * It is held to what the algorithm loses without smoothing.
 */
function measureClasses(
  target: Target,
  make: (random: Random) => CaseInputs,
  inputs: CaseInputs,
  actual: { readonly output: Float32Array; readonly lse?: Float32Array | undefined },
  exact: ReferenceOutputs,
  seed: number,
): Measured[] {
  const problem = problemOf(inputs);
  const underflow = UNDERFLOW[problem.dtype];
  const errors = classErrors(problem, referenceInputs(inputs), actual, exact, underflow);
  const draws = Math.min(MOST_DRAWS, Math.ceil(LOSS_ROWS / Math.max(1, exact.lse.length / Math.max(1, errors.length))));
  const losses = Array.from({ length: draws }, (_, draw) => {
    const others = draw === 0 ? inputs : make(new Random(seed + draw));
    const asInputs = referenceInputs(others);
    const others64 = draw === 0 ? exact : attentionExact(problem, asInputs);
    const lossesOf = (isSmoothed: boolean) =>
      classErrors(problem, asInputs, emulate(target, problem, others, isSmoothed), others64, underflow);
    const ofOthers = errors.some((own) => own.smoothedByOthers)
      ? lossesOf(false).filter((loss) => loss.smoothedByOthers)
      : [];
    return [...lossesOf(true), ...ofOthers];
  }).flat();
  return errors.flatMap(({ name, output, lse }): Measured[] => {
    const lost = losses.filter((loss) => loss.name === name);
    const limit = Math.max(
      target.relativeL1 + OUTPUT_ROUNDING[problem.dtype],
      ALGORITHM_SLACK * Math.max(...lost.map((loss) => loss.output ?? 0)),
    );
    const lseLimit = Math.max(
      lseTolerance(target) + LSE_SLOPE[target.algorithm.qkFormat] * Math.abs(lse.exact),
      2 * ALGORITHM_SLACK * Math.max(...lost.map((loss) => loss.lse.error)),
    );
    return [
      ...(output === undefined ? [] : [{ what: `output of ${name}: relative L1`, error: output, limit }]),
      { what: `lse of ${name}: off by`, error: lse.error, limit: lseLimit },
    ];
  });
}

/** An error and its limit. */
export interface Measured {
  /** In words that the error follows. */
  readonly what: string;
  readonly error: number;
  readonly limit: number;
}

/** The logsumexp nearest its limit; a NaN where there must be none, or none where there must be one, throws. */
function measureLse(actual: Float32Array, exact: Float64Array, limitOf: (exact: number) => number): Measured {
  let worst: Measured = { what: 'lse: off by', error: 0, limit: 1 };
  for (let i = 0; i < exact.length; i++) {
    const [a, e] = [actual[i] as number, exact[i] as number];
    const what = `lse[${i}] is ${a}, exact ${e}`;
    if (Number.isNaN(e)) check(!Number.isFinite(a), () => `${what}: a NaN was attended`);
    if (a === e || Number.isNaN(e)) continue;
    const [error, limit] = [Math.abs(a - e), limitOf(e)];
    check(Number.isFinite(error), () => what);
    if (error / limit > worst.error / worst.limit) worst = { what: `${what}: off by`, error, limit };
  }
  return worst;
}

/** A limit that was exceeded, in words. */
export const excessOf = ({ what, error, limit }: Measured) => `${what} ${error}, limit ${limit}`;

const MEASURED_AGAIN = 4;
const BEYOND_DOUBT = 2;

/**
 * An error over random inputs has a tail that no limit ends, and thousands of them are measured in a run. One that is
 * beyond its limit, not twice so, is therefore measured again on other inputs, where nothing may be beyond; a defect
 * shows there too.
 */
export async function checkMeasured(
  measure: (seed: number) => Promise<readonly Measured[]>,
  seed: number,
): Promise<void> {
  const beyond = (await measure(seed)).filter(({ error, limit }) => error > limit);
  for (const first of beyond) check(first.error <= BEYOND_DOUBT * first.limit, () => excessOf(first));
  if (beyond.length === 0) return;
  for (let again = seed + 1; again <= seed + MEASURED_AGAIN; again++) {
    for (const measured of await measure(again)) {
      const { error, limit } = measured;
      check(error <= limit, () => `${excessOf(measured)}, with seed ${again}; with ${seed} ${beyond.map(excessOf)}`);
    }
  }
}

/** The option of a call that the target's kernel does not take, by what its backend says. */
async function refusedOption({ backend, kernel }: Target, { sinks, blockMask }: AttentionOptions) {
  const descriptor = (await getBackend(backend)).kernels.find(({ name }) => name === kernel);
  if (sinks !== undefined && descriptor?.sinks !== true) return 'options.sinks';
  return blockMask !== undefined && descriptor?.blockMask !== true ? 'options.blockMask' : undefined;
}

/** A kernel that does not take an option must say so: an option is never ignored. */
async function checkRefused(target: Target, inputs: CaseInputs, argument: string): Promise<void> {
  const error = await attend(target, inputs).then(
    () => undefined,
    (reason: { code?: string; argument?: string }) => reason,
  );
  const refused = error?.code === 'unsupported-option' && error.argument === argument;
  check(refused, () => `${argument}, which the kernel does not take, gave ${error ?? 'an output'}`);
}

/** Runs one case and compares with exact attention. */
export const runCase = (target: Target, testCase: ConformanceCase, seed: number): Promise<void> =>
  checkMeasured((again) => measureCase(target, testCase, again), seed);

/** What {@link runCase} compares, for `margins.ts`; what must hold to the bit throws here already. */
export async function measureCase(target: Target, testCase: ConformanceCase, seed: number): Promise<Measured[]> {
  const inputs = inputsAsTaken(target, testCase.make(new Random(seed)));
  const problem = problemOf(inputs);
  const refused = await refusedOption(target, inputs.options);
  if (refused !== undefined) {
    await checkRefused(target, inputs, refused);
    return [];
  }
  const before = [inputs.q, inputs.k, inputs.v].map(snapshot);
  const { output, lse } = await attend(target, inputs);

  [inputs.q, inputs.k, inputs.v].forEach((view, i) => {
    const after = snapshot(view);
    const same = after.every((byte, at) => byte === before[i]?.[at]);
    check(same, () => `input ${['q', 'k', 'v'][i]} was written`);
  });
  check(output.dtype === problem.dtype, () => `output dtype ${output.dtype}, expected ${problem.dtype}`);
  check((lse !== undefined) === problem.returnLse, () => `lse ${lse === undefined ? 'missing' : 'unasked for'}`);

  const exact = exactOf(testCase, problem, inputs, seed);
  const actual = toFloat32(output);
  const width = problem.valueDim;
  check(actual.length === exact.output.length, () => `output of shape [${output.shape}]`);
  const poisoned = poisonedRows(exact.output, width);
  for (let i = 0; i < actual.length; i++) {
    const [a, e] = [actual[i] as number, exact.output[i] as number];
    if (Number.isFinite(e)) {
      if (!poisoned.has(Math.floor(i / width))) check(Number.isFinite(a), () => `output[${i}] is ${a}, exact ${e}`);
    } else check(!Number.isFinite(a), () => `output[${i}] is ${a}, but a NaN or infinity was attended`);
  }
  if (testCase.bound === 'row') {
    const numbers = { output: actual, lse: lse === undefined ? undefined : toFloat32(lse) };
    return measureClasses(
      target,
      (random) => inputsAsTaken(target, testCase.make(random)),
      inputs,
      numbers,
      exact,
      seed,
    );
  }
  const limits = limitsOf(target, testCase, problem, inputs, exact, seed);
  const error = outputError(actual, exact.output, problem, meanMagnitude(toFloat32(inputs.v)));
  return [
    { what: 'output: relative L1', error, limit: limits.output },
    ...(lse === undefined ? [] : [measureLse(toFloat32(lse), exact.lse, limits.lse)]),
  ];
}

const byName = (group: string, name: string): ConformanceCase => {
  const found = CASES.find((entry) => entry.group === group && entry.name.startsWith(name));
  if (found === undefined) throw new Error(`no case '${group}: ${name}'`);
  return found;
};

const sameBits = (a: Tensor, b: Tensor): boolean => {
  const [left, right] = [snapshot(a), snapshot(b)];
  return left.length === right.length && left.every((byte, i) => byte === right[i]);
};

/** What holds between calls, not within one. */
function behaviours(target: Target, seed: number): ConformanceTest[] {
  const make = (group: string, name: string) => inputsAsTaken(target, byName(group, name).make(new Random(seed)));
  const fullCase = () => make('causal', 'top-left 130');
  return [
    {
      name: 'the same call twice gives the same bits',
      async run() {
        const inputs = make('heads', 'GQA');
        const [first, second] = [await attend(target, inputs), await attend(target, inputs)];
        check(sameBits(first.output, second.output), () => 'outputs differ');
      },
    },
    {
      name: 'calls at the same time give what they give alone',
      async run() {
        const all = ['length 65', 'causal top-left 130', 'varlen 5', 'mask bool [Lq,Lk]'].map((text) => {
          const [group, ...rest] = text.split(' ');
          return make(group as string, rest.join(' '));
        });
        const alone: Tensor[] = [];
        for (const inputs of all) alone.push((await attend(target, inputs)).output);
        const together = await Promise.all([...all, ...all].map((inputs) => attend(target, inputs)));
        together.forEach(({ output }, i) => {
          check(sameBits(output, alone[i % all.length] as Tensor), () => `call ${i} differs from the one alone`);
        });
      },
    },
    {
      name: 'a plan is reused, and nothing of an earlier run shows in a later one',
      async run() {
        const inputs = fullCase();
        const { backend: _, kernel: __, ...rest } = inputs.options;
        const options = optionsOf(target, rest);
        const fill = (view: Tensor): Tensor =>
          asTaken(target, { ...view, dtype: 'float32', data: new Float32Array(view.data.length).fill(Number.NaN) });
        const attention = await createAttention(inputs, options);
        try {
          const first = await attention.run(inputs);
          const poisoned = await attention.run({ q: fill(inputs.q), k: fill(inputs.k), v: fill(inputs.v) });
          const again = await attention.run(inputs);
          check(sameBits(first.output, again.output), () => 'a run after one with NaN inputs differs');
          check(
            toFloat32(poisoned.output).every((value) => !Number.isFinite(value)),
            () => 'NaN inputs gave numbers',
          );
        } finally {
          attention.dispose();
        }
        let code: unknown;
        await attention.run(inputs).catch((error) => {
          code = error.code;
        });
        check(code === 'disposed', () => `a run after dispose gave ${code}`);
      },
    },
    ...[
      { name: 'one key at a time', steps: [1, 1, 1, 64, 1] },
      { name: 'in pieces of odd sizes', steps: [63, 5, 130, 2] },
      { name: 'from nothing', steps: [0, 70, 3] },
    ].map(({ name, steps }) => ({
      name: `prepared keys and values, appended to ${name}, attend as the whole would`,
      async run() {
        await checkMeasured((again) => measureKeyValueCache(target, steps, again), seed);
      },
    })),
    ...CACHE_EDITS.filter(({ group = 'cache' }) => !target.exceptions?.includes(group)).map(
      ({ name, steps, edit }) => ({
        name: `cache: ${name}`,
        async run() {
          await checkMeasured((again) => measureKeyValueCache(target, steps, again, edit), seed);
        },
      }),
    ),
    ...(target.exceptions?.includes('cache padding') ? [] : CACHE_PADDING).map(
      ({ name, steps, magnitude, isToken }) => ({
        name: `cache: ${name}`,
        async run() {
          const padding = { magnitude, isToken };
          await checkMeasured((again) => measureKeyValueCache(target, steps, again, undefined, padding), seed);
        },
      }),
    ),
    {
      name: 'inputs are those of the moment of the call, whatever becomes of them: every call',
      run: () => checkInputsAreTaken(target, seed),
    },
    ...(target.exceptions?.includes('cache padding')
      ? []
      : [{ name: 'cache: what its padding holds changes no bit', run: () => checkPaddingIsNothing(target, seed) }]),
    ...sparseBehaviours(
      (inputs) => attend(target, inputs),
      optionsOf(target, {}),
      () => new Random(seed),
      (inputs) => inputsAsTaken(target, inputs),
    ).map(({ name, run }) => ({
      name,
      async run() {
        const all = { sinks: fullCase().q, blockMask: { rows: 16, keys: 16, map: fullCase().q } };
        if ((await refusedOption(target, all)) === undefined) await run();
      },
    })),
    {
      name: `random problems (fast-check, seed ${seed})`,
      async run() {
        await fc.assert(
          fc.asyncProperty(arbitraryCase, fc.integer({ min: 0, max: 2 ** 31 - 1 }), async (testCase, dataSeed) => {
            if (testCase.work > (target.maxWork ?? Number.POSITIVE_INFINITY)) return;
            await runCase(target, testCase, dataSeed).catch((error: { code?: string }) => {
              if (target.partial !== true || error.code !== 'unsupported-option') throw error;
            });
          }),
          { seed: seed | 0, numRuns: target.randomCases ?? 40 },
        );
      },
    },
  ];
}

/**
 * Inputs, NHD, whose keys have lost the mean of the first tokens, which no output sees. A cache smooths with that mean,
 * and of one token or two it is a poor estimate: what quantization loses then is more than with the mean of all.
 */
function smoothedBy(inputs: CaseInputs, tokens: number): CaseInputs {
  const [batch, length, heads, d] = inputs.k.shape as [number, number, number, number];
  const data = toFloat32(inputs.k);
  for (let b = 0; b < batch; b++) {
    for (let channel = 0; channel < heads * d; channel++) {
      const at = (token: number) => (b * length + token) * heads * d + channel;
      let sum = 0;
      for (let token = 0; token < tokens; token++) sum += data[at(token)] as number;
      for (let token = 0; token < length; token++) data[at(token)] = (data[at(token)] as number) - sum / tokens;
    }
  }
  return { ...inputs, k: tensor(data, inputs.k.shape), options: { ...inputs.options, smoothK: false } };
}

/** Prepares the first step's tokens, appends the others, and attends after each step. */
async function measureKeyValueCache(
  target: Target,
  steps: readonly number[],
  seed: number,
  edit?: (key: Tensor, value: Tensor) => void,
  padding?: Pick<(typeof CACHE_PADDING)[number], 'magnitude' | 'isToken'>,
): Promise<Measured[]> {
  const measured: Measured[] = [];
  const total = steps.reduce((sum, step) => sum + step, 0);
  const random = new Random(seed);
  const dense = byName('heads', 'MQA').make(random);
  const shapeOf = (view: Tensor) => view.shape as [number, number, number, number];
  const [batch, , kvHeads, d] = shapeOf(dense.k);
  const whole = (offset: number): Tensor => {
    const data = random.normals(batch * total * kvHeads * d);
    for (let i = 0; i < data.length; i++) data[i] = (data[i] as number) + offset * Math.sin(i % d);
    return {
      ...dense.k,
      dtype: 'float32',
      data,
      shape: [batch, total, kvHeads, d],
      strides: [total * kvHeads * d, kvHeads * d, d, 1],
      offset: 0,
    };
  };
  const [wholeK, wholeV] = [whole(3), whole(0)];
  edit?.(wholeK, wholeV);
  /** bool `[B,L]` of tokens `start` to `end`. */
  const maskOf = (start: number, end: number): Tensor | undefined => {
    if (padding === undefined) return undefined;
    const length = end - start;
    const attends = (i: number) => padding.isToken(Math.floor(i / length), start + (i % length));
    return tensor(
      Uint8Array.from({ length: batch * length }, (_, i) => Number(attends(i))),
      [batch, length],
    );
  };
  if (padding !== undefined) {
    for (const x of [wholeK, wholeV]) {
      for (let i = 0; i < x.data.length; i++) {
        const token = Math.floor(i / (kvHeads * d));
        if (!padding.isToken(Math.floor(token / total), token % total)) x.data[i] = padding.magnitude;
      }
    }
  }
  const denseQ: Tensor = { ...dense.q, dtype: 'float32', data: toFloat32(dense.q), strides: dense.q.strides };
  const { q, k, v } = inputsAsTaken(target, { q: denseQ, k: wholeK, v: wholeV });
  const part = (view: Tensor, start: number, end: number) => slice(view, 1, start, end);
  const { qkQuantGran, pvAccumDtype, smoothV, smoothQ } = target.options ?? {};
  const settings = Object.fromEntries(
    Object.entries({ qkQuantGran, pvAccumDtype, smoothV, smoothQ }).filter(([, value]) => value !== undefined),
  );
  const first = steps[0] as number;
  const smoothing = steps.find((step) => step > 0) as number;
  const cache = await prepareKeyValue(part(k, 0, first), part(v, 0, first), {
    ...settings,
    backend: target.backend,
    kernel: target.kernel,
    tensorLayout: 'NHD',
    ...(padding && { keyMask: maskOf(0, first) as Tensor }),
  });
  try {
    let held = first;
    for (const step of [0, ...steps.slice(1)]) {
      // One token added needs no mask if it counts.
      const mask = step > 1 ? maskOf(held, held + step) : undefined;
      if (step > 0) {
        await cache.append(part(k, held, held + step), part(v, held, held + step), mask && { keyMask: mask });
      }
      held += step;
      check(cache.length === held, () => `length ${cache.length}, expected ${held}`);
      const hidden = maskOf(0, held);
      const attnMask = hidden && { ...hidden, shape: [batch, 1, 1, held], strides: [held, held, held, 1] };
      const options = { isCausal: true, causalAlignment: 'bottom-right', ...(attnMask && { attnMask }) } as const;
      const { output, lse } = await cache.attend(q, { ...options, returnLse: true });
      const inputs = { q, k: part(k, 0, held), v: part(v, 0, held), ...(attnMask && { attnMask }) };
      const problem = createProblem(inputs.q, inputs.k, inputs.v, { ...options, tensorLayout: 'NHD', returnLse: true });
      const exact = attentionExact(problem, inputs);
      const same = { ...inputs, options: { ...options, tensorLayout: 'NHD' as const, returnLse: true } };
      if (edit !== undefined || padding !== undefined) {
        const actual = { output: toFloat32(output), lse: toFloat32(lse) };
        const measuredNow = measureClasses(target, () => same, same, actual, exact, seed);
        measured.push(...measuredNow.map((each) => ({ ...each, what: `after ${held} tokens, ${each.what}` })));
        continue;
      }
      const error = outputError(toFloat32(output), exact.output, problem, meanMagnitude(toFloat32(v)));
      const lost = target.kernel === 'exact' ? 0 : lossOf(target, problem, smoothedBy(same, smoothing), exact).output;
      measured.push(
        {
          what: `output after ${held} tokens: relative L1`,
          error,
          limit: ALGORITHM_SLACK * Math.max(target.relativeL1, lost),
        },
        measureLse(toFloat32(lse), exact.lse, (value) => 2 * lseTolerance(target) + 1e-5 * Math.abs(value)),
      );
    }
  } finally {
    cache.dispose();
  }
  return measured;
}

/** Outputs of a cache that knows of its padding and grows past each of its buffers, whatever the padding holds. */
async function checkPaddingIsNothing(target: Target, seed: number): Promise<void> {
  const [batch, heads, d, steps] = [2, 1, 32, [3, 60, 440, 30, 1, 26]] as const;
  const random = new Random(seed);
  const total = steps.reduce((sum, step) => sum + step, 0);
  const counts = Array.from({ length: batch * total }, () => random.uniform() < 0.7);
  const [k, v] = [random.normals(batch * total * heads * d), random.normals(batch * total * heads * d)];
  const q = asTaken(target, tensor(random.normals(batch * 4 * d), [batch, 4, 1, d]));
  const outputs: Tensor[][] = [];
  for (const magnitude of [0, 1, 1e6]) {
    const filled = [k, v].map((x) =>
      asTaken(
        target,
        tensor(
          x.map((value, i) => (counts[Math.floor(i / (heads * d))] ? value : magnitude * Math.sin(i))),
          [batch, total, heads, d],
        ),
      ),
    ) as [Tensor, Tensor];
    const part = (start: number, end: number) =>
      filled.map((x) => slice(x, 1, start, end)) as unknown as readonly [Tensor, Tensor];
    const maskOf = (start: number, end: number) =>
      tensor(
        Uint8Array.from({ length: batch * (end - start) }, (_, i) => {
          const length = end - start;
          return Number(counts[Math.floor(i / length) * total + start + (i % length)]);
        }),
        [batch, end - start],
      );
    const { backend, kernel } = target;
    const cache = await prepareKeyValue(...part(0, steps[0]), {
      ...{ backend, kernel, tensorLayout: 'NHD' },
      keyMask: maskOf(0, steps[0]),
    });
    const own: Tensor[] = [];
    try {
      let held: number = steps[0];
      for (const step of steps.slice(1)) {
        await cache.append(...part(held, held + step), { keyMask: maskOf(held, held + step) });
        held += step;
        const mask = maskOf(0, held);
        own.push(
          await cache.attend(q, { attnMask: { ...mask, shape: [batch, 1, 1, held], strides: [held, 0, 0, 1] } }),
        );
      }
    } finally {
      cache.dispose();
    }
    outputs.push(own);
  }
  const [first, ...others] = outputs as [Tensor[], ...Tensor[][]];
  for (const own of others) {
    own.forEach((output, i) => {
      check(sameBits(output, first[i] as Tensor), () => `padding of another size changes what step ${i + 1} gives`);
    });
  }
}

type Way = (data: Tensor['data']) => void;

/** What a caller may do to an input right after a call. */
const TAKEN_AWAY: Readonly<Record<string, Way>> = {
  'written over': (data) => {
    (data as Float32Array).fill(data instanceof Uint8Array ? 0 : Number.NaN);
  },
  transferred: ({ buffer }) => {
    structuredClone(buffer, { transfer: [buffer as ArrayBuffer] });
  },
  'made smaller': ({ buffer }) => {
    (buffer as ArrayBuffer & { resize(size: number): void }).resize(0);
  },
};

interface TakenInputs {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly attnMask: Tensor;
  readonly keyMask: Tensor;
}

/** The calls that read a caller's tensors. `own` are those that are taken away once the call is made, with `made`. */
function callsOn({ backend, kernel, options, exceptions }: Target, intact: TakenInputs) {
  const named = { ...options, backend, kernel };
  const { smoothV, smoothQ, qkQuantGran, pvAccumDtype } = options ?? {};
  const settings = Object.fromEntries(
    Object.entries({ smoothV, smoothQ, qkQuantGran, pvAccumDtype }).filter(([, value]) => value !== undefined),
  );
  const held = { ...settings, backend, kernel };
  const masked = exceptions?.includes('cache padding') !== true;
  type Call = (own: TakenInputs, made: () => void) => Promise<Tensor>;
  const after = async <R>(promise: Promise<R>, made: () => void): Promise<R> => {
    made();
    return promise;
  };
  const calls: Readonly<Record<string, Call>> = {
    sageattn: ({ q, k, v, attnMask }, made) => after(sageattn(q, k, v, { ...named, attnMask, returnLse: false }), made),
    sageattnVarlen: ({ q, k, v }, made) => {
      const packed = ({ shape: [, heads = 0, tokens = 0, dim = 0], data, dtype }: Tensor): Tensor =>
        ({
          location: 'cpu',
          dtype,
          data,
          shape: [tokens, heads, dim],
          strides: [dim, tokens * dim, 1],
          offset: 0,
        }) as Tensor;
      const { tensorLayout: _, ...rest } = named;
      return after(
        sageattnVarlen(packed(q), packed(k), packed(v), [0, 9, 20], [0, 15, 20], { ...rest, returnLse: false }),
        made,
      );
    },
    'run of a plan': async (own, made) => {
      const { q, k, v, attnMask } = intact;
      const attention = await createAttention({ q, k, v, attnMask }, named);
      try {
        const inputs = { q: own.q, k: own.k, v: own.v, attnMask: own.attnMask };
        return (await after(attention.run(inputs), made)).output;
      } finally {
        attention.dispose();
      }
    },
    prepareKeyValue: async ({ k, v, keyMask }, made) => {
      const cache = await after(prepareKeyValue(k, v, { ...held, ...(masked && { keyMask }) }), made);
      const output = await cache.attend(intact.q, { attnMask: intact.attnMask });
      cache.dispose();
      return output;
    },
    append: async ({ k, v, keyMask }, made) => {
      const cache = await prepareKeyValue(intact.k, intact.v, held);
      await after(cache.append(k, v, masked ? { keyMask } : {}), made);
      const output = await cache.attend(intact.q);
      cache.dispose();
      return output;
    },
    attend: async ({ q, attnMask }, made) => {
      const cache = await prepareKeyValue(intact.k, intact.v, held);
      // The second waits its turn behind the first.
      const first = cache.attend(intact.q);
      const output = await after(cache.attend(q, { attnMask }), made);
      await first;
      cache.dispose();
      return output;
    },
  };
  return calls;
}

/** Every call reads its inputs as they are at the moment of the call, whatever is done to them later. */
async function checkInputsAreTaken(target: Target, seed: number): Promise<void> {
  const random = new Random(seed);
  const shape = [1, 2, 20, 32];
  const values = Array.from({ length: 3 }, () => random.normals(2 * 20 * 32));
  const flags = Uint8Array.from({ length: 20 }, (_, i) => Number(i % 7 !== 3));
  /** The same inputs in memory of their own, which can be resized. */
  const fresh = (): TakenInputs => {
    const buffer = (bytes: number) =>
      new (ArrayBuffer as new (length: number, options: object) => ArrayBuffer)(bytes, { maxByteLength: bytes });
    const [q, k, v] = values.map((x) => {
      const taken = asTaken(target, tensor(x, shape));
      const Words = taken.data.constructor as Float32ArrayConstructor;
      const data = new Words(buffer(taken.data.byteLength) as ArrayBuffer);
      data.set(taken.data as Float32Array);
      return { ...taken, data } as Tensor;
    }) as [Tensor, Tensor, Tensor];
    const [attnMask, keyMask] = [
      [1, 1, 1, 20],
      [1, 20],
    ].map((of) => {
      const data = new Uint8Array(buffer(flags.byteLength));
      data.set(flags);
      return tensor(data, of);
    }) as [Tensor, Tensor];
    return { q, k, v, attnMask, keyMask };
  };
  const all = Object.entries(callsOn(target, fresh()));
  // A simulator has no time for all.
  const calls = target.maxWork === undefined ? all : all.filter((_, i) => i % 3 === (seed >>> 0) % 3);
  const ways = Object.entries(TAKEN_AWAY);
  for (const [at, [name, call]] of calls.entries()) {
    const expected = await call(fresh(), () => undefined);
    const some = target.maxWork === undefined ? ways : ways.filter((_, i) => i === ((seed >>> 0) + at) % ways.length);
    for (const [way, take] of some) {
      const own = fresh();
      const output = await call(own, () => {
        for (const { data } of Object.values(own) as Tensor[]) take(data);
      });
      check(sameBits(output, expected), () => `${name} with inputs ${way} right after the call gives something else`);
    }
  }
}

/** Every test of the suite for one target. */
export function conformanceTests(target: Target, seed: number): ConformanceTest[] {
  const { maxWork = Number.POSITIVE_INFINITY, largestV = Number.POSITIVE_INFINITY, exceptions = [] } = target;
  const cases = [
    ...CASES,
    ...SPARSE_CASES,
    ...VISIBILITY_CASES.filter(({ group }) => !exceptions.includes(group)),
  ].filter((testCase) => testCase.work <= maxWork && testCase.largestV <= largestV);
  return [
    ...cases.map((testCase, i) => ({
      name: `${testCase.group}: ${testCase.name}`,
      run: () => runCase(target, testCase, seed + i),
    })),
    ...behaviours(target, seed),
  ];
}
