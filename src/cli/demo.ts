/** `sageattention demo`: a trained encoder on real text, with exact attention and with SageAttention. */

import { type Machine, thisMachine } from '../measure/machine.ts';
import { readUserFile } from './arguments.ts';
import { chooseBackend } from './backends.ts';
import { DEFAULT_SENTENCES, DEFAULT_TEXT, pickSentences } from './demo-text.ts';
import {
  compareEncoders,
  type EncoderComparison,
  type KernelSelection,
  type LayerComparison,
} from './encoder-comparison.ts';
import { UserError } from './errors.ts';
import { type BackendName, compare, type KernelName, TRAINED_LENGTH } from './library.ts';
import { openSentenceModel } from './model.ts';
import { openPeer } from './onnxruntime-peer.ts';
import { writeReport } from './report-file.ts';
import {
  ACCURACY_HEADINGS,
  accuracyCells,
  bold,
  cosine,
  count,
  dim,
  duration,
  paragraph,
  print,
  printFacts,
  rateCell,
  table,
} from './terminal.ts';

export interface DemoOptions {
  readonly text?: string;
  readonly backend: BackendName | 'auto';
  readonly kernel: KernelName | 'auto';
  readonly maxTokens: number;
  readonly json?: string;
}

/** What `demo --json` writes. */
export interface DemoReport {
  readonly schema: 'sageattention-demo/1';
  readonly machine: Machine;
  readonly backend: BackendName;
  readonly text: string;
  readonly textTokens: number;
  readonly sentences: EncoderComparison & {
    readonly texts: readonly string[];
    /** Cosine similarity of every two sentences. */
    readonly exactSimilarity: readonly (readonly number[])[];
    readonly sageSimilarity: readonly (readonly number[])[];
    readonly largestDifference: number;
  };
  /** The text, or its first `maxTokens`, in pieces as the model was trained. */
  readonly pieces: EncoderComparison;
  /** The same tokens as one sequence. */
  readonly oneSequence: EncoderComparison;
}

async function readText(file: string | undefined): Promise<{ title: string; text: string }> {
  if (file === undefined) return { title: DEFAULT_TEXT.title, text: await DEFAULT_TEXT.read() };
  const bytes = await readUserFile(file);
  try {
    return { title: file, text: new TextDecoder('utf-8', { fatal: true }).decode(bytes) };
  } catch {
    throw new UserError(`${file} is not UTF-8 text`);
  }
}

function similarity(embeddings: readonly Float32Array[]): number[][] {
  return embeddings.map((a) => embeddings.map((b) => compare(a, b).cosineSimilarity));
}

function cut<T>(values: readonly T[], length: number): T[][] {
  return Array.from({ length: Math.ceil(values.length / length) }, (_, i) =>
    values.slice(i * length, (i + 1) * length),
  );
}

/** The other engine's time, and how many times as long as SageAttention's it is. */
function peerCell({ onnxruntimeWeb: peer, sageMs }: LayerComparison): string {
  if (peer === undefined) return '';
  if ('failed' in peer) return peer.failed;
  return `${duration(peer.medianMs)} (${(peer.medianMs / sageMs).toFixed(1)}x)`;
}

function printComparison(comparison: EncoderComparison): void {
  const { layers, worstEmbeddingCosine, exactEncoderMs, sageEncoderMs, denseMs } = comparison;
  print(
    table(
      ['', '>heads', ...ACCURACY_HEADINGS],
      layers.flatMap((layer) => [
        [`layer ${layer.layer + 1} attention`, `${layer.heads} x ${layer.headDim}`, ...accuracyCells(layer.attention)],
        [`layer ${layer.layer + 1} output`, '', ...accuracyCells(layer.hidden)],
      ]),
    ),
  );
  const withPeer = layers.some(({ onnxruntimeWeb }) => onnxruntimeWeb !== undefined);
  print();
  print(
    table(
      ['', '>SageAttention', '>FLOP/s', '>exact f32', ...(withPeer ? ['>onnxruntime-web'] : [])],
      layers.map((layer) => [
        `layer ${layer.layer + 1}`,
        duration(layer.sageMs),
        rateCell(layer.sageGflops),
        `${duration(layer.exactMs)} (${(layer.exactMs / layer.sageMs).toFixed(1)}x)`,
        ...(withPeer ? [peerCell(layer)] : []),
      ]),
    ),
  );
  const kernels = [...new Set(layers.map(({ kernel }) => kernel))].join(', ');
  const least = comparison.sequences > 1 ? 'at least ' : '';
  print();
  print(paragraph(`Embeddings: cosine similarity ${least}${cosine(worstEmbeddingCosine)}. Kernel: ${kernels}.`));
  print(
    paragraph(
      `Whole encoder: ${duration(exactEncoderMs)} with exact attention in ${comparison.reference}, ` +
        `${duration(sageEncoderMs)} with SageAttention, of which ${duration(denseMs)} are its dense layers.`,
    ),
  );
}

