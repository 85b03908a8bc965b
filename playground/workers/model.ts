/** The worker of the sentence encoder: its activations for section 2, its embeddings for section 4. */
import * as Comlink from 'comlink';
import { createProblem } from '../../src/attention/problem.ts';
import { getBackend, type KernelName, sageattn, type Tensor, tensor } from '../../src/index.ts';
import { exactOutput } from '../../src/measure/accuracy.ts';
import { quantizingKernel } from '../../src/measure/quantizing-kernel.ts';
import {
  type AttentionCall,
  type AttentionFunction,
  loadSentenceModel,
  type SentenceModel,
  TRAINED_LENGTH,
} from '../../src/models/sentence-encoder/index.ts';
import { compare } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { slice } from '../../src/tensor/tensor.ts';
import type { Head } from '../lab.ts';
import { type BrowserBackend, survivingLoss, type Told, useBrowserBackends, watchDevice } from './backends.ts';
import { type BenchInputs, contestants } from './contestants.ts';
import { isTiming, measureInTurns } from './in-turns.ts';

const ready = useBrowserBackends();

let model: SentenceModel | undefined;
let stop = new AbortController();
let loading: Promise<SentenceModel> | undefined;

/** Fetches a file piece by piece, so that progress can be shown. */
async function download(url: string, onBytes: (bytes: number) => void): Promise<Uint8Array> {
  const response = await fetch(url);
  if (!response.ok || response.body === null)
    throw new Error(`${url.split('/').at(-1)}: ${response.status} ${response.statusText}`);
  const parts: Uint8Array[] = [];
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    onBytes(part.value.length);
  }
  const whole = new Uint8Array(parts.reduce((sum, { length }) => sum + length, 0));
  let end = 0;
  for (const part of parts) {
    whole.set(part, end);
    end += part.length;
  }
  return whole;
}

function need(): SentenceModel {
  if (model === undefined) throw new Error('the model is not loaded');
  return model;
}

/** What of one forward pass section 2 looks at: q, k and v of both layers. */
async function recordCalls(text: string): Promise<AttentionCall[]> {
  const { tokenizer, encoder } = need();
  const calls: AttentionCall[] = [];
  await encoder.encode([tokenizer.encode(text)], async (call) => {
    calls.push(call);
    return tensor(await exactOutput({ ...call, tensorLayout: 'NHD' }, () => {}), call.q.shape);
  });
  return calls;
}

let recorded: { readonly text: string; readonly calls: AttentionCall[] } | undefined;

function headOf({ q, k, v }: AttentionCall, head: number): Head {
  const [, length = 0, , dim = 0] = q.shape;
  const part = (view: Tensor) => toFloat32(slice(view, 2, head, head + 1));
  return { q: part(q), k: part(k), v: part(v), length, dim };
}

export interface SentencePair {
  readonly tokens: number;
  readonly exact: Float32Array;
  readonly quantized: Float32Array;
  /** Of the two embeddings. */
  readonly cosine: number;
  /** Of both layers. */
  readonly kernels: readonly KernelName[];
}

/** Attention of one layer on a long text. */
export interface LayerRun {
  readonly layer: number;
  readonly heads: number;
  readonly headDim: number;
  readonly kernel: string;
  readonly quantizedMs: number;
  /** The fastest exact attention on the same backend; none when each of them failed. */
  readonly exact: { readonly label: string; readonly ms: number } | undefined;
  /** On some query rows, against float64. */
  readonly relativeL1: number;
  readonly cosine: number;
}

export interface LongRun {
  readonly tokens: number;
  /** Everything of the model that is not attention. */
  readonly restMs: number;
}

const exactAttention: AttentionFunction = async (call) =>
  tensor(await exactOutput({ ...call, tensorLayout: 'NHD' }, () => {}), call.q.shape);

const kernelOf = async ({ q, k, v }: AttentionCall, backend: BrowserBackend): Promise<KernelName> =>
  quantizingKernel(await getBackend(backend), createProblem(q, k, v, { tensorLayout: 'NHD' }));

const quantizedAttention =
  (backend: BrowserBackend, onKernel?: (name: KernelName) => void): AttentionFunction =>
  async (call) => {
    const { q, k, v, attnMask, smScale } = call;
    const kernel = await kernelOf(call, backend);
    onKernel?.(kernel);
    return sageattn(q, k, v, { tensorLayout: 'NHD', smScale, backend, kernel, ...(attnMask && { attnMask }) });
  };

const ACCURACY_ROWS = 64;

