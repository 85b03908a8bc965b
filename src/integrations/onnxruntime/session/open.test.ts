/** What a session depends on once it is open, and which models are opened in one piece. */
import { mkdir, mkdtemp, rename, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import * as ort from 'onnxruntime-node';
import * as ortWeb from 'onnxruntime-web';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, vi } from 'vitest';
import { exactBackend } from '../../../../test/support/exact-backend.ts';
import { GraphBuilder } from '../../../../test/support/graph-builder.ts';
import { buildDecoder } from '../../../../test/support/models.ts';
import { Random, runSeed } from '../../../../test/support/random.ts';
import type { Backend } from '../../../backends/backend.ts';
import { setBackend } from '../../../backends/registry.ts';
import { compare } from '../../../reference/metrics.ts';
import { withSageAttention } from '../index.ts';
import { externalTensor, readModel, writeModel } from '../onnx/codec.ts';

const SEED = runSeed();
const [B, H, L, D] = [1, 2, 6, 8];
const WIDTH = H * D;
type Dims = readonly (number | string)[];

let backend = exactBackend();
let previous: Backend | undefined;
let folder: string;
beforeAll(async () => {
  console.info(`seed ${SEED}`);
  ortWeb.env.wasm.numThreads = 1;
  previous = await setBackend(backend);
});
beforeEach(async () => {
  backend = exactBackend();
  await setBackend(backend);
  folder = await mkdtemp(path.join(tmpdir(), 'open-'));
});
afterEach(async () => {
  vi.restoreAllMocks();
  vi.unstubAllGlobals();
  await rm(folder, { recursive: true });
});
afterAll(async () => {
  if (previous !== undefined) await setBackend(previous);
});

/** Projections, attention and a residual: the input is read by several sessions. */
function block(seed: number, dims: Dims = ['batch', 'length', WIDTH]): Uint8Array {
  const g = new GraphBuilder(new Random(seed));
  g.input('x', dims);
  const part = (perm: readonly number[]) =>
    g.op('Transpose', [g.op('Reshape', [g.linear('x', WIDTH, WIDTH), g.ints([0, 0, H, D])])], { perm });
  const scores = g.op('Mul', [g.op('MatMul', [part([0, 2, 1, 3]), part([0, 2, 3, 1])]), g.scalar(0.3)]);
  const heads = g.op('MatMul', [g.op('Softmax', [scores], { axis: -1 }), part([0, 2, 1, 3])]);
  const merged = g.op('Reshape', [g.op('Transpose', [heads], { perm: [0, 2, 1, 3] }), g.ints([0, 0, WIDTH])]);
  g.op('Add', [g.linear(merged, WIDTH, WIDTH), 'x'], {}, { outputs: ['y'] });
  g.output('y', dims);
  return g.build();
}

type Runtime = typeof ort;
const RUNTIMES = [
  ['onnxruntime-node', ort],
  ['onnxruntime-web', ortWeb as unknown as Runtime],
] as const;
const feedsOf = ({ Tensor }: Runtime, length = L) => ({
  x: new Tensor('float32', new Random(SEED + 1).normals(B * length * WIDTH), [B, length, WIDTH]),
});

async function expectSame(
  actual: ort.InferenceSession,
  plain: ort.InferenceSession,
  feeds: ort.InferenceSession.FeedsType,
) {
  const [{ y: a }, { y: e }] = [await actual.run(feeds), await plain.run(feeds)];
  expect(a?.dims).toEqual(e?.dims);
  expect(compare(a?.data as Float32Array, e?.data as Float32Array).relativeL1).toBeLessThan(1e-5);
}

