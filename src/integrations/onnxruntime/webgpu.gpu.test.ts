/**
 * onnxruntime-web's WebGPU provider in Node, over Dawn: attention on the same device. On software Vulkan onnxruntime's own
 * attention is no oracle, so results are compared with its CPU provider.
 */
import { afterAll, describe, expect } from 'vitest';
import { GraphBuilder } from '../../../test/support/graph-builder.ts';
import { buildDecoder, buildDiT } from '../../../test/support/models.ts';
import { Random, runSeed } from '../../../test/support/random.ts';
import { itNeeds } from '../../../test/support/requirement.ts';
import { compare } from '../../reference/metrics.ts';
import { withSageAttention } from './index.ts';
import type { OrtTensor } from './ort.ts';
import { adapterName, missing, newDevice, runtime } from './testing/node-webgpu.ts';

const SEED = runSeed();
const SIZE = { heads: 2, headDim: 64, blocks: 2 };
const WIDTH = SIZE.heads * SIZE.headDim;
const TOKENS = 150;

function dit(): Uint8Array {
  const g = new GraphBuilder(new Random(SEED));
  buildDiT(g, SIZE);
  return g.build();
}

const tensorOf = (random: Random, dims: readonly number[]) =>
  new runtime.Tensor('float32', random.normals(dims.reduce((product, size) => product * size, 1)), dims);

const ditFeeds = () => {
  const random = new Random(SEED + 1);
  return { x: tensorOf(random, [1, TOKENS, WIDTH]), c: tensorOf(random, [1, WIDTH]) };
};

const expectClose = (actual: unknown, expected: unknown) =>
  expect(compare(actual as Float32Array, expected as Float32Array).cosineSimilarity).toBeGreaterThan(0.999);

