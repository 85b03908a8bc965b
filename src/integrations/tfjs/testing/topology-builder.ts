/** Builds topologies of GraphModels node by node, with the weights and inputs that they run on. */
import * as tf from '@tensorflow/tfjs-core';
import type { Random } from '../../../../test/support/random.ts';
import { elementCount } from '../../../tensor/tensor.ts';
import type { ModelTopology } from '../index.ts';

/** Codes of TensorFlow's `DataType`. */
const TYPES = { float32: 1, int32: 3 } as const;

interface Weight {
  readonly name: string;
  readonly shape: number[];
  readonly dtype: 'float32' | 'int32';
  readonly values: ArrayLike<number>;
}

export class TopologyBuilder {
  readonly #random: Random;
  readonly #nodes: ModelTopology['node'][number][] = [];
  readonly #weights: Weight[] = [];
  readonly #inputs: Weight[] = [];

  constructor(random: Random) {
    this.#random = random;
  }

  /** @returns the node's name, as all of these do */
  node(
    op: string,
    input: readonly string[],
    attributes: Readonly<Record<string, boolean | number | string>> = {},
  ): string {
    const name = `${op}_${this.#nodes.length}`;
    const attr = Object.entries(attributes).map(([key, value]) => [
      key,
      typeof value === 'boolean' ? { b: value } : typeof value === 'string' ? { s: btoa(value) } : { type: value },
    ]);
    this.#nodes.push({ name, op, input: [...input], attr: Object.fromEntries(attr) });
    return name;
  }

  /** An input of normal numbers. */
  input(shape: readonly number[]): string {
    const name = this.node('Placeholder', [], { dtype: TYPES.float32 });
    this.#inputs.push({ name, shape: [...shape], dtype: 'float32', values: this.#normals(shape) });
    return name;
  }

  /** A constant of normal numbers. */
  constant(shape: readonly number[]): string {
    return this.#weight(shape, 'float32', this.#normals(shape));
  }

  scalar(value: number): string {
    return this.#weight([], 'float32', [value]);
  }

  integer(value: number): string {
    return this.#weight([], 'int32', [value]);
  }

  /** A constant vector of integers. */
  shape(sizes: readonly number[]): string {
    return this.#weight([sizes.length], 'int32', sizes);
  }

  topology(): ModelTopology {
    return { node: [...this.#nodes], versions: {} };
  }

  weights(): { weightSpecs: tf.io.WeightsManifestEntry[]; weightData: ArrayBuffer } {
    const data = this.#weights.flatMap(({ dtype, values }) => {
      const array = dtype === 'int32' ? Int32Array.from(values) : Float32Array.from(values);
      return [...new Uint8Array(array.buffer)];
    });
    const weightSpecs = this.#weights.map(({ name, shape, dtype }) => ({ name, shape, dtype }));
    return { weightSpecs, weightData: Uint8Array.from(data).buffer };
  }

  feeds(): tf.NamedTensorMap {
    return Object.fromEntries(
      this.#inputs.map(({ name, shape, values }) => [name, tf.tensor(Float32Array.from(values), shape)]),
    );
  }

  #normals(shape: readonly number[]): Float32Array {
    return this.#random.normals(elementCount(shape));
  }

  #weight(shape: readonly number[], dtype: Weight['dtype'], values: ArrayLike<number>): string {
    const name = this.node('Const', [], { dtype: TYPES[dtype] });
    this.#weights.push({ name, shape: [...shape], dtype, values });
    return name;
  }
}
