import { describe, expect, it } from 'vitest';
import { indexGraph } from '../model/graph.ts';
import { graph, node, tensorProto, untypedValue } from '../onnx/codec.ts';
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
