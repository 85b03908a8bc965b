/** Topologies in the spellings of exporters: each runs in tfjs alone and rewritten, and gives the same. */
import * as tf from '@tensorflow/tfjs-core';
import '@tensorflow/tfjs-backend-cpu';
import { loadGraphModel } from '@tensorflow/tfjs-converter';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, vi } from 'vitest';
import { exactBackend } from '../../../test/support/exact-backend.ts';
import { Random, runSeed } from '../../../test/support/random.ts';
import type { Backend } from '../../backends/backend.ts';
import { disposeBackends, setBackend } from '../../backends/registry.ts';
import { type GraphModelOptions, OPERATOR, rewriteTopology } from './index.ts';
import { EXPORTED } from './testing/exporters.ts';
import { TopologyBuilder } from './testing/topology-builder.ts';

const seed = runSeed();
let random: Random;
let exact: ReturnType<typeof exactBackend>;
let previous: Backend | undefined;

beforeAll(async () => {
  console.info(`seed ${seed}`);
  await tf.setBackend('cpu');
});
beforeEach(async () => {
  random = new Random(seed);
  exact = exactBackend();
  previous = await setBackend(exact);
  // tfjs advises against `executeAsync` where it sees no reason for it.
  vi.spyOn(console, 'warn').mockImplementation(() => undefined);
});
afterEach(async () => {
  vi.restoreAllMocks();
  if (previous !== undefined) await setBackend(previous);
});
afterAll(disposeBackends);

/** Largest difference to tfjs alone. Attention is exact in float64 here: what remains is float32. */
const TOLERANCE = 1e-5;

interface Expected {
  /** How many are found in the graph. */
  readonly attentions?: number;
  /** How many of them our kernels compute when it runs. */
  readonly calls?: number;
  readonly options?: GraphModelOptions;
}

/** Runs the graph with tfjs alone and rewritten: the same shapes and values, no tensor left behind. */
async function expectSame(
  g: TopologyBuilder,
  outputs: readonly string[],
  { attentions = 1, calls = attentions, options = {} }: Expected = {},
): Promise<void> {
  const { topology, taken, left } = rewriteTopology(g.topology(), options);
  expect(taken, JSON.stringify(left)).toHaveLength(attentions);
  expect(topology.node.filter(({ op }) => op === OPERATOR)).toHaveLength(attentions);
  await expectSameResults(g, outputs, topology);
  expect(exact.calls).toBe(calls);
}

async function expectSameResults(
  g: TopologyBuilder,
  outputs: readonly string[],
  rewritten: object,
  tolerance = TOLERANCE,
): Promise<void> {
  const run = async (modelTopology: object): Promise<{ shape: number[]; values: Float32Array }[]> => {
    const model = await loadGraphModel(tf.io.fromMemory({ ...g.weights(), modelTopology }));
    const feeds = g.feeds();
    const tensors = tf.memory().numTensors;
    const results = await model.executeAsync(feeds, [...outputs]);
    const list = Array.isArray(results) ? results : [results];
    expect(tf.memory().numTensors).toBe(tensors + list.length);
    const values = list.map((value) => ({ shape: value.shape, values: value.dataSync() as Float32Array }));
    tf.dispose([list, feeds]);
    model.dispose();
    return values;
  };
  const expected = await run(g.topology());
  const actual = await run(rewritten);
  expect(actual.map(({ shape }) => shape)).toEqual(expected.map(({ shape }) => shape));
  for (const [i, { values }] of expected.entries()) {
    const difference = values.reduce(
      (most, value, at) => Math.max(most, Math.abs(value - (actual[i]?.values[at] as number))),
      0,
    );
    expect(difference).toBeLessThan(tolerance);
  }
}

const builder = () => new TopologyBuilder(random);

