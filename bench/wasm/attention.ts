/**
 * Attention in WASM against ONNX Runtime, all in one process and interleaved, so that what disturbs one disturbs all.
 *
 *     node --import tsx bench/wasm/attention.ts --threads 1 [--tokens 1024,4096] [--kernels NAME,NAME] [--seconds 6] [--wide] [--out FILE]
 *
 * Prints a table and writes JSON: per contender the best and the median time, GFLOP/s of 4 H L^2 D at the best time,
 * the ratio of best times to each peer, and the error against float64 over the first query rows. On a machine that
 * others use too, the processor time of the whole process (all threads, median) says more than the clock; it is there
 * as well.
 */
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { loadavg } from 'node:os';
import { setTimeout } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { createProblem } from '../../src/attention/problem.ts';
import { chooseOptions } from '../../src/backends/choice.ts';
import { createWasmBackend } from '../../src/backends/wasm/index.ts';
import { thisMachine } from '../../src/measure/machine.ts';
import { Random } from '../../src/measure/random.ts';
import { median } from '../../src/measure/statistics.ts';
import { attentionExact } from '../../src/reference/exact.ts';
import { type Accuracy, compare } from '../../src/reference/metrics.ts';
import { slice, type Tensor, tensor } from '../../src/tensor/tensor.ts';
import { type Contender, type Operands, ortNode, ortWeb } from './peers.ts';

const { values: flags } = parseArgs({
  options: {
    threads: { type: 'string', default: '1' },
    tokens: { type: 'string', default: '1024,4096' },
    'head-dims': { type: 'string', default: '64,128' },
    /** Default: all of the backend's. */
    kernels: { type: 'string' },
    seconds: { type: 'string', default: '6' },
    /** Vectors of 256 bits, onnxruntime-web's too: V8's flag holds for the whole process. */
    wide: { type: 'boolean', default: false },
    out: { type: 'string' },
  },
});
const threads = Number(flags.threads);
const HEADS = 8;
/** Between any two calls. */
const PAUSE_MILLISECONDS = 30;
/** Query rows that are compared with float64. */
const EXACT_ROWS = 64;
/** Mean of the normal distribution that each channel of K takes its offset from. */
const CHANNEL_OFFSET = 2;

function operandsOf(tokens: number, headDim: number): Operands {
  const random = new Random(tokens + headDim);
  const count = tokens * HEADS * headDim;
  const offsets = random.normals(HEADS * headDim, CHANNEL_OFFSET);
  const shape = [1, tokens, HEADS, headDim];
  const k = random.normals(count).map((value, i) => value + (offsets[i % offsets.length] as number));
  return {
    ...{ batch: 1, heads: HEADS, tokens, headDim },
    q: tensor(random.normals(count), shape),
    k: tensor(k, shape),
    v: tensor(random.normals(count), shape),
  };
}

async function ours({ q, k, v }: Operands, simd: 'simd128' | 'relaxed'): Promise<Contender[]> {
  const backend = createWasmBackend({ threads, simd, wide: flags.wide });
  const problem = createProblem(q, k, v, { tensorLayout: 'NHD' });
  const named = flags.kernels?.split(',');
  const kernels = backend.kernels.filter(({ name }) => named === undefined || named.includes(name));
  return Promise.all(
    kernels.map(async (kernel) => {
      const plan = await backend.plan(problem, chooseOptions(kernel, problem, {}));
      return {
        name: `${kernel.name} (${simd})`,
        run: async () => {
          const { output } = await plan.run({ q, k, v }, {});
          return (output as Tensor).data as Float32Array;
        },
        release: () => backend.dispose(),
      };
    }),
  );
}

interface Row {
  readonly tokens: number;
  readonly headDim: number;
  readonly contender: string;
  readonly error?: string;
  readonly bestMilliseconds?: number;
  readonly medianMilliseconds?: number;
  /** Processor time of all threads. */
  readonly cpuMilliseconds?: number;
  readonly gflops?: number;
  /** Times faster than the peer: by best times, and by processor time. */
  readonly speedups?: Record<string, { readonly best: number; readonly cpu: number }>;
  readonly accuracy?: Accuracy;
  readonly rounds?: number;
}

