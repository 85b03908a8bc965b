/** An ONNX graph with the look-ups that matching and cutting need. */
import {
  canonicalDomain,
  type GraphProto,
  type NodeProto,
  type TensorProto,
  tensorNumbers,
  tensorProto,
  type ValueInfoProto,
} from '../onnx/codec.ts';

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
  /** What the graph says of the type of a value. */
  declared(value: string): ValueInfoProto | undefined;
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
    const constant = isOp(node, 'Constant') ? constantOf(node) : undefined;
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
  const declared = new Map([...graph.valueInfo, ...graph.output, ...graph.input].map((info) => [info.name, info]));
  const outputs = new Set(graph.output.map((output) => output.name));
  return {
    graph,
    nodes,
    constants,
    inputs: new Set(graph.input.map((input) => input.name).filter((name) => !constants.has(name))),
    outputs,
    opset,
    declared: (value) => declared.get(value),
    producer: (value) => producers.get(value),
    consumers: (value) => consumers.get(value) ?? [],
    soleConsumer: (value) => {
      const list = consumers.get(value);
      return list?.length === 1 && !outputs.has(value) ? list[0] : undefined;
    },
    readsOf: (node) => reads.get(node) ?? [],
  };
}

/** True where every node can run behind those that it reads from. onnxruntime refuses any other graph. */
export function isAcyclic({ nodes, producer, readsOf, consumers }: GraphIndex): boolean {
  const open = new Map(
    nodes.map((node) => [node, readsOf(node).filter((name) => producer(name) !== undefined).length]),
  );
  const ready = nodes.filter((node) => open.get(node) === 0);
  // The list grows while it is read.
  for (const node of ready) {
    for (const name of new Set(node.output)) {
      if (name === '' || producer(name) !== node) continue;
      for (const reader of new Set(consumers(name))) {
        const left = (open.get(reader) as number) - 1;
        open.set(reader, left);
        if (left === 0) ready.push(reader);
      }
    }
  }
  return ready.length === nodes.length;
}

/** The value of a `Constant` node, in any of its spellings except strings and sparse tensors. */
function constantOf(node: NodeProto): TensorProto | undefined {
  for (const { name, t, f, i, floats, ints } of node.attribute) {
    if (name === 'value') return t;
    if (name === 'value_float') return tensorProto('', 'float32', [], Float32Array.of(f));
    if (name === 'value_int') return tensorProto('', 'int64', [], BigInt64Array.of(i));
    if (name === 'value_floats') return tensorProto('', 'float32', [floats.length], Float32Array.from(floats));
    if (name === 'value_ints') return tensorProto('', 'int64', [ints.length], BigInt64Array.from(ints));
  }
  return undefined;
}

function subgraphsOf(node: NodeProto): GraphProto[] {
  return node.attribute.flatMap((entry) => [...(entry.g === undefined ? [] : [entry.g]), ...entry.graphs]);
}

/** The subgraph that an attribute of a node holds. */
export const subgraphOf = (node: NodeProto, name: string): GraphProto | undefined =>
  node.attribute.find((attribute) => attribute.name === name)?.g;

/** Names that a subgraph gives values, so that they are none of the graph around it. */
const namesOf = ({ input, initializer, node }: GraphProto): string[] => [
  ...input.map(({ name }) => name),
  ...initializer.map(({ name }) => name),
  ...node.flatMap(({ output }) => output),
];

/**
 * Walks a node's subgraphs at any depth, as they are written; without recursion, since graphs may be nested deeper than a call
 * stack.
 *
 * @param enter called with a subgraph before anything in it, `visit` with each node before its subgraphs, `leave` after all
 */
function walkSubgraphs(
  node: NodeProto,
  {
    enter = () => undefined,
    visit,
    leave = () => undefined,
  }: {
    readonly enter?: (subgraph: GraphProto) => void;
    readonly visit: (inner: NodeProto) => void;
    readonly leave?: (subgraph: GraphProto) => void;
  },
): void {
  type Place = { readonly subgraph: GraphProto; next: number };
  const begin = (of: NodeProto): Place[] =>
    subgraphsOf(of)
      .map((subgraph) => ({ subgraph, next: -1 }))
      .reverse();
  const stack = begin(node);
  for (let place = stack.at(-1); place !== undefined; place = stack.at(-1)) {
    const { subgraph } = place;
    if (place.next < 0) {
      enter(subgraph);
      place.next = 0;
    }
    const inner = subgraph.node[place.next];
    place.next++;
    if (inner === undefined) {
      leave(subgraph);
      stack.pop();
    } else {
      visit(inner);
      stack.push(...begin(inner));
    }
  }
}

/** Names of the outer graph that a node's subgraphs (If, Loop, Scan) read. */
function capturedNames(node: NodeProto): string[] {
  const captured: string[] = [];
  /** How many of the subgraphs that are open give a value this name. */
  const local = new Map<string, number>();
  const count = (subgraph: GraphProto, by: 1 | -1) => {
    for (const name of namesOf(subgraph)) local.set(name, (local.get(name) ?? 0) + by);
  };
  const read = (name: string) => {
    if (name !== '' && (local.get(name) ?? 0) === 0) captured.push(name);
  };
  walkSubgraphs(node, {
    enter: (subgraph) => count(subgraph, 1),
    visit: (inner) => inner.input.forEach(read),
    leave: (subgraph) => {
      for (const { name } of subgraph.output) read(name);
      count(subgraph, -1);
    },
  });
  return captured;
}

/** Every node inside a node's subgraphs, at any depth. */
export function nestedNodes(node: NodeProto): NodeProto[] {
  const found: NodeProto[] = [];
  walkSubgraphs(node, { visit: (inner) => found.push(inner) });
  return found;
}

/**
 * Nodes that run elsewhere than in a graph itself, as if they were one: to see what is in them. Where subgraphs use a name for several values,
 * one of them stands for all.
 */
export const indexNodes = (node: readonly NodeProto[], { graph, opset }: GraphIndex): GraphIndex =>
  indexGraph({ ...graph, node: [...node], initializer: [], input: [], output: [], valueInfo: [] }, opset);

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
