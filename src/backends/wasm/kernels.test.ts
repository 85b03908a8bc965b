import { readFileSync } from 'node:fs';
import { afterAll, describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import type { AttentionOptions } from '../../attention/options.ts';
import { createProblem, createVarlenProblem } from '../../attention/problem.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { attentionQuantized, PORTABLE_ALGORITHM, type QuantizedAlgorithm } from '../../reference/quantized.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { parseSafetensors, safetensorsToFloat32 } from '../../tensor/safetensors.ts';
import { slice, type Tensor, tensor } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import { createWasmBackendOn } from './backend.ts';
import type { Simd } from './geometry.ts';
import { ACCURATE_KERNEL, INTEGER_KERNEL, KERNELS } from './kernel-table.ts';

const relaxedRuns = Number(process.versions.node.split('.')[0]) >= 24;
const BUILDS: Simd[] = relaxedRuns ? ['simd128', 'relaxed'] : ['simd128'];
const backends = new Map(BUILDS.map((simd) => [simd, createWasmBackendOn({ simd, threads: 2 })]));
afterAll(async () => {
  for (const backend of backends.values()) await backend.dispose();
});

interface Inputs {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly attnMask?: Tensor;
}

async function attend(simd: Simd, kernel: typeof INTEGER_KERNEL, inputs: Inputs, options: AttentionOptions = {}) {
  const backend = backends.get(simd);
  if (backend === undefined) throw new Error(simd);
  const { q, k, v, attnMask } = inputs;
  const problem = createProblem(q, k, v, { ...options, ...(attnMask === undefined ? {} : { attnMask }) });
  const plan = await backend.plan(problem, chooseOptions(kernel, problem, options));
  const { output, lse } = await plan.run(inputs, {});
  return {
    problem,
    output: toFloat32(output as Tensor),
    lse: lse === undefined ? undefined : toFloat32(lse as Tensor),
    exact: attentionExact(problem, inputs),
  };
}

const random = new Random(runSeed());
const seed = `seed ${random.seed}`;

function normalInputs(heads: number, lq: number, lk: number, d: number, dv: number): Inputs {
  const offsets = random.normals(d, 2);
  return {
    q: tensor(random.normals(heads * lq * d), [1, heads, lq, d]),
    k: tensor(
      random.normals(heads * lk * d).map((value, i) => value + (offsets[i % d] as number)),
      [1, heads, lk, d],
    ),
    v: tensor(random.normals(heads * lk * dv), [1, heads, lk, dv]),
  };
}

/**
 * The scale of the error that each kernel may have on normal inputs: official FP8 kernels 0.038, FP16 kernels 0.0129.
 */
const BOUNDS = { [INTEGER_KERNEL.name]: 0.03, [ACCURATE_KERNEL.name]: 0.0129 } as Record<string, number>;

/**
 * As in the conformance suite: the logsumexp of a row with one key has the rounding of its one score, about 0.011 for
 * ordinary numbers, up to 0.018 where Q has one bit less. Of a thousand rows the worst is near 0.04 in one run of
 * twenty.
 */
const LSE_BOUND = 0.07;

test.runIf(relaxedRuns)('dot products in two steps give the same bits as in one', async () => {
  const results = await Promise.all(
    [false, true].map(async (twoSteps) => {
      const backend = createWasmBackendOn({ simd: 'relaxed' }, { kind: 'inline', twoSteps });
      const outputs: Float32Array[] = [];
      for (const kernel of [INTEGER_KERNEL, ACCURATE_KERNEL]) {
        for (const lq of [1, 7]) {
          const drawn = new Random(lq);
          const draw = (length: number) => tensor(drawn.normals(2 * length * 72), [1, 2, length, 72]);
          const inputs = { q: draw(lq), k: draw(300), v: draw(300) };
          const problem = createProblem(inputs.q, inputs.k, inputs.v, {});
          const plan = await backend.plan(problem, chooseOptions(kernel, problem, {}));
          outputs.push(toFloat32((await plan.run(inputs, {})).output as Tensor));
        }
      }
      await backend.dispose();
      return outputs;
    }),
  );
  expect(results[1]).toEqual(results[0]);
});

describe.each(BUILDS)('%s', (simd) => {
  test.each([...KERNELS])('$name: over a cache a single row is computed as one of many', async (kernel) => {
    const backend = backends.get(simd) as NonNullable<ReturnType<typeof backends.get>>;
    // Channels whose groups of eight are odd in number, and keys that fill no tile.
    for (const [d, dv, keys] of [
      [64, 64, 300],
      [72, 24, 37],
      [20, 8, 513],
      [128, 136, 130],
    ] as const) {
      const { q, k, v } = normalInputs(2, 5, keys, d, dv);
      const few = slice(q, 2, 3, 4);
      const problemOf = (queries: Tensor) => createProblem(queries, k, v, { returnLse: true });
      const choice = chooseOptions(kernel, problemOf(q), kernel.name === 'qk-fp4-pv-fp4' ? { smoothQ: false } : {});
      const held = await backend.prepareKeyValue(problemOf(q), choice, k, v, {});
      const many = await held.attend(q, problemOf(q), {}, {});
      const one = await held.attend(few, problemOf(few), {}, {});
      held.dispose();
      const row = (outputs: typeof one, name: 'output' | 'lse') => {
        const found = outputs[name] as Tensor;
        return toFloat32(outputs === many ? slice(found, 2, 3, 4) : found);
      };
      expect(row(one, 'output'), seed).toEqual(row(many, 'output'));
      expect(row(one, 'lse'), seed).toEqual(row(many, 'lse'));
    }
  });

  describe.each([INTEGER_KERNEL, ACCURATE_KERNEL])('$name', (kernel) => {
    const bound = BOUNDS[kernel.name] as number;

    test.each(['normal-d64-gqa', 'outlier-d64-causal', 'outlier-d128', 'outlier-d128-causal'])(
      'golden %s: at least as accurate as the official kernel',
      async (name) => {
        const path = new URL(`../../../test/golden/${name}.safetensors`, import.meta.url);
        const file = parseSafetensors(readFileSync(path));
        const entry = (key: string) => {
          const found = file.tensors.get(key);
          if (found === undefined) throw new Error(`${name} has no ${key}`);
          return found;
        };
        const operand = (key: string) => {
          const { bytes, shape } = entry(key);
          return tensor(new Uint16Array(bytes.slice().buffer), shape, { dtype: 'bfloat16' });
        };
        const official =
          kernel === INTEGER_KERNEL ? 'out.qk_int8_pv_fp8_cuda_sm90.per_thread' : 'out.qk_int8_pv_fp16_cuda.fp32';
        const exact = safetensorsToFloat32(entry('exact.o'));
        const { output } = await attend(
          simd,
          kernel,
          { q: operand('q'), k: operand('k'), v: operand('v') },
          { isCausal: name.includes('causal') },
        );
        const theirs = compare(safetensorsToFloat32(entry(official)), exact);
        const mine = compare(output, exact);
        expect(mine.relativeL1).toBeLessThan(theirs.relativeL1);
        expect(mine.cosineSimilarity).toBeGreaterThan(theirs.cosineSimilarity - 1e-5);
      },
    );

    test('normal inputs with an offset on K', async () => {
      const { output, lse, exact } = await attend(simd, kernel, normalInputs(2, 150, 700, 64, 64), { returnLse: true });
      expect(compare(output, exact.output).relativeL1, seed).toBeLessThan(bound);
      expect(compare(lse as Float32Array, exact.lse).maxAbsoluteError, seed).toBeLessThan(LSE_BOUND);
    });

    test('many tiles: a maximum that keeps rising, and one that comes first', async () => {
      for (const rising of [true, false]) {
        const inputs = normalInputs(1, 40, 1000, 32, 32);
        const k = inputs.k.data as Float32Array;
        for (let j = 0; j < 1000; j++) {
          for (let c = 0; c < 32; c++) k[j * 32 + c] = (k[j * 32 + c] as number) * (1 + (rising ? j : 999 - j) / 200);
        }
        const { output, exact } = await attend(simd, kernel, inputs, { smScale: 0.5 });
        // Scores are large, so the error of 8-bit scores counts for more.
        expect(compare(output, exact.output).cosineSimilarity, seed).toBeGreaterThan(0.995);
      }
    });

    test('a masked-out NaN, infinity or huge number changes nothing; a NaN that is seen is a NaN', async () => {
      const inputs = normalInputs(2, 50, 200, 64, 40);
      const mask = new Uint8Array(200).fill(1);
      const poisoned = [3, 130, 199];
      for (const j of poisoned) mask[j] = 0;
      const attnMask = tensor(mask, [1, 1, 1, 200]);
      const clean = await attend(simd, kernel, { ...inputs, attnMask });
      for (const poison of [Number.NaN, Number.POSITIVE_INFINITY, 1e30]) {
        const k = (inputs.k.data as Float32Array).slice();
        const v = (inputs.v.data as Float32Array).slice();
        for (const j of poisoned) {
          for (let head = 0; head < 2; head++) {
            k.fill(poison, (head * 200 + j) * 64, (head * 200 + j + 1) * 64);
            v.fill(poison, (head * 200 + j) * 40, (head * 200 + j + 1) * 40);
          }
        }
        const dirty = { ...inputs, k: tensor(k, [1, 2, 200, 64]), v: tensor(v, [1, 2, 200, 40]) };
        expect((await attend(simd, kernel, { ...dirty, attnMask })).output).toEqual(clean.output);
        if (Number.isNaN(poison)) expect((await attend(simd, kernel, dirty)).output.every(Number.isNaN)).toBe(true);
      }
      // One value: its channel only. Under a causal mask: the rows from its key on only.
      const v = (inputs.v.data as Float32Array).slice();
      v[60 * 40 + 7] = Number.NaN;
      const oneHead = { ...inputs, v: tensor(v, [1, 2, 200, 40]) };
      const { output } = await attend(simd, kernel, oneHead, { isCausal: true, causalAlignment: 'bottom-right' });
      expect(
        output.every((value, i) => Number.isNaN(value) === (i < 50 * 40 && i % 40 === 7)),
        seed,
      ).toBe(true);
      const topLeft = await attend(simd, kernel, oneHead, { isCausal: true });
      expect(topLeft.output.some(Number.isNaN)).toBe(false);
    });

    test('a NaN in a query is the NaN of its row only', async () => {
      const inputs = normalInputs(1, 9, 20, 8, 8);
      (inputs.q.data as Float32Array)[3 * 8 + 1] = Number.NaN;
      const { output, lse } = await attend(simd, kernel, inputs, { returnLse: true });
      expect(output.every((value, i) => Number.isNaN(value) === (i >= 24 && i < 32))).toBe(true);
      expect([...(lse as Float32Array)].map(Number.isNaN)).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8].map((i) => i === 3));
    });

    test('zero queries, keys, values and scale', async () => {
      const inputs = normalInputs(1, 5, 30, 16, 16);
      for (const zeroed of ['q', 'k', 'v'] as const) {
        const { data, shape } = inputs[zeroed];
        const zeros = { ...inputs, [zeroed]: tensor(new Float32Array(data.length), shape) };
        const { output, exact } = await attend(simd, kernel, zeros);
        const { maxAbsoluteError } = compare(output, exact.output);
        expect(maxAbsoluteError).toBeLessThan(0.02);
      }
      const { output, exact } = await attend(simd, kernel, inputs, { smScale: 0 });
      expect(compare(output, exact.output).maxAbsoluteError).toBeLessThan(0.02);
      const negative = await attend(simd, kernel, inputs, { smScale: -0.7 });
      expect(compare(negative.output, negative.exact.output).relativeL1).toBeLessThan(2 * bound);
    });

    test('varlen with lengths that share no tile boundary, some of them empty', async () => {
      const cuQ = [0, 3, 3, 70, 171];
      const cuK = [0, 130, 135, 135, 400];
      const q = tensor(random.normals(171 * 4 * 24), [171, 4, 24]);
      const k = tensor(
        random.normals(400 * 2 * 24).map((value) => value + 1),
        [400, 2, 24],
      );
      const v = tensor(random.normals(400 * 2 * 33), [400, 2, 33]);
      const problem = createVarlenProblem(q, k, v, cuQ, cuK, { isCausal: true, returnLse: true });
      const backend = backends.get(simd);
      const plan = await backend?.plan(problem, chooseOptions(kernel, problem, { smoothV: true }));
      const result = await plan?.run({ q, k, v }, {});
      const exact = attentionExact(problem, { q, k, v });
      expect(compare(toFloat32(result?.output as Tensor), exact.output).relativeL1, seed).toBeLessThan(bound);
      expect(compare(toFloat32(result?.lse as Tensor), exact.lse).maxAbsoluteError, seed).toBeLessThan(LSE_BOUND);
    });
  });
});

