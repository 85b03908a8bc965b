/** What a cut session promises beyond its numbers: onnxruntime's own interface, reports, options, errors. */
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import * as ort from 'onnxruntime-node';
import * as ortWeb from 'onnxruntime-web';
import { afterAll, beforeAll, beforeEach, describe, expect, it, vi } from 'vitest';
import { exactBackend } from '../../../../test/support/exact-backend.ts';
import { GraphBuilder } from '../../../../test/support/graph-builder.ts';
import { buildDecoder, buildDiT } from '../../../../test/support/models.ts';
import { Random, runSeed } from '../../../../test/support/random.ts';
import type { Backend } from '../../../backends/backend.ts';
import { setBackend } from '../../../backends/registry.ts';
import { ExecutionError, InvalidArgumentError } from '../../../errors.ts';
import { compare } from '../../../reference/metrics.ts';
import { withSageAttention } from '../index.ts';
import {
  externalTensor,
  functionProto,
  type GraphProto,
  modelLike,
  node,
  readModel,
  writeModel,
} from '../onnx/codec.ts';

const SEED = runSeed();
const SIZE = { heads: 4, headDim: 16, blocks: 3 };
const WIDTH = SIZE.heads * SIZE.headDim;
const TOKENS = 24;

let backend = exactBackend();
let previous: Backend | undefined;
beforeAll(async () => {
  console.info(`seed ${SEED}`);
  ortWeb.env.wasm.numThreads = 1;
  previous = await setBackend(backend);
});
beforeEach(async () => {
  backend = exactBackend();
  await setBackend(backend);
});
afterAll(async () => {
  if (previous !== undefined) await setBackend(previous);
});

function dit(): Uint8Array {
  const g = new GraphBuilder(new Random(SEED));
  buildDiT(g, SIZE);
  return g.build();
}
const DIT = dit();

function tensorOf(random: Random, dims: readonly number[], TensorClass: typeof ort.Tensor = ort.Tensor): ort.Tensor {
  const count = dims.reduce((product, size) => product * size, 1);
  return new TensorClass('float32', random.normals(count), dims);
}

const ditFeeds = (tokens = TOKENS) => {
  const random = new Random(SEED + 1);
  return { x: tensorOf(random, [2, tokens, WIDTH]), c: tensorOf(random, [2, WIDTH]) };
};

function expectClose(actual: ort.Tensor | undefined, expected: ort.Tensor | undefined): void {
  expect(actual?.dims).toEqual(expected?.dims);
  expect(compare(actual?.data as Float32Array, expected?.data as Float32Array).relativeL1).toBeLessThan(1e-5);
}

/** Graphs of sessions that hold a part of a model; their names end in its level. */
const piecesOf = (calls: readonly (readonly unknown[])[]): GraphProto[] =>
  calls.map(([bytes]) => readModel(bytes as Uint8Array).graph as GraphProto).filter(({ name }) => /\/\d+$/.test(name));

const sageOf = (options = {}) => withSageAttention(ort, { minTokens: 0, ...options });

