/**
 * Whether replacing attention makes small vision transformers slower: blocks of the sizes of published models (197 to 1370 tokens, heads of
 * 16 to 64) through onnxruntime-web on a CPU, as they are and with every attention replaced, in turns, with one thread and with two.
 * `DEFAULT_MIN_TOKENS` rests on it.
 *
 *     npx tsx bench/onnxruntime/vision-models.ts OUTPUT.json [--blocks 3] [--runs 12] [--seconds 5] [--only EVA]
 *
 * Times are medians: wall clock of a run, and the time that all threads of the process spent on it. A gain is the time without by the time
 * with this package: below 1 the model became slower.
 */
import { spawnSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { withSageAttention } from '../../src/integrations/onnxruntime/index.ts';
import { thisMachine } from '../../src/measure/machine.ts';
import { Random } from '../../src/measure/random.ts';
import { median } from '../../src/measure/statistics.ts';
import { compare } from '../../src/reference/metrics.ts';
import { GraphBuilder } from '../../test/support/graph-builder.ts';
import { buildViT } from '../../test/support/models.ts';

/** Model, batch, tokens, heads, head dim, and how many times wider the MLP is. */
const MODELS: readonly (readonly [string, number, number, number, number, number])[] = [
  ['DeiT-Ti', 1, 197, 3, 64, 4],
  ['DeiT-S', 1, 197, 6, 64, 4],
  ['MobileViT-XXS, 32 x 32 patches of 2 x 2', 4, 256, 4, 16, 2],
  ['MobileViT-S, 32 x 32 patches of 2 x 2', 4, 256, 4, 36, 2],
  ['EVA-02-Ti at 224', 1, 257, 3, 64, 4],
  ['CrossViT-S, small branch', 1, 401, 6, 32, 4],
  ['CrossViT-9, small branch', 1, 401, 4, 32, 3],
  ['EVA-02-Ti at 336', 1, 577, 3, 64, 4],
  ['EVA-02-S at 336', 1, 577, 6, 64, 4],
  ['PiT-XS, first stage', 1, 730, 2, 48, 4],
  ['PiT-S, first stage', 1, 730, 3, 48, 4],
  ['heads of 16', 1, 768, 8, 16, 4],
  ['heads of 32', 1, 768, 6, 32, 4],
  ['ViT-S at 448, patches of 16', 1, 785, 6, 64, 4],
  ['MobileViT-S, 64 x 64 patches of 2 x 2', 4, 1024, 4, 36, 2],
  ['ViT-Ti at 512, patches of 16', 1, 1025, 3, 64, 4],
  ['DINOv2-S at 518', 1, 1370, 6, 64, 4],
];

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    threads: { type: 'string' },
    blocks: { type: 'string', default: '3' },
    runs: { type: 'string', default: '12' },
    /** For one model; five runs are made at least. */
    seconds: { type: 'string', default: '5' },
    only: { type: 'string', default: '' },
  },
});

const LEAST_RUNS = 5;
const WARM_UPS = 2;

type Times = { readonly wall: number; readonly cpu: number };

async function measure(threads: number): Promise<object[]> {
  const ort = await import('onnxruntime-web');
  ort.env.wasm.numThreads = threads;
  const rows: object[] = [];
  for (const [model, batch, tokens, heads, headDim, mlpRatio] of MODELS) {
    if (!model.includes(flags.only)) continue;
    const g = new GraphBuilder(new Random(1));
    buildViT(g, { heads, headDim, mlpRatio, blocks: Number(flags.blocks) });
    const bytes = g.build();
    const width = heads * headDim;
    const x = new ort.Tensor('float32', new Random(2).normals(batch * tokens * width), [batch, tokens, width]);
    const options = { executionProviders: ['wasm'] };
    const sessions = [
      await ort.InferenceSession.create(bytes, options),
      await withSageAttention(ort, { minTokens: 0 }).InferenceSession.create(bytes, options),
    ];
    const times: [Times[], Times[]] = [[], []];
    const outputs: Float32Array[] = [];
    const start = performance.now();
    for (let run = -WARM_UPS; run < Number(flags.runs); run++) {
      if (run >= LEAST_RUNS && performance.now() - start > 1000 * Number(flags.seconds)) break;
      for (const [i, session] of sessions.entries()) {
        const [began, cpu] = [performance.now(), process.cpuUsage()];
        const { y } = await session.run({ x });
        const used = process.cpuUsage(cpu);
        const wall = performance.now() - began;
        if (run >= 0) times[i]?.push({ wall, cpu: (used.user + used.system) / 1000 });
        outputs[i] = y?.data as Float32Array;
      }
    }
    for (const session of sessions) await session.release();
    const of = (i: 0 | 1, what: keyof Times) => median(times[i].map((time) => time[what]));
    const pair = (what: keyof Times) => ({ without: of(0, what), with: of(1, what), gain: of(0, what) / of(1, what) });
    const { cosineSimilarity } = compare(outputs[1] as Float32Array, outputs[0] as Float32Array);
    const [wall, cpu] = [pair('wall'), pair('cpu')];
    rows.push({ model, threads, batch, tokens, heads, headDim, runs: times[0].length, wall, cpu, cosineSimilarity });
    const figures = `wall ${wall.gain.toFixed(2)}, processor ${cpu.gain.toFixed(2)}`;
    console.error(`${threads} threads, ${model}, ${tokens} tokens, ${heads} x ${headDim}: ${figures}`);
  }
  return rows;
}

if (flags.threads !== undefined) {
  process.stdout.write(JSON.stringify(await measure(Number(flags.threads))));
  process.exit(0);
}
const results = [1, 2].flatMap((threads) => {
  const args = [...process.execArgv, process.argv[1] as string, ...process.argv.slice(2), '--threads', `${threads}`];
  const { stdout, status } = spawnSync(process.execPath, args, {
    stdio: ['ignore', 'pipe', 'inherit'],
    encoding: 'utf8',
  });
  if (status !== 0) throw new Error(`the process with ${threads} threads ended with ${status}`);
  return JSON.parse(stdout) as object[];
});
const commit = spawnSync('git', ['rev-parse', '--short', 'HEAD'], { encoding: 'utf8' }).stdout.trim();
const report = {
  date: new Date().toISOString().slice(0, 10),
  commit,
  machine: thisMachine(),
  blocks: Number(flags.blocks),
  results,
};
writeFileSync(positionals[0] ?? 'vision-models.json', `${JSON.stringify(report, null, 1)}\n`);
