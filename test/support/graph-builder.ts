/** Writes small ONNX models with random weights, one node after the other, for tests and benches. */

import {
  type ElementTypeName,
  graph,
  model,
  type NodeOptions,
  type NodeProto,
  node,
  type TensorProto,
  tensorProto,
  type ValueInfoProto,
  valueInfo,
  writeModel,
} from '../../src/integrations/onnxruntime/onnx/codec.ts';
import { float16FromNumber } from '../../src/tensor/formats/float16.ts';
import type { Random } from './random.ts';

type Dims = readonly (number | string)[];

/** Attributes beside the domain and the name of a node. */
export type OpOptions = NodeOptions & { readonly outputs?: readonly string[] };

export class GraphBuilder {
  readonly #nodes: NodeProto[] = [];
  readonly #initializers: TensorProto[] = [];
  readonly #inputs: ValueInfoProto[] = [];
  readonly #outputs: ValueInfoProto[] = [];
  readonly #random: Random;
  readonly #float: 'float32' | 'float16';
  #count = 0;

  constructor(random: Random, float: 'float32' | 'float16' = 'float32') {
    this.#random = random;
    this.#float = float;
  }

  input(name: string, dims: Dims, type: ElementTypeName = this.#float): string {
    this.#inputs.push(valueInfo(name, type, dims));
    return name;
  }

  output(name: string, dims?: Dims, type: ElementTypeName = this.#float): void {
    this.#outputs.push(valueInfo(name, type, dims));
  }

  /** Adds a node; the result is its first output. */
  op(
    opType: string,
    inputs: readonly string[],
    attributes: NodeOptions['attributes'] = {},
    options: OpOptions = {},
  ): string {
    const outputs = options.outputs ?? [`${opType}_${this.#count}`];
    this.#nodes.push(node(opType, inputs, outputs, { name: `${opType}.${this.#count++}`, ...options, attributes }));
    return outputs[0] as string;
  }

  /** A node of the `com.microsoft` domain. */
  contrib(
    opType: string,
    inputs: readonly string[],
    attributes: NodeOptions['attributes'],
    outputs?: readonly string[],
  ): string {
    return this.op(opType, inputs, attributes, {
      domain: 'com.microsoft',
      ...(outputs === undefined ? {} : { outputs }),
    });
  }

  ints(values: readonly number[]): string {
    return this.#constant('int64', [values.length], BigInt64Array.from(values, BigInt));
  }

  /** An int64 without dimensions. */
  int(value: number): string {
    return this.#constant('int64', [], BigInt64Array.of(BigInt(value)));
  }

  scalar(value: number): string {
    return this.#floats([], Float32Array.of(value));
  }

  floats(dims: readonly number[], values: ArrayLike<number>): string {
    return this.#floats(dims, Float32Array.from(values));
  }

  bools(dims: readonly number[], values: ArrayLike<number>): string {
    return this.#constant('bool', dims, Uint8Array.from(values));
  }

  /** Normal numbers. */
  weight(dims: readonly number[], scale: number): string {
    const count = dims.reduce((product, size) => product * size, 1);
    return this.#floats(dims, this.#random.normals(count, scale));
  }

  /** `x W + b` over the last axis. */
  linear(x: string, from: number, to: number, scale = 1): string {
    const product = this.op('MatMul', [x, this.weight([from, to], scale / Math.sqrt(from))]);
    return this.op('Add', [product, this.weight([to], 0.1)]);
  }

  #floats(dims: readonly number[], values: Float32Array): string {
    if (this.#float === 'float32') return this.#constant('float32', dims, values);
    // A loop: `from` with a function takes several times as long, and models of benches have many weights.
    const bits = new Uint16Array(values.length);
    for (let i = 0; i < bits.length; i++) bits[i] = float16FromNumber(values[i] as number);
    return this.#constant('float16', dims, bits);
  }

  #constant(type: ElementTypeName, dims: readonly number[], data: ArrayBufferView): string {
    const name = `c${this.#count++}`;
    this.#initializers.push(tensorProto(name, type, dims, data));
    return name;
  }

  build(opset = 17): Uint8Array {
    const proto = graph({
      name: 'test',
      nodes: this.#nodes,
      inputs: this.#inputs,
      outputs: this.#outputs,
      initializers: this.#initializers,
    });
    return writeModel(model(proto, { '': opset, 'com.microsoft': 1 }));
  }
}
