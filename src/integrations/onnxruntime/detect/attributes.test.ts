/** An attribute that detection does not know, or another value of one that it does, is never overlooked. */
import fc from 'fast-check';
import * as ort from 'onnxruntime-node';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { exactBackend } from '../../../../test/support/exact-backend.ts';
import { GraphBuilder } from '../../../../test/support/graph-builder.ts';
import { Random, runSeed } from '../../../../test/support/random.ts';
import type { Backend } from '../../../backends/backend.ts';
import { setBackend } from '../../../backends/registry.ts';
import { withSageAttention } from '../index.ts';
import { indexGraph } from '../model/graph.ts';
import { ATTRIBUTE_TYPES, attribute, type GraphProto, type NodeProto, readModel } from '../onnx/codec.ts';
import { OTHER_VALUES, withAnotherAttribute } from '../testing/attributes.ts';
import { EXPORTERS } from '../testing/exporters/index.ts';
import { detectAttention } from './index.ts';

const seed = runSeed();
let previous: Backend | undefined;
beforeAll(async () => {
  console.info(`seed ${seed}`);
  previous = await setBackend(exactBackend());
});
afterAll(async () => {
  if (previous !== undefined) await setBackend(previous);
});

function modelOf(entry: (typeof EXPORTERS)[number]) {
  const builder = new GraphBuilder(new Random(seed));
  entry.build(builder);
  return readModel(builder.build(entry.opset ?? 17));
}

const detected = (graph: GraphProto, opset = 17) => detectAttention(indexGraph(graph, opset));

/** What no node of an attention may have. */
const MUTATIONS: Readonly<Record<string, (node: NodeProto) => void>> = {
  'an unknown attribute': (node) => node.attribute.push(attribute('left_window_size', 1)),
  'an unknown attribute named as a member of every object': (node) => node.attribute.push(attribute('constructor', 1)),
  'an attribute twice': (node) => {
    const [first = attribute('axis', 1)] = node.attribute;
    node.attribute.push(first, first);
  },
  'an attribute of a function': (node) => {
    for (const entry of node.attribute) entry.refAttrName = 'outer';
    if (node.attribute.length === 0) node.attribute.push(attribute('axis', 1));
  },
  'a number of another type': (node) => {
    for (const entry of node.attribute) {
      entry.type = entry.type === ATTRIBUTE_TYPES.float ? ATTRIBUTE_TYPES.int : ATTRIBUTE_TYPES.float;
      entry.f = Number.NaN;
    }
    if (node.attribute.length === 0) node.attribute.push(attribute('axis', 1));
  },
};

it.each(Object.entries(MUTATIONS))('no node with %s is part of an attention', (_, mutate) => {
  for (const entry of EXPORTERS) {
    const graph = modelOf(entry).graph as GraphProto;
    const names = detected(graph, entry.opset).sites.map(({ nodes }) => nodes.flatMap((node) => node.output));
    for (const output of new Set(names.flat())) {
      const node = graph.node.find((candidate) => candidate.output.includes(output));
      // Nodes that were added, to turn an output.
      if (node === undefined) continue;
      const { attribute: before } = node;
      node.attribute = before.map((attribute) => ({ ...attribute }));
      mutate(node);
      const { sites, left } = detected(graph, entry.opset);
      node.attribute = before;
      const name = `${entry.name}: ${node.opType}`;
      expect(
        sites.filter(({ nodes }) => nodes.includes(node)),
        name,
      ).toEqual([]);
      // An attention disappears from the report in no case: its softmax or its node is still read by something.
      expect(sites.length + left.length, name).toBeGreaterThanOrEqual(names.length);
      expect(
        left.every(({ reason }) => reason !== ''),
        name,
      ).toBe(true);
    }
  }
});

it('a number that a node with an unknown attribute gives is not computed here', () => {
  const builder = new GraphBuilder(new Random(seed));
  for (const name of ['q', 'k', 'v']) builder.input(name, [1, 2, 4, 4]);
  const root = builder.op('Sqrt', [builder.scalar(16)], {}, { outputs: ['root'] });
  const p = builder.op('Softmax', [builder.op('Div', [builder.op('MatMul', ['q', 'k']), root])], { axis: -1 });
  builder.op('MatMul', [p, 'v'], {}, { outputs: ['y'] });
  builder.output('y');
  const graph = readModel(builder.build()).graph as GraphProto;
  expect(detected(graph).sites).toMatchObject([{ scale: 0.25, runtimeScales: [] }]);
  graph.node.find(({ opType }) => opType === 'Sqrt')?.attribute.push(attribute('cubic', 1));
  expect(detected(graph).sites).toMatchObject([{ scale: 1, runtimeScales: [{ value: 'root', inverse: true }] }]);
});

it('other values of known attributes are taken as onnxruntime takes them, or left', { timeout: 120_000 }, async () => {
  const sage = withSageAttention(ort, { minTokens: 0 });
  const quiet = { logSeverityLevel: 4 } as const;
  const numbers = fc.constantFrom(...OTHER_VALUES);
  const cases = EXPORTERS.filter(({ taken = 1 }) => taken > 0);
  let compared = 0;
  await fc.assert(
    fc.asyncProperty(fc.nat(), fc.nat(), fc.nat(), numbers, async (which, at, position, value) => {
      const entry = cases[which % cases.length] as (typeof cases)[number];
      const changed = withAnotherAttribute(entry, seed, { at, position, value });
      if (changed === undefined) return;
      const { bytes, name: attributeName } = changed;
      const feeds = entry.feeds(new Random(seed + 1));
      const run = async (runtime: { InferenceSession: Pick<typeof ort.InferenceSession, 'create'> }) => {
        const session = await runtime.InferenceSession.create(bytes, quiet);
        try {
          return await session.run(feeds);
        } finally {
          await session.release();
        }
      };
      const expected = await run(ort).catch(() => undefined);
      if (expected === undefined) return;
      compared++;
      const actual = await run(sage as never);
      for (const [name, { data, dims }] of Object.entries(expected)) {
        expect(actual[name]?.dims, entry.name).toEqual(dims);
        const [x, y] = [actual[name]?.data, data] as [Float32Array, Float32Array];
        const largest = y.reduce((most, number) => Math.max(most, Math.abs(number)), 0);
        const wrong = x.findIndex((number, i) => Math.abs(number - (y[i] as number)) > 1e-4 * largest);
        expect(wrong, `${entry.name}: ${attributeName} = ${value}, ${name}[${wrong}]`).toBe(-1);
      }
    }),
    { numRuns: 150, seed },
  );
  expect(compared).toBeGreaterThan(5);
});