describe('a model is read once', () => {
  const WAYS = [
    ['attention replaced', 0],
    ['attention left, first in pieces and then in one', 100],
  ] as const;

  describe.each(RUNTIMES)('%s', (_, runtime) => {
    it.each(WAYS)('memory of the caller may be used again or given away: %s', async (_name, minTokens) => {
      const bytes = block(SEED);
      const plain = await runtime.InferenceSession.create(block(SEED));
      const options = { minTokens };
      const overwritten = await withSageAttention(runtime, options).InferenceSession.create(bytes);
      bytes.set(block(SEED + 1));
      const given = block(SEED);
      const transferred = await withSageAttention(runtime, options).InferenceSession.create(
        given.buffer as ArrayBuffer,
        given.byteOffset,
        given.byteLength,
      );
      structuredClone(given.buffer, { transfer: [given.buffer as ArrayBuffer] });
      for (const session of [overwritten, transferred]) {
        for (let run = 0; run < 3; run++) await expectSame(session, plain, feedsOf(runtime));
      }
      expect(backend.calls > 0).toBe(minTokens === 0);
    });

    it.each(WAYS)('a file may change: %s', async (_name, minTokens) => {
      const file = path.join(folder, 'model.onnx');
      await writeFile(file, block(SEED));
      const sage = await withSageAttention(runtime, { minTokens }).InferenceSession.create(file);
      const plain = await runtime.InferenceSession.create(file);
      await writeFile(file, block(SEED + 1));
      for (let run = 0; run < 3; run++) await expectSame(sage, plain, feedsOf(runtime));
    });

    it('external data in memory may be used again', async () => {
      const { bytes, data } = external();
      const options = { externalData: [{ path: 'weights.bin', data: data.slice() }] };
      const plain = await runtime.InferenceSession.create(bytes, options);
      const mine = { externalData: [{ path: 'weights.bin', data: data.slice() }] };
      const sage = await withSageAttention(runtime, { minTokens: 100 }).InferenceSession.create(bytes, mine);
      mine.externalData[0]?.data.fill(1);
      for (let run = 0; run < 3; run++) await expectSame(sage, plain, feedsOf(runtime));
    });
  });

  it('a URL is asked for once', async () => {
    const fetched = vi.fn(async () => new Response(block(SEED) as Uint8Array<ArrayBuffer>));
    vi.stubGlobal('fetch', fetched);
    const plain = await ortWeb.InferenceSession.create(block(SEED));
    for (const options of [{ minTokens: 100 }, { exclude: [/./] }]) {
      fetched.mockClear();
      const opened = vi.spyOn(ortWeb.InferenceSession, 'create');
      const sage = await withSageAttention(ortWeb, options).InferenceSession.create('https://models.example/m.onnx');
      for (let run = 0; run < 3; run++) await expectSame(sage as never, plain as never, feedsOf(ortWeb as never));
      expect(fetched).toHaveBeenCalledTimes(1);
      expect(opened.mock.calls.filter(([model]) => typeof model === 'string')).toEqual([]);
      opened.mockRestore();
    }
  });

  it('external data that changes on disk keeps the model in pieces', async () => {
    const { bytes, data } = external();
    const file = path.join(folder, 'model.onnx');
    await writeFile(file, bytes);
    await writeFile(path.join(folder, 'weights.bin'), data);
    const plain = await ort.InferenceSession.create(file);
    const sage = await withSageAttention(ort, { minTokens: 100 }).InferenceSession.create(file);
    await writeFile(
      path.join(folder, 'new'),
      data.map((byte) => byte ^ 1),
    );
    await rename(path.join(folder, 'new'), path.join(folder, 'weights.bin'));
    for (let run = 0; run < 3; run++) await expectSame(sage, plain, feedsOf(ort));
  });
});

/** The model with its weights in a file. */
function external(): { readonly bytes: Uint8Array; readonly data: Uint8Array } {
  const model = readModel(block(SEED));
  const chunks: Uint8Array[] = [];
  let offset = 0;
  if (model.graph === undefined) throw new Error('no graph');
  model.graph.initializer = model.graph.initializer.map((tensor) => {
    if (tensor.rawData.length < 512) return tensor;
    chunks.push(tensor.rawData);
    offset += tensor.rawData.length;
    return externalTensor(tensor, 'weights.bin', offset - tensor.rawData.length, tensor.rawData.length);
  });
  return { bytes: writeModel(model), data: new Uint8Array(Buffer.concat(chunks)) };
}