describe.each(BUILDS)('%s: the ends of float32', (simd) => {
  const scaled = (view: Tensor, factor: number) =>
    tensor(
      toFloat32(view).map((value) => value * factor),
      view.shape,
    );

  test.each([INTEGER_KERNEL, ACCURATE_KERNEL])('$name: a query row whose range is beyond float32', async (kernel) => {
    const inputs = normalInputs(1, 20, 60, 32, 32);
    // Elements reach 3e38 to either side.
    const data = toFloat32(inputs.q).map((value, i) =>
      i % 32 < 2 ? (i % 32) * 6e38 - 3e38 : Math.max(-3e38, Math.min(3e38, value * 1e38)),
    );
    const q = tensor(data, inputs.q.shape);
    const { output, exact } = await attend(
      simd,
      kernel,
      { ...inputs, q, k: scaled(inputs.k, 1e-30) },
      { smScale: 2e-9 },
    );
    const bound = 2 * (BOUNDS[kernel.name] as number);
    expect(compare(output, exact.output).relativeL1, seed).toBeLessThan(bound);
  });

  test.each([INTEGER_KERNEL, ACCURATE_KERNEL])('$name: a softcap below float32 is one all the same', async (kernel) => {
    const { output, exact } = await attend(simd, kernel, normalInputs(1, 20, 60, 32, 32), { softcap: 1e-300 });
    expect(compare(output, exact.output).relativeL1, seed).toBeLessThan(BOUNDS[kernel.name] as number);
  });

  test('a scale beyond float32 gives equal scores where all are 0', async () => {
    const inputs = normalInputs(1, 5, 40, 32, 32);
    const q = scaled(inputs.q, 0);
    const { output, exact } = await attend(simd, INTEGER_KERNEL, { ...inputs, q }, { smScale: 1e39 });
    expect(compare(output, exact.output).relativeL1, seed).toBeLessThan(BOUNDS[INTEGER_KERNEL.name] as number);
  });
});

