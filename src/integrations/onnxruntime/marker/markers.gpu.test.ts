/**
 * Markers under onnxruntime-web's WebGPU provider in Node: what they give is what the model in pieces gives, bit for bit, and a marker
 * that does not work costs nothing but the way back.
 */
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { GraphBuilder } from '../../../../test/support/graph-builder.ts';
import { buildDecoder, buildDiT } from '../../../../test/support/models.ts';
import { Random, runSeed } from '../../../../test/support/random.ts';
import { itNeeds } from '../../../../test/support/requirement.ts';
import { compare } from '../../../reference/metrics.ts';
import { float16FromNumber } from '../../../tensor/formats/float16.ts';
import { countRuns, EXPECTED_COMMANDS } from '../../testing/count-commands.ts';
import { type SageAttentionOptions, withSageAttention } from '../index.ts';
import type { OrtTensor } from '../ort.ts';
import { mergedDecoder, mergedFeeds, PAST } from '../testing/merged-decoder.ts';
import { adapterName, missing, newDevice, runtime } from '../testing/node-webgpu.ts';

const SEED = runSeed();
type Float = 'float32' | 'float16';
type Feeds = Record<string, InstanceType<(typeof runtime)['Tensor']>>;

function floats(random: Random, dims: readonly number[], type: Float = 'float32') {
  const values = random.normals(dims.reduce((product, size) => product * size, 1));
  const data = type === 'float32' ? values : Uint16Array.from(values, float16FromNumber);
  return new runtime.Tensor(type, data, dims);
}

