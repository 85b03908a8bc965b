/** Around the numbers of a run: feeds, options, release, and what `policy: 'adaptive'` measures, as onnxruntime alone has it. */
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import * as ort from 'onnxruntime-node';
import * as ortWeb from 'onnxruntime-web';
import { afterAll, afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { exactBackend } from '../../../test/support/exact-backend.ts';
import { GraphBuilder } from '../../../test/support/graph-builder.ts';
import { Random, runSeed } from '../../../test/support/random.ts';
import type { Backend } from '../../backends/backend.ts';
import { setBackend } from '../../backends/registry.ts';
import { compare } from '../../reference/metrics.ts';
import { withSageAttention } from './index.ts';
import { readModel } from './onnx/codec.ts';

const SEED = runSeed();
const H = 2;
const D = 8;

let backend = exactBackend();
let previous: Backend | undefined;
beforeEach(async () => {
  backend = exactBackend();
  const before = await setBackend(backend);
  previous ??= before;
});
afterEach(() => vi.restoreAllMocks());
afterAll(async () => {
  console.info(`seed ${SEED}`);
  if (previous !== undefined) await setBackend(previous);
});

/** Attention whose operands no session of onnxruntime sees before it: inputs q, k, v `[batch,H,length,D]`. */
function attention(float: 'float32' | 'float16' = 'float32'): Uint8Array {
  const g = new GraphBuilder(new Random(SEED), float);
  for (const name of ['q', 'k', 'v']) g.input(name, ['batch', H, 'length', D]);
  const kT = g.op('Transpose', ['k'], { perm: [0, 1, 3, 2] });
  const size = g.op('Slice', [g.op('Shape', ['q']), g.ints([-1]), g.ints([2 ** 31 - 1])]);
  const root = g.op('Sqrt', [g.op('Cast', [size], { to: float === 'float32' ? 1 : 10 })]);
  const p = g.op('Softmax', [g.op('Div', [g.op('MatMul', ['q', kT]), root])], { axis: -1 });
  g.op('MatMul', [p, 'v'], {}, { outputs: ['y'] });
  g.output('y', ['batch', H, 'length', D]);
  return g.build();
}
const ATTENTION = attention();

const tensor = (dims: readonly number[]) =>
  new ort.Tensor('float32', new Random(SEED).normals(dims.reduce((product, size) => product * size, 1)), dims);
const feeds = (length = 4) => ({
  q: tensor([1, H, length, D]),
  k: tensor([1, H, length, D]),
  v: tensor([1, H, length, D]),
});

const sageOf = (options = {}) => withSageAttention(ort, { minTokens: 0, ...options }).InferenceSession;
const messageOf = (promise: Promise<unknown>) =>
  promise.then(
    () => undefined,
    (error: Error) => error.message,
  );

describe('feeds', () => {
  it.each([
    [
      'a size that the model fixes',
      { q: tensor([1, H + 1, 4, D]), k: tensor([1, H + 1, 4, D]), v: tensor([1, H + 1, 4, D]) },
    ],
    ['another rank', { q: tensor([H, 4, D]), k: tensor([H, 4, D]), v: tensor([H, 4, D]) }],
  ])('%s is refused as onnxruntime refuses it', async (_, wrong) => {
    const plain = await ort.InferenceSession.create(ATTENTION);
    const sage = await sageOf().create(ATTENTION);
    const expected = await messageOf(plain.run(wrong));
    expect(expected).toBeDefined();
    expect(await messageOf(sage.run(wrong))).toBe(expected);
    expect((await sage.run(feeds())).y?.dims).toEqual([1, H, 4, D]);
  });

  it('a tensor that the model has no input for is refused where onnxruntime refuses it', async () => {
    ortWeb.env.wasm.numThreads = 1;
    for (const runtime of [ort, ortWeb as unknown as typeof ort]) {
      const others = Object.entries({ ...feeds(), other: tensor([1]) }).map(
        ([name, { data, dims }]) => [name, new runtime.Tensor('float32', data as Float32Array, dims)] as const,
      );
      const plain = await runtime.InferenceSession.create(ATTENTION);
      const sage = await withSageAttention(runtime, { minTokens: 0 }).InferenceSession.create(ATTENTION);
      const inputs = Object.fromEntries(others);
      expect(await messageOf(sage.run(inputs))).toBe(await messageOf(plain.run(inputs)));
    }
  });

  it('are read before run returns', async () => {
    const sage = await sageOf().create(ATTENTION);
    const inputs = feeds();
    const expected = (await sage.run(inputs)).y?.data;
    const pending = sage.run(inputs);
    for (const { data } of Object.values(inputs)) (data as Float32Array).fill(Number.NaN);
    expect((await pending).y?.data).toEqual(expected);
  });

  it('a float16 scale computed from sizes is read', async () => {
    const bytes = attention('float16');
    const half = (dims: readonly number[]) =>
      new ort.Tensor('float16', new Uint16Array(dims.reduce((a, b) => a * b, 1)).fill(0x3c00) as never, dims);
    const inputs = { q: half([1, H, 4, D]), k: half([1, H, 4, D]), v: half([1, H, 4, D]) };
    const sage = await sageOf().create(bytes);
    const { y } = await sage.run(inputs);
    expect(sage.sageAttention[0]?.reason).toBeUndefined();
    expect(Array.from(y?.data as Uint16Array, Number)).toEqual(
      Array.from((await (await ort.InferenceSession.create(bytes)).run(inputs)).y?.data as Uint16Array, Number),
    );
  });
});

describe('release', () => {
  it.each([
    ['attention replaced', 0],
    ['attention left, in pieces and whole', 100],
  ])('nothing runs and nothing is opened after it: %s', async (_, minTokens) => {
    const sage = await sageOf({ minTokens }).create(ATTENTION);
    for (let run = 0; run < 2; run++) await sage.run(feeds());
    await sage.release();
    const create = vi.spyOn(ort.InferenceSession, 'create');
    for (const length of [4, 5]) await expect(sage.run(feeds(length))).rejects.toThrow('Session already disposed.');
    await expect(sage.release()).rejects.toThrow('Session already disposed.');
    expect(create).not.toHaveBeenCalled();
  });

  it('waits for a run in flight', async () => {
    const sage = await sageOf().create(ATTENTION);
    const running = sage.run(feeds());
    await sage.release();
    expect((await running).y?.dims).toEqual([1, H, 4, D]);
  });

  it('a session that could not be opened is opened by the next run', async () => {
    const create = ort.InferenceSession.create.bind(ort.InferenceSession);
    const failing = vi.spyOn(ort.InferenceSession, 'create');
    const pieces = await sageOf({ minTokens: 100, wholeFallback: false }).create(ATTENTION);
    failing.mockRejectedValueOnce(new Error('no memory'));
    await expect(pieces.run(feeds())).rejects.toThrow('no memory');
    failing.mockImplementation(create as never);
    expect((await pieces.run(feeds())).y?.dims).toEqual([1, H, 4, D]);

    const whole = await sageOf({ minTokens: 100 }).create(ATTENTION);
    failing.mockRejectedValueOnce(new Error('no memory'));
    expect((await whole.run(feeds())).y?.dims).toEqual([1, H, 4, D]);
    expect(whole.sageAttention[0]?.reason).toBe('onnxruntime ran the model in one piece: no memory');
  });
});

describe('options', () => {
  it('a file for the optimized model is written by onnxruntime from the whole model', async () => {
    const folder = await mkdtemp(path.join(tmpdir(), 'optimized-'));
    try {
      const nodes = async (session: typeof ort.InferenceSession, name: string) => {
        const optimizedModelFilePath = path.join(folder, name);
        const options = { optimizedModelFilePath, graphOptimizationLevel: 'disabled', logSeverityLevel: 3 } as const;
        await (await session.create(ATTENTION, options)).release();
        return readModel(new Uint8Array(await readFile(optimizedModelFilePath))).graph?.node.map(
          ({ opType }) => opType,
        );
      };
      const expected = await nodes(ort.InferenceSession, 'plain.onnx');
      expect(await nodes(sageOf() as never, 'sage.onnx')).toEqual(expected);
    } finally {
      await rm(folder, { recursive: true });
    }
  });

  it('session options that are none are refused as onnxruntime refuses them', async () => {
    for (const wrong of [3, null, 'x']) {
      const expected = await messageOf(ort.InferenceSession.create(ATTENTION, wrong as never));
      expect(expected).toBeDefined();
      expect(await messageOf(sageOf().create(ATTENTION, wrong as never))).toBe(expected);
    }
  });

  it('a global regular expression matches each time', async () => {
    const include = [/Softmax/g];
    for (let i = 0; i < 3; i++) {
      expect((await sageOf({ include }).create(ATTENTION)).sageAttention[0]).toMatchObject({ taken: true });
    }
  });
});

describe("policy: 'adaptive'", () => {
  /** The exact backend with another time, or result, of its kernel. */
  async function slow(milliseconds: number | ((queryLength: number) => number)): Promise<void> {
    await setBackend({
      ...backend,
      plan: async (problem, choice) => {
        const plan = await backend.plan(problem, choice);
        const wait = typeof milliseconds === 'number' ? milliseconds : milliseconds(problem.queryLength);
        return {
          ...plan,
          run: async (inputs, context) => {
            await new Promise((resolve) => setTimeout(resolve, wait));
            return plan.run(inputs, context);
          },
        };
      },
    });
  }

  it('does not count the opening of sessions against onnxruntime', async () => {
    await slow(400);
    const create = ort.InferenceSession.create.bind(ort.InferenceSession);
    let delay = 0;
    vi.spyOn(ort.InferenceSession, 'create').mockImplementation(async (...args: unknown[]) => {
      await new Promise((resolve) => setTimeout(resolve, delay));
      return (create as (...args: unknown[]) => Promise<ort.InferenceSession>)(...args);
    });
    const sage = await sageOf({ policy: 'adaptive', calibrationRuns: 1 }).create(ATTENTION);
    delay = 1000;
    await sage.run(feeds());
    expect(sage.sageAttention[0]).toMatchObject({ taken: false, reason: 'onnxruntime was faster' });
  });

  it('weighs runs of different lengths by what they take', async () => {
    await slow((queryLength) => (queryLength < 50 ? 200 : 0));
    const sage = await sageOf({ policy: 'adaptive', calibrationRuns: 2 }).create(ATTENTION);
    await sage.run(feeds(5));
    // The types know the class by its factory alone.
    const { prototype } = ort.InferenceSession as unknown as { prototype: ort.InferenceSession };
    const { run } = prototype;
    vi.spyOn(prototype, 'run').mockImplementation(async function (this: ort.InferenceSession, ...args: unknown[]) {
      await new Promise((resolve) => setTimeout(resolve, 1000));
      return (run as (...args: unknown[]) => Promise<ort.InferenceSession.OnnxValueMapType>).apply(this, args);
    });
    await sage.run(feeds(64));
    expect(sage.sageAttention[0]).toMatchObject({ taken: true, reason: undefined });
  });

  /** Chooses one block of four rows of blocks, which is far from the whole. */
  const sparsity = { topK: 0.25, rows: 16, keys: 16 } as const;

  it('computes the blocks of a sparsity only where they are close to the whole, and reports what they are', async () => {
    await slow(0);
    const { prototype } = ort.InferenceSession as unknown as { prototype: ort.InferenceSession };
    const { run } = prototype;
    vi.spyOn(prototype, 'run').mockImplementation(async function (this: ort.InferenceSession, ...args: unknown[]) {
      await new Promise((resolve) => setTimeout(resolve, 500));
      return (run as (...args: unknown[]) => Promise<ort.InferenceSession.OnnxValueMapType>).apply(this, args);
    });
    const options = { policy: 'adaptive', calibrationRuns: 1, sparsity } as const;
    const dense = await sageOf(options).create(ATTENTION);
    await dense.run(feeds(64));
    expect(dense.sageAttention[0]).toMatchObject({ taken: true, keptFraction: undefined });

    // The exact backend is slow where it computes every block.
    const { plan } = backend;
    await setBackend({
      ...backend,
      plan: async (problem, choice) => {
        const made = await plan(problem, choice);
        const wait = problem.blocks === undefined ? 200 : 0;
        return {
          ...made,
          run: async (inputs, context) => {
            await new Promise((resolve) => setTimeout(resolve, wait));
            return made.run(inputs, context);
          },
        };
      },
    });
    const sparse = await sageOf({ ...options, threshold: -1 }).create(ATTENTION);
    await sparse.run(feeds(64));
    expect(sparse.sageAttention[0]).toMatchObject({ taken: true, keptFraction: 0.25 });
  });

  it('a sparsity is used everywhere under the fixed policy', async () => {
    const sage = await sageOf({ sparsity }).create(ATTENTION);
    await sage.run(feeds(64));
    expect(sage.sageAttention[0]).toMatchObject({ taken: true, keptFraction: 0.25 });
  });

  it('a reason of a run before is none of the runs that compare', async () => {
    const sage = await sageOf({ policy: 'adaptive', minTokens: 4 }).create(ATTENTION);
    await sage.run(feeds(3));
    expect(sage.sageAttention[0]?.reason).toBe('3 tokens are fewer than minTokens, 4');
    await sage.run(feeds(5));
    expect(sage.sageAttention[0]?.reason).toBeUndefined();
  });

  it('returns to the model in one piece where that is faster, although the attention by itself is not', async () => {
    const sage = await sageOf({ policy: 'adaptive', calibrationRuns: 1 }).create(ATTENTION);
    const { prototype } = ort.InferenceSession as unknown as { prototype: ort.InferenceSession };
    const { run } = prototype;
    // What the pieces cost, and onnxruntime's own attention while kernels are compared.
    let delay = 300;
    const runs = vi.spyOn(prototype, 'run').mockImplementation(async function (
      this: ort.InferenceSession,
      ...args: unknown[]
    ) {
      const isWhole = this.inputNames.join() === 'q,k,v' && this.outputNames.join() === 'y' && delay === 0;
      await new Promise((resolve) => setTimeout(resolve, isWhole ? 0 : 300));
      return (run as (...args: unknown[]) => Promise<ort.InferenceSession.OnnxValueMapType>).apply(this, args);
    });
    const expected = (await sage.run(feeds())).y;
    expect(sage.sageAttention[0]).toMatchObject({ taken: true });
    delay = 0;
    const { y } = await sage.run(feeds());
    expect(compare(y?.data as Float32Array, expected?.data as Float32Array).relativeL1).toBeLessThan(1e-5);
    expect(sage.sageAttention[0]).toMatchObject({ taken: false, reason: 'the model in one piece was faster' });
    runs.mockClear();
    for (const length of [4, 5]) expect((await sage.run(feeds(length))).y?.dims).toEqual([1, H, length, D]);
    expect(runs).toHaveBeenCalledTimes(4);
  });

  it('runs at the same time compare each on its own', async () => {
    await slow(400);
    const sage = await sageOf({ policy: 'adaptive', calibrationRuns: 2 }).create(ATTENTION);
    const expected = await (await ort.InferenceSession.create(ATTENTION)).run(feeds());
    const together = await Promise.all([1, 2, 3].map(() => sage.run(feeds())));
    for (const { y } of together) expect(y?.data).toEqual(expected.y?.data);
    expect(sage.sageAttention[0]).toMatchObject({ taken: false, reason: 'onnxruntime was faster' });
  });
});
