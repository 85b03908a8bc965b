/**
 * What block-sparse attention keeps of a trained model, and what that costs: the sentence encoder on a long text as one sequence, which
 * is beyond the 128 tokens that it was trained with, so that its attention is real and its embedding means little.
 *
 *     node --import tsx bench/wasm/sparse-encoder.ts [--tokens 4096] [--rounds 5] [--out FILE]
 *
 * For each layer and each way of choosing: the fraction of blocks kept, the share of the softmax that was lost, by the estimate and by
 * logsumexps, relative L1 and cosine against exact attention beside those of the dense kernel, and times of the processor, choosing
 * included, in turns with the dense kernel's; none with `--rounds 0`, as on a machine that others use. Layers get exact attention's output, so that errors do not add up.
 */
import { readFile, writeFile } from 'node:fs/promises';
import { parseArgs } from 'node:util';
import type { Sparsity } from '../../src/attention/sparsity.ts';
import { createWasmBackend } from '../../src/backends/wasm/index.ts';
import { openSentenceModel } from '../../src/cli/model.ts';
import { sageattn, sageattnSparse, setBackend } from '../../src/index.ts';
import { exactOutput } from '../../src/measure/accuracy.ts';
import { thisMachine } from '../../src/measure/machine.ts';
import { median } from '../../src/measure/statistics.ts';
import { compare } from '../../src/reference/metrics.ts';
import { type Tensor, tensor } from '../../src/tensor/tensor.ts';

const { values: flags } = parseArgs({
  options: {
    tokens: { type: 'string', default: '4096' },
    rounds: { type: 'string', default: '5' },
    out: { type: 'string' },
  },
});
const rounds = Number(flags.rounds);
const CHOICES: readonly Sparsity[] = [
  { topP: 0.98 },
  { topP: 0.98, rows: 64, keys: 32 },
  { topP: 0.9 },
  { threshold: 0.6, mass: 0.98 },
  { topK: 0.5 },
];

await setBackend(createWasmBackend({ threads: 1 }));
const { tokenizer, encoder } = await openSentenceModel();
const text = await readFile(new URL('../../src/cli/alice-chapter-1.txt', import.meta.url), 'utf8');
const ids = tokenizer.encode(text).slice(0, Number(flags.tokens));

const processor = async (work: () => Promise<unknown>) => {
  const before = process.cpuUsage();
  await work();
  const { user, system } = process.cpuUsage(before);
  return (user + system) / 1000;
};
const errors = (actual: Tensor, exact: ArrayLike<number>) => {
  const { relativeL1, cosineSimilarity } = compare(actual.data as Float32Array, exact);
  return { relativeL1, cosineSimilarity };
};

interface Result {
  readonly layer: number;
  readonly sparsity: Sparsity;
  readonly keptFraction: number;
  readonly lostMassEstimated: number;
  readonly lostMass: number;
  readonly dense: { readonly relativeL1: number; readonly cosineSimilarity: number; readonly milliseconds?: number };
  readonly sparse: { readonly relativeL1: number; readonly cosineSimilarity: number; readonly milliseconds?: number };
}

const results: Result[] = [];
await encoder.encode(
  [ids],
  async ({ layer, q, k, v, smScale }) => {
    const options = { backend: 'wasm', tensorLayout: 'NHD', smScale, returnLse: true } as const;
    const exact = await exactOutput({ q, k, v, attnMask: undefined, smScale, tensorLayout: 'NHD' }, () => {});
    const dense = await sageattn(q, k, v, options);
    for (const sparsity of CHOICES) {
      const run = () => sageattnSparse(q, k, v, { ...options, sparsity });
      const sparse = await run();
      const times = { dense: [] as number[], sparse: [] as number[] };
      for (let round = 0; round < rounds; round++) {
        times.dense.push(await processor(() => sageattn(q, k, v, options)));
        times.sparse.push(await processor(run));
      }
      const { data } = sparse.lse as Tensor<'float32'>;
      const lost = data.reduce((sum, lse, i) => sum + 1 - Math.exp(lse - (dense.lse.data[i] as number)), 0);
      const result: Result = {
        ...{ layer, sparsity, keptFraction: sparse.sparsity.keptFraction },
        ...{ lostMassEstimated: sparse.sparsity.lostMass, lostMass: lost / data.length },
        dense: { ...errors(dense.output, exact), ...(rounds > 0 && { milliseconds: median(times.dense) }) },
        sparse: { ...errors(sparse.output, exact), ...(rounds > 0 && { milliseconds: median(times.sparse) }) },
      };
      results.push(result);
      const speed = rounds === 0 ? '' : `, ${(median(times.dense) / median(times.sparse)).toFixed(2)}x`;
      console.log(
        `layer ${layer} ${JSON.stringify(sparsity)}: kept ${result.keptFraction.toFixed(3)}, lost ${result.lostMass.toFixed(4)} (estimated ${result.lostMassEstimated.toFixed(4)}), L1 ${result.dense.relativeL1.toFixed(4)} -> ${result.sparse.relativeL1.toFixed(4)}, cosine ${result.sparse.cosineSimilarity.toFixed(5)}${speed}`,
      );
    }
    return tensor(exact, q.shape);
  },
  { maxLength: Number.POSITIVE_INFINITY },
);
if (flags.out !== undefined) {
  const report = { ...thisMachine(), tokens: ids.length, rounds, results };
  await writeFile(flags.out, `${JSON.stringify(report, null, 1)}\n`);
}
