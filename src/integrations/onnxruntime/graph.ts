/** An ONNX graph with the look-ups that matching and cutting need. */
import { canonicalDomain, type GraphProto, type NodeProto, type TensorProto, tensorNumbers } from './onnx/codec.ts';

export interface GraphIndex {
  readonly graph: GraphProto;
  /** Nodes that compute something; `Constant` nodes are among `constants` instead. */
  readonly nodes: readonly NodeProto[];
  readonly constants: ReadonlyMap<string, TensorProto>;
  /** Names that a caller feeds. */
  readonly inputs: ReadonlySet<string>;
  readonly outputs: ReadonlySet<string>;
  /** Version of the default operator set. */
  readonly opset: number;
  producer(value: string): NodeProto | undefined;
  consumers(value: string): readonly NodeProto[];
  /** The one node that reads `value`, once; undefined when there are more uses or it is an output of the graph. */
  soleConsumer(value: string): NodeProto | undefined;
  /** Names that a node reads, those captured by its subgraphs included; no empty names. */
  readsOf(node: NodeProto): readonly string[];
}

export function indexGraph(graph: GraphProto, opset: number): GraphIndex {
  const constants = new Map<string, TensorProto>(graph.initializer.map((tensor) => [tensor.name, tensor]));
  const nodes: NodeProto[] = [];
  const producers = new Map<string, NodeProto>();
  const consumers = new Map<string, NodeProto[]>();
  const reads = new Map<NodeProto, string[]>();
  for (const node of graph.node) {
    const constant = node.opType === 'Constant' ? node.attribute.find((entry) => entry.name === 'value')?.t : undefined;
    if (constant !== undefined) {
      constants.set(node.output[0] as string, constant);
      continue;
    }
    nodes.push(node);
    for (const name of node.output) if (name !== '') producers.set(name, node);
    const names = [...node.input.filter((name) => name !== ''), ...capturedNames(node)];
    reads.set(node, [...new Set(names)]);
    for (const name of names) {
      const list = consumers.get(name);
      if (list === undefined) consumers.set(name, [node]);
      else list.push(node);
    }
  }
  const outputs = new Set(graph.output.map((output) => output.name));
  return {
    graph,
    nodes,
    constants,
    inputs: new Set(graph.input.map((input) => input.name).filter((name) => !constants.has(name))),
    outputs,
    opset,
    producer: (value) => producers.get(value),
    consumers: (value) => consumers.get(value) ?? [],
    soleConsumer: (value) => {
      const list = consumers.get(value);
      return list?.length === 1 && !outputs.has(value) ? list[0] : undefined;
    },
    readsOf: (node) => reads.get(node) ?? [],
  };
}

function subgraphsOf(node: NodeProto): GraphProto[] {
  return node.attribute.flatMap((entry) => [...(entry.g === undefined ? [] : [entry.g]), ...entry.graphs]);
}

/** Names of the outer graph that a node's subgraphs (If, Loop, Scan) read. */
function capturedNames(node: NodeProto): string[] {
  return subgraphsOf(node).flatMap((subgraph) => {
    const local = new Set([
      ...subgraph.input.map((input) => input.name),
      ...subgraph.initializer.map((tensor) => tensor.name),
      ...subgraph.node.flatMap((inner) => inner.output),
    ]);
    const used = [
      ...subgraph.node.flatMap((inner) => [...inner.input, ...capturedNames(inner)]),
      ...subgraph.output.map((output) => output.name),
    ];
    return used.filter((name) => name !== '' && !local.has(name));
  });
}

/** Every node inside a node's subgraphs, at any depth. */
export function nestedNodes(node: NodeProto): NodeProto[] {
  return subgraphsOf(node).flatMap((subgraph) => subgraph.node.flatMap((inner) => [inner, ...nestedNodes(inner)]));
}

export function isOp(node: NodeProto, opType: string, domain?: string): boolean;
export function isOp(node: NodeProto | undefined, opType: string, domain?: string): node is NodeProto;
export function isOp(node: NodeProto | undefined, opType: string, domain = ''): boolean {
  return node !== undefined && node.opType === opType && canonicalDomain(node.domain) === domain;
}

export function intAttribute(node: NodeProto, name: string): number | undefined {
  const entry = node.attribute.find((attribute) => attribute.name === name);
  return entry === undefined ? undefined : Number(entry.i);
}

export function intsAttribute(node: NodeProto, name: string): number[] | undefined {
  return node.attribute.find((attribute) => attribute.name === name)?.ints.map(Number);
}

export function floatAttribute(node: NodeProto, name: string): number | undefined {
  return node.attribute.find((attribute) => attribute.name === name)?.f;
}

export function stringAttribute(node: NodeProto, name: string): string | undefined {
  const entry = node.attribute.find((attribute) => attribute.name === name);
  return entry === undefined ? undefined : new TextDecoder().decode(entry.s);
}

/** Elements of a constant of at most 4096 elements. */
export function constantNumbers(index: GraphIndex, value: string): number[] | undefined {
  const tensor = index.constants.get(value);
  if (tensor === undefined) return undefined;
  const elements = tensor.dims.reduce((product, size) => product * Number(size), 1);
  return elements <= 4096 ? tensorNumbers(tensor) : undefined;
}

const UNARY: Readonly<Record<string, (x: number) => number>> = {
  Identity: (x) => x,
  Cast: (x) => x,
  Sqrt: Math.sqrt,
  Reciprocal: (x) => 1 / x,
  Neg: (x) => -x,
  Unsqueeze: (x) => x,
  Squeeze: (x) => x,
  Reshape: (x) => x,
  Expand: (x) => x,
};

const BINARY: Readonly<Record<string, (x: number, y: number) => number>> = {
  Add: (x, y) => x + y,
  Sub: (x, y) => x - y,
  Mul: (x, y) => x * y,
  Div: (x, y) => x / y,
  Pow: (x, y) => x ** y,
};

/** The value of an expression of constants all of whose elements are equal; undefined when it is none. */
export function constantScalar(index: GraphIndex, value: string, depth = 0): number | undefined {
  const numbers = constantNumbers(index, value);
  if (numbers !== undefined) {
    const [first] = numbers;
    return first !== undefined && numbers.every((x) => Object.is(x, first)) ? first : undefined;
  }
  const node = index.producer(value);
  if (node === undefined || depth > 16 || canonicalDomain(node.domain) !== '') return undefined;
  if (node.opType === 'ConstantOfShape') {
    const fill = node.attribute.find((entry) => entry.name === 'value')?.t;
    return fill === undefined ? 0 : tensorNumbers(fill)?.[0];
  }
  if (node.opType === 'Constant') return floatAttribute(node, 'value_float') ?? intAttribute(node, 'value_int');
  const [a, b] = node.input;
  const unary = UNARY[node.opType];
  const binary = BINARY[node.opType];
  if (a === undefined || (unary === undefined && binary === undefined)) return undefined;
  const x = constantScalar(index, a, depth + 1);
  if (x === undefined) return undefined;
  if (unary !== undefined) return unary(x);
  const y = b === undefined ? undefined : constantScalar(index, b, depth + 1);
  return y === undefined ? undefined : binary?.(x, y);
}