/** SageAttention's fastest kernel and every peer of its backend, in turns. */
async function timeLayer(
  call: AttentionCall,
  backend: BrowserBackend,
  ortBase: string | undefined,
  signal: AbortSignal,
): Promise<LayerRun> {
  const contiguous = (view: Tensor) => tensor(toFloat32(view), view.shape);
  const inputs: BenchInputs = { q: contiguous(call.q), k: contiguous(call.k), v: contiguous(call.v), isCausal: false };
  const [, , heads = 0, headDim = 0] = call.q.shape;
  const name = await kernelOf(call, backend);
  const ours = `${backend}:${name}`;
  const chosen = (await contestants([backend], ortBase)).filter(({ id, kind }) => kind === 'peer' || id === ours);
  const outcomes = await measureInTurns(chosen, inputs, { rows: ACCURACY_ROWS, signal, onStep: () => {} });
  const quantized = outcomes.get(ours);
  if (quantized === undefined) throw new Error(`backend ${backend} has no kernel ${name}`);
  if (!isTiming(quantized)) throw new Error(quantized.failure);
  const exact = chosen
    .flatMap(({ id, kind, label }) => {
      const outcome = outcomes.get(id);
      return kind === 'peer' && isTiming(outcome) ? [{ label, ms: outcome.medianMs }] : [];
    })
    .sort((a, b) => a.ms - b.ms)[0];
  return {
    layer: call.layer,
    heads,
    headDim,
    kernel: name,
    quantizedMs: quantized.medianMs,
    exact,
    relativeL1: quantized.relativeL1,
    cosine: quantized.cosineSimilarity,
  };
}

const api = {
  /** @param base the folder of the model's files, with its slash */
  async load(base: string, onProgress: (bytes: number) => void): Promise<void> {
    let received = 0;
    loading ??= loadSentenceModel((name) =>
      download(base + name, (bytes) => {
        received += bytes;
        onProgress(received);
      }),
    );
    try {
      model = await loading;
    } catch (error) {
      loading = undefined;
      throw error;
    }
  },

  async head(text: string, layer: number, head: number): Promise<Head> {
    if (recorded?.text !== text) recorded = { text, calls: await recordCalls(text) };
    const call = recorded.calls[layer];
    if (call === undefined)
      return { q: new Float32Array(), k: new Float32Array(), v: new Float32Array(), length: 0, dim: 0 };
    const taken = headOf(call, head);
    return Comlink.transfer(taken, [taken.q.buffer, taken.k.buffer, taken.v.buffer]);
  },

  /** One sentence, with exact attention and with SageAttention. */
  async sentence(text: string, backend: BrowserBackend): Promise<SentencePair> {
    await ready;
    const { tokenizer, encoder } = need();
    const ids = tokenizer.encode(text);
    const [exact] = await encoder.encode([ids], exactAttention);
    const kernels: KernelName[] = [];
    const attend = quantizedAttention(backend, (name) => kernels.push(name));
    const [quantized] = await survivingLoss(() => encoder.encode([ids], attend));
    if (exact === undefined || quantized === undefined) throw new Error('the encoder gave nothing');
    const { cosineSimilarity } = compare(quantized, exact);
    return { tokens: Math.min(ids.length, TRAINED_LENGTH), exact, quantized, cosine: cosineSimilarity, kernels };
  },

  /**
   * The text as one sequence through the model, then the attention of each layer timed by itself.
   *
   * @returns nothing when it was stopped
   */
  async long(
    text: string,
    maxTokens: number,
    backend: BrowserBackend,
    ortBase: string | undefined,
    onStep: (note: string) => Told,
    onLayer: (run: LayerRun) => Told,
  ): Promise<LongRun | undefined> {
    await ready;
    stop = new AbortController();
    const { signal } = stop;
    const { tokenizer, encoder } = need();
    await onStep('Cutting the text into tokens…');
    const ids = tokenizer.encode(text).slice(0, maxTokens);
    if (ids.length === 0) return { tokens: 0, restMs: 0 };
    const calls: AttentionCall[] = [];
    let attentionMs = 0;
    const start = performance.now();
    const attend = quantizedAttention(backend);
    const record: AttentionFunction = async (call) => {
      await onStep(`${ids.length} tokens through the model: layer ${calls.length + 1} of 2…`);
      signal.throwIfAborted();
      const before = performance.now();
      const output = await survivingLoss(() => attend(call));
      attentionMs += performance.now() - before;
      calls.push(call);
      return output;
    };
    try {
      await encoder.encode([ids], record, { maxLength: Number.POSITIVE_INFINITY });
      const restMs = performance.now() - start - attentionMs;
      for (const call of calls) {
        await onStep(`Timing attention of layer ${call.layer + 1}…`);
        await onLayer(await survivingLoss(() => timeLayer(call, backend, ortBase, signal)));
      }
      return { tokens: ids.length, restMs };
    } catch (error) {
      if (signal.aborted) return undefined;
      throw error;
    }
  },

  stop(): void {
    stop.abort();
  },

  watchDevice,
};

export type ModelApi = typeof api;
Comlink.expose(api);
