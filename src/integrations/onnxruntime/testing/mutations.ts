/** A model with two attentions, and what can be wrong or unusual about a graph. */
import { GraphBuilder } from '../../../../test/support/graph-builder.ts';
import { Random } from '../../../../test/support/random.ts';
import { attribute, type GraphProto, type ModelProto, node, readModel, valueInfo, writeModel } from '../onnx/codec.ts';

const [B, H, L, D] = [1, 2, 6, 32];
const WIDTH = H * D;

/** Batch, tokens, width. */
export const MUTATED = { batch: B, tokens: L, width: WIDTH } as const;

/** Two attentions, one in single operators with a mask and one as an operator, weights large and small, and a node for nothing. */
function base(seed: number, isStatic: boolean): Uint8Array {
  const g = new GraphBuilder(new Random(seed));
  g.input('x', isStatic ? [B, L, WIDTH] : ['b', 'l', WIDTH]);
  g.input('mask', isStatic ? [B, 1, L, L] : ['b', 1, 'l', 'l']);
  const part = (perm: readonly number[]) =>
    g.op('Transpose', [g.op('Reshape', [g.linear('x', WIDTH, WIDTH), g.ints([0, 0, H, D])])], { perm });
  const scores = g.op('Mul', [g.op('MatMul', [part([0, 2, 1, 3]), part([0, 2, 3, 1])]), g.scalar(0.3)]);
  const masked = g.op('Add', [scores, 'mask']);
  const heads = g.op('MatMul', [g.op('Softmax', [masked], { axis: -1 }), part([0, 2, 1, 3])]);
  const merged = g.op('Reshape', [g.op('Transpose', [heads], { perm: [0, 2, 1, 3] }), g.ints([0, 0, WIDTH])]);
  g.op('Relu', [merged], {}, { outputs: ['unused'] });
  const [q, k, v] = [1, 2, 3].map(() => g.linear(merged, WIDTH, WIDTH)) as [string, string, string];
  g.contrib('MultiHeadAttention', [q, k, v], { num_heads: H }, ['second']);
  g.op('Add', ['second', merged], {}, { outputs: ['y'] });
  g.output('y');
  return g.build();
}

type Pick = (count: number) => number;

const namesIn = (graph: GraphProto) => [
  ...graph.input.map(({ name }) => name),
  ...graph.initializer.map(({ name }) => name),
  ...graph.node.flatMap(({ output }) => output),
];