describe('a diffusion transformer', () => {
  it('runs in one session more than it has blocks, and agrees with onnxruntime', async () => {
    const create = vi.spyOn(ort.InferenceSession, 'create');
    const plain = await ort.InferenceSession.create(DIT);
    create.mockClear();
    const sage = await sageOf().InferenceSession.create(DIT);
    expect(piecesOf(create.mock.calls)).toHaveLength(SIZE.blocks + 1);
    create.mockRestore();
    expect(sage).toBeInstanceOf(ort.InferenceSession);
    expect(sage.inputMetadata).toEqual(plain.inputMetadata);
    expect(sage.outputMetadata).toEqual(plain.outputMetadata);
    const [expected, actual] = [await plain.run(ditFeeds()), await sage.run(ditFeeds())];
    expectClose(actual.y, expected.y);
    expect(sage.sageAttention).toHaveLength(SIZE.blocks);
    expect(sage.sageAttention[0]).toEqual({
      node: expect.stringMatching(/^Softmax/),
      form: 'MatMul-Softmax-MatMul',
      heads: SIZE.heads,
      headDim: SIZE.headDim,
      queryLength: TOKENS,
      keyLength: TOKENS,
      taken: true,
      path: 'cut',
      cutReason: 'a marker needs onnxruntime-web on WebGPU',
      reason: undefined,
      kernel: 'qk-int8-pv-fp16',
      milliseconds: expect.any(Number),
      cosineSimilarity: undefined,
    });
    // Another length through the same session.
    expectClose((await sage.run(ditFeeds(17))).y, (await plain.run(ditFeeds(17))).y);
    await sage.release();
    await expect(sage.run(ditFeeds())).rejects.toThrow();
  });

  it('moves the modulation of each block to the session that reads it', async () => {
    const inputs: string[][] = [];
    const create = vi.spyOn(ort.InferenceSession, 'create');
    await sageOf().InferenceSession.create(DIT);
    for (const graph of piecesOf(create.mock.calls)) inputs.push(graph.input.map(({ name }) => name));
    create.mockRestore();
    // The attention's result, the residual, the activated conditioning, two shifts and scales and gates at most.
    for (const names of inputs) expect(names.length).toBeLessThanOrEqual(7);
  });

  it('takes fetches and preallocated outputs as onnxruntime does', async () => {
    const sage = await sageOf().InferenceSession.create(DIT);
    const feeds = ditFeeds();
    const expected = (await sage.run(feeds)).y;
    expectClose((await sage.run(feeds, ['y'])).y, expected);
    const mine = new ort.Tensor('float32', new Float32Array(2 * TOKENS * WIDTH), [2, TOKENS, WIDTH]);
    const { y } = await sage.run(feeds, { y: mine });
    expectClose(y, expected);
    await expect(sage.run(feeds, ['z'])).rejects.toThrow(/invalid output name: z/);
    await expect(sage.run({ x: feeds.x })).rejects.toThrow(/input 'c' is missing in 'feeds'/);
  });

  it('runs calls at the same time', async () => {
    const sage = await sageOf().InferenceSession.create(DIT);
    const lengths = [5, 24, 11];
    const together = await Promise.all(lengths.map((tokens) => sage.run(ditFeeds(tokens))));
    for (const [i, tokens] of lengths.entries()) expectClose(together[i]?.y, (await sage.run(ditFeeds(tokens))).y);
  });
});

describe('a decoder with a cache', () => {
  it('prefills and decodes as onnxruntime does', async () => {
    const kvHeads = 2;
    const g = new GraphBuilder(new Random(SEED));
    buildDecoder(g, SIZE, kvHeads);
    const bytes = g.build();
    const plain = await ort.InferenceSession.create(bytes);
    const sage = await sageOf().InferenceSession.create(bytes);
    const random = new Random(SEED + 2);
    let past = Object.fromEntries(
      plain.inputNames
        .filter((name) => name.startsWith('past'))
        .map((name) => [name, tensorOf(random, [1, kvHeads, 0, SIZE.headDim])]),
    );
    let total = 0;
    for (const length of [9, 1, 1, 4]) {
      total += length;
      const mask = Float32Array.from({ length: length * total }, (_, i) =>
        i % total <= total - length + Math.floor(i / total) ? 0 : -3.4028234663852886e38,
      );
      const feeds = {
        x: tensorOf(random, [1, length, WIDTH]),
        mask: new ort.Tensor('float32', mask, [1, 1, length, total]),
        ...past,
      };
      const [expected, actual] = [await plain.run(feeds), await sage.run(feeds)];
      for (const name of plain.outputNames) expectClose(actual[name], expected[name]);
      past = Object.fromEntries(
        Object.entries(expected).flatMap(([name, tensor]) =>
          name === 'y' ? [] : [[name.replace('present', 'past'), tensor]],
        ),
      );
    }
    expect(backend.calls).toBe(4 * SIZE.blocks);
    expect(sage.sageAttention.every(({ taken, heads }) => taken && heads === SIZE.heads)).toBe(true);
  });
});

