/**
 * Small graphs through onnxruntime with and without SageAttention. The backend is exact, so the outputs must agree to float32
 * accuracy: an error of matching or cutting cannot hide behind quantization.
 */
import * as ortNode from 'onnxruntime-node';
import * as ortWeb from 'onnxruntime-web';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { exactBackend } from '../../../../test/support/exact-backend.ts';
import { GraphBuilder } from '../../../../test/support/graph-builder.ts';
import { Random, runSeed } from '../../../../test/support/random.ts';
import type { Backend } from '../../../backends/backend.ts';
import { setBackend } from '../../../backends/registry.ts';
import { detectAttention } from '../detect/index.ts';
import { withSageAttention } from '../index.ts';
import { indexGraph } from '../model/graph.ts';
import { type GraphProto, readModel } from '../onnx/codec.ts';
import type { Case, Feeds } from './case.ts';

const ENGINES = { 'onnxruntime-node': ortNode, 'onnxruntime-web': ortWeb } as const;

/** Feeds of one onnxruntime package are made of that package's tensors. */
function convert(ort: typeof ortNode | typeof ortWeb, feeds: Feeds): Feeds {
  const TensorClass = ort.Tensor as unknown as new (
    type: string,
    data: unknown,
    dims: readonly number[],
  ) => ortNode.Tensor;
  return Object.fromEntries(
    Object.entries(feeds).map(([name, { type, data, dims }]) => [name, new TensorClass(type, data, dims)]),
  );
}

/** One test for each case and engine. */
export function testCases(cases: readonly Case[]): void {
  const seed = runSeed();
  const backend = exactBackend();
  let previous: Backend | undefined;
  beforeAll(async () => {
    console.info(`seed ${seed}`);
    ortWeb.env.wasm.numThreads = 1;
    previous = await setBackend(backend);
  });
  afterAll(async () => {
    if (previous !== undefined) await setBackend(previous);
  });

  describe.each(Object.entries(ENGINES))('%s', (engine, ort) => {
    const sage = withSageAttention(ort as typeof ortNode, { minTokens: 0 });

    it.each(cases.map((entry) => [entry.name, entry] as const))('%s', async (_, entry) => {
      const builder = new GraphBuilder(new Random(seed));
      entry.build(builder);
      const bytes = builder.build(entry.opset ?? 17);
      const feeds = convert(ort, entry.feeds(new Random(seed + 1)));
      const plain = await ort.InferenceSession.create(bytes);
      const cut = await sage.InferenceSession.create(bytes);
      const before = backend.calls;
      const expected = await plain.run(feeds as never);
      const actual = await cut.run(feeds);

      const report = cut.sageAttention;
      const taken = entry.taken ?? 1;
      expect(report.filter((attention) => attention.taken).length, JSON.stringify(report)).toBe(taken);
      expect(backend.calls - before).toBe(taken);
      if (entry.sources !== undefined) {
        const [site] = detectAttention(indexGraph(readModel(bytes).graph as GraphProto, entry.opset ?? 17)).sites;
        expect(new Set([site?.q, site?.k, site?.v].map((operand) => operand?.value)).size).toBe(entry.sources);
      }
      if (entry.left !== undefined) expect(report.map(({ reason }) => reason).join()).toContain(entry.left);
      expect(cut.inputMetadata).toEqual(plain.inputMetadata);
      expect(cut.outputMetadata).toEqual(plain.outputMetadata);
      for (const name of plain.outputNames) {
        const e = expected[name] as ortNode.Tensor;
        const a = actual[name] as ortNode.Tensor;
        expect([a.type, a.dims]).toEqual([e.type, e.dims]);
        const [x, y] = [a.data, e.data] as [Float32Array, Float32Array];
        const largest = y.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
        // float32 on both sides, sums of at most a few hundred terms.
        x.forEach(
          (value, i) =>
            void (
              Math.abs(value - (y[i] as number)) <= 2e-5 * largest ||
              Object.is(value, y[i]) ||
              expect(value, `${engine} ${name}[${i}]`).toBe(y[i])
            ),
        );
      }
      await plain.release();
      await cut.release();
    });
  });
}
