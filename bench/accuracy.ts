/**
 * Accuracy of every kernel that runs here on the golden inputs, beside the official kernels' own outputs for them.
 *
 *     npm run bench:accuracy        writes bench/results/accuracy.json
 */
import { spawnSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { ensureRuntime } from '../scripts/runtimes.ts';
import { createProblem } from '../src/attention/problem.ts';
import { createWasmBackend } from '../src/backends/wasm/index.ts';
import { type BackendName, disposeBackends, getBackend, listBackends, sageattn, setBackend } from '../src/index.ts';
import { thisMachine } from '../src/measure/machine.ts';
import { attentionExact } from '../src/reference/exact.ts';
import { type Accuracy, compare } from '../src/reference/metrics.ts';
import { toFloat32 } from '../src/tensor/access.ts';
import { GOLDEN_NAMES, readGolden } from '../test/golden/golden.ts';

export interface AccuracyRow {
  readonly golden: string;
  /** `official` outputs come from the golden file; the others were computed in this run. */
  readonly source: 'official' | 'wasm' | 'webgpu' | 'cuda';
  readonly kernel: string;
  readonly accuracy: Accuracy;
}

// The engine must compute relaxed SIMD right for its kernels to be measured.
if (Number(process.versions.node.split('.')[0]) < 24) {
  const { status } = spawnSync(ensureRuntime('node24'), ['--import', 'tsx', fileURLToPath(import.meta.url)], {
    stdio: 'inherit',
  });
  process.exit(status ?? 1);
}

const rows: AccuracyRow[] = [];
const available = (await listBackends()).filter(({ availability }) => availability.available);
for (const name of GOLDEN_NAMES) {
  const golden = readGolden(name);
  const options = { isCausal: golden.isCausal };
  const exact = attentionExact(createProblem(golden.q, golden.k, golden.v, options), golden).output;
  const measure = async (source: BackendName, label: (kernel: string) => string) => {
    for (const { name: kernel } of (await getBackend(source)).kernels) {
      const output = await sageattn(golden.q, golden.k, golden.v, { ...options, backend: source, kernel });
      rows.push({ golden: name, source, kernel: label(kernel), accuracy: compare(toFloat32(output), exact) });
    }
  };
  for (const kernel of golden.outputs) {
    rows.push({ golden: name, source: 'official', kernel, accuracy: compare(golden.float32(`out.${kernel}`), exact) });
  }
  for (const { name: backend } of available) {
    if (backend !== 'wasm') await measure(backend, (kernel) => kernel);
  }
  for (const simd of ['simd128', 'relaxed'] as const) {
    const previous = await setBackend(createWasmBackend({ simd, threads: 1 }));
    await previous?.dispose();
    await measure('wasm', (kernel) => `${kernel} (${simd})`);
  }
}
await disposeBackends();

writeFileSync(
  new URL('results/accuracy.json', import.meta.url),
  `${JSON.stringify({ machine: thisMachine(), rows }, undefined, 1)}\n`,
);
for (const { golden, source, kernel, accuracy } of rows) {
  console.log(
    `${golden}  ${source} ${kernel}: relative L1 ${accuracy.relativeL1.toFixed(5)}, cosine ${accuracy.cosineSimilarity.toFixed(6)}`,
  );
}