describe('a rewritten GraphModel', () => {
  it.each(EXPORTED.map((entry) => [entry.models, entry] as const))(
    'computes what the graph did: %s',
    async (_, entry) => {
      const g = builder();
      await expectSame(g, entry.build(g), { calls: entry.calls ?? 1 });
    },
  );

  it('scales per head, and by a number from either side', async () => {
    const g = builder();
    const [q, k, v] = [g.input([2, 3, 5, 8]), g.input([2, 3, 7, 8]), g.input([2, 3, 7, 4])];
    const scores = g.node('BatchMatMulV2', [q, k], { adj_y: true });
    const perHead = g.node('Mul', [g.constant([3, 1, 1]), scores]);
    const scaled = g.node('RealDiv', [perHead, g.scalar(2.5)]);
    await expectSame(g, [g.node('BatchMatMulV2', [g.node('Softmax', [scaled]), v])]);
  });

  it('leaves factors of single keys to tfjs', async () => {
    const g = builder();
    const [q, k, v] = [g.input([1, 2, 5, 8]), g.input([1, 2, 8, 8]), g.input([1, 2, 8, 4])];
    const scores = g.node('BatchMatMulV2', [q, k], { adj_y: true });
    const scaled = g.node('Mul', [scores, g.constant([8])]);
    await expectSame(g, [g.node('BatchMatMulV2', [g.node('Softmax', [scaled]), v])], { calls: 0 });
  });

  it.each([
    // One batch entry: with more tfjs' own CPU backend takes the wrong head, as it counts batch dimensions as one.
    ['keys and values of one head', [1, 4], [1, 1], [1, 1]],
    ['keys of one batch entry', [2, 4], [1, 4], [2, 4]],
    ['queries of one batch entry', [1, 4], [2, 4], [2, 4]],
    ['keys without a batch', [2, 4], [4], [4]],
    ['values without batch and heads', [2, 4], [2, 4], []],
    ['no batch at all', [], [], []],
    ['five dimensions', [2, 2, 3], [2, 2, 3], [2, 2, 3]],
  ])('broadcasts as BatchMatMul does: %s', async (_, ofQ, ofK, ofV) => {
    const g = builder();
    const [q, k, v] = [g.input([...ofQ, 5, 8]), g.input([...ofK, 8, 7]), g.input([...ofV, 7, 4])];
    const scores = g.node('BatchMatMulV2', [q, k]);
    await expectSame(g, [g.node('BatchMatMulV2', [g.node('Softmax', [scores]), v])]);
  });

  it.each([[[]], [[7]], [[5, 1]], [[5, 7]], [[3, 1, 7]], [[2, 1, 1, 7]], [[2, 3, 5, 7]]])(
    'adds a mask of shape %j',
    async (shape) => {
      const g = builder();
      const [q, k, v] = [g.input([2, 3, 5, 8]), g.input([2, 3, 7, 8]), g.input([2, 3, 7, 4])];
      const scores = g.node('BatchMatMulV2', [q, k], { adj_y: true });
      const masked = g.node('AddV2', [g.input(shape), g.node('Mul', [scores, g.scalar(0.3)])]);
      await expectSame(g, [g.node('BatchMatMulV2', [g.node('Softmax', [masked]), v])]);
    },
  );

  it('leaves a mask that makes more scores to tfjs', async () => {
    const g = builder();
    const [q, k, v] = [g.input([1, 3, 5, 8]), g.input([1, 3, 7, 8]), g.input([1, 3, 7, 4])];
    const scores = g.node('BatchMatMulV2', [q, k], { adj_y: true });
    const masked = g.node('AddV2', [scores, g.input([2, 1, 5, 7])]);
    await expectSame(g, [g.node('BatchMatMulV2', [g.node('Softmax', [masked]), v])], { calls: 0 });
  });

  it('leaves a softmax over more than the keys of one head to tfjs', async () => {
    const g = builder();
    const [q, k, v] = [g.input([2, 3, 5, 8]), g.input([2, 3, 7, 8]), g.input([2, 3, 7, 4])];
    const scores = g.node('BatchMatMulV2', [q, k], { adj_y: true });
    const flat = g.node('Reshape', [scores, g.shape([2, 3, 35])]);
    const probabilities = g.node('Reshape', [g.node('Softmax', [flat]), g.shape([2, 3, 5, 7])]);
    await expectSame(g, [g.node('BatchMatMulV2', [probabilities, v])], { calls: 0 });
  });

  it('folds probabilities for values whose heads are folded', async () => {
    const g = builder();
    const [q, k, v] = [g.input([2, 3, 5, 8]), g.input([2, 3, 7, 8]), g.input([6, 7, 4])];
    const scores = g.node('BatchMatMulV2', [q, k], { adj_y: true });
    const folded = g.node('Reshape', [g.node('Softmax', [scores]), g.shape([6, 5, 7])]);
    await expectSame(g, [g.node('BatchMatMulV2', [folded, v])]);
  });

  it('leaves scores that are cast to integers', async () => {
    const g = builder();
    const [q, k, v] = [g.input([1, 2, 5, 8]), g.input([1, 2, 7, 8]), g.input([1, 2, 7, 4])];
    const scores = g.node('BatchMatMulV2', [q, k], { adj_y: true });
    const cast = g.node('Cast', [g.node('Cast', [scores], { DstT: 3 })], { DstT: 1 });
    await expectSame(g, [g.node('BatchMatMulV2', [g.node('Softmax', [cast]), v])], { attentions: 0 });
  });

  it.each([
    ['keys first, channels last (Keras)', 'aecd,abcd->acbe', 'acbe,aecd->abcd', [2, 5, 3, 8], [2, 7, 3, 8], true],
    ['heads in front', 'bhid,bhjd->bhij', 'bhij,bhjd->bhid', [2, 3, 5, 8], [2, 3, 7, 8], false],
    ['values first', 'bid,bjd->bij', 'bjd,bij->bdi', [2, 5, 8], [2, 7, 8], false],
  ] as const)('takes products by Einsum: %s', async (_, ofScores, ofValues, ofQ, ofK, isSwapped) => {
    const g = builder();
    const [q, k, v] = [g.input(ofQ), g.input(ofK), g.input(ofK)];
    const scaled = g.node('Mul', [q, g.scalar(0.3)]);
    const scores = g.node('Einsum', isSwapped ? [k, scaled] : [scaled, k], { equation: ofScores });
    const mask = g.input(ofQ.length === 4 ? [2, 1, 5, 7] : [2, 5, 7]);
    const p = g.node('Softmax', [g.node('AddV2', [scores, mask])]);
    const values = ofValues.startsWith('bjd') ? [v, p] : [p, v];
    await expectSame(g, [g.node('Einsum', values, { equation: ofValues })]);
  });

  it.each([
    ['select', -1e9, 1],
    ['selectNot', Number.NEGATIVE_INFINITY, 1],
    ['select', -3, 0],
  ])('takes a mask by %s with %d where that hides', async (kind, fill, calls) => {
    const g = builder();
    const [q, k, v] = [g.input([2, 3, 5, 8]), g.input([2, 3, 7, 8]), g.input([2, 3, 7, 4])];
    const scores = g.node('BatchMatMulV2', [q, k], { adj_y: true });
    const condition = g.node('Greater', [g.input([2, 1, 5, 7]), g.scalar(kind === 'select' ? -0.7 : 0.7)]);
    const branches = kind === 'select' ? [scores, g.scalar(fill)] : [g.scalar(fill), scores];
    const p = g.node('Softmax', [g.node('SelectV2', [condition, ...branches])]);
    await expectSame(g, [g.node('BatchMatMulV2', [p, v])], { calls });
  });

  it('takes a mask that is scaled with the scores, and one that is subtracted', async () => {
    const g = builder();
    const [q, k, v] = [g.input([2, 3, 5, 8]), g.input([2, 3, 7, 8]), g.input([2, 3, 7, 4])];
    const biased = g.node('AddV2', [g.node('BatchMatMulV2', [q, k], { adj_y: true }), g.input([2, 3, 5, 7])]);
    const scaled = g.node('RealDiv', [biased, g.scalar(3)]);
    const p = g.node('Softmax', [g.node('Sub', [scaled, g.input([2, 1, 1, 7])])]);
    await expectSame(g, [g.node('BatchMatMulV2', [p, v])]);
  });

  it.each([
    ['the last axis', [2, 3, 5, 7], -1, true, 1],
    ['the last axis by its number', [2, 3, 5, 7], 3, true, 1],
    ['another axis', [2, 3, 5, 7], 2, true, 0],
    ['an axis that is dropped', [7, 7], -1, false, 0],
  ])('computes a softmax in steps over %s', async (_, shape, axis, keep_dims, calls) => {
    const g = builder();
    const batch = shape.slice(0, -2);
    const q = g.input([...batch, shape.at(-2) as number, 8]);
    const [k, v] = [g.input([...batch, 7, 8]), g.input([...batch, 7, 4])];
    const scores = g.node('Mul', [g.node('BatchMatMulV2', [q, k], { adj_y: true }), g.scalar(0.3)]);
    const max = g.node('Max', [scores, g.shape([axis])], { keep_dims });
    const e = g.node('Exp', [g.node('Sub', [scores, max])]);
    const p = g.node('RealDiv', [e, g.node('Sum', [e, g.shape([axis])], { keep_dims })]);
    await expectSame(g, [g.node('BatchMatMulV2', [p, v])], { calls });
  });

  it('says why probabilities that go elsewhere stay', () => {
    const g = builder();
    const scores = g.node('BatchMatMulV2', [g.input([1, 5, 8]), g.input([1, 7, 8])], { adj_y: true });
    g.node('Tanh', [g.node('Softmax', [scores])]);
    const { taken, left } = rewriteTopology(g.topology());
    expect(taken).toEqual([]);
    expect(left).toEqual([expect.objectContaining({ reason: expect.stringContaining('go into Tanh') })]);
  });

  it('says that attention in a function stays', () => {
    const node = (name: string, op: string, ...input: string[]) => ({ name, op, input });
    const nodeDef = [
      node('s', 'BatchMatMulV2', 'q', 'k'),
      node('p', 'Softmax', 's:output:0'),
      node('y', 'BatchMatMulV2', 'p:softmax:0', 'v'),
    ];
    const library = { function: [{ signature: { name: 'while_body' }, nodeDef }, { signature: { name: 'empty' } }] };
    const { taken, left } = rewriteTopology({ node: [node('x', 'Placeholder')], library });
    expect(taken).toEqual([]);
    expect(left).toEqual([{ node: 'p', reason: expect.stringContaining("inside the function 'while_body'") }]);
  });

  it.each(['squarings', 'a chain', 'a circle'])('looks once at each node of %s', (kind) => {
    const node = (name: string, op: string, input: string[]) => ({ name, op, input });
    const count = kind === 'squarings' ? 60 : 10_000;
    const chain = Array.from({ length: count }, (_, i) => {
      const before = i > 0 ? `n${i - 1}` : kind === 'a circle' ? `n${count - 1}` : 's';
      return kind === 'squarings' ? node(`n${i}`, 'Mul', [before, before]) : node(`n${i}`, 'Identity', [before]);
    });
    const nodes = [
      node('s', 'Placeholder', []),
      ...chain,
      node('p', 'Softmax', [`n${count - 1}`]),
      node('y', 'BatchMatMulV2', ['p', 's']),
    ];
    expect(rewriteTopology({ node: nodes }).left).toHaveLength(1);
  });

  it('keeps nodes that the caller names as outputs', async () => {
    const g = builder();
    const [q, k, v] = [g.input([1, 2, 5, 8]), g.input([1, 2, 7, 8]), g.input([1, 2, 7, 4])];
    const probabilities = g.node('Softmax', [g.node('BatchMatMulV2', [q, k], { adj_y: true })]);
    const output = g.node('BatchMatMulV2', [probabilities, v]);
    await expectSame(g, [output, probabilities], { attentions: 0, options: { outputs: [`${probabilities}:0`] } });
  });

  it.each([
    ['modelTopology', () => rewriteTopology({ modelConfig: {} } as never)],
    ['modelTopology', () => rewriteTopology(undefined as never)],
    ['options.kernl', () => rewriteTopology({ node: [] }, { kernl: 'auto' } as never)],
    ['options.kernel', () => rewriteTopology({ node: [] }, { kernel: 'fast' } as never)],
    ['options.outputs', () => rewriteTopology({ node: [] }, { outputs: ['probabilities:0'] })],
  ])('refuses a wrong %s', (argument, rewrite) => {
    expect(rewrite).toThrow(expect.objectContaining({ name: 'InvalidArgumentError', argument }));
  });

  it('does not change the topology that it is given', () => {
    const g = builder();
    const [q, k, v] = [g.input([1, 5, 8]), g.input([1, 7, 8]), g.input([1, 7, 4])];
    const scores = g.node('BatchMatMulV2', [q, k], { adj_y: true });
    g.node('BatchMatMulV2', [g.node('Reshape', [g.node('Softmax', [scores]), g.node('Shape', [scores])]), v]);
    const topology = g.topology();
    const before = JSON.stringify(topology);
    expect(rewriteTopology(topology).taken).toHaveLength(1);
    expect(JSON.stringify(topology)).toBe(before);
  });

  it('computes what the graph did, for random steps between the products', async () => {
    let taken = 0;
    for (let i = 0; i < 60; i++) {
      const g = builder();
      const output = randomGraph(g);
      const rewritten = rewriteTopology(g.topology());
      taken += rewritten.taken.length;
      // Several factors make scores of thousands, of which float32 keeps a ten-thousandth.
      await expectSameResults(g, [output], rewritten.topology, 1e-3);
    }
    expect(taken).toBeGreaterThan(30);
    expect(exact.calls).toBeGreaterThan(10);
  });
});

