/**
 * Accuracy of every kernel that runs here on the golden inputs, beside the official kernels' own outputs for them.
 *
 *     npm run bench:accuracy        writes bench/results/accuracy.json
 */
import { writeFileSync } from 'node:fs';
import { createProblem } from '../src/attention/problem.ts';
import { thisMachine } from '../src/cli/machine.ts';
import { disposeBackends, getBackend, listBackends, sageattn } from '../src/index.ts';
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

const rows: AccuracyRow[] = [];
const available = (await listBackends()).filter(({ availability }) => availability.available);
for (const name of GOLDEN_NAMES) {
  const golden = readGolden(name);
  const options = { isCausal: golden.isCausal };
  const exact = attentionExact(createProblem(golden.q, golden.k, golden.v, options), golden).output;
  for (const kernel of golden.outputs) {
    rows.push({ golden: name, source: 'official', kernel, accuracy: compare(golden.float32(`out.${kernel}`), exact) });
  }
  for (const { name: backend } of available) {
    for (const { name: kernel } of (await getBackend(backend)).kernels) {
      const output = await sageattn(golden.q, golden.k, golden.v, { ...options, backend, kernel });
      rows.push({ golden: name, source: backend, kernel, accuracy: compare(toFloat32(output), exact) });
    }
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