describe('onnxruntime-web on WebGPU in Node', () => {
  const devices: GPUDevice[] = [];
  afterAll(() => {
    for (const device of devices) device.destroy();
  });

  itNeeds(missing)(
    "runs attention on onnxruntime's own device, and gives outputs where they were asked for",
    async () => {
      console.info(`seed ${SEED}, ${adapterName}`);
      const bytes = dit();
      const cpu = await runtime.InferenceSession.create(bytes, { executionProviders: ['wasm'] });
      const expected = await cpu.run(ditFeeds());
      const sageOrt = withSageAttention(runtime, { minTokens: 0 });
      const session = await sageOrt.InferenceSession.create(bytes, { executionProviders: ['webgpu'] });
      for (let run = 0; run < 2; run++) {
        const { y } = (await session.run(ditFeeds())) as unknown as { y: OrtTensor };
        expect([y.location, y.dims]).toEqual(['cpu', [1, TOKENS, WIDTH]]);
        expectClose(y.data, expected.y?.data);
      }
      expect(session.sageAttention.map(({ taken, queryLength }) => [taken, queryLength])).toEqual(
        new Array(SIZE.blocks).fill([true, TOKENS]),
      );
      await session.release();

      const onGpu = await sageOrt.InferenceSession.create(bytes, {
        executionProviders: ['webgpu'],
        preferredOutputLocation: 'gpu-buffer',
      });
      const { y } = (await onGpu.run(ditFeeds())) as unknown as { y: OrtTensor };
      expect(y.location).toBe('gpu-buffer');
      expectClose(await y.getData(true), expected.y?.data);
      await onGpu.release();
    },
  );

  itNeeds(missing)('prefills and decodes on a device of the program, the cache staying on it', async () => {
    const kvHeads = 1;
    const g = new GraphBuilder(new Random(SEED));
    buildDecoder(g, SIZE, kvHeads);
    const bytes = g.build();
    const device = await newDevice();
    devices.push(device);
    const cpu = await runtime.InferenceSession.create(bytes, { executionProviders: ['wasm'] });
    const session = await withSageAttention(runtime, { minTokens: 0 }).InferenceSession.create(bytes, {
      executionProviders: [{ name: 'webgpu', device }],
      preferredOutputLocation: Object.fromEntries(
        cpu.outputNames.map((name) => [name, name === 'y' ? 'cpu' : 'gpu-buffer']),
      ),
    });
    const random = new Random(SEED + 2);
    type Cache = Record<string, InstanceType<(typeof runtime)['Tensor']>>;
    const empty: Cache = Object.fromEntries(
      cpu.inputNames
        .filter((name) => name.startsWith('past'))
        .map((name) => [name, tensorOf(random, [1, kvHeads, 0, SIZE.headDim])]),
    );
    const asPast = (results: Cache): Cache =>
      Object.fromEntries(
        Object.entries(results).flatMap(([name, value]) =>
          name === 'y' ? [] : [[name.replace('present', 'past'), value]],
        ),
      );
    let [cpuPast, gpuPast] = [empty, empty];
    let total = 0;
    for (const length of [40, 1, 3]) {
      total += length;
      const mask = Float32Array.from({ length: length * total }, (_, i) =>
        i % total <= total - length + Math.floor(i / total) ? 0 : -3.4028234663852886e38,
      );
      const feeds = {
        x: tensorOf(random, [1, length, WIDTH]),
        mask: new runtime.Tensor('float32', mask, [1, 1, length, total]),
      };
      const expected = (await cpu.run({ ...feeds, ...cpuPast })) as Cache;
      const actual = (await session.run({ ...feeds, ...gpuPast })) as Cache;
      expectClose(actual.y?.data, expected.y?.data);
      expect((actual['present_key.0'] as unknown as OrtTensor).location).toBe('gpu-buffer');
      [cpuPast, gpuPast] = [asPast(expected), asPast(actual)];
    }
    expect(session.sageAttention.every(({ taken }) => taken)).toBe(true);
    await session.release();
  });

  // lavapipe compiles these kernels for a minute and a half.
  describe.runIf(process.env.SAGEATTENTION_TESTS === 'all')('wide heads', { timeout: 400_000 }, () => {
    itNeeds(missing)('runs the attention of an image autoencoder: one head of 512 channels', async () => {
      const [channels, side] = [512, 12];
      const pixels = side * side;
      const g = new GraphBuilder(new Random(SEED));
      // As torch.onnx writes the block of diffusers: GroupNorm, one head, the input added again.
      g.input('x', [1, channels, 'height', 'width']);
      const groups = g.op('Reshape', ['x', g.ints([0, 32, -1])]);
      const ones = [1, 0].map((value) => g.floats([32], new Float32Array(32).fill(value)));
      const normal = g.op('InstanceNormalization', [groups, ...ones]);
      const rows = g.op('Transpose', [g.op('Reshape', [normal, g.ints([1, channels, -1])])], { perm: [0, 2, 1] });
      const head = () => {
        const split = g.op('Reshape', [g.linear(rows, channels, channels), g.ints([0, -1, 1, channels])]);
        return g.op('Transpose', [split], { perm: [0, 2, 1, 3] });
      };
      const [q, k, v] = [head(), head(), head()];
      const scores = g.op('MatMul', [q, g.op('Transpose', [k], { perm: [0, 1, 3, 2] })]);
      const p = g.op('Softmax', [g.op('Mul', [scores, g.scalar(1 / Math.sqrt(channels))])], { axis: -1 });
      const merged = g.op('Transpose', [g.op('MatMul', [p, v])], { perm: [0, 2, 1, 3] });
      const out = g.linear(g.op('Reshape', [merged, g.ints([0, -1, channels])]), channels, channels);
      const image = g.op('Reshape', [g.op('Transpose', [out], { perm: [0, 2, 1] }), g.op('Shape', ['x'])]);
      g.op('Add', [image, 'x'], {}, { outputs: ['y'] });
      g.output('y', [1, channels, 'height', 'width']);
      const bytes = g.build();
      const random = new Random(SEED + 2);
      const given = { x: tensorOf(random, [1, channels, side, side]) };
      const cpu = await runtime.InferenceSession.create(bytes, { executionProviders: ['wasm'] });
      const expected = await cpu.run(given);
      const session = await withSageAttention(runtime, { minTokens: 0 }).InferenceSession.create(bytes, {
        executionProviders: ['webgpu'],
      });
      const { y } = (await session.run(given)) as unknown as { y: OrtTensor };
      expectClose(y.data, expected.y?.data);
      expect(session.sageAttention.map(({ taken, headDim, queryLength }) => [taken, headDim, queryLength])).toEqual([
        [true, channels, pixels],
      ]);
      await session.release();
    });
  });
});