test.each(BUILDS)('%s: scores far from 0 keep what they differ by', async (simd) => {
  // In whole numbers, which are their own codes. Scores are near 9000 in base 2, where steps of float32 are a thousandth: times 4096, as exponents
  // have it, four.
  const [rows, keys, d] = [24, 150, 64];
  const integers = (length: number, least: number, most: number) =>
    Float32Array.from({ length }, () => random.integer(least, most));
  const q = integers(rows * d, 0, 126);
  const k = new Float32Array(keys * d).fill(100);
  const differences = integers(keys, -5, 5);
  for (let row = 0; row < rows; row++) q.set([q[row * d] as number, 126], row * d);
  for (let key = 0; key < keys; key++) k.set([100 + (differences[key] as number), 127], key * d);
  const inputs = {
    q: tensor(q, [1, 1, rows, d]),
    k: tensor(k, [1, 1, keys, d]),
    v: tensor(random.normals(keys * d), [1, 1, keys, d]),
  };
  const { output, exact } = await attend(simd, INTEGER_KERNEL, inputs, { smScale: 0.016, smoothK: false });
  expect(compare(output, exact.output).relativeL1, seed).toBeLessThan(BOUNDS[INTEGER_KERNEL.name] as number);
});

/** The first key scores `above` more than the others, which lie close together. */
function sinkInputs(tokens: number, above: number, spread: number): Inputs {
  const [rows, d] = [40, 64];
  const q = random.normals(rows * d);
  const k = random.normals(tokens * d, spread);
  for (let i = 0; i < q.length; i += d) q[i] = 8;
  for (let i = 0; i < k.length; i += d) k[i] = i === 0 ? above : 0;
  return {
    q: tensor(q, [1, 1, rows, d]),
    k: tensor(k, [1, 1, tokens, d]),
    v: tensor(random.normals(tokens * d), [1, 1, tokens, d]),
  };
}