/** Embeddings that agree so well find the same neighbours. */
const SAME_COSINE = 0.999;

/** What all of it comes to, in words. */
function verdict(comparisons: readonly EncoderComparison[]): string[] {
  const worst = Math.min(...comparisons.map(({ worstEmbeddingCosine }) => worstEmbeddingCosine));
  const { layers, longest } = comparisons.at(-1) as EncoderComparison;
  const sum = (times: readonly number[]) => times.reduce((total, time) => total + time, 0);
  const sageMs = sum(layers.map((layer) => layer.sageMs));
  const against = (name: string, milliseconds: number) => {
    const ratio = milliseconds / sageMs;
    const said = ratio >= 1 ? `${ratio.toFixed(1)} times as long` : `only ${ratio.toFixed(2)} of that`;
    return `${name} ${duration(milliseconds)}, ${said}`;
  };
  const peers = layers.map(({ onnxruntimeWeb }) => onnxruntimeWeb);
  const peerMs = peers.flatMap((peer) => (peer !== undefined && 'medianMs' in peer ? [peer.medianMs] : []));
  return [
    `Accuracy: ${worst >= SAME_COSINE ? 'the same answers' : 'different answers'}. ` +
      `Every embedding has a cosine similarity of at least ${cosine(worst)} with the exact one.`,
    `Speed: attention over ${count(longest)} tokens takes ${[
      duration(sageMs),
      against('exact float32 of this package', sum(layers.map(({ exactMs }) => exactMs))),
      ...(peerMs.length === layers.length ? [against('onnxruntime-web', sum(peerMs))] : []),
    ].join('; ')}.`,
  ];
}

/** Two columns of eight fit into a line. */
const SIMILARITY_WIDTH = 4;

/** Digits and, on a terminal, shades of grey: white is 1. */
function similarityCell(value: number): string {
  const text = value
    .toFixed(2)
    .replace(/^(-?)0\./, '$1.')
    .replace('1.00', '1.0')
    .padStart(SIMILARITY_WIDTH);
  if (process.stdout.isTTY !== true || process.env.NO_COLOR) return text;
  const level = Math.round(Math.min(1, Math.max(0, value)) * 23);
  return `\u001b[48;5;${232 + level}m\u001b[38;5;${level > 11 ? 16 : 231}m${text}\u001b[0m`;
}

function printMatrices({ texts, exactSimilarity, sageSimilarity, largestDifference }: DemoReport['sentences']): void {
  texts.forEach((text, i) => {
    print(`  ${i + 1}  ${text.length > 75 ? `${text.slice(0, 74)}…` : text}`);
  });
  print();
  const heading = texts.map((_, i) => String(i + 1).padStart(SIMILARITY_WIDTH)).join('');
  print(`     ${'exact'.padEnd(heading.length)}     SageAttention`);
  print(`     ${heading}     ${heading}`);
  for (const [i, row] of exactSimilarity.entries()) {
    const sage = sageSimilarity[i] as readonly number[];
    print(`${String(i + 1).padStart(4)} ${row.map(similarityCell).join('')}     ${sage.map(similarityCell).join('')}`);
  }
  print(`Largest difference between the two matrices: ${largestDifference.toExponential(2)}`);
}

