/** Decoders with and without a cache in one file, as Optimum merges them for transformers.js. */
import * as ortNode from 'onnxruntime-node';
import * as ortWeb from 'onnxruntime-web';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { exactBackend } from '../../../test/support/exact-backend.ts';
import { Random, runSeed } from '../../../test/support/random.ts';
import type { Backend } from '../../backends/backend.ts';
import { setBackend } from '../../backends/registry.ts';
import { withSageAttention } from './index.ts';
import { mergedDecoder, mergedFeeds, PAST } from './testing/merged-decoder.ts';

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

const ENGINES = { 'onnxruntime-node': ortNode, 'onnxruntime-web': ortWeb as unknown as typeof ortNode } as const;

describe.each(Object.entries(ENGINES))('a merged decoder on %s', (_, ort) => {
  const bytes = mergedDecoder(new Random(seed));

  it('takes the attention of both branches', async () => {
    const plain = await ort.InferenceSession.create(bytes);
    const sage = await withSageAttention(ort, { minTokens: 0 }).InferenceSession.create(bytes);
    expect(sage.inputMetadata).toEqual(plain.inputMetadata);
    expect(sage.outputMetadata).toEqual(plain.outputMetadata);
    for (const [useCache, length] of [
      [false, 9],
      [true, 1],
      [true, 3],
      [false, 4],
    ] as const) {
      const feeds = mergedFeeds(ort, new Random(seed + length), length, useCache);
      const before = backend.calls;
      const [expected, actual] = [await plain.run(feeds), await sage.run(feeds)];
      expect(backend.calls - before).toBe(1);
      for (const name of plain.outputNames) {
        const [x, y] = [actual[name], expected[name]] as [ortNode.Tensor, ortNode.Tensor];
        expect(x.dims).toEqual(y.dims);
        const [a, b] = [x.data, y.data] as [Float32Array, Float32Array];
        const largest = b.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-3);
        expect(a.findIndex((value, i) => Math.abs(value - (b[i] as number)) > 2e-5 * largest)).toBe(-1);
      }
    }
    expect(sage.sageAttention.map(({ taken, queryLength, keyLength }) => [taken, queryLength, keyLength])).toEqual([
      [true, 3, 3 + PAST],
      [true, 4, 4],
    ]);
    await plain.release();
    await sage.release();
    await expect(sage.run(mergedFeeds(ort, new Random(seed), 4, false))).rejects.toThrow();
  });

  it('runs in one piece what is too short', async () => {
    const plain = await ort.InferenceSession.create(bytes);
    const sage = await withSageAttention(ort, { minTokens: 8 }).InferenceSession.create(bytes);
    for (let run = 0; run < 3; run++) {
      for (const [useCache, length, calls] of [
        [true, 1, 0],
        [false, 9, 1],
      ] as const) {
        const feeds = mergedFeeds(ort, new Random(seed + run), length, useCache);
        const before = backend.calls;
        const [expected, actual] = [await plain.run(feeds), await sage.run(feeds)];
        expect(backend.calls - before).toBe(calls);
        const [y, e] = [actual.y, expected.y].map((tensor) => [...(tensor as ortNode.Tensor).data] as number[]);
        const difference = (y as number[]).map((value, at) => Math.abs(value - (e?.[at] as number)));
        expect(Math.max(...difference)).toBeLessThan(1e-4);
      }
    }
    expect(sage.sageAttention[0]?.reason).toContain('fewer than minTokens');
    await plain.release();
    await sage.release();
  });

  it('leaves branches that no input decides between', async () => {
    const sage = await withSageAttention(ort, { minTokens: 0 }).InferenceSession.create(
      mergedDecoder(new Random(seed), { isComputed: true }),
    );
    expect(sage.sageAttention.map(({ taken, reason }) => [taken, reason?.includes('inside a subgraph of If')])).toEqual(
      [
        [false, true],
        [false, true],
      ],
    );
    await sage.release();
  });
});
