/**
 * Backward passes in WASM by the format of their last three products: float32 and integers, in one process and in turns.
 *
 *     node --import tsx bench/wasm/gradients.ts [--rounds 9] [--out FILE]
 *
 * Prints for each shape the median processor time of one thread (a machine that others use too says more by it than by the clock), the
 * median of the ratios of neighbouring calls, and the relative L2 of each gradient.
 */
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { loadavg } from 'node:os';
import { parseArgs } from 'node:util';
import { createProblem } from '../../src/attention/problem.ts';
import { setBackend } from '../../src/backends/registry.ts';
import { createWasmBackend } from '../../src/backends/wasm/index.ts';
import { sageattnTrainable, tensor } from '../../src/index.ts';
import { thisMachine } from '../../src/measure/machine.ts';
import { Random } from '../../src/measure/random.ts';
import { median } from '../../src/measure/statistics.ts';
import { backwardExact } from '../../src/reference/backward.ts';
import { relativeL2 } from '../../src/reference/metrics.ts';

const { values: flags } = parseArgs({ options: { rounds: { type: 'string', default: '9' }, out: { type: 'string' } } });
const SHAPES = [
  { heads: 8, tokens: 256, headDim: 64, isCausal: false },
  { heads: 8, tokens: 512, headDim: 64, isCausal: false },
  { heads: 4, tokens: 512, headDim: 128, isCausal: false },
  { heads: 2, tokens: 2048, headDim: 64, isCausal: true },
];
const PRECISIONS = ['fp16', 'int8'] as const;
const NAMES = ['dq', 'dk', 'dv'] as const;

const backend = createWasmBackend({ threads: 1 });
await setBackend(backend);
const results = [];
for (const { heads, tokens, headDim, isCausal } of SHAPES) {
  const random = new Random(tokens + headDim);
  const shape = [1, heads, tokens, headDim];
  const draw = () => tensor(random.normals(heads * tokens * headDim), shape);
  const inputs = { q: draw(), k: draw(), v: draw(), dOutput: draw() };
  const { q, k, v, dOutput } = inputs;
  const exact = backwardExact(createProblem(q, k, v, { isCausal }), inputs);
  const times: Record<(typeof PRECISIONS)[number], number[]> = { fp16: [], int8: [] };
  const errors: Record<string, number[]> = {};
  for (let round = 0; round <= Number(flags.rounds); round++) {
    for (const precision of PRECISIONS) {
      const trainable = await sageattnTrainable(q, k, v, { backend: 'wasm', backwardPrecision: precision, isCausal });
      const before = process.cpuUsage();
      const gradients = await trainable.backward(dOutput);
      const { user, system } = process.cpuUsage(before);
      trainable.dispose();
      if (round > 0) times[precision].push((user + system) / 1000);
      else {
        errors[precision] = NAMES.map((name) => relativeL2(gradients[name].data as Float32Array, exact[name]));
      }
    }
  }
  const ratio = median(times.fp16.map((time, i) => time / (times.int8[i] as number)));
  const milliseconds = { fp16: median(times.fp16), int8: median(times.int8) };
  results.push({ heads, tokens, headDim, isCausal, milliseconds, ratio, relativeL2: errors });
  console.log(
    `${heads} x ${tokens} x ${headDim}${isCausal ? ' causal' : ''}: fp16 ${milliseconds.fp16.toFixed(1)} ms, int8 ${milliseconds.int8.toFixed(1)} ms, ratio ${ratio.toFixed(2)};`,
    PRECISIONS.map((name) => `${name} ${errors[name]?.map((error) => error.toFixed(4)).join(' / ')}`).join(', '),
  );
}
const { details } = await backend.availability();
await backend.dispose();
if (flags.out !== undefined) {
  const commit = execFileSync('git', ['rev-parse', '--short', 'HEAD'], { encoding: 'utf8' }).trim();
  const date = new Date().toISOString();
  const report = { ...thisMachine(), loadAverage: loadavg()[0], commit, date, details, results };
  writeFileSync(flags.out, `${JSON.stringify(report, undefined, 2)}\n`);
}