describe('options', () => {
  it('minTokens: a shape for which nothing is replaced runs in one piece from its second run on', async () => {
    const create = vi.spyOn(ort.InferenceSession, 'create');
    const sage = await sageOf({ minTokens: 20 }).InferenceSession.create(DIT);
    const long = (await sage.run(ditFeeds(24))).y;
    expect(backend.calls).toBe(SIZE.blocks);
    const first = (await sage.run(ditFeeds(19))).y;
    expect(sage.sageAttention[0]).toMatchObject({ taken: false, reason: '19 tokens are fewer than minTokens, 20' });
    create.mockClear();
    expectClose((await sage.run(ditFeeds(19))).y, first);
    expect(create).toHaveBeenCalledTimes(1);
    await sage.run(ditFeeds(19));
    expect(create).toHaveBeenCalledTimes(1);
    expect(backend.calls).toBe(SIZE.blocks);
    create.mockRestore();
    expectClose((await sage.run(ditFeeds(24))).y, long);
    expect(sage.sageAttention[0]).toMatchObject({ taken: true, reason: undefined });
    await sage.release();
  });

  it('include and exclude choose by node name', async () => {
    const all = (await sageOf().InferenceSession.create(DIT)).sageAttention.map(({ node }) => node) as [
      string,
      string,
      string,
    ];
    const some = await sageOf({ include: [all[0], /Softmax/], exclude: [all[1]] }).InferenceSession.create(DIT);
    await some.run(ditFeeds());
    expect(backend.calls).toBe(SIZE.blocks - 1);
    expect(some.sageAttention.find(({ node }) => node === all[1])).toMatchObject({
      taken: false,
      reason: 'excluded by the options',
    });
    const none = await sageOf({ include: ['nothing'] }).InferenceSession.create(DIT);
    expect(none.sageAttention.map(({ reason }) => reason)).toEqual(
      new Array(SIZE.blocks).fill('not included by the options'),
    );
  });

  it('adaptive: keeps a kernel that is close and faster, and leaves attention that no kernel computes closely', async () => {
    const kernel = backend.kernels[0] as (typeof backend.kernels)[number];
    const sage = await sageOf({ policy: 'adaptive', calibrationRuns: 1 }).InferenceSession.create(DIT);
    const expected = (await sage.run(ditFeeds())).y;
    for (const { taken, reason, cosineSimilarity } of sage.sageAttention) {
      if (taken) expect(cosineSimilarity).toBeGreaterThan(0.998);
      else expect(reason).toBe('onnxruntime was faster');
    }
    expectClose((await sage.run(ditFeeds())).y, expected);

    const wrong = exactBackend();
    await setBackend({
      ...wrong,
      kernels: [kernel],
      plan: async (problem, choice) => {
        const plan = await wrong.plan(problem, choice);
        return {
          ...plan,
          run: async (inputs, context) => {
            const outputs = await plan.run(inputs, context);
            (outputs.output as unknown as { data: Float32Array }).data.reverse();
            return outputs;
          },
        };
      },
    });
    const left = await sageOf({ policy: 'adaptive', calibrationRuns: 1 }).InferenceSession.create(DIT);
    expectClose((await left.run(ditFeeds())).y, expected);
    expectClose((await left.run(ditFeeds())).y, expected);
    for (const { taken, reason } of left.sageAttention) {
      expect(taken).toBe(false);
      expect(reason).toMatch(/no kernel reached a cosine similarity of 0.998/);
    }
  });

  it.each([
    { kernel: 'no-such' },
    { minToken: 1 },
    { minTokens: -1 },
    { include: 'x' },
    { policy: 'x' },
    { threshold: 2 },
    { sparsity: { topK: 2 } },
  ])('refuses %o', (options) => {
    expect(() => withSageAttention(ort, options as never)).toThrow(InvalidArgumentError);
  });
});

