/**
 * Universal Sentence Encoder Lite (Cer et al. 2018, arXiv 1803.11175, section 3.1): two pre-norm transformer layers,
 * the mean over the tokens, one dense layer. Computed as the shipped graph computes it, except that attention is the
 * caller's.
 */
import { InvalidArgumentError } from '../../errors.ts';
import { type Tensor, tensor } from '../../tensor/tensor.ts';
import { createDense, type Dense } from './dense.ts';
import type { LayerWeights, NormWeights, SentenceEncoderWeights } from './weights.ts';

/** What one layer asks of attention. */
export interface AttentionCall {
  /** Index of the layer. */
  readonly layer: number;
  /** `[B,L,H,D]` float32, and so are k and v: views of one packed projection `[B,L,3,H,D]`. */
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  /**
   * Additive, `[B,1,1,L]`: 0 for tokens, -1e9 for padding, as in the graph. None when all sequences are equally long.
   */
  readonly attnMask: Tensor | undefined;
  readonly smScale: number;
}

/** `softmax(q k^T * smScale + attnMask) v`, contiguous `[B,L,H,D]` float32. */
export type AttentionFunction = (call: AttentionCall) => Promise<Tensor>;

export interface EncodeOptions {
  /** Tokens of a sequence that are used; default 128, what the model was trained with. Infinity: all. */
  readonly maxLength?: number;
  /** Called with each layer's output, `[B,L,512]`, padding included. */
  readonly onLayer?: (layer: number, hidden: Float32Array) => void;
}

export interface SentenceEncoder {
  /** Size of an embedding. */
  readonly size: number;
  /**
   * @param sequences token ids, of any lengths
   * @returns one embedding a sequence, of length 1 in the Euclidean norm
   */
  encode(
    sequences: readonly (readonly number[])[],
    attention: AttentionFunction,
    options?: EncodeOptions,
  ): Promise<Float32Array[]>;
  /** Multiply-adds of the attention of all layers over so many sequences of one length. */
  attentionWork(batch: number, length: number): number;
}

/** The sequences that the model was trained with are no longer than this. */
export const TRAINED_LENGTH = 128;
const NORM_EPSILON = 1e-6;
const PADDING_BIAS = -1e9;
const SMALLEST_SQUARED_NORM = 1e-12;

/** Pre-norm: `scale * (x - mean) / sqrt(variance + epsilon) + bias`, row by row. */
function layerNorm(x: Float32Array, { scale, bias }: NormWeights): Float32Array {
  const width = scale.length;
  const result = new Float32Array(x.length);
  for (let row = 0; row < x.length; row += width) {
    let sum = 0;
    for (let i = row; i < row + width; i++) sum += x[i] as number;
    const mean = sum / width;
    let squares = 0;
    for (let i = row; i < row + width; i++) squares += ((x[i] as number) - mean) ** 2;
    const inverse = 1 / Math.sqrt(squares / width + NORM_EPSILON);
    for (let i = 0; i < width; i++) {
      result[row + i] = ((x[row + i] as number) - mean) * inverse * (scale[i] as number) + (bias[i] as number);
    }
  }
  return result;
}

function add(target: Float32Array, other: Float32Array): Float32Array {
  for (let i = 0; i < target.length; i++) target[i] = (target[i] as number) + (other[i] as number);
  return target;
}

function relu(x: Float32Array): Float32Array {
  for (let i = 0; i < x.length; i++) x[i] = Math.max(0, x[i] as number);
  return x;
}

interface Batch {
  readonly size: number;
  /** Longest sequence; the others are padded to it. */
  readonly length: number;
  readonly lengths: readonly number[];
  readonly attnMask: Tensor | undefined;
}

function createLayer(weights: LayerWeights, index: number) {
  const dense = ({ kernel, bias, inputs, outputs }: NonNullable<LayerWeights['residual']>): Dense =>
    createDense(kernel, bias, inputs, outputs);
  const qkv = dense(weights.qkv);
  const attentionOutput = dense(weights.attentionOutput);
  const residual = weights.residual && dense(weights.residual);
  const feedForward1 = dense(weights.feedForward1);
  const feedForward2 = dense(weights.feedForward2);
  const { heads, headDim } = weights;

  return async (x: Float32Array, batch: Batch, attention: AttentionFunction): Promise<Float32Array> => {
    const rows = batch.size * batch.length;
    const packed = await qkv.apply(layerNorm(x, weights.attentionNorm), rows);
    const part = (which: number) =>
      tensor(packed, [batch.size, batch.length, heads, headDim], {
        offset: which * heads * headDim,
        strides: [batch.length * qkv.outputs, qkv.outputs, headDim, 1],
      });
    const attended = await attention({
      layer: index,
      q: part(0),
      k: part(1),
      v: part(2),
      attnMask: batch.attnMask,
      smScale: 1 / Math.sqrt(headDim),
    });
    const hidden = add(
      await attentionOutput.apply(attended.data as Float32Array, rows),
      residual === undefined ? x : await residual.apply(x, rows),
    );
    const inner = relu(await feedForward1.apply(layerNorm(hidden, weights.feedForwardNorm), rows));
    return add(await feedForward2.apply(inner, rows), hidden);
  };
}