export async function demo({ text: file, backend, kernel, maxTokens, json }: DemoOptions): Promise<void> {
  // What a clean machine lacks is said before anything else.
  const { tokenizer, encoder } = await openSentenceModel();
  const { title, text } = await readText(file);
  const tokens = tokenizer.encode(text);
  if (tokens.length === 0) throw new UserError(`${title} has no words`);
  const selection: KernelSelection = { backend: (await chooseBackend(backend, kernel)).name, kernel };

  // Another CPU engine says something about speed only beside a CPU backend.
  const peer = selection.backend === 'wasm' ? await openPeer() : undefined;

  print(bold('SageAttention in a trained sentence encoder'));
  printFacts({
    model: 'Universal Sentence Encoder Lite, English: 2 layers, 4 heads of 64 and 4 of 128',
    backend: selection.backend,
    text: `${title}: ${count(tokens.length)} tokens`,
  });
  print(
    dim(
      [
        ...(kernel === 'auto'
          ? ['SageAttention: the fastest kernel that quantizes, also where so few keys get the exact one by default.']
          : []),
        'attention: the same q, k and v through both. output: of the whole layer, all up to it computed with SageAttention.',
        'accuracy: cosine similarity, relative L1 and largest difference against exact attention, of the sentences in float64, of the whole text in float32.',
        "exact f32: this package's kernel that quantizes nothing, on WebAssembly. In brackets: times SageAttention's time.",
        ...(peer === undefined
          ? []
          : [`onnxruntime-web: its float32 MultiHeadAttention on WebAssembly, ${peer.threads} threads.`]),
      ]
        .map(paragraph)
        .join('\n'),
    ),
  );

  const texts = file === undefined ? [...DEFAULT_SENTENCES] : pickSentences(text);
  print();
  print(bold(`1. ${texts.length} sentences, one padded batch`));
  const sentences = await compareEncoders(
    encoder,
    texts.map(tokenizer.encode),
    selection,
    'sentences',
    TRAINED_LENGTH,
    peer,
  );
  const exactSimilarity = similarity(sentences.exactEmbeddings);
  const sageSimilarity = similarity(sentences.sageEmbeddings);
  const sentenceReport = {
    ...sentences.comparison,
    texts,
    exactSimilarity,
    sageSimilarity,
    largestDifference: compare(sageSimilarity.flat(), exactSimilarity.flat()).maxAbsoluteError,
  };
  printMatrices(sentenceReport);
  print();
  printComparison(sentenceReport);

  const used = tokens.slice(0, maxTokens);
  const which = `${used.length < tokens.length ? 'The first' : 'All'} ${count(used.length)} tokens`;
  const pieces = cut(used, TRAINED_LENGTH);
  print();
  print(bold(`2. ${which} in ${pieces.length} pieces of at most ${TRAINED_LENGTH}, as the model was trained`));
  const inPieces = await compareEncoders(encoder, pieces, selection, 'pieces', TRAINED_LENGTH, peer);
  printComparison(inPieces.comparison);

  print();
  print(bold(`3. ${which} as one sequence`));
  print(
    dim(
      paragraph(
        `Beyond what the model was trained for (${TRAINED_LENGTH} tokens): the embedding means little. What it shows is how accurate and how fast attention is on real activations at this length.`,
      ),
    ),
  );
  const inOne = await compareEncoders(encoder, [used], selection, 'one sequence', Number.POSITIVE_INFINITY, peer);
  printComparison(inOne.comparison);

  print();
  print(bold('Verdict'));
  for (const line of verdict([sentences, inPieces, inOne].map(({ comparison }) => comparison))) {
    print(paragraph(line));
  }

  if (json !== undefined) {
    const report: DemoReport = {
      schema: 'sageattention-demo/1',
      machine: thisMachine(),
      backend: selection.backend,
      text: title,
      textTokens: tokens.length,
      sentences: sentenceReport,
      pieces: inPieces.comparison,
      oneSequence: inOne.comparison,
    };
    await writeReport(json, JSON.stringify(report, null, 2));
  }
}
