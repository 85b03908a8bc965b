/**
 * Calls of 1 to 2048 tokens in WASM against ONNX Runtime, as applications make them (`sageattn`, default options). Each contender has a
 * process of its own, which is stopped (SIGSTOP) while another one has its turn: a thread pool that spins on after its call takes nothing from
 * anybody else. Turns alternate, in another order each round.
 *
 *     node .gpu/programs/bench-wasm.mjs --threads 1 [--tokens 1,8,64] [--shapes 1x8x64] [--queries 1] [--seconds 2] [--contenders ours,node] [--wide] [--out FILE]
 *
 * With `--queries`, q has so many tokens and k and v have `--tokens`: with 1 it is decoding, and a contender of its own attends
 * to keys and values that were prepared before. Shapes are batch x heads x D. Prints a line for each shape and length and writes JSON: median and best time of each contender,
 * processor time of its process (median), its error, and the kernel that ran in ours.
 */
import { type ChildProcess, execFileSync, fork } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { loadavg } from 'node:os';
import { parseArgs } from 'node:util';
import { createProblem } from '../../src/attention/problem.ts';
import { createWasmBackend } from '../../src/backends/wasm/index.ts';
import { messageOf } from '../../src/errors.ts';
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
    contenders: { type: 'string', default: 'ours,prepared,web,node' },
    /** Vectors of 256 bits in our process. */
    wide: { type: 'boolean', default: false },
    out: { type: 'string' },
    /** Set by the parent: which contender this process is. */
    child: { type: 'string' },
  },
});
const threads = Number(flags.threads);
/** Longer calls than this many multiply-adds teach nothing about short ones. */
const MOST_WORK = 2 ** 33;
/** A turn's calls take so long together, at least one. Shorter calls are made as long before they are timed. */
const TURN_MILLISECONDS = 3;
/** Calls that take longer need no other before: what has to wake up or come back to the caches takes less than a hundredth of it. */
const LONG_MILLISECONDS = 20;
const LEAST_ROUNDS = 5;
const EXACT_ROWS = 32;
/** Of each contender before any is timed: code is compiled in tiers. */
const WARM_MILLISECONDS = 400;

interface Task {
  readonly batch: number;
  readonly heads: number;
  readonly headDim: number;
  readonly tokens: number;
  readonly queries: number;
}
type Request = { readonly task: Task } | 'turn';
interface Ready {
  readonly name: string;
  readonly relativeL1: number;
  readonly kernel?: string;
  readonly details?: Readonly<Record<string, string>> | undefined;
}
interface Turn {
  readonly time: number;
  readonly cpu: number;
}
type Answer = { readonly ready: Ready } | { readonly turn: Turn } | { readonly error: string };

function operandsOf({ batch, heads, headDim, tokens, queries }: Task): Operands {
  const random = new Random(tokens + headDim);
  const draw = (length: number) =>
    tensor(random.normals(batch * length * heads * headDim), [batch, length, heads, headDim]);
  return { ...{ batch, heads, tokens, queries, headDim }, q: draw(queries), k: draw(tokens), v: draw(tokens) };
}

const CONTENDERS: Record<string, (operands: Operands) => Promise<Contender>> = {
  /** `sageattn` as an application calls it. */
  ours: async ({ q, k, v }) => ({
    name: 'ours',
    run: async () => (await sageattn(q, k, v, { backend: 'wasm', tensorLayout: 'NHD' })).data as Float32Array,
    release: async () => {},
  }),
  /** Attention to keys and values that were quantized before. */
  prepared: async ({ q, k, v }) => {
    const held = await prepareKeyValue(k, v, { backend: 'wasm', tensorLayout: 'NHD' });
    return {
      name: 'prepared',
      run: async () => (await held.attend(q)).data as Float32Array,
      release: async () => held.dispose(),
    };
  },
  web: (operands) => ortWeb(operands, threads),
  node: (operands) => ortNode(operands, threads),
};

/** One contender: answers what the parent asks until it disconnects. */
async function beContender(kind: string): Promise<void> {
  const backend = createWasmBackend({ threads, wide: flags.wide });
  await setBackend(backend);
  let contender: Contender | undefined;
  let latest = 0;
  const run = async (milliseconds: number) => {
    const start = performance.now();
    let calls = 0;
    let now = start;
    do {
      await contender?.run();
      calls++;
      now = performance.now();
    } while (now - start < milliseconds);
    latest = (now - start) / calls;
    return latest;
  };
  const prepare = async (task: Task): Promise<Ready> => {
    await contender?.release();
    contender = undefined;
    const operands = operandsOf(task);
    contender = await (CONTENDERS[kind] as (typeof CONTENDERS)[string])(operands);
    const output = await contender.run();
    const [k, v] = [slice(operands.k, 0, 0, 1), slice(operands.v, 0, 0, 1)];
    const q = slice(slice(operands.q, 0, 0, 1), 1, 0, Math.min(EXACT_ROWS, task.queries));
    const exact = attentionExact(createProblem(q, k, v, { tensorLayout: 'NHD' }), { q, k, v }).output;
    const { relativeL1 } = compare(output.subarray(0, exact.length), exact);
    await run(WARM_MILLISECONDS);
    if (kind !== 'ours') return { name: contender.name, relativeL1 };
    const problem = createProblem(operands.q, operands.k, operands.v, { tensorLayout: 'NHD' });
    const [kernel, { details }] = [await backend.defaultKernel(problem), await backend.availability()];
    return { name: contender.name, relativeL1, kernel: kernel.name, details };
  };
  const turn = async (): Promise<Turn> => {
    if (latest < LONG_MILLISECONDS) await run(TURN_MILLISECONDS);
    const before = process.cpuUsage();
    const start = performance.now();
    const time = await run(TURN_MILLISECONDS);
    const calls = Math.round((performance.now() - start) / time);
    const { user, system } = process.cpuUsage(before);
    return { time, cpu: (user + system) / 1000 / calls };
  };
  process.on('message', async (request: Request) => {
    let answer: Answer;
    try {
      answer = request === 'turn' ? { turn: await turn() } : { ready: await prepare(request.task) };
    } catch (error) {
      answer = { error: messageOf(error) };
    }
    process.send?.(answer);
  });
  // onnxruntime-web keeps its threads.
  process.on('disconnect', () => process.exit(0));
}