describe('names of files', () => {
  it.each(['model.onnx', './model.onnx', 'sub/../model.onnx'])('%s', async (name) => {
    const before = process.cwd();
    process.chdir(folder);
    try {
      await mkdir('sub');
      await writeFile('model.onnx', block(SEED));
      const sage = await withSageAttention(ort, { minTokens: 0 }).InferenceSession.create(name);
      await expectSame(sage, await ort.InferenceSession.create(name), feedsOf(ort));
      expect(sage.sageAttention[0]).toMatchObject({ taken: true });
    } finally {
      process.chdir(before);
    }
  });

  // As in Hugging Face's cache, where both names are links, and with the data beside the model's own file only.
  it.each(['both are links', 'the data is beside the link', 'the data is beside the target'])(
    'links: %s',
    async (way) => {
      const { bytes, data } = external();
      const [blobs, snapshot] = [path.join(folder, 'blobs'), path.join(folder, 'snapshot')];
      await Promise.all([mkdir(blobs), mkdir(snapshot)]);
      await writeFile(path.join(blobs, 'model'), bytes);
      await symlink(path.join('..', 'blobs', 'model'), path.join(snapshot, 'model.onnx'));
      const beside = path.join(snapshot, 'weights.bin');
      if (way === 'both are links') {
        await writeFile(path.join(blobs, 'data'), data);
        await symlink(path.join('..', 'blobs', 'data'), beside);
      } else await writeFile(way.endsWith('link') ? beside : path.join(blobs, 'weights.bin'), data);
      const open = ({ InferenceSession }: Pick<Runtime, 'InferenceSession'>) =>
        InferenceSession.create(path.join(snapshot, 'model.onnx'), { logSeverityLevel: 4 }).catch(
          (error: Error) => error.message,
        );
      const [plain, sage] = [await open(ort), await open(withSageAttention(ort, { minTokens: 0 }) as never)];
      if (typeof plain === 'string' || typeof sage === 'string') expect(sage).toEqual(plain);
      else {
        await expectSame(sage, plain, feedsOf(ort));
        expect((sage as unknown as { sageAttention: unknown[] }).sageAttention[0]).toMatchObject({ taken: true });
      }
    },
  );
});

it('under env.wasm.proxy every session gets copies: the proxy takes buffers away', async () => {
  const { InferenceSession } = ortWeb;
  const create = async (...args: unknown[]) => {
    const [bytes] = args as [Uint8Array];
    const session = await (InferenceSession.create as (...args: unknown[]) => Promise<ortWeb.InferenceSession>)(
      bytes.slice(),
      ...args.slice(1),
    );
    structuredClone(bytes.buffer, { transfer: [bytes.buffer as ArrayBuffer] });
    const run = session.run.bind(session);
    session.run = async (feeds: ortWeb.InferenceSession.FeedsType, ...rest: unknown[]) => {
      const sent = Object.entries(feeds).map(([name, { type, data, dims }]) => {
        const moved = structuredClone(data, { transfer: [(data as Float32Array).buffer as ArrayBuffer] });
        return [name, new ortWeb.Tensor(type as 'float32', moved as Float32Array, dims)];
      });
      return (run as (...args: unknown[]) => Promise<ortWeb.InferenceSession.OnnxValueMapType>)(
        Object.fromEntries(sent),
        ...rest,
      );
    };
    return session;
  };
  const proxied = {
    ...ortWeb,
    env: { ...ortWeb.env, versions: ortWeb.env.versions, wasm: { ...ortWeb.env.wasm, proxy: true } },
    InferenceSession: new Proxy(InferenceSession, {
      get: (target, name) => (name === 'create' ? create : Reflect.get(target, name)),
    }),
  };
  const plain = await InferenceSession.create(block(SEED));
  for (const minTokens of [0, 100]) {
    const sage = await withSageAttention(proxied as never as typeof ortWeb, { minTokens }).InferenceSession.create(
      block(SEED),
    );
    for (let run = 0; run < 3; run++) {
      const [{ y: a }, { y: e }] = [
        await sage.run(feedsOf(ortWeb as never) as never),
        await plain.run(feedsOf(ortWeb as never) as never),
      ];
      expect(compare(a?.data as Float32Array, e?.data as Float32Array).relativeL1).toBeLessThan(1e-5);
    }
  }
});

