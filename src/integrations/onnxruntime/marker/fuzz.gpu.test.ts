/**
 * Graphs of every kind with markers, under onnxruntime-web's WebGPU provider in Node: what exporters write, random scores, wrong and
 * unusual nodes, other values of attributes. A marker gives what the model in pieces gives, which the kernels' accuracy bounds against
 * onnxruntime on a CPU, and no attention disappears from the report. A sample of them; `SAGEATTENTION_TESTS=all` runs every one.
 */
import * as ortNode from 'onnxruntime-node';
import { afterAll, beforeAll, describe, expect, vi } from 'vitest';
import { GraphBuilder } from '../../../../test/support/graph-builder.ts';
import { Random, runSeed } from '../../../../test/support/random.ts';
import { itNeeds } from '../../../../test/support/requirement.ts';
import { sampled } from '../../../../test/support/sample.ts';
import { messageOf } from '../../../errors.ts';
import { compare } from '../../../reference/metrics.ts';
import { detectAttention } from '../detect/index.ts';
import { type SageAttentionOptions, withSageAttention } from '../index.ts';
import { indexGraph } from '../model/graph.ts';
import { type GraphProto, readModel } from '../onnx/codec.ts';
import type { OrtTensor } from '../ort.ts';
import { toNumbers } from '../session/calibration.ts';
import { OTHER_VALUES, withAnotherAttribute } from '../testing/attributes.ts';
import { type Feeds, floats } from '../testing/case.ts';
import { EXPORTERS } from '../testing/exporters/index.ts';
import { MUTATED, MUTATION_NAMES, mutatedModel } from '../testing/mutations.ts';
import { adapterName, missing, newDevice, runtime } from '../testing/node-webgpu.ts';
import { randomGraph } from '../testing/random-graph.ts';

const SEED = runSeed();
/** Of the whole; `npm test` takes a share of them. */
const COUNTS = { 'random scores': 120, 'wrong and unusual nodes': 100, 'other attributes': 80 } as const;

interface Graph {
  readonly bytes: Uint8Array;
  readonly feeds: readonly Feeds[];
  readonly opset: number;
  readonly label: string;
}

interface FuzzCase {
  readonly name: string;
  /** Undefined where there is nothing to change. */
  make(): Graph | undefined;
}

const numbered = (kind: keyof typeof COUNTS, make: (random: Random, i: number) => Graph | undefined): FuzzCase[] =>
  Array.from({ length: COUNTS[kind] }, (_, i) => ({
    name: `${kind}: ${i}`,
    make: () => make(new Random(SEED + 101 * i), i),
  }));

function exporterGraph(entry: (typeof EXPORTERS)[number]): Graph {
  const builder = new GraphBuilder(new Random(SEED));
  entry.build(builder);
  const opset = entry.opset ?? 17;
  return { bytes: builder.build(opset), feeds: [entry.feeds(new Random(SEED + 1))], opset, label: entry.name };
}

function mutatedGraph(random: Random): Graph {
  const isStatic = random.uniform() < 0.3;
  const mutations = Array.from({ length: random.integer(1, 2) }, () => ({
    name: random.pick(MUTATION_NAMES),
    choices: Array.from({ length: 4 }, () => random.integer(0, 10_000)),
  }));
  const { batch, tokens, width } = MUTATED;
  const feeds = [tokens, ...(isStatic ? [] : [tokens + 3, 1])].map((length) => ({
    x: floats(random, [batch, length, width]),
    mask: floats(random, [batch, 1, length, length]),
  }));
  return { bytes: mutatedModel(SEED, isStatic, mutations), feeds, opset: 17, label: JSON.stringify(mutations) };
}

const CASES: readonly FuzzCase[] = [
  ...EXPORTERS.map((entry) => ({ name: `exporters: ${entry.name}`, make: () => exporterGraph(entry) })),
  ...numbered('random scores', (random, i) => {
    const g = new GraphBuilder(random);
    const { feeds, steps } = randomGraph(g, random, i % 2 === 1);
    return { bytes: g.build(17), feeds: [feeds], opset: 17, label: steps.join(', ') };
  }),
  ...numbered('wrong and unusual nodes', mutatedGraph),
  ...numbered('other attributes', (random) => {
    const entry = random.pick(EXPORTERS.filter(({ taken = 1 }) => taken > 0));
    const [at, position, value] = [random.integer(0, 999), random.integer(0, 9), random.pick(OTHER_VALUES)];
    const changed = withAnotherAttribute(entry, SEED, { at, position, value });
    if (changed === undefined) return undefined;
    const label = `${entry.name}: ${changed.name}[${position}] = ${value}`;
    return { bytes: changed.bytes, feeds: [entry.feeds(random)], opset: entry.opset ?? 17, label };
  }),
];

const QUIET = { logSeverityLevel: 4 } as const;