async function measure(tokens: number, headDim: number): Promise<Row[]> {
  const operands = operandsOf(tokens, headDim);
  const relaxed = Number(process.versions.node.split('.')[0]) >= 24;
  const contenders = [
    ...(relaxed ? await ours(operands, 'relaxed') : []),
    ...(await ours(operands, 'simd128')),
    await ortWeb(operands, threads),
    await ortNode(operands, threads),
  ];
  const q = slice(operands.q, 1, 0, Math.min(EXACT_ROWS, tokens));
  const exact = attentionExact(createProblem(q, operands.k, operands.v, { tensorLayout: 'NHD' }), {
    q,
    k: operands.k,
    v: operands.v,
  }).output;

  const rows: Row[] = [];
  const running: { contender: Contender; accuracy: Accuracy; times: number[]; cpu: number[] }[] = [];
  for (const contender of contenders) {
    try {
      const output = await contender.run();
      running.push({ contender, accuracy: compare(output.subarray(0, exact.length), exact), times: [], cpu: [] });
    } catch (error) {
      rows.push({
        tokens,
        headDim,
        contender: contender.name,
        error: String(error)
          .replaceAll(/\S*\/\S+/g, '')
          .slice(0, 200),
      });
    }
  }
  // Warm: code is compiled in tiers, on threads of the same process, and memory has grown.
  for (let i = 0; i < (tokens <= 1024 ? 10 : 2); i++) for (const { contender } of running) await contender.run();
  const end = performance.now() + Number(flags.seconds) * 1000;
  for (let round = 0; round === 0 || performance.now() < end; round++) {
    for (let turn = 0; turn < running.length; turn++) {
      // Another order every round: what one leaves behind (garbage, cold caches) does not always meet the same next
      // one.
      const { contender, times, cpu } = running[(round * 5 + turn) % running.length] as (typeof running)[number];
      // A peer's thread pool spins for a while after its call, on the processors that the next contender needs.
      await setTimeout(PAUSE_MILLISECONDS);
      const before = process.cpuUsage();
      const start = performance.now();
      await contender.run();
      times.push(performance.now() - start);
      const { user, system } = process.cpuUsage(before);
      cpu.push((user + system) / 1000);
    }
  }
  const peers = running.filter(({ contender }) => contender.name.startsWith('onnxruntime'));
  const best = (times: readonly number[]) => times.reduce((least, time) => Math.min(least, time));
  for (const { contender, accuracy, times, cpu } of running) {
    rows.push({
      ...{ tokens, headDim, contender: contender.name, accuracy, rounds: times.length },
      bestMilliseconds: best(times),
      medianMilliseconds: median(times),
      cpuMilliseconds: median(cpu),
      gflops: (4 * HEADS * tokens * tokens * headDim) / best(times) / 1e6,
      speedups: Object.fromEntries(
        peers.map((peer) => [
          peer.contender.name,
          { best: best(peer.times) / best(times), cpu: median(peer.cpu) / median(cpu) },
        ]),
      ),
    });
  }
  for (const contender of contenders) await contender.release();
  return rows;
}

const rows: Row[] = [];
for (const tokens of flags.tokens.split(',').map(Number)) {
  for (const headDim of flags['head-dims'].split(',').map(Number)) {
    for (const row of await measure(tokens, headDim)) {
      rows.push(row);
      const { contender, error, bestMilliseconds, cpuMilliseconds, gflops, speedups, accuracy } = row;
      const label = `${tokens} tokens, D ${headDim}, ${threads} thread(s): ${contender}`.padEnd(70);
      const ratios = Object.values(speedups ?? {}).map((ratio) => `x${ratio.best.toFixed(2)}/${ratio.cpu.toFixed(2)}`);
      console.log(
        error === undefined
          ? `${label} ${bestMilliseconds?.toFixed(2)} ms (cpu ${cpuMilliseconds?.toFixed(2)})  ${gflops?.toFixed(0)} GFLOP/s  ` +
              `${ratios.join(' ')}  relative L1 ${accuracy?.relativeL1.toExponential(2)}  cosine ` +
              `${accuracy?.cosineSimilarity.toFixed(6)}`
          : `${label} fails: ${error}`,
      );
    }
  }
}
if (flags.out !== undefined) {
  const report = {
    ...thisMachine(),
    // Well above the number of cores: others were at work, and only processor times mean anything.
    loadAverage: loadavg()[0],
    node: process.version,
    commit: process.env.SAGEATTENTION_COMMIT ?? execFileSync('git', ['rev-parse', 'HEAD'], { encoding: 'utf8' }).trim(),
    date: new Date().toISOString(),
    ...{ threads, wide: flags.wide, heads: HEADS, rows },
  };
  writeFileSync(flags.out, `${JSON.stringify(report, null, 2)}\n`);
}
// onnxruntime-web keeps its threads.
process.exit(0);