it('GroupQueryAttention with rotary embedding and padded sequences runs as without', async () => {
  const [KV, D] = [1, 16];
  const g = new GraphBuilder(new Random(SEED));
  for (const [name, heads] of Object.entries({ q: H, k: KV, v: KV })) g.input(name, ['b', 'l', heads * D]);
  for (const name of ['pk', 'pv']) g.input(name, ['b', KV, 'p', D]);
  g.input('seq', ['b'], 'int32');
  g.input('total', [], 'int32');
  const table = (f: (x: number) => number) =>
    g.floats(
      [32, D / 2],
      Float32Array.from({ length: 16 * D }, (_, i) => f(Math.floor(i / (D / 2)) / 10 ** (i % (D / 2)))),
    );
  const inputs = ['q', 'k', 'v', 'pk', 'pv', 'seq', 'total', table(Math.cos), table(Math.sin)];
  g.contrib('GroupQueryAttention', inputs, { num_heads: H, kv_num_heads: KV, do_rotary: 1 }, ['y', 'nk', 'nv']);
  for (const name of ['y', 'nk', 'nv']) g.output(name);
  const bytes = g.build();
  const random = new Random(SEED);
  const floats = (dims: readonly number[]) =>
    new ort.Tensor('float32', random.normals(dims.reduce((a, b) => a * b, 1)), dims);
  for (const lengths of [
    [L - 3, L - 1],
    [L - 1, L - 3],
    [L - 1, L - 1],
  ]) {
    const feeds = {
      q: floats([2, L, H * D]),
      k: floats([2, L, KV * D]),
      v: floats([2, L, KV * D]),
      pk: floats([2, KV, 0, D]),
      pv: floats([2, KV, 0, D]),
      seq: new ort.Tensor('int32', Int32Array.from(lengths), [2]),
      total: new ort.Tensor('int32', Int32Array.of(L), []),
    };
    const sage = await withSageAttention(ort, { minTokens: 0, wholeFallback: false }).InferenceSession.create(bytes);
    await expectSame(sage, await ort.InferenceSession.create(bytes), feeds);
    expect(sage.sageAttention[0]?.taken).toBe(lengths[0] === lengths[1]);
  }
});

describe('which models are cut', () => {
  it('a model whose fixed lengths are too short is opened in one piece, and the report says so', async () => {
    const create = vi.spyOn(ort.InferenceSession, 'create');
    const sage = await withSageAttention(ort, { minTokens: L + 1 }).InferenceSession.create(block(SEED, [B, L, WIDTH]));
    expect(sage.sageAttention).toEqual([
      expect.objectContaining({
        taken: false,
        reason: `${L} tokens are fewer than minTokens, ${L + 1}`,
        queryLength: L,
        keyLength: L,
      }),
    ]);
    // The model without its weights, and the model.
    expect(create).toHaveBeenCalledTimes(2);
    const long = await withSageAttention(ort, { minTokens: L }).InferenceSession.create(block(SEED, [B, L, WIDTH]));
    await long.run(feedsOf(ort));
    expect(long.sageAttention[0]).toMatchObject({ taken: true });
  });

  it('free dimensions that the options fix count', async () => {
    const options = { freeDimensionOverrides: { batch: B, length: L } };
    // onnxruntime-node does not know this option.
    const sage = await withSageAttention(ortWeb, { minTokens: L + 1 }).InferenceSession.create(block(SEED), options);
    expect(sage.sageAttention[0]).toMatchObject({ taken: false, queryLength: L });
  });

  it('an attention operator of fixed length', async () => {
    const g = new GraphBuilder(new Random(SEED));
    g.input('x', [B, L, WIDTH]);
    g.contrib('MultiHeadAttention', ['x', 'x', 'x'], { num_heads: H }, ['y']);
    g.output('y');
    const bytes = g.build();
    const create = vi.spyOn(ort.InferenceSession, 'create');
    const sage = await withSageAttention(ort, { minTokens: L + 1 }).InferenceSession.create(bytes);
    expect(create).toHaveBeenCalledTimes(2);
    expect(sage.sageAttention[0]).toMatchObject({ taken: false, queryLength: L, keyLength: L });
  });

  it('steps of a decoder run in one piece once two of them have shown that the cache does not matter', async () => {
    const g = new GraphBuilder(new Random(SEED));
    buildDecoder(g, { heads: H, headDim: D, blocks: 2 }, H);
    const bytes = g.build();
    const plain = await ort.InferenceSession.create(bytes);
    const sage = await withSageAttention(ort, { minTokens: 4 }).InferenceSession.create(bytes);
    const { prototype } = ort.InferenceSession as unknown as { prototype: ort.InferenceSession };
    const runs = vi.spyOn(prototype, 'run');
    const random = new Random(SEED + 2);
    const counts: number[] = [];
    for (let past = 8; past < 14; past++) {
      const floats = (dims: readonly number[]) =>
        new ort.Tensor('float32', random.normals(dims.reduce((a, b) => a * b, 1)), dims);
      const feeds = Object.fromEntries(
        plain.inputNames.map((name) => [
          name,
          name === 'x'
            ? floats([1, 1, WIDTH])
            : name === 'mask'
              ? new ort.Tensor('float32', new Float32Array(past + 1), [1, 1, 1, past + 1])
              : floats([1, H, past, D]),
        ]),
      );
      runs.mockClear();
      await sage.run(feeds);
      counts.push(runs.mock.calls.length);
      await expectSame(sage, plain, feeds);
    }
    expect(counts.slice(2)).toEqual([2, 2, 2, 2]);
    expect(backend.calls).toBe(0);
  });
});

