/** The encoder with exact attention and with SageAttention, side by side. */
import { performance } from 'node:perf_hooks';
import { exactOutput } from '../measure/accuracy.ts';
import { attentionOperations } from '../measure/operations.ts';
import { quantizingKernel } from '../measure/quantizing-kernel.ts';
import { median } from '../measure/statistics.ts';
import {
  type Accuracy,
  type AttentionCall,
  type AttentionFunction,
  type BackendName,
  compare,
  createProblem,
  getBackend,
  type KernelName,
  type SentenceEncoder,
  sageattn,
  type Tensor,
  tensor,
} from './library.ts';
import { failureOf, type Peer } from './onnxruntime-peer.ts';
import { type Progress, progress } from './terminal.ts';

export interface LayerComparison {
  readonly layer: number;
  readonly heads: number;
  readonly headDim: number;
  readonly kernel: KernelName;
  /** SageAttention's output against exact attention's on the same q, k and v. */
  readonly attention: Accuracy;
  /** The layer's output when every layer so far used SageAttention, against all exact. */
  readonly hidden: Accuracy;
  /** Exact attention in float32, this package's kernel `exact` on WASM: median of several calls. */
  readonly exactMs: number;
  /** Median of several calls. */
  readonly sageMs: number;
  /** 4 B H L^2 D / sageMs; padding counts, as it is computed. */
  readonly sageGflops: number;
  /** The same attention by onnxruntime-web in float32, where it is installed: median time, or why it failed. */
  readonly onnxruntimeWeb?: { readonly medianMs: number } | { readonly failed: string };
}

export interface EncoderComparison {
  readonly sequences: number;
  readonly tokens: number;
  readonly longest: number;
  readonly layers: readonly LayerComparison[];
  /** Of each sequence's embedding, SageAttention against exact: the smallest cosine similarity. */
  readonly worstEmbeddingCosine: number;
  /** The whole encoder with each attention. */
  readonly exactEncoderMs: number;
  readonly sageEncoderMs: number;
  /** What of that is not attention: dense layers and norms. */
  readonly denseMs: number;
  /** What the accuracy is measured against. */
  readonly reference: 'float64' | 'float32';
}

export interface EncoderResult {
  readonly comparison: EncoderComparison;
  readonly exactEmbeddings: readonly Float32Array[];
  readonly sageEmbeddings: readonly Float32Array[];
}

export interface KernelSelection {
  readonly backend: BackendName;
  /** `auto`: the fastest that quantizes, also for few keys. */
  readonly kernel: KernelName | 'auto';
}

/** Calls are repeated this often at least, and short ones until this many milliseconds have gone. */
const LEAST_CALLS = 3;
const TIMED_MS = 150;
/** A call that takes longer is timed once. */
const LONG_MS = 250;
/** Multiply-adds up to which the reference is computed in float64, by plain TypeScript; beyond, by the exact float32 kernel. */
const FLOAT64_WORK = 2e8;

/** A selection in which the kernel is settled. */
interface Chosen extends KernelSelection {
  readonly kernel: KernelName;
}

function optionsOf({ attnMask, smScale }: AttentionCall) {
  return { tensorLayout: 'NHD', smScale, ...(attnMask && { attnMask }) } as const;
}

const runSage = (call: AttentionCall, chosen: Chosen): Promise<Tensor> =>
  sageattn(call.q, call.k, call.v, { ...optionsOf(call), ...chosen });

const EXACT: Chosen = { backend: 'wasm', kernel: 'exact' };

async function choose(call: AttentionCall, { backend, kernel }: KernelSelection): Promise<Chosen> {
  if (kernel !== 'auto') return { backend, kernel };
  const problem = createProblem(call.q, call.k, call.v, optionsOf(call));
  return { backend, kernel: await quantizingKernel(await getBackend(backend), problem) };
}

/** @param warm whether such a call has run before, so that the first one's time counts if it is long */
async function timed<T>(run: () => Promise<T>, warm: boolean): Promise<{ output: T; medianMs: number }> {
  const begin = performance.now();
  const output = await run();
  const first = performance.now() - begin;
  if (warm && first > LONG_MS) return { output, medianMs: first };
  const calls = first > LONG_MS ? 1 : LEAST_CALLS;
  const times: number[] = [];
  for (let total = 0; times.length < calls || total < TIMED_MS; total += times.at(-1) as number) {
    const start = performance.now();
    await run();
    times.push(performance.now() - start);
  }
  return { output, medianMs: median(times) };
}