export function createSentenceEncoder(weights: SentenceEncoderWeights): SentenceEncoder {
  const { embeddings, vocabularySize, width, frequencies } = weights;
  const layers = weights.layers.map(createLayer);
  const output = createDense(weights.output.kernel, weights.output.bias, weights.output.inputs, weights.output.outputs);

  /** The graph adds the embedding twice: once by itself, once with the position signal. Padding stays 0. */
  function embed(sequences: readonly (readonly number[])[], { size, length, lengths }: Batch): Float32Array {
    const x = new Float32Array(size * length * width);
    const half = width / 2;
    for (let b = 0; b < size; b++) {
      for (let position = 0; position < (lengths[b] as number); position++) {
        const id = sequences[b]?.[position] as number;
        const row = (b * length + position) * width;
        for (let i = 0; i < width; i++) x[row + i] = 2 * (embeddings[id * width + i] as number);
        for (let i = 0; i < half; i++) {
          const angle = Math.fround(position * (frequencies[i] as number));
          x[row + i] = (x[row + i] as number) + Math.sin(angle);
          x[row + half + i] = (x[row + half + i] as number) + Math.cos(angle);
        }
      }
    }
    return x;
  }

  function paddingMask(lengths: readonly number[], length: number): Tensor | undefined {
    if (lengths.every((other) => other === length)) return undefined;
    const mask = new Float32Array(lengths.length * length);
    lengths.forEach((end, b) => {
      mask.fill(PADDING_BIAS, b * length + end, (b + 1) * length);
    });
    return tensor(mask, [lengths.length, 1, 1, length]);
  }

  /** Mean over the tokens of each sequence, `[B,512]`; 0 for an empty one. */
  function pool(hidden: Float32Array, { size, length, lengths }: Batch): Float32Array {
    const means = new Float32Array(size * output.inputs);
    for (let b = 0; b < size; b++) {
      const count = lengths[b] as number;
      for (let i = 0; i < output.inputs && count > 0; i++) {
        let sum = 0;
        for (let token = 0; token < count; token++) sum += hidden[(b * length + token) * output.inputs + i] as number;
        means[b * output.inputs + i] = sum / count;
      }
    }
    return means;
  }

  function normalize(embedding: Float32Array): Float32Array {
    const squares = embedding.reduce((sum, value) => sum + value * value, 0);
    const inverse = 1 / Math.sqrt(Math.max(squares, SMALLEST_SQUARED_NORM));
    return embedding.map((value) => value * inverse);
  }

  async function encode(
    sequences: readonly (readonly number[])[],
    attention: AttentionFunction,
    { maxLength = TRAINED_LENGTH, onLayer }: EncodeOptions = {},
  ): Promise<Float32Array[]> {
    const invalid = sequences.flat().find((id) => !Number.isInteger(id) || id < 0 || id >= vocabularySize);
    if (invalid !== undefined) {
      throw new InvalidArgumentError(
        'invalid-shape',
        'sequences',
        `token ids from 0 to ${vocabularySize - 1}`,
        String(invalid),
      );
    }
    const lengths = sequences.map((ids) => Math.min(ids.length, maxLength));
    const length = Math.max(0, ...lengths);
    const batch: Batch = { size: sequences.length, length, lengths, attnMask: paddingMask(lengths, length) };
    let hidden = embed(sequences, batch);
    if (length > 0) {
      for (const [index, layer] of layers.entries()) {
        hidden = await layer(hidden, batch, attention);
        onLayer?.(index, hidden);
      }
    }
    const embedded = (await output.apply(pool(hidden, batch), batch.size)).map(Math.tanh);
    return sequences.map((_, b) => normalize(embedded.subarray(b * output.outputs, (b + 1) * output.outputs)));
  }

  const attentionWork = (batch: number, length: number) =>
    weights.layers.reduce((sum, { heads, headDim }) => sum + 2 * batch * heads * headDim * length * length, 0);

  return { size: output.outputs, encode, attentionWork };
}