describe('graphs without end', () => {
  const attention = (g: GraphBuilder, q: string) => {
    const p = g.op('Softmax', [g.op('MatMul', [q, g.op('Transpose', ['k'], { perm: [0, 1, 3, 2] })])], { axis: -1 });
    g.op('MatMul', [p, 'v'], {}, { outputs: ['y'] });
    g.output('y');
  };
  const inputs = (g: GraphBuilder) => {
    for (const name of ['q', 'k', 'v']) g.input(name, [B, H, L, D]);
  };

  it.each(['Identity', 'Transpose', 'Reshape', 'Mul'])(
    'a cycle of %s is refused in the words of onnxruntime',
    async (opType) => {
      const g = new GraphBuilder(new Random(SEED));
      inputs(g);
      const more = { Reshape: [g.ints([0, 0, 0, 0])], Mul: [g.scalar(1)] }[opType] ?? [];
      const attributes = opType === 'Transpose' ? { perm: [0, 1, 2, 3] } : {};
      g.op(opType, ['b', ...more], attributes, { outputs: ['a'] });
      g.op(opType, ['a', ...more], attributes, { outputs: ['b'] });
      attention(g, 'a');
      const messages = [ort, withSageAttention(ort, { minTokens: 0 })].map(({ InferenceSession }) =>
        InferenceSession.create(g.build(), { logSeverityLevel: 4 }).then(
          () => 'opened',
          (error: Error) => error.message,
        ),
      );
      const [plain, sage] = await Promise.all(messages);
      expect(plain).not.toBe('opened');
      expect(sage).toBe(plain);
    },
  );

  it.each(['Identity', 'Neg'])('a chain of 10,000 %s', async (opType) => {
    const g = new GraphBuilder(new Random(SEED));
    inputs(g);
    let q = 'q';
    for (let i = 0; i < 10_000; i++) q = g.op(opType, [q]);
    attention(g, q);
    const bytes = g.build();
    const plain = await ort.InferenceSession.create(bytes);
    const sage = await withSageAttention(ort, { minTokens: 0 }).InferenceSession.create(bytes);
    const random = new Random(SEED);
    const x = () => new ort.Tensor('float32', random.normals(B * H * L * D), [B, H, L, D]);
    await expectSame(sage, plain, { q: x(), k: x(), v: x() });
    expect(sage.sageAttention[0]).toMatchObject({ taken: true });
  });
});