describe('a model with markers', () => {
  let device: GPUDevice;
  beforeAll(async () => {
    if (missing === undefined) device = await newDevice();
  });
  afterAll(() => {
    device?.destroy();
  });

  const open = (bytes: Uint8Array, options: SageAttentionOptions = {}, on: GPUDevice | undefined = device) =>
    withSageAttention(runtime, { minTokens: 0, ...options }).InferenceSession.create(bytes, {
      executionProviders: [on === undefined ? 'webgpu' : { name: 'webgpu', device: on }],
      logSeverityLevel: 3,
    });
  const bytesOf = ({ data }: OrtTensor) => {
    const { buffer, byteOffset, byteLength } = data as Float32Array;
    return Buffer.from(buffer, byteOffset, byteLength);
  };
  type Session = Awaited<ReturnType<typeof open>>;
  const outputsOf = async (session: Session, feeds: Feeds) =>
    (await session.run(feeds)) as unknown as Record<string, OrtTensor>;
  const expectSame = (actual: Record<string, OrtTensor>, expected: Record<string, OrtTensor>) => {
    for (const [name, tensor] of Object.entries(expected)) {
      expect(actual[name]?.dims, name).toEqual(tensor.dims);
      expect(bytesOf(actual[name] as OrtTensor).equals(bytesOf(tensor)), name).toBe(true);
    }
  };
  const pathsOf = (session: Session) => session.sageAttention.map(({ path }) => path);

  const SIZE = { heads: 2, headDim: 40, blocks: 2 };
  const WIDTH = SIZE.heads * SIZE.headDim;
  const dit = (spelling: 'fused' | 'decomposed', float: Float) => {
    const g = new GraphBuilder(new Random(SEED), float);
    buildDiT(g, SIZE, spelling);
    return g.build();
  };

  for (const [spelling, float] of [
    ['fused', 'float32'],
    ['decomposed', 'float32'],
    ['decomposed', 'float16'],
  ] as const) {
    itNeeds(missing)(`gives what the pieces give: ${spelling}, ${float}, batches and lengths`, async () => {
      console.info(`seed ${SEED}, ${adapterName}`);
      if (float === 'float16' && !device.features.has('shader-f16')) return;
      const bytes = dit(spelling, float);
      const marked = await open(bytes);
      const cut = await open(bytes, { markers: false });
      expect(pathsOf(marked), JSON.stringify(marked.sageAttention)).toEqual(['marker', 'marker']);
      expect(pathsOf(cut)).toEqual(['cut', 'cut']);
      const random = new Random(SEED + 1);
      for (const [batch, tokens] of [
        [1, 37],
        [2, 70],
        [1, 37],
        [1, 1],
      ] as const) {
        const feeds: Feeds = {
          x: floats(random, [batch, tokens, WIDTH], float),
          c: floats(random, [batch, WIDTH], float),
        };
        expectSame(await outputsOf(marked, feeds), await outputsOf(cut, feeds));
        expect(marked.sageAttention.map(({ path, queryLength }) => [path, queryLength])).toEqual([
          ['marker', tokens],
          ['marker', tokens],
        ]);
      }
      await marked.release();
      await cut.release();
    });
  }

  itNeeds(missing)('takes grouped heads, a mask and a growing cache', async () => {
    const kvHeads = 1;
    const g = new GraphBuilder(new Random(SEED));
    buildDecoder(g, SIZE, kvHeads);
    const bytes = g.build();
    const [marked, cut] = [await open(bytes), await open(bytes, { markers: false })];
    expect(pathsOf(marked), JSON.stringify(marked.sageAttention)).toEqual(['marker', 'marker']);
    const random = new Random(SEED + 2);
    let past: Feeds = Object.fromEntries(
      marked.inputNames
        .filter((name) => name.startsWith('past'))
        .map((name) => [name, floats(random, [1, kvHeads, 5, SIZE.headDim])]),
    );
    let total = 5;
    for (const length of [9, 1, 1]) {
      total += length;
      const mask = Float32Array.from({ length: length * total }, (_, i) =>
        i % total <= total - length + Math.floor(i / total) ? 0 : -3.4028234663852886e38,
      );
      const feeds = {
        x: floats(random, [1, length, WIDTH]),
        mask: new runtime.Tensor('float32', mask, [1, 1, length, total]),
        ...past,
      };
      const [actual, expected] = [await outputsOf(marked, feeds), await outputsOf(cut, feeds)];
      expectSame(actual, expected);
      expect(pathsOf(marked)).toEqual(['marker', 'marker']);
      past = Object.fromEntries(
        Object.entries(expected).flatMap(([name, value]) =>
          name === 'y' ? [] : [[name.replace('present', 'past'), value as unknown as Feeds[string]]],
        ),
      );
    }
    await marked.release();
    await cut.release();
  });

  itNeeds(missing)('takes a decoder with and without a cache in one file: markers in both branches', async () => {
    const bytes = mergedDecoder(new Random(SEED));
    const [marked, cut] = [await open(bytes), await open(bytes, { markers: false })];
    expect(pathsOf(marked), JSON.stringify(marked.sageAttention)).toEqual(['marker', 'marker']);
    expect(pathsOf(cut)).toEqual(['cut', 'cut']);
    for (const [useCache, length] of [
      [false, 9],
      [true, 1],
      [true, 3],
      [false, 4],
    ] as const) {
      const feeds = mergedFeeds(runtime as never, new Random(SEED + length), length, useCache) as unknown as Feeds;
      expectSame(await outputsOf(marked, feeds), await outputsOf(cut, feeds));
    }
    const seen = marked.sageAttention.map(({ path, queryLength, keyLength }) => [path, queryLength, keyLength]);
    expect(seen).toEqual([
      ['marker', 3, 3 + PAST],
      ['marker', 4, 4],
    ]);
    await marked.release();
    await cut.release();
  });

  itNeeds(missing)('short attention without a marker: each of the first runs is right, however it runs', async () => {
    // Not 'fused': onnxruntime-web's own kernel for it is wrong where subgroups have 4 lanes (cosine 0.996, alone too).
    const bytes = dit('decomposed', 'float32');
    const plain = await runtime.InferenceSession.create(bytes, { executionProviders: ['wasm'] });
    const session = await withSageAttention(runtime, { markers: false }).InferenceSession.create(bytes, {
      executionProviders: [{ name: 'webgpu', device }],
    });
    const random = new Random(SEED + 5);
    for (let run = 0; run < 9; run++) {
      const feeds: Feeds = { x: floats(random, [1, 33, WIDTH]), c: floats(random, [1, WIDTH]) };
      const [actual, expected] = [await outputsOf(session, feeds), await plain.run(feeds)];
      const [x, y] = [actual.y?.data, expected.y?.data] as [Float32Array, Float32Array];
      expect(compare(x, y).cosineSimilarity, `run ${run}`).toBeGreaterThan(0.999);
    }
    const [{ path, reason } = { path: undefined, reason: '' }] = session.sageAttention;
    if (path === undefined) expect(reason).toMatch(/a cut gains nothing|the model in one piece was faster/);
    else expect(path).toBe('cut');
    await session.release();
    await plain.release();
  });

  itNeeds(missing)('takes GroupQueryAttention: a prompt, then steps of one query', async () => {
    const [heads, kvHeads, dim] = [4, 2, 16];
    const width = heads * dim;
    const g = new GraphBuilder(new Random(SEED));
    // As the exporters of transformers.js and onnxruntime-genai write it: lengths come from the mask.
    const x = g.input('x', ['batch', 'length', width]);
    g.input('attention_mask', ['batch', 'total'], 'int64');
    const counted = g.op('ReduceSum', ['attention_mask', g.ints([1])], { keepdims: 1 });
    const last = g.op('Cast', [g.op('Sub', [counted, g.ints([1])])], { to: 6 });
    const total = g.op('Cast', [g.op('Gather', [g.op('Shape', ['attention_mask']), g.int(1)])], { to: 6 });
    const angles = Array.from({ length: (64 * dim) / 2 }, (_, i) => Math.floor(i / (dim / 2)) * 10 ** -(i % (dim / 2)));
    const tables = [Math.cos, Math.sin].map((f) => g.floats([64, dim / 2], angles.map(f)));
    let hidden = x;
    for (const block of [0, 1]) {
      const past = ['key', 'value'].map((kind) => g.input(`past.${block}.${kind}`, ['batch', kvHeads, 'past', dim]));
      const kv = () => g.linear(hidden, width, kvHeads * dim, 2);
      const present = ['key', 'value'].map((kind) => `present.${block}.${kind}`);
      const inputs = [g.linear(hidden, width, width, 2), kv(), kv(), ...past, last, total, ...tables];
      const attended = `attended.${block}`;
      const attributes = { num_heads: heads, kv_num_heads: kvHeads, do_rotary: 1 };
      g.contrib('GroupQueryAttention', inputs, attributes, [attended, ...present]);
      hidden = g.op('Add', [g.linear(attended, width, width), hidden]);
      for (const name of present) g.output(name, ['batch', kvHeads, 'total', dim]);
    }
    g.op('Identity', [hidden], {}, { outputs: ['y'] });
    g.output('y', ['batch', 'length', width]);
    const bytes = g.build();
    const [marked, cut] = [await open(bytes), await open(bytes, { markers: false })];
    expect(pathsOf(marked), JSON.stringify(marked.sageAttention)).toEqual(['marker', 'marker']);
    const random = new Random(SEED + 7);
    let past: Feeds = Object.fromEntries(
      marked.inputNames
        .filter((name) => name.startsWith('past'))
        .map((name) => [name, floats(random, [1, kvHeads, 0, dim])]),
    );
    let held = 0;
    for (const length of [21, 1, 1]) {
      held += length;
      const feeds = {
        x: floats(random, [1, length, width]),
        attention_mask: new runtime.Tensor('int64', new BigInt64Array(held).fill(1n), [1, held]),
        ...past,
      };
      const [actual, expected] = [await outputsOf(marked, feeds), await outputsOf(cut, feeds)];
      expectSame(actual, expected);
      expect(marked.sageAttention.map(({ path, queryLength, keyLength }) => [path, queryLength, keyLength])).toEqual(
        new Array(2).fill(['marker', length, held]),
      );
      // A padded sequence is onnxruntime's, and the next run has its markers again.
      if (length === 1) {
        const padded = BigInt64Array.from({ length: held }, (_, i) => BigInt(Number(i > 0)));
        const short = { ...feeds, attention_mask: new runtime.Tensor('int64', padded, [1, held]) };
        expectSame(await outputsOf(marked, short), await outputsOf(cut, short));
        expect(pathsOf(marked)).not.toContain('marker');
      }
      past = Object.fromEntries(
        Object.entries(expected).flatMap(([name, value]) =>
          name === 'y' ? [] : [[name.replace('present', 'past'), value as unknown as Feeds[string]]],
        ),
      );
    }
    await marked.release();
    await cut.release();
  });

  const ditFeeds = (random: Random, tokens: number): Feeds => ({
    x: floats(random, [1, tokens, WIDTH]),
    c: floats(random, [1, WIDTH]),
  });

  itNeeds(missing)('keeps sessions and devices apart, in runs at once, and leaves prototypes alone', async () => {
    const prototypes = ['GPUDevice', 'GPUCommandEncoder', 'GPUComputePassEncoder'].map((name) => {
      const { prototype } = (globalThis as unknown as Record<string, { prototype: object }>)[name] as {
        prototype: object;
      };
      return [prototype, Object.getOwnPropertyDescriptors(prototype)] as const;
    });
    const [fused, decomposed] = [dit('fused', 'float32'), dit('decomposed', 'float32')];
    const cut = await open(fused, { markers: false });
    const other = await newDevice();
    const sessions = [await open(fused), await open(fused, {}, other), await open(decomposed)];
    const random = new Random(SEED + 3);
    const feeds = [ditFeeds(random, 19), ditFeeds(random, 33), ditFeeds(random, 19)];
    const results = await Promise.all(sessions.map((session, i) => outputsOf(session, feeds[i] as Feeds)));
    for (const i of [0, 1]) {
      expectSame(results[i] as Record<string, OrtTensor>, await outputsOf(cut, feeds[i] as Feeds));
    }
    const apart = await open(decomposed, { markers: false });
    expectSame(results[2] as Record<string, OrtTensor>, await outputsOf(apart, feeds[2] as Feeds));
    for (const session of sessions) expect(pathsOf(session)).toEqual(['marker', 'marker']);
    for (const session of [...sessions, cut, apart]) await session.release();
    other.destroy();
    for (const [prototype, before] of prototypes) expect(Object.getOwnPropertyDescriptors(prototype)).toEqual(before);
  });

  itNeeds(missing)('goes back to pieces where a marker fails, and says so', async () => {
    const own = await newDevice();
    const bytes = dit('fused', 'float32');
    const marked = await open(bytes, {}, own);
    const cut = await open(bytes, { markers: false }, own);
    expect(pathsOf(marked)).toEqual(['marker', 'marker']);
    const random = new Random(SEED + 4);
    // Two tokens: as an Einsum a marker is a sum over all of its axes.
    const feeds = ditFeeds(random, 2);
    const expected = await outputsOf(cut, feeds);
    const encoders = own.createCommandEncoder;
    // Passes that nobody watches: not one marker is replaced.
    own.createCommandEncoder = (descriptor) => Object.getPrototypeOf(own).createCommandEncoder.call(own, descriptor);
    expectSame(await outputsOf(marked, feeds), expected);
    expect(marked.sageAttention.map(({ path, cutReason }) => [path, cutReason])).toEqual(
      new Array(SIZE.blocks).fill(['cut', 'its marker failed: 0 dispatches of 2 markers were replaced']),
    );
    own.createCommandEncoder = encoders;
    expectSame(await outputsOf(marked, feeds), expected);
    const again = await open(bytes, {}, own);
    expectSame(await outputsOf(again, feeds), expected);
    expect(pathsOf(again)).toEqual(['marker', 'marker']);
    for (const session of [marked, cut, again]) await session.release();
    own.destroy();
  });

  itNeeds(missing)("works on onnxruntime's own device, and with outputs left there", async () => {
    const bytes = dit('fused', 'float32');
    const cut = await open(bytes, { markers: false });
    const feeds = ditFeeds(new Random(SEED + 6), 17);
    const { y } = await outputsOf(cut, feeds);
    const session = await withSageAttention(runtime, { minTokens: 0 }).InferenceSession.create(bytes, {
      executionProviders: ['webgpu'],
      preferredOutputLocation: 'gpu-buffer',
      logSeverityLevel: 3,
    });
    const results = (await session.run(feeds)) as unknown as Record<string, OrtTensor>;
    expect(results.y?.location).toBe('gpu-buffer');
    const data = (await results.y?.getData(true)) as Float32Array;
    expect(Buffer.from(data.buffer, data.byteOffset, data.byteLength).equals(bytesOf(y as OrtTensor))).toBe(true);
    expect(session.sageAttention.map(({ path }) => path)).toEqual(['marker', 'marker']);
    await session.release();
    await cut.release();
  });

  itNeeds(missing)('records no more clears, passes and submits than the model as it is', async () => {
    const own = await newDevice();
    const { whole, marker, cut, paths, isSame, accuracy } = await countRuns(runtime, own, SEED);
    own.destroy();
    console.info(JSON.stringify({ whole, marker, cut }));
    expect(paths).toEqual(['marker', 'marker']);
    expect({ whole, marker }).toEqual(EXPECTED_COMMANDS);
    expect([cut.dispatches, isSame]).toEqual([marker.dispatches, true]);
    expect(accuracy.cosineSimilarity).toBeGreaterThan(0.999);
  });

  itNeeds(missing)('leaves what is too short, where all of it is', async () => {
    const own = device;
    const short = await open(dit('fused', 'float32'), { minTokens: 100 }, own);
    const random = new Random(SEED + 5);
    await outputsOf(short, ditFeeds(random, 21));
    expect(short.sageAttention.map(({ taken, reason }) => [taken, reason])).toEqual(
      new Array(SIZE.blocks).fill([false, '21 tokens are fewer than minTokens, 100']),
    );
    await outputsOf(short, ditFeeds(random, 121));
    expect(pathsOf(short)).toEqual(['marker', 'marker']);
    await short.release();
  });
});
