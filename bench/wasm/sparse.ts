/**
 * Block-sparse attention in WASM against the dense kernel, all in one process and in turns, so that what disturbs one disturbs all.
 *
 *     node --import tsx bench/wasm/sparse.ts [--tokens 4096] [--head-dim 64] [--threads 1] [--rounds 9] [--keys 64] [--kernels exact] [--out FILE]
 *
 * Prints for each map the median time, how many times as fast as the dense kernel that is, the same by processor time (all threads),
 * which says more on a machine that others use too, and the time to choose as many blocks by `topK`.
 */
import { writeFileSync } from 'node:fs';
import { loadavg } from 'node:os';
import { parseArgs } from 'node:util';
import { contiguousBlocks } from '../../src/attention/block-choice.ts';
import { createProblem } from '../../src/attention/problem.ts';
import { settleSparsity } from '../../src/attention/sparsity.ts';
import { chooseOptions } from '../../src/backends/choice.ts';
import { createWasmBackend } from '../../src/backends/wasm/index.ts';
import { thisMachine } from '../../src/measure/machine.ts';
import { Random } from '../../src/measure/random.ts';
import { median } from '../../src/measure/statistics.ts';
import { tensor } from '../../src/tensor/tensor.ts';
import { blockMapOf } from '../block-maps.ts';

const { values: flags } = parseArgs({
  options: {
    tokens: { type: 'string', default: '4096' },
    'head-dim': { type: 'string', default: '64' },
    threads: { type: 'string', default: '1' },
    rounds: { type: 'string', default: '9' },
    keys: { type: 'string', default: '64' },
    kernels: { type: 'string', default: 'qk-int8-pv-int8' },
    out: { type: 'string' },
  },
});
const [tokens, headDim, threads, rounds] = [flags.tokens, flags['head-dim'], flags.threads, flags.rounds].map(
  Number,
) as [number, number, number, number];
const HEADS = 8;
const [ROWS, KEYS] = [128, Number(flags.keys)];

const random = new Random(tokens + headDim);
const shape = [1, HEADS, tokens, headDim];
const draw = () => tensor(random.normals(HEADS * tokens * headDim), shape);
const [q, k, v] = [draw(), draw(), draw()];
const [nq, nk] = [Math.ceil(tokens / ROWS), Math.ceil(tokens / KEYS)];

interface Contender {
  readonly name: string;
  readonly share: number;
  run(): Promise<unknown>;
}

const backend = createWasmBackend({ threads });
const results = [];
for (const name of flags.kernels.split(',')) {
  const kernel = backend.kernels.find((descriptor) => descriptor.name === name);
  if (kernel === undefined) throw new Error(`no kernel '${name}'`);
  const dense = createProblem(q, k, v, {});
  const sparse = { ...dense, blocks: contiguousBlocks(dense, { rows: ROWS, keys: KEYS }) };
  const choice = chooseOptions(kernel, sparse, {});
  const [densePlan, sparsePlan] = [await backend.plan(dense, choice), await backend.plan(sparse, choice)];
  const masked = (share: number, kind: 'random' | 'banded'): Contender => {
    const size = { heads: HEADS, rowBlocks: nq, keyBlocks: nk };
    const blockMap = blockMapOf(size, share, kind === 'banded' ? 'bands' : random);
    return { name: `${kind}, ${share} kept`, share, run: () => sparsePlan.run({ q, k, v, blockMap }, {}) };
  };
  const choosing = async (topK: number): Promise<Contender> => {
    const plan = await backend.planBlockMap?.(sparse, settleSparsity({ topK, rows: ROWS, keys: KEYS }));
    return { name: `choosing ${topK} of the blocks`, share: topK, run: async () => plan?.run({ q, k }, {}) };
  };
  const contenders: Contender[] = [
    { name: 'dense', share: 1, run: () => densePlan.run({ q, k, v }, {}) },
    masked(1, 'banded'),
    ...[0.5, 0.25].flatMap((share) => [masked(share, 'random'), masked(share, 'banded')]),
    ...(await Promise.all([0.5, 0.25].map(choosing))),
  ];
  const times = contenders.map(() => ({ clock: [] as number[], processor: [] as number[] }));
  for (const { run } of contenders) await run();
  for (let round = 0; round < rounds; round++) {
    for (const [i, { run }] of contenders.entries()) {
      const cpu = process.cpuUsage();
      const start = performance.now();
      await run();
      times[i]?.clock.push(performance.now() - start);
      const { user, system } = process.cpuUsage(cpu);
      times[i]?.processor.push((user + system) / 1000);
    }
  }
  const medians = times.map(({ clock, processor }) => ({ clock: median(clock), processor: median(processor) }));
  const [first] = medians as [(typeof medians)[0]];
  for (const [i, { name: contender, share }] of contenders.entries()) {
    const { clock, processor } = medians[i] as typeof first;
    const row = {
      kernel: name,
      contender,
      share,
      clock,
      processor,
      ofDense: first.clock / clock,
      ofDenseProcessor: first.processor / processor,
    };
    results.push(row);
    const ratio = `${row.ofDense.toFixed(2)}x by the clock, ${row.ofDenseProcessor.toFixed(2)}x by processor time`;
    console.log(`${name} ${contender.padEnd(28)} ${clock.toFixed(1).padStart(8)} ms  ${ratio}`);
  }
}
console.log(`load ${loadavg().map((load) => load.toFixed(1))}`);
await backend.dispose();
if (flags.out !== undefined) {
  const settings = { tokens, headDim, heads: HEADS, threads, rounds, rows: ROWS, keys: KEYS };
  writeFileSync(
    flags.out,
    `${JSON.stringify({ machine: await thisMachine(), settings, load: loadavg(), results }, null, 2)}\n`,
  );
}
