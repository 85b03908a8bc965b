/**
 * Forward and backward of attention at 512 tokens: this package's WASM kernels, and the same in operations of tfjs' WASM
 * backend, in turns. `tsx bench/wasm/training.ts [rounds]` prints a table and writes it to bench/results/training-wasm.json.
 */
import { writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import tf from '@tensorflow/tfjs';
import { setWasmPaths } from '@tensorflow/tfjs-backend-wasm';
import type * as Tf from '@tensorflow/tfjs-core';
import { createProblem } from '../../src/attention/problem.ts';
import { setBackend } from '../../src/backends/registry.ts';
import { createWasmBackend } from '../../src/backends/wasm/index.ts';
import { sageattnTrainable, tensor } from '../../src/index.ts';
import { createTrainableAttention } from '../../src/integrations/tfjs/index.ts';
import { Random } from '../../src/measure/random.ts';
import { backwardExact } from '../../src/reference/backward.ts';
import { relativeL2 } from '../../src/reference/metrics.ts';

const [HEADS, DIM] = [8, 64];
const rounds = Number(process.argv[2] ?? 7);

async function main(): Promise<void> {
  const require = createRequire(import.meta.url);
  setWasmPaths(`${path.dirname(require.resolve('@tensorflow/tfjs-backend-wasm'))}/`);
  await tf.setBackend('wasm');
  await tf.ready();
  const synchronous = await createTrainableAttention();
  const backend = createWasmBackend({ threads: 2 });
  await setBackend(backend);
  const { details } = await backend.availability();
  const rows: object[] = [];
  for (const length of [512]) {
    const random = new Random(length);
    const shape = [1, HEADS, length, DIM] as [number, number, number, number];
    const [q, k, v, dOutput] = Array.from({ length: 4 }, () => tensor(random.normals(HEADS * length * DIM), shape)) as [
      ReturnType<typeof tensor>,
      ReturnType<typeof tensor>,
      ReturnType<typeof tensor>,
      ReturnType<typeof tensor>,
    ];
    const [q4, k4, v4, dy] = [q, k, v, dOutput].map((x) => tf.tensor4d(x.data as Float32Array, shape)) as [
      Tf.Tensor4D,
      Tf.Tensor4D,
      Tf.Tensor4D,
      Tf.Tensor4D,
    ];
    const gradients = (attend: (a: Tf.Tensor, b: Tf.Tensor, c: Tf.Tensor) => Tf.Tensor) => {
      const made = tf.grads((a, b, c) => attend(a as Tf.Tensor, b as Tf.Tensor, c as Tf.Tensor))([q4, k4, v4], dy);
      for (const gradient of made) gradient.dataSync();
      tf.dispose(made);
    };
    const contestants: Record<string, () => void | Promise<void>> = {
      'tfjs wasm': () =>
        gradients((a, b, c) => tf.matMul(tf.softmax(tf.mul(tf.matMul(a, b, false, true), DIM ** -0.5)), c)),
      'sageattention/tfjs, one thread': () => gradients((a, b, c) => synchronous(a, b, c)),
      'sageattnTrainable, two threads': async () => {
        const trainable = await sageattnTrainable(q, k, v, { backend: 'wasm' });
        await trainable.backward(dOutput);
        trainable.dispose();
      },
    };
    const times: Record<string, number[]> = {};
    for (let round = 0; round <= rounds; round++) {
      for (const [name, run] of Object.entries(contestants)) {
        const started = performance.now();
        await run();
        // The first round compiles.
        const spent = performance.now() - started;
        if (round > 0) times[name] = [...(times[name] ?? []), spent];
      }
    }
    const trainable = await sageattnTrainable(q, k, v, { backend: 'wasm' });
    const made = await trainable.backward(dOutput);
    const exact = backwardExact(createProblem(q, k, v, {}), { q, k, v, dOutput });
    const errors = (['dq', 'dk', 'dv'] as const).map((name) =>
      relativeL2(made[name].data as Float32Array, exact[name]),
    );
    const best = Object.fromEntries(Object.entries(times).map(([name, all]) => [name, Math.min(...all)]));
    rows.push({ length, milliseconds: best, relativeL2: errors });
    console.log(length, best, errors.map((error) => error.toFixed(4)).join(' / '));
  }
  const result = { node: process.version, simd: details.simd, heads: HEADS, dim: DIM, rounds, rows };
  writeFileSync(new URL('../results/training-wasm.json', import.meta.url), `${JSON.stringify(result, undefined, 2)}\n`);
  await backend.dispose();
}

await main();