async function timePeer(peer: Peer, call: AttentionCall): Promise<NonNullable<LayerComparison['onnxruntimeWeb']>> {
  try {
    const { medianMs } = await timed(await peer.prepare(call), false);
    return { medianMs };
  } catch (error) {
    return { failed: failureOf(error) };
  }
}

/** Rows of real tokens; rows of padding are arbitrary. */
function tokenRows(values: Float32Array, lengths: readonly number[], longest: number): Float32Array {
  const width = values.length / (lengths.length * longest);
  const rows = new Float32Array(lengths.reduce((sum, length) => sum + length, 0) * width);
  let end = 0;
  lengths.forEach((length, b) => {
    rows.set(values.subarray(b * longest * width, (b * longest + length) * width), end);
    end += length * width;
  });
  return rows;
}

interface Recorded {
  readonly call: AttentionCall;
  readonly exact: Float32Array;
}

/**
 * Encodes `sequences` twice and compares.
 *
 * @param label names the work on the progress bar
 * @param maxLength Infinity: sequences are not clipped to what the model was trained with
 * @param peer another engine whose time is taken on the same tensors
 */
export async function compareEncoders(
  encoder: SentenceEncoder,
  sequences: readonly (readonly number[])[],
  selection: KernelSelection,
  label: string,
  maxLength: number,
  peer: Peer | undefined,
): Promise<EncoderResult> {
  const lengths = sequences.map(({ length }) => Math.min(length, maxLength));
  const longest = Math.max(...lengths);
  const recorded: Recorded[] = [];
  const exactHidden: Float32Array[] = [];
  let bar: Progress | undefined;
  const reference = encoder.attentionWork(sequences.length, longest) <= FLOAT64_WORK ? 'float64' : 'float32';
  const exact: AttentionFunction = async (call) => {
    bar ??= progress(`${label}: exact attention in ${reference}, 2 layers`, 2 * longest);
    const output =
      reference === 'float64'
        ? await exactOutput({ ...call, tensorLayout: 'NHD' }, (rows) => bar?.advance(rows))
        : ((await runSage(call, EXACT)).data as Float32Array);
    if (reference === 'float32') bar.advance(longest);
    recorded.push({ call, exact: output });
    return tensor(output, call.q.shape);
  };
  const exactStart = performance.now();
  const exactEmbeddings = await encoder
    .encode(sequences, exact, { maxLength, onLayer: (_, hidden) => exactHidden.push(hidden) })
    .finally(() => bar?.stop());
  const exactEncoderMs = performance.now() - exactStart;

  const sageHidden: Float32Array[] = [];
  let attentionMs = 0;
  const sageStart = performance.now();
  const sageEmbeddings = await encoder.encode(
    sequences,
    async (call) => {
      const before = performance.now();
      const output = await runSage(call, await choose(call, selection));
      attentionMs += performance.now() - before;
      return output;
    },
    { maxLength, onLayer: (_, hidden) => sageHidden.push(hidden) },
  );
  const sageEncoderMs = performance.now() - sageStart;

  const rowsOf = (values: Float32Array) => tokenRows(values, lengths, longest);
  const layers: LayerComparison[] = [];
  for (const { call, exact: expected } of recorded) {
    const chosen = await choose(call, selection);
    const { output, medianMs: sageMs } = await timed(() => runSage(call, chosen), true);
    const { medianMs: exactMs } = await timed(() => runSage(call, EXACT), reference === 'float32');
    const [batch, length, heads, headDim] = call.q.shape as [number, number, number, number];
    layers.push({
      layer: call.layer,
      heads,
      headDim,
      kernel: chosen.kernel,
      attention: compare(rowsOf(output.data as Float32Array), rowsOf(expected)),
      hidden: compare(rowsOf(sageHidden[call.layer] as Float32Array), rowsOf(exactHidden[call.layer] as Float32Array)),
      exactMs,
      sageMs,
      sageGflops: attentionOperations({ batch, heads, tokens: length, headDim }) / sageMs / 1e6,
      ...(peer && { onnxruntimeWeb: await timePeer(peer, call) }),
    });
  }
  const cosines = exactEmbeddings.map(
    (embedding, i) => compare(sageEmbeddings[i] as Float32Array, embedding).cosineSimilarity,
  );
  return {
    comparison: {
      sequences: sequences.length,
      tokens: lengths.reduce((sum, length) => sum + length, 0),
      longest,
      layers,
      worstEmbeddingCosine: Math.min(...cosines),
      exactEncoderMs,
      sageEncoderMs,
      denseMs: sageEncoderMs - attentionMs,
      reference,
    },
    exactEmbeddings,
    sageEmbeddings,
  };
}