describe('what cannot be replaced', () => {
  it('a model that is no ONNX fails in the words of onnxruntime', async () => {
    const warn = vi.spyOn(console, 'warn').mockImplementation(() => undefined);
    const bytes = Uint8Array.of(1, 2, 3, 4);
    const expected = await ort.InferenceSession.create(bytes).catch((error: Error) => error.message);
    await expect(sageOf().InferenceSession.create(bytes)).rejects.toThrow(expected as string);
    await expect(sageOf().InferenceSession.create('/no/such/model.onnx')).rejects.toThrow();
    warn.mockRestore();
  });

  it('attention operators too short to be worth it, one behind the other, in pieces and whole', async () => {
    const g = new GraphBuilder(new Random(SEED));
    buildDiT(g, SIZE, 'fused');
    const bytes = g.build();
    const { y: expected } = await (await ort.InferenceSession.create(bytes)).run(ditFeeds());
    for (const wholeFallback of [false, true]) {
      const sage = await sageOf({ minTokens: 1000, wholeFallback }).InferenceSession.create(bytes);
      for (let run = 0; run < 2; run++) expectClose((await sage.run(ditFeeds())).y, expected);
      expect(sage.sageAttention.map(({ taken }) => taken)).toEqual(new Array(SIZE.blocks).fill(false));
      await sage.release();
    }
    expect(backend.calls).toBe(0);
  });

  it("a model in onnxruntime's own format runs unmodified, with one warning", async () => {
    const folder = await mkdtemp(path.join(tmpdir(), 'ort-format-'));
    const file = path.join(folder, 'model.ort');
    const warn = vi.spyOn(console, 'warn').mockImplementation(() => undefined);
    try {
      const writer = await ort.InferenceSession.create(DIT, { optimizedModelFilePath: file, logSeverityLevel: 3 });
      await writer.release();
      for (const source of [file, new Uint8Array(await readFile(file))]) {
        warn.mockClear();
        const sage = await sageOf().InferenceSession.create(source);
        expect(warn.mock.calls.flat()).toEqual([expect.stringContaining('the model runs unmodified')]);
        expect(sage.sageAttention).toEqual([]);
        expectClose((await sage.run(ditFeeds())).y, (await (await ort.InferenceSession.create(DIT)).run(ditFeeds())).y);
      }
    } finally {
      warn.mockRestore();
      await rm(folder, { recursive: true });
    }
  });

  it('attention inside control flow is left, with the reason', async () => {
    const g = new GraphBuilder(new Random(SEED));
    buildDiT(g, { ...SIZE, blocks: 1 });
    const model = readModel(g.build());
    const inner = model.graph;
    if (inner === undefined) throw new Error('no graph');
    const outer = new GraphBuilder(new Random(1));
    outer.input('x', ['batch', 'tokens', WIDTH]);
    outer.input('c', ['batch', WIDTH]);
    const condition = outer.op('Greater', [outer.op('Size', ['x']), outer.int(0)]);
    const branch = { ...inner, input: [] };
    outer.op('If', [condition], { then_branch: branch, else_branch: branch }, { outputs: ['y'] });
    outer.output('y', ['batch', 'tokens', WIDTH]);
    const bytes = outer.build();
    const sage = await sageOf().InferenceSession.create(bytes);
    expect(sage.sageAttention.map(({ taken, reason }) => [taken, reason])).toEqual(
      new Array(2).fill([false, expect.stringMatching(/inside a subgraph of If/)]),
    );
    expectClose((await sage.run(ditFeeds())).y, (await (await ort.InferenceSession.create(bytes)).run(ditFeeds())).y);
  });

  it.each([
    ['a function of its own', 'pkg', 'Attend', /inside the model's function 'Attend'/],
    ['a function by the name of an operator', 'com.microsoft', 'MultiHeadAttention', undefined],
  ])('a model with attention in %s runs as without', async (_, domain, name, reason) => {
    const warnings = vi.spyOn(console, 'warn').mockImplementation(() => {});
    const random = new Random(SEED);
    const g = new GraphBuilder(random);
    const feeds = Object.fromEntries(['q', 'k', 'v'].map((part) => [part, tensorOf(random, [1, 6, 8])]));
    for (const part of Object.keys(feeds)) g.input(part, [1, 6, 8]);
    const attributes = domain === 'com.microsoft' ? { num_heads: 1 } : {};
    g.op(name, Object.keys(feeds), attributes, { domain, outputs: ['y'] });
    g.output('y');
    const model = readModel(g.build());
    // No scale: another function than the operator.
    const nodes = [
      node('Transpose', ['k'], ['t'], { attributes: { perm: [0, 2, 1] } }),
      node('MatMul', ['q', 't'], ['s']),
      node('Softmax', ['s'], ['p'], { name: 'weights', attributes: { axis: -1 } }),
      node('MatMul', ['p', 'v'], ['o']),
    ];
    model.functions.push(functionProto({ name, domain, nodes, inputs: Object.keys(feeds), outputs: ['o'] }));
    const bytes = writeModel(modelLike(model, model.graph as GraphProto, [domain]));
    const plain = await ort.InferenceSession.create(bytes);
    const session = await sageOf().InferenceSession.create(bytes);
    const [expected, actual] = [await plain.run(feeds), await session.run(feeds)];
    expect(actual.y?.data).toEqual(expected.y?.data);
    expect(session.sageAttention.map((entry) => entry.reason)).toEqual(
      reason === undefined ? [] : [expect.stringMatching(reason)],
    );
    expect(warnings).toHaveBeenCalledTimes(reason === undefined ? 1 : 0);
    warnings.mockRestore();
    await plain.release();
    await session.release();
  });

  it('an error inside attention names the node', async () => {
    await setBackend({
      ...exactBackend(),
      plan: async () => {
        throw new Error('the kernel broke');
      },
    });
    const sage = await sageOf().InferenceSession.create(DIT);
    const { node } = sage.sageAttention[0] as { node: string };
    const error = await sage.run(ditFeeds()).catch((caught: unknown) => caught);
    expect(error).toBeInstanceOf(ExecutionError);
    expect((error as Error).message).toBe(`attention '${node}': the kernel broke`);
  });
});

describe('weights', () => {
  it('a model with external data is cut in Node and in WASM without reading the data itself', async () => {
    const model = readModel(DIT);
    const graph = model.graph;
    if (graph === undefined) throw new Error('no graph');
    const chunks: Uint8Array[] = [];
    let offset = 0;
    graph.initializer = graph.initializer.map((tensor) => {
      if (tensor.rawData.length < 512) return tensor;
      chunks.push(tensor.rawData);
      const moved = externalTensor(tensor, 'weights.bin', offset, tensor.rawData.length);
      offset += tensor.rawData.length;
      return moved;
    });
    const data = new Uint8Array(Buffer.concat(chunks));
    const folder = await mkdtemp(path.join(tmpdir(), 'external-'));
    try {
      const file = path.join(folder, 'model.onnx');
      await writeFile(file, writeModel(model));
      await writeFile(path.join(folder, 'weights.bin'), data);
      const expected = (await (await ort.InferenceSession.create(DIT)).run(ditFeeds())).y;
      const node = await sageOf().InferenceSession.create(file);
      expectClose((await node.run(ditFeeds())).y, expected);
      const web = await withSageAttention(ortWeb, { minTokens: 0 }).InferenceSession.create(writeModel(model), {
        externalData: [{ path: 'weights.bin', data }],
      });
      const random = new Random(SEED + 1);
      const WebTensor = ortWeb.Tensor as unknown as typeof ort.Tensor;
      const feeds = { x: tensorOf(random, [2, TOKENS, WIDTH], WebTensor), c: tensorOf(random, [2, WIDTH], WebTensor) };
      expectClose((await web.run(feeds)).y as unknown as ort.Tensor, expected);
      expect(node.sageAttention.concat(web.sageAttention).every(({ taken }) => taken)).toBe(true);
    } finally {
      await rm(folder, { recursive: true });
    }
  });

  it('sessions refer to the model file instead of copying its weights', async () => {
    const folder = await mkdtemp(path.join(tmpdir(), 'shared-'));
    try {
      const file = path.join(folder, 'model.onnx');
      await writeFile(file, DIT);
      const create = vi.spyOn(ort.InferenceSession, 'create');
      const sage = await sageOf().InferenceSession.create(file);
      const sizes = (create.mock.calls as unknown as [Uint8Array][]).map(([bytes]) => bytes.length);
      create.mockRestore();
      expect(sizes.reduce((sum, size) => sum + size, 0)).toBeLessThan(DIT.length / 10);
      const expected = (await (await ort.InferenceSession.create(DIT)).run(ditFeeds())).y;
      expectClose((await sage.run(ditFeeds())).y, expected);
    } finally {
      await rm(folder, { recursive: true });
    }
  });
});