/** Scores scaled, masked and reshaped at random; often attention, sometimes not. */
function randomGraph(g: TopologyBuilder): string {
  const batch = Array.from({ length: random.integer(0, 3) }, () => random.integer(1, 3));
  const [queries, keys, dim] = [random.integer(1, 5), random.integer(1, 5), random.integer(1, 6)];
  const size = tf.util.sizeFromShape(batch);
  const transposed = random.uniform() < 0.5;
  const k = g.input([...batch, ...(transposed ? [keys, dim] : [dim, keys])]);
  let scores = g.node('BatchMatMulV2', [g.input([...batch, queries, dim]), k], { adj_y: transposed });
  let shape = [...batch, queries, keys];
  /** A shape that broadcasts to the scores' shape. */
  const smaller = () =>
    shape.map((length) => (random.uniform() < 0.4 ? 1 : length)).slice(random.integer(0, shape.length));
  const either = (op: string, other: string) => g.node(op, random.uniform() < 0.5 ? [scores, other] : [other, scores]);
  const reshape = (to: number[]) => {
    shape = to;
    return g.node('Reshape', [scores, g.shape(to)]);
  };
  const steps: readonly (() => string)[] = [
    () => either('Mul', g.constant(random.uniform() < 0.7 ? [] : smaller())),
    () => g.node('RealDiv', [scores, g.scalar(1 + random.uniform())]),
    () => either('AddV2', g.input(smaller())),
    () => reshape([size, queries, keys]),
    () => reshape([...batch, queries, keys]),
    () => reshape([1, ...batch, queries, keys]),
    () => reshape([size * queries, keys]),
    () => reshape([...batch, queries * keys]),
    () => g.node('Reshape', [scores, g.node('Shape', [scores])]),
    () => g.node('Cast', [g.node('Identity', [scores])], { DstT: 1 }),
  ];
  for (let count = random.integer(0, 4); count > 0; count--) scores = random.pick(steps)();
  scores = g.node('Softmax', [scores]);
  scores = reshape([...batch, queries, keys]);
  return g.node('BatchMatMulV2', [scores, g.input([...batch, keys, random.integer(1, 6)])]);
}
