/** A small graph with attention in it, its inputs, and how it must be rewritten. */
import * as ort from 'onnxruntime-node';
import type { GraphBuilder } from '../../../../test/support/graph-builder.ts';
import type { Random } from '../../../../test/support/random.ts';

export type Feeds = Record<string, ort.Tensor>;

/** A row of the documentation's table of exporters. */
export interface ExportedModels {
  readonly models: string;
  readonly exporter: string;
  /** Version of this package that takes it. */
  readonly since: string;
}

export interface Case {
  readonly name: string;
  /** Set where real models are exported like this. */
  readonly exported?: ExportedModels;
  readonly build: (g: GraphBuilder) => void;
  readonly feeds: (random: Random) => Feeds;
  readonly opset?: number;
  /** Attentions replaced; default 1. */
  readonly taken?: number;
  /** Part of the reason of an attention that is left. */
  readonly left?: string;
  /** Values that q, k and v are read from; not looked at by default. */
  readonly sources?: number;
}

/** Normal numbers. */
export function floats(random: Random, dims: readonly number[], scale = 1): ort.Tensor {
  const count = dims.reduce((product, size) => product * size, 1);
  return new ort.Tensor('float32', random.normals(count, scale), dims);
}
