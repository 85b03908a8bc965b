/** What `chromium.ts` measures in a page: calls of `sageattn` by default options and onnxruntime-web's, in turns. */
import * as ort from 'onnxruntime-web';
import { createProblem } from '../../src/attention/problem.ts';
import { createWasmBackend } from '../../src/backends/wasm/index.ts';
import { sageattn, setBackend } from '../../src/index.ts';
import { Random } from '../../src/measure/random.ts';
import { median } from '../../src/measure/statistics.ts';
import { attentionExact } from '../../src/reference/exact.ts';
import { compare } from '../../src/reference/metrics.ts';
import { slice, tensor } from '../../src/tensor/tensor.ts';
import { type Contender, ortWeb } from './peers.ts';

export interface Shape {
  readonly batch: number;
  readonly heads: number;
  readonly headDim: number;
  readonly tokens: number;
}

export interface PageRow extends Shape {
  /** Milliseconds. */
  readonly ours: number;
  readonly peer: number;
  /** Median of the ratios of times that follow one another. */
  readonly ratio: number;
  readonly relativeL1: number;
}

const EXACT_ROWS = 32;
const WARM_MILLISECONDS = 300;
/** A page's clock ticks in steps of up to 0.1 ms. */
const BURST_MILLISECONDS = 4;
/** Between contenders: onnxruntime-web's threads spin on for a while after a call, on the processors that the next one needs. */
const PAUSE_MILLISECONDS = 30;

async function burst({ run }: Contender, calls: number): Promise<number> {
  await new Promise((resolve) => setTimeout(resolve, PAUSE_MILLISECONDS));
  await run();
  const start = performance.now();
  for (let i = 0; i < calls; i++) await run();
  return (performance.now() - start) / calls;
}

const page = {
  async start(threads: number): Promise<string> {
    ort.env.wasm.wasmPaths = `${location.origin}/`;
    const backend = createWasmBackend({ threads });
    await setBackend(backend);
    return `${(await backend.availability()).details.threads}`;
  },

  async measure(shape: Shape, threads: number, milliseconds: number): Promise<PageRow> {
    const { batch, heads, headDim, tokens } = shape;
    const random = new Random(tokens + headDim);
    const draw = () => tensor(random.normals(batch * tokens * heads * headDim), [batch, tokens, heads, headDim]);
    const operands = { ...shape, q: draw(), k: draw(), v: draw() };
    const { q, k, v } = operands;
    const ours: Contender = {
      name: 'ours',
      run: async () => (await sageattn(q, k, v, { backend: 'wasm', tensorLayout: 'NHD' })).data as Float32Array,
      release: async () => {},
    };
    const peer = await ortWeb(operands, threads);
    const few = slice(q, 1, 0, Math.min(EXACT_ROWS, tokens));
    const exact = attentionExact(createProblem(few, k, v, { tensorLayout: 'NHD' }), { q: few, k, v }).output;
    const perBatch = exact.length / batch;
    const { relativeL1 } = compare((await ours.run()).subarray(0, perBatch), exact.subarray(0, perBatch));
    for (const end = performance.now() + WARM_MILLISECONDS; performance.now() < end; ) {
      await ours.run();
      await peer.run();
    }
    const calls = Math.ceil(BURST_MILLISECONDS / Math.max(0.001, await burst(ours, 3)));
    const times: [ours: number, peer: number][] = [];
    for (const end = performance.now() + milliseconds; times.length < 3 || performance.now() < end; ) {
      // Each goes first half of the time.
      const second = times.length % 2 === 1 ? await burst(peer, calls) : undefined;
      const first = await burst(ours, calls);
      times.push([first, second ?? (await burst(peer, calls))]);
    }
    await peer.release();
    return {
      ...shape,
      ours: median(times.map(([own]) => own)),
      peer: median(times.map(([, other]) => other)),
      ratio: median(times.map(([own, other]) => other / own)),
      relativeL1,
    };
  },
};

export type BenchPage = typeof page;
Object.assign(globalThis, { page });
document.title = 'ready';