/** The parent's side of a contender. */
class Rival {
  readonly kind: string;
  readonly #child: ChildProcess;

  constructor(kind: string) {
    this.kind = kind;
    this.#child = fork(process.argv[1] as string, [...process.argv.slice(2), '--child', kind]);
    this.#child.kill('SIGSTOP');
  }

  /** Nothing else runs while it answers. */
  async ask(request: Request): Promise<Answer> {
    const answer = new Promise<Answer>((resolve) => {
      const ended = () => resolve({ error: 'the process ended' });
      this.#child.once('exit', ended);
      this.#child.once('message', (message) => {
        this.#child.off('exit', ended);
        resolve(message as Answer);
      });
    });
    this.#child.kill('SIGCONT');
    this.#child.send(request, () => {});
    try {
      return await answer;
    } finally {
      this.#child.kill('SIGSTOP');
    }
  }

  end(): void {
    this.#child.kill('SIGCONT');
    if (this.#child.connected) this.#child.disconnect();
  }
}

interface Measured {
  readonly best: number;
  readonly median: number;
  readonly cpu: number;
  readonly rounds: number;
  readonly relativeL1: number;
}

async function measure(rivals: readonly Rival[], task: Task, seconds: number) {
  const running: { rival: Rival; ready: Ready; times: number[]; cpu: number[] }[] = [];
  for (const rival of rivals) {
    if (rival.kind === 'prepared' && task.queries === task.tokens) continue;
    const answer = await rival.ask({ task });
    // A peer may not be installed, or fail: onnxruntime-web at 4096 tokens.
    if ('ready' in answer) running.push({ rival, ready: answer.ready, times: [], cpu: [] });
    else if ('error' in answer && rival.kind === 'ours') throw new Error(answer.error);
  }
  const end = performance.now() + seconds * 1000;
  for (let round = 0; round < LEAST_ROUNDS || performance.now() < end; round++) {
    for (let turn = 0; turn < running.length; turn++) {
      const { rival, times, cpu } = running[(round + turn) % running.length] as (typeof running)[number];
      const answer = await rival.ask('turn');
      if (!('turn' in answer)) throw new Error(`${rival.kind}: ${'error' in answer ? answer.error : 'no turn'}`);
      times.push(answer.turn.time);
      cpu.push(answer.turn.cpu);
    }
  }
  const contenders: Record<string, Measured> = {};
  for (const { ready, times, cpu } of running) {
    const best = times.reduce((least, time) => Math.min(least, time));
    const { relativeL1 } = ready;
    contenders[ready.name] = { best, median: median(times), cpu: median(cpu), rounds: times.length, relativeL1 };
  }
  const { kernel = '', details } = (running[0] as (typeof running)[number]).ready;
  return { kernel, contenders, details };
}

interface Row extends Task {
  readonly kernel: string;
  readonly contenders: Record<string, Measured>;
}

function write(file: string, details: Ready['details'], rows: readonly Row[]): void {
  const report = {
    ...thisMachine(),
    loadAverage: loadavg()[0],
    commit: process.env.SAGEATTENTION_COMMIT ?? execFileSync('git', ['rev-parse', 'HEAD'], { encoding: 'utf8' }).trim(),
    date: new Date().toISOString(),
    ...{ details, threads, wide: flags.wide, processPerContender: true, rows },
  };
  writeFileSync(file, `${JSON.stringify(report, null, 2)}\n`);
}

async function compareAll(): Promise<void> {
  // Ours first: the others' ratios are to it.
  const rivals = flags.contenders.split(',').map((kind) => new Rival(kind));
  const rows: Row[] = [];
  for (const shape of flags.shapes.split(',')) {
    const [batch, heads, headDim] = shape.split('x').map(Number) as [number, number, number];
    for (const tokens of flags.tokens.split(',').map(Number)) {
      const queries = flags.queries === undefined ? tokens : Number(flags.queries);
      if (2 * batch * heads * queries * tokens * headDim > MOST_WORK) continue;
      const task = { batch, heads, headDim, tokens, queries };
      const { kernel, contenders, details } = await measure(rivals, task, Number(flags.seconds));
      rows.push({ ...task, kernel, contenders });
      const own = contenders.ours as Measured;
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
      // A machine that is lent may be taken away before the end.
      if (flags.out !== undefined) write(flags.out, details, rows);
    }
  }
  for (const rival of rivals) rival.end();
  for (const peer of ['onnxruntime-web', 'onnxruntime-node']) {
    const ratios = rows.flatMap(({ contenders }) => {
      const [, found] = Object.entries(contenders).find(([name]) => name.startsWith(peer)) ?? [];
      return found === undefined ? [] : [found.median / (contenders.ours as Measured).median];
    });
    if (ratios.length === 0) continue;
    const slower = ratios.filter((ratio) => ratio < 1).length;
    console.log(
      `${peer} / ours: least ${Math.min(...ratios).toFixed(2)}, median ${median(ratios).toFixed(2)}, most ` +
        `${Math.max(...ratios).toFixed(2)}; ours slower in ${slower} of ${ratios.length}`,
    );
  }
}

await (flags.child === undefined ? compareAll() : beContender(flags.child));