test.each(BUILDS)('%s: attention sinks lose less than FP8 does', async (simd) => {
  const fp8: QuantizedAlgorithm = { ...PORTABLE_ALGORITHM, pvFormat: 'fp8', pvAccumDtype: 'fp32+fp32' };
  for (const [tokens, above, spread] of [
    [128, 5.55, 0.1],
    [256, 6, 0.3],
    [1000, 7, 0.5],
    [1000, 8, 1],
  ] as const) {
    const inputs = sinkInputs(tokens, above, spread);
    const { problem, output, exact } = await attend(simd, INTEGER_KERNEL, inputs);
    const theirs = compare(attentionQuantized(problem, inputs, fp8).output, exact.output).relativeL1;
    expect(compare(output, exact.output).relativeL1, `${tokens} keys, +${above}, ${seed}`).toBeLessThan(theirs);
  }
});

test('bitwise the same on any number of threads and any kind of executor', async () => {
  for (const inputs of [normalInputs(3, 200, 300, 40, 48), sinkInputs(300, 6, 0.5)])
    for (const simd of BUILDS) {
      for (const kernel of [INTEGER_KERNEL, ACCURATE_KERNEL]) {
        const { output } = await attend(simd, kernel, inputs, { isCausal: true });
        for (const [threads, kind] of [
          [1, 'threads'],
          [3, 'threads'],
          [1, 'worker'],
          [1, 'inline'],
        ] as const) {
          const other = createWasmBackendOn({ simd, threads }, { kind });
          const problem = createProblem(inputs.q, inputs.k, inputs.v, { isCausal: true });
          const plan = await other.plan(problem, chooseOptions(kernel, problem, {}));
          const result = await plan.run(inputs, {});
          expect(toFloat32(result.output as Tensor), `${simd} ${kernel.name} ${threads} ${kind}`).toEqual(output);
          await other.dispose();
        }
      }
    }
});

test('65,536 keys', async () => {
  const inputs = normalInputs(1, 8, 65536, 16, 16);
  for (const simd of BUILDS) {
    const { output, exact } = await attend(simd, INTEGER_KERNEL, inputs);
    expect(compare(output, exact.output).relativeL1, seed).toBeLessThan(0.03);
  }
});