/** Undefined where onnxruntime refuses the model or one of its inputs. */
async function onCpu({ bytes, feeds }: Graph): Promise<Record<string, ortNode.Tensor>[] | undefined> {
  const session = await ortNode.InferenceSession.create(bytes, QUIET).catch(() => undefined);
  if (session === undefined) return undefined;
  const results: Record<string, ortNode.Tensor>[] = [];
  for (const inputs of feeds) {
    const given = Object.fromEntries(Object.entries(inputs).filter(([name]) => session.inputNames.includes(name)));
    const outputs = await session.run(given).catch(() => undefined);
    if (outputs === undefined) return undefined;
    results.push(outputs as Record<string, ortNode.Tensor>);
  }
  return results;
}

describe('graphs with markers', () => {
  let device: GPUDevice;
  const seen = { marker: 0, cut: 0, left: 0, refused: 0 };
  beforeAll(async () => {
    if (missing !== undefined) return;
    console.info(`seed ${SEED}, ${adapterName}`);
    device = await newDevice();
    vi.spyOn(console, 'warn').mockImplementation(() => undefined);
  });
  afterAll(() => {
    console.info(JSON.stringify(seen));
    device?.destroy();
  });

  const open = (bytes: Uint8Array, options: SageAttentionOptions) =>
    withSageAttention(runtime, { minTokens: 0, ...options }).InferenceSession.create(bytes, {
      executionProviders: [{ name: 'webgpu', device }],
      ...QUIET,
    });
  type Session = Awaited<ReturnType<typeof open>>;
  const runOf = (session: Session, feeds: Feeds) => {
    const given = session.inputNames.map((name) => {
      const { type, data, dims } = feeds[name] as ortNode.Tensor;
      return [name, new runtime.Tensor(type as 'float32', data as Float32Array, dims)] as const;
    });
    return session.run(Object.fromEntries(given)) as unknown as Promise<Record<string, OrtTensor>>;
  };
  const expectClose = (actual: Float32Array, expected: Float32Array, bound: number, about: string) => {
    const { relativeL1 } = compare(actual, expected);
    expect(relativeL1 <= bound || !expected.every(Number.isFinite), `${about}: ${relativeL1}`).toBe(true);
  };
  const numbersOf = (tensor: OrtTensor | ortNode.Tensor) => toNumbers(tensor as OrtTensor);

  for (const { name, make } of sampled(CASES, SEED, { byHand: 0.02, otherwise: 0.03 })) {
    itNeeds(missing)(name, async () => {
      const graph = make();
      const exact = graph && (await onCpu(graph));
      if (graph === undefined || exact === undefined) {
        seen.refused++;
        return;
      }
      const { bytes, feeds, label } = graph;
      const detected = detectAttention(indexGraph(readModel(bytes).graph as GraphProto, graph.opset));
      const inPieces = await open(bytes, { markers: false }).catch(messageOf);
      if (typeof inPieces === 'string') {
        // What onnxruntime-web refuses and onnxruntime-node does not is refused in its words.
        const refusal = await runtime.InferenceSession.create(bytes, QUIET).then(() => 'opened', messageOf);
        expect(inPieces, label).toBe(refusal);
        expect(await open(bytes, {}).then(() => 'opened', messageOf), label).toBe(refusal);
        seen.refused++;
        return;
      }
      const marked = await open(bytes, {});
      for (const [i, inputs] of feeds.entries()) {
        const expected = await runOf(inPieces, inputs);
        const actual = await runOf(marked, inputs);
        const report = JSON.stringify(marked.sageAttention);
        expect(marked.sageAttention.length, report).toBeGreaterThanOrEqual(
          detected.sites.length + detected.left.length,
        );
        for (const { taken, path, reason, cutReason } of marked.sageAttention) {
          if (taken) expect(path === 'marker' || cutReason, report).toBeTruthy();
          else expect(reason, report).toBeTruthy();
          seen[path ?? 'left']++;
        }
        expect(marked.sageAttention.map(({ node, taken }) => [node, taken]).sort(), `${label}: ${report}`).toEqual(
          inPieces.sageAttention.map(({ node, taken }) => [node, taken]).sort(),
        );
        for (const [output, tensor] of Object.entries(expected)) {
          const about = `${label}: ${output}; ${report}`;
          expect(actual[output]?.dims, about).toEqual(tensor.dims);
          const [a, b] = [await numbersOf(actual[output] as OrtTensor), await numbersOf(tensor)];
          // A mask of booleans is added in the one and selects in the other, which rounds otherwise.
          expectClose(a, b, 1e-3, about);
          expectClose(b, await numbersOf(exact[i]?.[output] as ortNode.Tensor), 0.1, about);
        }
      }
      await inPieces.release();
      await marked.release();
    });
  }
});
