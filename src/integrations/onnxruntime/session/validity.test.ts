/** Mutated graphs: what onnxruntime refuses is refused in its words, and what it runs gives the same numbers. */
import fc from 'fast-check';
import * as ort from 'onnxruntime-node';
import { afterAll, beforeAll, expect, it, vi } from 'vitest';
import { exactBackend } from '../../../../test/support/exact-backend.ts';
import { Random, runSeed } from '../../../../test/support/random.ts';
import type { Backend } from '../../../backends/backend.ts';
import { setBackend } from '../../../backends/registry.ts';
import { compare } from '../../../reference/metrics.ts';
import { withSageAttention } from '../index.ts';
import { type GraphProto, readModel, writeModel } from '../onnx/codec.ts';
import { MUTATED, MUTATION_NAMES, mutatedModel } from '../testing/mutations.ts';

const SEED = runSeed();
const RUNS = 150;
const { batch: B, tokens: L, width: WIDTH } = MUTATED;

const backend = exactBackend();
let previous: Backend | undefined;
beforeAll(async () => {
  console.info(`seed ${SEED}`);
  previous = await setBackend(backend);
});
afterAll(async () => {
  if (previous !== undefined) await setBackend(previous);
});

const quiet = { logSeverityLevel: 4 } as const;
const outcome = <T>(promise: Promise<T>) =>
  promise.then(
    (value) => ({ value }),
    (error: Error) => ({ error: error.message }),
  );

const mutation = fc.record({
  name: fc.constantFrom(...MUTATION_NAMES),
  choices: fc.array(fc.nat({ max: 10_000 }), { minLength: 4, maxLength: 4 }),
});

/** The model without nodes whose results nothing needs: onnxruntime runs them, and fails where one fails. */
function withoutDeadNodes(bytes: Uint8Array): Uint8Array {
  const model = readModel(bytes);
  const { graph } = model;
  if (graph === undefined) throw new Error('no graph');
  const needed = new Set(graph.output.map(({ name }) => name));
  const alive = new Set<GraphProto['node'][number]>();
  for (const name of needed) {
    for (const entry of graph.node.filter(({ output }) => output.includes(name))) {
      alive.add(entry);
      for (const input of entry.input) needed.add(input);
    }
  }
  graph.node = graph.node.filter((entry) => alive.has(entry));
  return writeModel(model);
}

/** One run of each, which must agree. */
async function compareRuns(
  bytes: Uint8Array,
  plain: ort.InferenceSession,
  sage: ort.InferenceSession,
  feeds: ort.InferenceSession.FeedsType,
): Promise<'ran' | 'failed'> {
  const actual = await outcome(sage.run(feeds));
  let expected = await outcome(plain.run(feeds));
  if ('error' in expected && 'value' in actual) {
    expected = await outcome((await ort.InferenceSession.create(withoutDeadNodes(bytes), quiet)).run(feeds));
  }
  if ('error' in expected || 'error' in actual) {
    expect('error' in actual ? actual.error : 'ran').toBe('error' in expected ? expected.error : 'ran');
    return 'failed';
  }
  for (const [name, tensor] of Object.entries(expected.value)) {
    expect(actual.value[name]?.dims).toEqual(tensor.dims);
    if (tensor.type !== 'float32') {
      expect(actual.value[name]?.data).toEqual(tensor.data);
      continue;
    }
    const { relativeL1 } = compare(actual.value[name]?.data as Float32Array, tensor.data as Float32Array);
    expect(relativeL1 < 1e-4 || !Number.isFinite(relativeL1)).toBe(true);
  }
  return 'ran';
}

it('mutated graphs', async () => {
  vi.spyOn(console, 'warn').mockImplementation(() => undefined);
  const seen = { refused: 0, ran: 0, failed: 0 };
  const random = new Random(SEED + 1);
  const floats = (dims: readonly number[]) =>
    new ort.Tensor('float32', random.normals(dims.reduce((a, b) => a * b, 1)), dims);
  const feeds = { x: floats([B, L, WIDTH]), mask: floats([B, 1, L, L]) };
  const property = fc.asyncProperty(
    fc.boolean(),
    fc.array(mutation, { minLength: 1, maxLength: 2 }),
    fc.constantFrom(0, L + 1),
    async (isStatic, mutations, minTokens) => {
      const bytes = mutatedModel(SEED, isStatic, mutations);
      const plain = await outcome(ort.InferenceSession.create(bytes, quiet));
      const sage = await outcome(withSageAttention(ort, { minTokens }).InferenceSession.create(bytes, quiet));
      if ('error' in plain || 'error' in sage) {
        seen.refused++;
        expect('error' in sage ? sage.error : 'opened').toBe('error' in plain ? plain.error : 'opened');
        return;
      }
      expect(sage.value.inputMetadata).toEqual(plain.value.inputMetadata);
      expect(sage.value.outputMetadata).toEqual(plain.value.outputMetadata);
      for (let run = 0; run < 2; run++) seen[await compareRuns(bytes, plain.value, sage.value, feeds)]++;
      await plain.value.release();
      await sage.value.release();
    },
  );
  await fc.assert(property, { seed: SEED, numRuns: RUNS, endOnFailure: false });
  console.info(JSON.stringify(seen));
  expect(seen.refused).toBeGreaterThan(RUNS / 10);
  expect(seen.ran).toBeGreaterThan(RUNS / 10);
});