const MUTATIONS: Readonly<Record<string, (graph: GraphProto, pick: Pick, model: ModelProto) => void>> = {
  'an input of a node is another value': (graph, pick) => {
    const { input } = graph.node[pick(graph.node.length)] as { input: string[] };
    const names = namesIn(graph);
    input[pick(input.length)] = names[pick(names.length)] as string;
  },
  'an input of a node is missing': (graph, pick) => {
    const { input } = graph.node[pick(graph.node.length)] as { input: string[] };
    input.splice(pick(input.length), 1);
  },
  'an input of a node is empty, or dangles': (graph, pick) => {
    const { input } = graph.node[pick(graph.node.length)] as { input: string[] };
    input[pick(input.length)] = pick(2) === 0 ? '' : 'nowhere';
  },
  'an output has a name that is used': (graph, pick) => {
    const names = namesIn(graph);
    const { output } = graph.node[pick(graph.node.length)] as { output: string[] };
    output[0] = names[pick(names.length)] as string;
  },
  'a node is gone': (graph, pick) => void graph.node.splice(pick(graph.node.length), 1),
  'a node is there twice': (graph, pick) =>
    void graph.node.push(graph.node[pick(graph.node.length)] as GraphProto['node'][number]),
  'nodes in another order': (graph, pick) => {
    const [moved] = graph.node.splice(pick(graph.node.length), 1);
    graph.node.splice(pick(graph.node.length), 0, moved as GraphProto['node'][number]);
  },
  'two nodes of one name': (graph, pick) => {
    const [a, b] = [pick(graph.node.length), pick(graph.node.length)];
    (graph.node[a] as { name: string }).name = (graph.node[b] as { name: string }).name;
  },
  'another operator': (graph, pick) => {
    const operators = ['Relu', 'MatMul', 'Softmax', 'Add', 'Transpose', 'Nothing', 'Gemm', 'Concat', 'Gelu'];
    (graph.node[pick(graph.node.length)] as { opType: string }).opType = operators[pick(operators.length)] as string;
  },
  'another domain': (graph, pick) => {
    const domains = ['', 'ai.onnx', 'com.microsoft', 'no.such'];
    (graph.node[pick(graph.node.length)] as { domain: string }).domain = domains[pick(domains.length)] as string;
  },
  'an attribute twice, unknown, or of another type': (graph, pick) => {
    const with_ = graph.node.filter((entry) => entry.attribute.length > 0);
    const target = with_[pick(with_.length)] as GraphProto['node'][number];
    const [first] = target.attribute as [GraphProto['node'][number]['attribute'][number]];
    const kind = pick(4);
    if (kind === 0) target.attribute.push(first);
    if (kind === 1) target.attribute.push(attribute('no_such', 1));
    if (kind === 2) target.attribute[0] = attribute(first.name, { float: 0.5 });
    if (kind === 3) target.attribute[0] = attribute(first.name, [3, 0, 2, 1]);
  },
  'no attributes': (graph, pick) => {
    (graph.node[pick(graph.node.length)] as { attribute: unknown[] }).attribute = [];
  },
  'an initializer is gone, twice, or unnamed': (graph, pick) => {
    const at = pick(graph.initializer.length);
    const kind = pick(3);
    if (kind === 0) graph.initializer.splice(at, 1);
    if (kind === 1) graph.initializer.push(graph.initializer[at] as GraphProto['initializer'][number]);
    if (kind === 2) (graph.initializer[at] as { name: string }).name = '';
  },
  'an initializer of other dimensions, type or length': (graph, pick) => {
    const tensor = graph.initializer[pick(graph.initializer.length)] as GraphProto['initializer'][number];
    const kind = pick(4);
    if (kind === 0) tensor.dims = tensor.dims.map((size) => size + 1n);
    if (kind === 1) tensor.dataType = [0, 1, 6, 7, 10, 11, 99][pick(7)] as number;
    if (kind === 2) tensor.rawData = tensor.rawData.slice(0, -4);
    if (kind === 3) tensor.dims = [-1n, ...tensor.dims.slice(1)];
  },
  'an initializer of other dimensions, as many numbers': (graph, pick) => {
    const tensor = graph.initializer[pick(graph.initializer.length)] as GraphProto['initializer'][number];
    const count = tensor.dims.reduce((product, size) => product * size, 1n);
    tensor.dims = [[count], [1n, count], [count, 1n]][pick(3)] as bigint[];
  },
  'an input twice, gone, or of another type': (graph, pick) => {
    const at = pick(graph.input.length);
    const input = graph.input[at] as GraphProto['input'][number];
    const kind = pick(4);
    if (kind === 0) graph.input.push(input);
    if (kind === 1) graph.input.splice(at, 1);
    if (kind === 2) graph.input[at] = valueInfo(input.name, 'int64', [B, L, WIDTH]);
    if (kind === 3) graph.input[at] = valueInfo(input.name, 'float32', [B, L]);
  },
  'an initializer that is declared as an input': (graph, pick) => {
    const { name } = graph.initializer[pick(graph.initializer.length)] as { name: string };
    graph.input.push(valueInfo(name, pick(2) === 0 ? 'float32' : 'int64', [WIDTH, WIDTH]));
  },
  'an output that nothing gives, twice, or a value inside': (graph, pick) => {
    const names = [...namesIn(graph), 'nowhere', 'y'];
    graph.output.push({
      ...valueInfo('', 'float32'),
      name: names[pick(names.length)] as string,
      ...(pick(2) === 0 ? {} : { type: undefined as never }),
    });
  },
  'a value that is declared as something else': (graph, pick) => {
    const names = namesIn(graph);
    const dims = [undefined, [1], [B, L, WIDTH], [B, H, L, L]][pick(4)];
    graph.valueInfo.push(valueInfo(names[pick(names.length)] as string, pick(2) === 0 ? 'float32' : 'int64', dims));
  },
  'a node for nothing that is wrong': (graph, pick) => {
    const names = namesIn(graph);
    graph.node.push(
      node('MatMul', [names[pick(names.length)] as string, names[pick(names.length)] as string], ['for nothing']),
    );
  },
  'a constant that is wrong, or no constant': (graph, pick) => {
    const kinds = [{}, { value_int: 1, value_float: { float: 1 } }, { value_ints: [1, 2] }];
    graph.node.push(node('Constant', [], [`constant${pick(2)}`], { attributes: kinds[pick(3)] ?? {} }));
  },
  'another operator set or version of the format': (_, pick, model) => {
    const kind = pick(3);
    if (kind === 0)
      (model.opsetImport[0] as { version: bigint }).version = [1n, 7n, 9n, 11n, 24n, 99n][pick(6)] as bigint;
    if (kind === 1) model.irVersion = [0n, 1n, 3n, 10n, 99n][pick(5)] as bigint;
    if (kind === 2) model.opsetImport.splice(pick(2), 1);
  },
};

export interface Mutation {
  readonly name: string;
  readonly choices: readonly number[];
}

export const MUTATION_NAMES: readonly string[] = Object.keys(MUTATIONS);

/**
 * A model of two attentions with something wrong, or something else, in it.
 *
 * @param isStatic the sizes of its inputs are numbers, {@link MUTATED}
 */
export function mutatedModel(seed: number, isStatic: boolean, mutations: readonly Mutation[]): Uint8Array {
  const model = readModel(base(seed, isStatic));
  for (const { name, choices } of mutations) {
    let at = 0;
    const pick: Pick = (count) => (count === 0 ? 0 : (choices[at++ % choices.length] as number) % count);
    try {
      MUTATIONS[name]?.(model.graph as GraphProto, pick, model);
    } catch (error) {
      // The mutation before left nothing to change.
      if (!(error instanceof TypeError)) throw error;
    }
  }
  return writeModel(model);
}
