/**
 * How far the cases of the conformance table stay from their limits over many seeds: a case that comes near them fails
 * some day by chance. Run it for a new case, a new kernel or a new limit.
 *
 *     npx tsx test/conformance/margins.ts [--backend wasm|cuda] [--simd auto|simd128|relaxed] [--seconds 120] [--cases TEXT]
 *       [--backward]
 *
 * With `--backward` it is the table of gradients on WASM, one precision after another. Prints the cases nearest their limits: the largest of error / limit that was seen, and how many of its standard
 * deviations lie between its mean and 1, or deviations of its logarithm where that gives fewer: some errors vary widely,
 * and their own deviation would hide a rare large one. Fails when a limit was exceeded, or is nearer than three of them
 * (but for the random problems, which are many cases in one).
 */

import { parseArgs } from 'node:util';
import Table from 'cli-table3';
import fc from 'fast-check';
import { createSimulatedBackend } from '../../src/backends/cuda/testing/simulator/backend.ts';
import { setBackend } from '../../src/backends/registry.ts';
import { createWasmBackend, type WasmBackendOptions } from '../../src/backends/wasm/index.ts';
import { messageOf } from '../../src/errors.ts';
import { CUDA_TARGETS } from '../cuda/targets.ts';
import { LARGEST_V, measureBackwardCase } from './backward-suite.ts';
import { arbitraryCase, CASES, type ConformanceCase } from './cases.ts';
import { excessOf, type Measured, measureCase } from './suite.ts';
import { VISIBILITY_CASES } from './visibility-cases.ts';
import { WASM_BACKWARD_TARGETS, WASM_TARGETS } from './wasm-targets.ts';

const { values: flags } = parseArgs({
  options: {
    backend: { type: 'string', default: 'wasm' },
    simd: { type: 'string', default: 'auto' },
    seconds: { type: 'string', default: '120' },
    cases: { type: 'string', default: '' },
    rows: { type: 'string', default: '25' },
    backward: { type: 'boolean', default: false },
  },
});

/** Multiply-adds of the largest case that the simulator is given. */
const SIMULATED_WORK = 2e5;
/** Seeds from which a distribution's width is guessed. */
const LEAST_SAMPLES = 8;
const LEAST_DEVIATIONS = 3;

interface Samples {
  readonly target: string;
  readonly name: string;
  /** What was compared: the output or a logsumexp. */
  readonly what: string;
  readonly ratios: number[];
}

const samples = new Map<string, Samples>();
let failures = 0;

/** What the cases are measured on. */
interface Subject {
  readonly name: string;
  /** Cases with a larger V are left out. */
  readonly largestV: number;
  measure(testCase: ConformanceCase, seed: number): Promise<Measured[]>;
}

async function measure(target: Subject, testCase: ConformanceCase, seed: number, name: string): Promise<void> {
  try {
    for (const measured of await target.measure(testCase, seed)) {
      const { what, error, limit } = measured;
      const kind = what.split(/[:[]/, 1)[0] as string;
      const key = `${target.name} ${name} ${kind}`;
      const entry = samples.get(key) ?? { target: target.name, name, what: kind, ratios: [] };
      samples.set(key, entry);
      entry.ratios.push(error / limit);
      if (error > limit) console.log(`EXCEEDED ${target.name}, ${name}, seed ${seed}: ${excessOf(measured)}`);
    }
  } catch (error) {
    failures++;
    console.log(`FAILED ${target.name}, ${name}, seed ${seed}: ${messageOf(error)}`);
  }
}

const simulated = flags.backend === 'cuda';
await setBackend(
  simulated
    ? createSimulatedBackend(90)
    : createWasmBackend({ threads: 1, simd: flags.simd as NonNullable<WasmBackendOptions['simd']> }),
);
const targets: readonly Subject[] = flags.backward
  ? WASM_BACKWARD_TARGETS[flags.simd === 'relaxed' ? 'relaxed' : 'simd128'].map((target) => ({
      name: target.name,
      largestV: LARGEST_V,
      measure: (testCase, seed) => measureBackwardCase(target, testCase, seed),
    }))
  : (simulated ? CUDA_TARGETS : WASM_TARGETS).map((target) => ({
      name: target.name,
      largestV: target.largestV ?? Number.POSITIVE_INFINITY,
      measure: (testCase, seed) => measureCase(target, testCase, seed),
    }));
const cases = flags.backward ? CASES : [...CASES, ...VISIBILITY_CASES];
const maxWork = simulated ? SIMULATED_WORK : Number.POSITIVE_INFINITY;
const end = performance.now() + 1000 * Number(flags.seconds);

while (performance.now() < end) {
  const seed = Math.floor(Math.random() * 2 ** 32);
  const [random] = fc.sample(arbitraryCase, { numRuns: 1, seed: seed | 0 });
  for (const target of targets) {
    for (const testCase of cases) {
      const name = `${testCase.group}: ${testCase.name}`;
      if (!name.includes(flags.cases) || testCase.largestV > target.largestV) continue;
      if (testCase.work <= maxWork && performance.now() < end) await measure(target, testCase, seed, name);
    }
    if (
      random !== undefined &&
      random.work <= maxWork &&
      random.largestV <= target.largestV &&
      'random'.includes(flags.cases)
    ) {
      await measure(target, random, seed, 'random');
    }
  }
}

function deviationsTo(limit: number, values: readonly number[]): number {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  return (limit - mean) / Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length);
}

const rows = [...samples.values()]
  .filter(({ ratios }) => ratios.length >= LEAST_SAMPLES)
  .map(({ ratios, ...rest }) => {
    const logarithms = ratios.filter((ratio) => ratio > 0).map(Math.log);
    const deviations = Math.min(deviationsTo(1, ratios), deviationsTo(0, logarithms));
    return { ...rest, count: ratios.length, largest: Math.max(...ratios), deviations };
  })
  .filter(({ deviations }) => Number.isFinite(deviations))
  .sort((a, b) => b.largest - a.largest);

const table = new Table({ head: ['target', 'case', 'what', 'seeds', 'largest of limit', 'deviations'] });
for (const { target, name, what, count, largest, deviations } of rows.slice(0, Number(flags.rows))) {
  table.push([target, name, what, count, largest.toFixed(3), deviations.toFixed(1)]);
}
console.log(table.toString());
const near = rows.filter(
  ({ name, largest, deviations }) => largest > 1 || (name !== 'random' && deviations < LEAST_DEVIATIONS),
);
console.log(`${rows.length} measured, ${near.length} nearer than ${LEAST_DEVIATIONS} deviations, ${failures} failed`);
process.exit(near.length + failures > 0 ? 1 : 0);
