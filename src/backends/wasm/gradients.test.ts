import { afterAll, expect, test } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { createBackwardProblem } from '../../attention/backward.ts';
import type { AttentionOptions } from '../../attention/options.ts';
import { createProblem } from '../../attention/problem.ts';
import { backwardExact } from '../../reference/backward.ts';
import { relativeL2 } from '../../reference/metrics.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { type Tensor, tensor } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import { createWasmBackendOn, type WasmBackend } from './backend.ts';
import type { Simd } from './geometry.ts';
import { ACCURATE_KERNEL } from './kernel-table.ts';

const relaxedRuns = Number(process.versions.node.split('.')[0]) >= 24;
const BUILDS: Simd[] = relaxedRuns ? ['simd128', 'relaxed'] : ['simd128'];
const NAMES = ['dq', 'dk', 'dv'] as const;
const random = new Random(runSeed());
const seed = `seed ${random.seed}`;

const backends: WasmBackend[] = [];
afterAll(async () => {
  for (const backend of backends) await backend.dispose();
});

function made(...options: Parameters<typeof createWasmBackendOn>): WasmBackend {
  const backend = createWasmBackendOn(...options);
  backends.push(backend);
  return backend;
}

interface Inputs {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly dOutput: Tensor;
}

const HEAD = [1, 2, 150, 40] as const;

function normalInputs(): Inputs {
  const normal = () => tensor(random.normals(2 * 150 * 40), HEAD);
  return { q: normal(), k: normal(), v: normal(), dOutput: normal() };
}

/** Gradients in integers, and the exact ones. */
async function gradients(backend: WasmBackend, inputs: Inputs, options: AttentionOptions = {}) {
  const { q, k, v, dOutput } = inputs;
  const attention = { ...createProblem(q, k, v, { ...options, returnLse: true }), forGradients: true } as const;
  const choice = chooseOptions(ACCURATE_KERNEL, attention, options);
  const { output, lse } = await (await backend.plan(attention, choice)).run(inputs, {});
  const results = { output: output as Tensor, lse: lse as Tensor<'float32'>, dOutput };
  const problem = createBackwardProblem(attention, results, undefined, { backwardPrecision: 'int8' }, 'fp16');
  const plan = await backend.planBackward?.(problem, choice);
  if (plan === undefined) throw new Error('no backward pass');
  const found = await plan.run({ ...inputs, ...results }, {});
  return NAMES.map((name) => toFloat32(found[name] as Tensor));
}

test.each(BUILDS)('integer gradients are the same bits on any number of threads, %s', async (simd) => {
  const inputs = normalInputs();
  const [first, ...others] = await Promise.all(
    [1, 2, 3].map((threads) => gradients(made({ simd, threads }), inputs, { isCausal: true })),
  );
  for (const other of others) expect(other, seed).toEqual(first);
});

test.runIf(relaxedRuns)('integer gradients are the same bits with dot products in one step and in two', async () => {
  const inputs = normalInputs();
  const [one, two] = await Promise.all(
    [false, true].map((twoSteps) => gradients(made({ simd: 'relaxed' }, { kind: 'inline', twoSteps }), inputs)),
  );
  expect(two, seed).toEqual(one);
});

test.each(BUILDS)('rows lose nothing by large tokens that they do not see, %s', async (simd) => {
  // Token 100 is large in everything that is rounded; causal, so that rows before it do not see it. Its own gradients, and those of
  // keys that it sees, are left out.
  const plain = normalInputs();
  const [backend, options] = [made({ simd, threads: 1 }), { isCausal: true } as const];
  const times = 10 ** random.uniform(1, 6);
  const grown = (x: Tensor, factor: number) => {
    const data = Float32Array.from(x.data as Float32Array);
    for (let head = 0; head < 2; head++) {
      const at = (head * 150 + 100) * 40;
      for (let d = at; d < at + 40; d++) data[d] = (data[d] as number) * factor;
    }
    return tensor(data, HEAD);
  };
  const rows = (x: ArrayLike<number>, from: number, to: number) =>
    [0, 1].flatMap((head) => Array.prototype.slice.call(x, (head * 150 + from) * 40, (head * 150 + to) * 40));
  const keys = { ...plain, k: grown(plain.k, times), v: grown(plain.v, times) };
  const queries = { ...plain, q: grown(plain.q, times), dOutput: grown(plain.dOutput, times) };
  const exactOf = (inputs: Inputs) => backwardExact(createProblem(inputs.q, inputs.k, inputs.v, options), inputs);
  const [dq] = await gradients(backend, keys, options);
  expect(relativeL2(rows(dq as Float32Array, 0, 100), rows(exactOf(keys).dq, 0, 100)), `dq, ${seed}`).toBeLessThan(
    0.05,
  );
  const [, dk, dv] = await gradients(backend, queries, options);
  const { dk: exactDk, dv: exactDv } = exactOf(queries);
  expect(relativeL2(rows(dk as Float32Array, 101, 150), rows(exactDk, 101, 150)), `dk, ${seed}`).toBeLessThan(0.05);
  expect(relativeL2(rows(dv as Float32Array, 101, 150), rows(exactDv, 101, 150)), `dv, ${seed}`).toBeLessThan(0.05);
});
