/** The worker of section 2: keeps the head that is shown, and computes its charts. */
import * as Comlink from 'comlink';
import {
  type Backend,
  getBackend,
  sageattn,
  sageattnSparse,
  setBackend,
  type Tensor,
  tensor,
} from '../../src/index.ts';
import { median } from '../../src/measure/statistics.ts';
import { compare, exactAttention } from '../../src/reference/index.ts';
import type { KeptBlocks } from '../kept-blocks.ts';
import {
  type Distribution,
  drawHead,
  type Head,
  type OutputError,
  outputErrors,
  type Picture,
  picture,
  type Quantization,
  smoothingSweep,
} from '../lab.ts';

let head: Head | undefined;
/** Counts changes, so that errors of a head that is no longer looked at are given up. */
let version = 0;

let own: Promise<unknown> | undefined;

/** The WASM backend, where the browser can run it. */
async function wasmBackend(): Promise<Backend | undefined> {
  // Loaded as the library loads it, so that it is one chunk of the page. A head is too little work for threads.
  own ??= import('../../src/backends/wasm/index.ts').then(({ createWasmBackend }) =>
    setBackend(createWasmBackend({ threads: 1 })),
  );
  await own;
  const backend = await getBackend('wasm');
  return (await backend.availability()).available ? backend : undefined;
}

/** What the WASM kernels themselves lose: those that a browser without a GPU runs. */
async function* wasmErrors({ q, k, v, length, dim }: Head): AsyncGenerator<OutputError> {
  const backend = await wasmBackend();
  if (backend === undefined) return;
  const [tq, tk, tv] = [q, k, v].map((data) => tensor(data, [1, 1, length, dim])) as [Tensor, Tensor, Tensor];
  const exact = exactAttention(tq, tk, tv).output;
  for (const { name } of backend.kernels) {
    // It quantizes nothing, and its error is ten thousand times as small: an axis that had it would show nothing of the others.
    if (name === 'exact') continue;
    for (const smoothK of [false, true]) {
      const output = await sageattn(tq, tk, tv, { backend: 'wasm', kernel: name, smoothK });
      const { relativeL1 } = compare(output.data as Float32Array, exact);
      yield { kernel: `WASM ${name}`, granularity: 'per token', smoothK, relativeL1 };
    }
  }
}

/** Rows and keys of a block: a head has few tokens here. */
const BLOCK = 16;
/** A head by itself is over too soon to be timed. */
const COPIES = 32;
const ROUNDS = 5;

/** Attention over the blocks that hold `mass` of the softmax; undefined where WASM does not run. */
async function blocksOf({ q, k, v, length, dim }: Head, mass: number): Promise<KeptBlocks | undefined> {
  if ((await wasmBackend()) === undefined) return undefined;
  const batch = (copies: number) =>
    [q, k, v].map((data) => {
      // Each copy is the same memory again.
      const strides = [0, 0, dim, 1];
      return tensor(data, [copies, 1, length, dim], { strides });
    }) as [Tensor, Tensor, Tensor];
  const own = batch(1);
  const options = { backend: 'wasm', sparsity: { topP: mass, rows: BLOCK, keys: BLOCK } } as const;
  const exact = exactAttention(...own).output;
  const { output, sparsity } = await sageattnSparse(...own, options);
  const all = await sageattn(...own, { backend: 'wasm' });
  const many = batch(COPIES);
  const times: Record<'all' | 'sparse', number[]> = { all: [], sparse: [] };
  const ways = { all: () => sageattn(...many, { backend: 'wasm' }), sparse: () => sageattn(...many, options) };
  // In turns: what disturbs one disturbs both. The first round compiles.
  for (let round = 0; round <= ROUNDS; round++) {
    for (const way of ['all', 'sparse'] as const) {
      const start = performance.now();
      await ways[way]();
      if (round > 0) times[way].push(performance.now() - start);
    }
  }
  const errorOf = ({ data }: Tensor) => compare(data as Float32Array, exact).relativeL1;
  return {
    ...{ rows: BLOCK, keys: BLOCK, map: sparsity.blockMask.map.data as Uint8Array },
    ...{ keptFraction: sparsity.keptFraction, lostMass: sparsity.lostMass },
    ...{ error: errorOf(output), errorOfAll: errorOf(all), speed: median(times.all) / median(times.sparse) },
  };
}

/** Every row of the chart, in its order. */
async function* allErrors(of: Head): AsyncGenerator<OutputError> {
  yield* outputErrors(of);
  yield* wasmErrors(of);
}

const api = {
  draw(distribution: Distribution): void {
    head = drawHead(distribution);
    version++;
  },

  take(next: Head): void {
    head = next;
    version++;
  },

  picture(quantization: Quantization): Picture {
    if (head === undefined) throw new Error('nothing to draw yet');
    return picture(head, quantization);
  },

  /** The blocks that hold so much of the softmax of the head that is shown. */
  async blocks(mass: number): Promise<KeptBlocks | undefined> {
    return head && blocksOf(head, mass);
  },

  /** `smoothingSweep`, of a head that is not kept. */
  async sweep(of: Head, bits: Quantization['bits']): Promise<number[]> {
    return [...smoothingSweep(of, bits)];
  },

  /** The errors, or undefined when the head was changed meanwhile. */
  async errors(): Promise<readonly OutputError[] | undefined> {
    if (head === undefined) return undefined;
    const started = version;
    const errors: OutputError[] = [];
    for await (const error of allErrors(head)) {
      errors.push(error);
      await new Promise((resolve) => setTimeout(resolve));
      if (version !== started) return undefined;
    }
    return errors;
  },
};

export type LabApi = typeof api;
Comlink.expose(api);
