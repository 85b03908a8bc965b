/**
 * Calls of 1 to 4096 tokens in WASM against ONNX Runtime, as applications make them (`sageattn`, default options), all in one
 * process and interleaved.
 *
 *     node --import tsx bench/wasm/short.ts --threads 1 [--tokens 1,8,64] [--shapes 1x8x64] [--queries 1] [--seconds 2] [--pause 30] [--alone] [--wide] [--out FILE]
 *
 * With `--queries`, q has so many tokens and k and v have `--tokens`: with 1 it is decoding, and a contender of its own attends
 * to keys and values that were prepared before. Shapes are batch x heads x D. Prints a line for each shape and length and writes JSON: median and best time of each contender,
 * processor time of the whole process (median), the ratio of each peer to ours, the kernel that ran and its error.
 */
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { loadavg } from 'node:os';
import { setTimeout } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { createProblem } from '../../src/attention/problem.ts';
import { createWasmBackend } from '../../src/backends/wasm/index.ts';
import { prepareKeyValue, sageattn, setBackend } from '../../src/index.ts';
import { thisMachine } from '../../src/measure/machine.ts';
import { Random } from '../../src/measure/random.ts';
import { median } from '../../src/measure/statistics.ts';
import { attentionExact } from '../../src/reference/exact.ts';
import { compare } from '../../src/reference/metrics.ts';
import { slice, tensor } from '../../src/tensor/tensor.ts';
import { type Contender, type Operands, ortNode, ortWeb } from './peers.ts';

const { values: flags } = parseArgs({
  options: {
    threads: { type: 'string', default: '1' },
    tokens: { type: 'string', default: '1,8,16,32,64,96,128,197,256,384,512,577,1024,2048' },
    shapes: { type: 'string', default: '1x8x64,8x4x64,1x12x64,24x4x128,1x16x72' },
    queries: { type: 'string' },
    seconds: { type: 'string', default: '2' },
    /** Milliseconds between contenders, see below. */
    pause: { type: 'string', default: '30' },
    /** Without peers: what a call costs where nobody else's threads spin. */
    alone: { type: 'boolean', default: false },
    /** Vectors of 256 bits, onnxruntime-web's too: V8's flag holds for the whole process. */
    wide: { type: 'boolean', default: false },
    out: { type: 'string' },
  },
});
const threads = Number(flags.threads);
/** Longer calls than this many multiply-adds teach nothing about short ones. */
const MOST_WORK = 2 ** 33;
/** A peer's thread pool spins for a while after its call, on the processors that the next contender needs. */
const pause = Number(flags.pause);
/** Calls of one contender in a row: work between two of its own calls counts, as in an application. */
const BURST = 5;
const EXACT_ROWS = 32;
/** Of all contenders before any is timed: code is compiled in tiers. */
const WARM_MILLISECONDS = 400;

function operandsOf(batch: number, heads: number, headDim: number, tokens: number, queries: number): Operands {
  const random = new Random(tokens + headDim);
  const draw = (length: number) =>
    tensor(random.normals(batch * length * heads * headDim), [batch, length, heads, headDim]);
  return { ...{ batch, heads, tokens, queries, headDim }, q: draw(queries), k: draw(tokens), v: draw(tokens) };
}

/** `sageattn` as an application calls it. */
function ours({ q, k, v }: Operands): Contender {
  return {
    name: 'ours',
    run: async () => (await sageattn(q, k, v, { backend: 'wasm', tensorLayout: 'NHD' })).data as Float32Array,
    release: async () => {},
  };
}

/** Attention to keys and values that were quantized before. */
async function prepared({ q, k, v }: Operands): Promise<Contender> {
  const held = await prepareKeyValue(k, v, { backend: 'wasm', tensorLayout: 'NHD' });
  return {
    name: 'prepared',
    run: async () => (await held.attend(q)).data as Float32Array,
    release: async () => held.dispose(),
  };
}

interface Measured {
  readonly best: number;
  readonly median: number;
  readonly cpu: number;
}

