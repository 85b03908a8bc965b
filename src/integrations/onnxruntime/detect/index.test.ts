import { describe, expect, it } from 'vitest';
import { indexGraph } from '../model/graph.ts';
import { functionProto, graph, node, tensorProto, untypedValue } from '../onnx/codec.ts';
import { detectAttention } from './index.ts';

const body = graph({
  name: 'body',
  nodes: [
    node('MatMul', ['q', 'k'], ['s']),
    node('Softmax', ['s'], ['p'], { name: 'weights', attributes: { axis: -1 } }),
    node('MatMul', ['p', 'v'], ['y']),
  ],
  inputs: [],
  outputs: [untypedValue('y')],
  initializers: [],
});

describe('attention in a subgraph', () => {
  it.each([
    ['Loop', 'body'],
    ['Scan', 'body'],
    ['If', 'then_branch'],
  ])('of %s is left, with the reason, at any depth', (opType, attribute) => {
    const inner = node(opType, ['one'], ['z'], { name: 'inner', attributes: { [attribute]: body } });
    const around = graph({
      name: 'around',
      nodes: [inner],
      inputs: [],
      outputs: [untypedValue('z')],
      initializers: [],
    });
    const outer = node('If', ['one'], ['w'], { name: 'outer', attributes: { then_branch: around } });
    const reasonOf = (nodes: (typeof inner)[]) => {
      const one = tensorProto('one', 'float32', [], Float32Array.of(1));
      const index = indexGraph(graph({ name: 'g', nodes, inputs: [], outputs: [], initializers: [one] }), 17);
      const { sites, left } = detectAttention(index);
      expect(sites).toEqual([]);
      return left.map(({ name, reason }) => [name, reason]);
    };
    expect(reasonOf([inner])).toEqual([
      ['weights', `inside a subgraph of ${opType} 'inner', which onnxruntime runs as a whole`],
    ]);
    expect(reasonOf([outer])).toEqual([
      ['weights', "inside a subgraph of If 'outer', which onnxruntime runs as a whole"],
    ]);
  });
});

it('attention in a function of the model is left, as one node, in single operators and with a softmax in steps', () => {
  const axes = { axes: [-1] };
  const inSteps = [
    node('ReduceMax', ['s'], ['m'], { attributes: axes }),
    node('Sub', ['s', 'm'], ['d']),
    node('Exp', ['d'], ['e']),
    node('ReduceSum', ['e'], ['sum'], { attributes: axes }),
    node('Div', ['e', 'sum'], ['p'], { name: 'steps' }),
  ];
  const fused = node('MultiHeadAttention', ['q', 'k', 'v'], ['y'], { name: 'one', domain: 'com.microsoft' });
  const nodes = [...body.node, ...inSteps, fused];
  const empty = graph({ name: 'g', nodes: [], inputs: [], outputs: [], initializers: [] });
  const functions = [functionProto({ name: 'Attend', domain: 'pkg', nodes, inputs: [], outputs: [] })];
  const { sites, left } = detectAttention(indexGraph(empty, 12), functions);
  expect(sites).toEqual([]);
  expect(left.map(({ name, form }) => [name, form])).toEqual([
    ['weights', 'Softmax'],
    ['steps', 'Div'],
    ['one', 'com.microsoft.MultiHeadAttention'],
  ]);
  for (const { reason } of left) expect(reason).toContain("inside the model's function 'Attend'");
});
