/** Random graphs between the two products give what onnxruntime alone gives, whatever of them is taken. */
import * as ort from 'onnxruntime-node';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { exactBackend } from '../../../../test/support/exact-backend.ts';
import { GraphBuilder } from '../../../../test/support/graph-builder.ts';
import { Random, runSeed } from '../../../../test/support/random.ts';
import type { Backend } from '../../../backends/backend.ts';
import { setBackend } from '../../../backends/registry.ts';
import { withSageAttention } from '../index.ts';
import { randomGraph } from '../testing/random-graph.ts';

const seed = runSeed();
const backend = exactBackend();
let previous: Backend | undefined;
beforeAll(async () => {
  console.info(`seed ${seed}`);
  previous = await setBackend(backend);
});
afterAll(async () => {
  if (previous !== undefined) await setBackend(previous);
});

const GRAPHS = 120;

it('takes only what is attention', { timeout: 120_000 }, async () => {
  const sage = withSageAttention(ort, { minTokens: 0 });
  const options = { logSeverityLevel: 4 } as const;
  let taken = 0;
  let refused = 0;
  for (let i = 0; i < GRAPHS; i++) {
    const random = new Random(seed + i);
    const g = new GraphBuilder(random);
    const { feeds, steps } = randomGraph(g, random);
    const bytes = g.build(17);
    const plain = await ort.InferenceSession.create(bytes, options).catch(() => undefined);
    const expected = await plain?.run(feeds).catch(() => undefined);
    if (plain === undefined || expected === undefined) {
      refused++;
      continue;
    }
    const session = await sage.InferenceSession.create(bytes, options);
    const actual = await session.run(feeds);
    const label = `seed ${seed + i}: ${steps.join(', ')}; ${JSON.stringify(session.sageAttention)}`;
    expect(session.sageAttention.length, label).toBe(1);
    taken += session.sageAttention.filter((attention) => attention.taken).length;
    const [x, y] = [actual.y, expected.y] as [ort.Tensor, ort.Tensor];
    expect(x.dims, label).toEqual(y.dims);
    const [a, b] = [x.data, y.data] as [Float32Array, Float32Array];
    const largest = b.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    // Several factors make scores of hundreds, of which float32 keeps a ten-thousandth.
    const wrong = a.findIndex((value, at) => !(Math.abs(value - (b[at] as number)) <= 1e-3 * largest));
    expect(wrong, label).toBe(-1);
    await plain.release();
    await session.release();
  }
  console.info(`${taken} taken, ${refused} refused by onnxruntime, of ${GRAPHS}`);
  expect(taken).toBeGreaterThan(GRAPHS / 4);
});
