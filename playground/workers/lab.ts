/** The worker of section 2: keeps the head that is shown, and computes its charts. */
import * as Comlink from 'comlink';
import { getBackend, sageattn, setBackend, type Tensor, tensor } from '../../src/index.ts';
import { compare, exactAttention } from '../../src/reference/index.ts';
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

/** What the WASM kernels themselves lose: those that a browser without a GPU runs. */
async function* wasmErrors({ q, k, v, length, dim }: Head): AsyncGenerator<OutputError> {
  // Loaded as the library loads it, so that it is one chunk of the page. A head is too little work for threads.
  own ??= import('../../src/backends/wasm/index.ts').then(({ createWasmBackend }) =>
    setBackend(createWasmBackend({ threads: 1 })),
  );
  await own;
  const backend = await getBackend('wasm');
  if (!(await backend.availability()).available) return;
  const [tq, tk, tv] = [q, k, v].map((data) => tensor(data, [1, 1, length, dim])) as [Tensor, Tensor, Tensor];
  const exact = exactAttention(tq, tk, tv).output;
  for (const { name } of backend.kernels) {
    for (const smoothK of [false, true]) {
      const output = await sageattn(tq, tk, tv, { backend: 'wasm', kernel: name, smoothK });
      const { relativeL1 } = compare(output.data as Float32Array, exact);
      yield { kernel: `WASM ${name}`, granularity: 'per token', smoothK, relativeL1 };
    }
  }
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