async function measure(operands: Operands, seconds: number) {
  const { q, k, v } = operands;
  const problem = createProblem(q, k, v, { tensorLayout: 'NHD' });
  const contenders = [ours(operands)];
  if (operands.queries !== operands.tokens) contenders.push(await prepared(operands));
  for (const peer of flags.alone ? [] : [ortWeb, ortNode]) {
    // One that is not installed is left out.
    await peer(operands, threads).then(
      (contender) => contenders.push(contender),
      () => {},
    );
  }
  const few = slice(q, 1, 0, Math.min(EXACT_ROWS, operands.queries ?? operands.tokens));
  const exact = attentionExact(createProblem(few, k, v, { tensorLayout: 'NHD' }), { q: few, k, v }).output;
  const perBatch = exact.length / operands.batch;
  const running: { contender: Contender; times: number[]; cpu: number[]; relativeL1: number }[] = [];
  for (const contender of contenders) {
    try {
      const output = await contender.run();
      const { relativeL1 } = compare(output.subarray(0, perBatch), exact.subarray(0, perBatch));
      running.push({ contender, times: [], cpu: [], relativeL1 });
    } catch {
      // onnxruntime-web fails at 4096 tokens.
    }
  }
  const warm = performance.now() + WARM_MILLISECONDS;
  for (let i = 0; i < 3 || performance.now() < warm; i++) for (const { contender } of running) await contender.run();
  const end = performance.now() + seconds * 1000;
  for (let round = 0; round < 3 || performance.now() < end; round++) {
    for (let turn = 0; turn < running.length; turn++) {
      const { contender, times, cpu } = running[(round + turn) % running.length] as (typeof running)[number];
      await setTimeout(pause);
      await contender.run();
      const before = process.cpuUsage();
      const start = performance.now();
      for (let i = 0; i < BURST; i++) await contender.run();
      times.push((performance.now() - start) / BURST);
      const { user, system } = process.cpuUsage(before);
      cpu.push((user + system) / 1000 / BURST);
    }
  }
  const kernel = await backend.defaultKernel(problem);
  const found: Record<string, Measured & { relativeL1: number }> = {};
  for (const { contender, times, cpu, relativeL1 } of running) {
    const best = times.reduce((least, time) => Math.min(least, time));
    found[contender.name] = { best, median: median(times), cpu: median(cpu), relativeL1 };
    await contender.release();
  }
  return { kernel: kernel.name, contenders: found };
}

const backend = createWasmBackend({ threads, wide: flags.wide });
await setBackend(backend);
interface Row extends Awaited<ReturnType<typeof measure>> {
  readonly batch: number;
  readonly heads: number;
  readonly headDim: number;
  readonly queries: number;
  readonly tokens: number;
}

async function write(file: string): Promise<void> {
  const report = {
    ...thisMachine(),
    // Well above the number of cores: others were at work, and only processor times mean anything.
    loadAverage: loadavg()[0],
    commit: process.env.SAGEATTENTION_COMMIT ?? execFileSync('git', ['rev-parse', 'HEAD'], { encoding: 'utf8' }).trim(),
    date: new Date().toISOString(),
    details: (await backend.availability()).details,
    ...{ threads, wide: flags.wide, rows },
  };
  writeFileSync(file, `${JSON.stringify(report, null, 2)}\n`);
}

const rows: Row[] = [];
for (const shape of flags.shapes.split(',')) {
  const [batch, heads, headDim] = shape.split('x').map(Number) as [number, number, number];
  for (const tokens of flags.tokens.split(',').map(Number)) {
    const queries = flags.queries === undefined ? tokens : Number(flags.queries);
    if (2 * batch * heads * queries * tokens * headDim > MOST_WORK) continue;
    const operands = operandsOf(batch, heads, headDim, tokens, queries);
    const { kernel, contenders } = await measure(operands, Number(flags.seconds));
    rows.push({ batch, heads, headDim, queries, tokens, kernel, contenders });
    const own = contenders.ours as Measured & { relativeL1: number };
    const ratios = Object.entries(contenders)
      .filter(([name]) => name !== 'ours')
      .map(
        ([name, peer]) =>
          `${name.split(' ')[0]} ${(peer.median / own.median).toFixed(2)}x (cpu ${(peer.cpu / own.cpu).toFixed(2)}x)`,
      );
    console.log(
      `${shape.padEnd(9)} ${String(tokens).padStart(5)} ${kernel.padEnd(16)} ${(own.median * 1000).toFixed(0).padStart(8)} us  ` +
        `${ratios.join('  ')}  L1 ${own.relativeL1.toExponential(1)}`,
    );
  }
  // A machine that is lent may be taken away before the end.
  if (flags.out !== undefined) await write(flags.out);
}
for (const peer of ['onnxruntime-web', 'onnxruntime-node']) {
  // By processor time, which other work on the machine disturbs less.
  const ratios = rows.flatMap(({ contenders }) => {
    const [, found] = Object.entries(contenders).find(([name]) => name.startsWith(peer)) ?? [];
    return found === undefined ? [] : [found.cpu / (contenders.ours as Measured).cpu];
  });
  if (ratios.length === 0) continue;
  const slower = ratios.filter((ratio) => ratio < 1).length;
  console.log(
    `${peer} / ours by processor time: least ${Math.min(...ratios).toFixed(2)}, median ${median(ratios).toFixed(2)}, most ` +
      `${Math.max(...ratios).toFixed(2)}; ours slower in ${slower} of ${ratios.length}`,
  );
}
// onnxruntime-web keeps its threads.
process.exit(0);
