/** A decoder layer in two branches of one `If`: with the keys and values of a cache, and without. */
import type * as ort from 'onnxruntime-node';
import type { Random } from '../../../../test/support/random.ts';
import {
  type GraphProto,
  graph,
  model,
  type NodeProto,
  node,
  type TensorProto,
  tensorProto,
  untypedValue,
  valueInfo,
  writeModel,
} from '../onnx/codec.ts';

const H = 2;
const D = 8;
const C = H * D;
const HEADS = ['batch', H, 'total', D] as const;
export const PAST = 5;

/** Weights lie outside of the branches, which share them; everything else is each branch's own. */
function branch(name: string, hasCache: boolean): GraphProto {
  const nodes: NodeProto[] = [];
  const initializers: TensorProto[] = [];
  const own = (label: string) => `${name}/${label}`;
  const op = (opType: string, inputs: string[], label: string, attributes: Record<string, number | number[]> = {}) => {
    nodes.push(node(opType, inputs, [own(label)], { name: own(label), attributes }));
    return own(label);
  };
  const ints = (label: string, values: readonly number[]) => {
    initializers.push(tensorProto(own(label), 'int64', [values.length], BigInt64Array.from(values, BigInt)));
    return own(label);
  };
  const heads = (label: string, weight: string) => {
    const split = op(
      'Reshape',
      [op('MatMul', ['x', weight], `${label}.projected`), ints(`${label}.shape`, [0, 0, H, D])],
      `${label}.split`,
    );
    return op('Transpose', [split], `${label}.heads`, { perm: [0, 2, 1, 3] });
  };
  const state = (label: string, past: string) => {
    const now = heads(label, `w${label}`);
    return hasCache
      ? op('Concat', [past, now], `${label}.state`, { axis: 2 })
      : op('Identity', [now], `${label}.state`);
  };
  const [k, v] = [state('k', 'past_k'), state('v', 'past_v')];
  initializers.push(tensorProto(own('scale'), 'float32', [], Float32Array.of(1 / Math.sqrt(D))));
  const scores = op('MatMul', [heads('q', 'wq'), op('Transpose', [k], 'kT', { perm: [0, 1, 3, 2] })], 'scores');
  const p = op('Softmax', [op('Mul', [scores, own('scale')], 'scaled')], 'p', { axis: -1 });
  const o = op('Transpose', [op('MatMul', [p, v], 'o')], 'merged', { perm: [0, 2, 1, 3] });
  const y = op('Add', [op('Reshape', [o, ints('o.shape', [0, 0, C])], 'o.rows'), 'x'], 'y');
  return graph({
    name,
    nodes,
    inputs: [],
    outputs: [
      valueInfo(y, 'float32', ['batch', 'length', C]),
      valueInfo(k, 'float32', HEADS),
      valueInfo(v, 'float32', HEADS),
    ],
    initializers,
  });
}

/** @param isComputed the condition is computed by the graph, rather than an input of it */
export function mergedDecoder(random: Random, { isComputed = false } = {}): Uint8Array {
  const weight = (name: string) => tensorProto(name, 'float32', [C, C], random.normals(C * C, 0.4));
  const condition = isComputed ? 'decided' : 'use_cache_branch';
  const decide = isComputed ? [node('Not', ['use_cache_branch'], [condition])] : [];
  const attributes = { then_branch: branch('with', true), else_branch: branch('without', false) };
  return writeModel(
    model(
      graph({
        name: 'merged',
        nodes: [
          ...decide,
          node('If', [condition], ['y', 'present_k', 'present_v'], { name: 'optimum::if', attributes }),
        ],
        inputs: [
          valueInfo('x', 'float32', ['batch', 'length', C]),
          valueInfo('past_k', 'float32', ['batch', H, 'past', D]),
          valueInfo('past_v', 'float32', ['batch', H, 'past', D]),
          valueInfo('use_cache_branch', 'bool', [1]),
        ],
        outputs: ['y', 'present_k', 'present_v'].map((name) =>
          name === 'y' ? valueInfo(name, 'float32', ['batch', 'length', C]) : untypedValue(name),
        ),
        initializers: ['wq', 'wk', 'wv'].map(weight),
      }),
      { '': 17 },
    ),
  );
}

export function mergedFeeds(
  { Tensor }: typeof ort,
  random: Random,
  length: number,
  useCache: boolean,
): Record<string, ort.Tensor> {
  const floats = (...dims: number[]) =>
    new Tensor('float32', random.normals(dims.reduce((product, size) => product * size, 1)), dims);
  return {
    x: floats(2, length, C),
    past_k: floats(2, H, PAST, D),
    past_v: floats(2, H, PAST, D),
    use_cache_branch: new Tensor('bool', Uint8Array.of(Number(useCache)), [1]),
  };
}
