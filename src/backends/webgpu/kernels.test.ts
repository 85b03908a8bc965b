/**
 * Every kernel that the tables can ask for, checked by Dawn's compiler; and the backend on Dawn's null device, which
 * validates everything and computes nothing. Neither needs a GPU or a driver.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { create } from 'webgpu';
import { type AttentionProblem, createProblem, createVarlenProblem } from '../../attention/problem.ts';
import { type Tensor, type TensorView, tensor } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import type { Capabilities } from './capabilities.ts';
import { chooseVariant, familiesOf } from './families/choose.ts';
import { matrixProducts } from './families/matrix.ts';
import { matrixProbeKernel, probeMatrixDialect } from './families/matrix-dialect.ts';
import { chooseTiles } from './families/tiled.ts';
import { createWebgpuBackend, downloadTensor, emptyGpuTensor, uploadTensor, type WebgpuBackend } from './index.ts';
import { QK_INT8_PV_FP16 } from './kernel-table.ts';
import { tiledWorkgroupBytes } from './kernels/attention-tiled.ts';
import { nativeMatrices } from './kernels/matrix-operations.ts';
import { aligned, unitsOf } from './launches/launch.ts';
import { comesOutRight, tryShapes } from './matrix-trial.ts';
import { APPLE, DIALECT, EXTENSION, H200, webgpuKernels } from './testing/configurations.ts';

const gpu = create(['backend=null', 'enable-dawn-features=allow_unsafe_apis']);

let device: GPUDevice;
beforeAll(async () => {
  const adapter = await gpu.requestAdapter();
  if (adapter === null) throw new Error('Dawn has no null adapter');
  const requiredFeatures = ['shader-f16', 'subgroups', 'chromium-experimental-subgroup-matrix'] as GPUFeatureName[];
  device = await adapter.requestDevice({ requiredFeatures });
});
afterAll(() => device.destroy());

/** The compiler's errors and warnings. */
async function messagesOf(code: string): Promise<string[]> {
  device.pushErrorScope('validation');
  const { messages } = await device.createShaderModule({ code }).getCompilationInfo();
  await device.popErrorScope();
  return messages.map(
    ({ type, lineNum, message }) => `${type}: ${message} | ${code.split('\n')[lineNum - 1]?.slice(0, 200)}`,
  );
}

describe('WGSL', () => {
  const kernels = webgpuKernels();
  for (const group of new Set(kernels.map((kernel) => kernel.group))) {
    it(`${group} compile`, async () => {
      for (const kernel of kernels.filter((kernel) => kernel.group === group)) {
        expect(await messagesOf(kernel.source()), kernel.name).toEqual([]);
      }
    });
  }

  it('the probe of subgroup matrices compiles in the dialect of this Dawn', async () => {
    for (const product of [...H200, ...APPLE]) {
      expect(await messagesOf(matrixProbeKernel(product, nativeMatrices(EXTENSION, DIALECT), 32))).toEqual([]);
    }
  });

  it('a product that comes out right in no dialect is named', async () => {
    const found = await probeMatrixDialect(device, 'chromium-experimental-subgroup-matrix', H200, 32);
    expect(found).toEqual({ wrong: H200[0] });
  });

  it('a device whose products come out wrong gets the next family, and its report says so', async () => {
    const adapter = { info: { subgroupMatrixConfigs: H200 } } as unknown as GPUAdapter;
    const backend = createWebgpuBackend({ device, adapter, gpu, capabilities: { subgroupSize: [32, 32] } });
    const { families } = (await backend.availability()).details;
    expect(families).toMatch(/^subgroup; base; no matrix: .*; wrong in a trial: i8->i32 16x16x32/);
    const { capabilities } = await backend.context();
    expect(familiesOf(capabilities).offered).not.toContain('matrix');
    expect(capabilities.wrongMatrices).toContainEqual(H200[0]);
    await backend.dispose();
  });
});

const CAPABILITIES: Capabilities = {
  adapter: 'test',
  isSoftware: false,
  shaderF16: true,
  subgroups: true,
  subgroupSize: [32, 32],
  matrixConfigs: [],
  matrixFeature: undefined,
  matrixDialect: DIALECT,
  packedDot: true,
  subgroupId: true,
  timestamps: false,
  workgroupBytes: 32768,
  workgroupThreads: 256,
  storageBuffers: 8,
  bindingBytes: 2 ** 27,
  bufferBytes: 2 ** 28,
  bindingAlignment: 256,
  dispatch: 65535,
};

describe('selection', () => {
  it('every head dim gets tiles that fit, also with the core limit of workgroup memory', () => {
    for (const workgroupBytes of [16384, 32768, 49152]) {
      for (let d = 32; d <= 256; d += 32) {
        for (let dv = 32; dv <= 256; dv += 32) {
          for (const queryLength of [1, 20, 5000]) {
            const tiles = chooseTiles({ ...CAPABILITIES, workgroupBytes }, 'subgroup', d, dv, queryLength, undefined);
            expect(tiledWorkgroupBytes(tiles, d, dv)).toBeLessThanOrEqual(workgroupBytes);
          }
        }
      }
    }
  });

  it('takes INT8 products where they are listed, and exact floating-point sums where they are not', () => {
    expect(matrixProducts(H200, 'f32')).toMatchObject({
      qk: { componentType: 'i8', N: 16 },
      pv: { componentType: 'f16', resultComponentType: 'f32', N: 16 },
    });
    expect(matrixProducts(APPLE, 'f32')).toMatchObject({ qk: { componentType: 'f32' }, pv: { componentType: 'f32' } });
    // f16 sums of products of INT8 values would overflow.
    expect(matrixProducts(APPLE.slice(1), 'f32')).toBeUndefined();
  });

  it('every head dim gets the matrix shape of its table, as far as device limits allow', () => {
    const kernel = { descriptor: QK_INT8_PV_FP16, pvAccumDtype: 'fp32' } as const;
    const chosen = (dims: readonly [number, number], queryLength: number, limits: Partial<Capabilities> = {}) => {
      const device = { ...CAPABILITIES, matrixConfigs: H200, matrixFeature: 'subgroup-matrix', ...limits };
      const problem = { headDim: dims[0], valueDim: dims[1], queryLength } as AttentionProblem;
      const { family, name } = chooseVariant(device, problem, kernel, {});
      return `${family} ${name}`;
    };
    const large = { workgroupBytes: 49152, workgroupThreads: 1024 };
    expect(chosen([64, 64], 8192, large)).toBe('matrix 4s128r16k-qk4-pv2');
    expect(chosen([80, 80], 8192, large)).toBe('matrix 4s128r16k-qk4-pv2');
    expect(chosen([64, 64], 1024, large)).toBe('matrix 4s64r32k-qk2-pv1');
    expect(chosen([128, 128], 8192, large)).toBe('matrix 8s128r32k-qk4-pv2-qk-pv');
    expect(chosen([256, 256], 8192, large)).toBe('matrix 8s64r32k-qk4-pv1');
    expect(chosen([192, 192], 8192, large)).toBe('matrix 8s64r32k-qk4-pv2');
    expect(chosen([64, 64], 1, large)).toBe('matrix 2s32r32k-qk1-pv1');
    const least = { workgroupBytes: 16384, workgroupThreads: 256 };
    expect(chosen([128, 128], 8192, least)).toBe('matrix 4s64r16k-qk4-pv1');
    expect(chosen([256, 256], 8192, least)).toBe('matrix 1s16r16k-qk1-pv1');
    const apple = { workgroupBytes: 32768, workgroupThreads: 1024, matrixConfigs: APPLE };
    expect(chosen([128, 128], 8192, apple)).toBe('matrix 4s64r16k-qk4-pv1');
    // K and V of 16 keys in float32 alone take 32 KiB.
    expect(chosen([256, 256], 8192, apple)).toMatch(/^subgroup /);
    for (const [D, Dv] of [
      [32, 256],
      [256, 32],
      [96, 160],
      [224, 224],
    ] as const) {
      for (const queryLength of [1, 100, 5000]) expect(chosen([D, Dv], queryLength, large)).toMatch(/^matrix /);
    }
  });

  it('a shape that is wrong in a trial gives way to the next one, and at last to the next family', async () => {
    const capabilities = { matrixConfigs: H200, matrixFeature: 'subgroup-matrix', subgroupSize: [32, 32] } as const;
    const backend = createWebgpuBackend({ gpu, capabilities });
    const context = await backend.context();
    const [q, k, v] = [0, 1, 2].map(() => tensor(new Float32Array(64), [1, 1, 1, 64])) as [Tensor, Tensor, Tensor];
    const problem = createProblem(q, k, v, {});
    const choice = chooseOptions(backend.defaultKernel(), problem, {});
    const chosen = () => chooseVariant(context.capabilities, problem, choice, {}).name;
    const tried: string[] = [];
    const trial =
      (right: (variant: string) => boolean) =>
      async (...[, , , forced]: Parameters<typeof comesOutRight>) => {
        tried.push(forced.variant as string);
        return right(forced.variant as string);
      };
    const best = chosen();
    await tryShapes(context, problem, choice, {}, { trial: trial((variant) => variant !== best) });
    const second = chosen();
    expect(tried).toEqual([best, second]);
    expect(best).not.toBe(second);
    await tryShapes(context, problem, choice, {}, { trial: trial(() => false) });
    expect(tried, 'a shape is tried once').toHaveLength(2);
    context.rightShapes.clear();
    await tryShapes(context, problem, choice, {}, { trial: trial(() => false) });
    expect(chooseVariant(context.capabilities, problem, choice, {}).family).toBe('subgroup');
    // The null device computes nothing: the trial itself sees it.
    expect(await comesOutRight(context, problem, choice, { family: 'subgroup' })).toBe(false);
    await backend.dispose();
  });

  it('says why a family is missing', () => {
    const { offered, missing } = familiesOf({ ...CAPABILITIES, subgroups: false });
    expect(offered).toEqual(['base']);
    expect(missing).toEqual(["matrix: no feature 'subgroups'", "subgroup: no feature 'subgroups'"]);
    expect(familiesOf({ ...CAPABILITIES, matrixConfigs: H200, matrixFeature: 'subgroup-matrix' }).offered).toEqual([
      'matrix',
      'subgroup',
      'base',
    ]);
  });
});

describe('units', () => {
  const whole = { tiles: [0, 10], heads: [0, 3], splits: [0, 1] } as const;

  it('cover the whole range once, each within the limits', () => {
    const row = 1000;
    const units = unitsOf(
      whole,
      ({ tiles, heads }) => [
        { slot: 0, buffer: 'q', start: (heads[0] * 10 + tiles[0]) * row, end: ((heads[1] - 1) * 10 + tiles[1]) * row },
      ],
      { ...CAPABILITIES, bindingBytes: 4096, dispatch: 4 },
    );
    const seen = units.flatMap(({ tiles, heads }) => {
      expect(tiles[1] - tiles[0]).toBeLessThanOrEqual(4);
      expect(((heads[1] - 1 - heads[0]) * 10 + tiles[1] - tiles[0]) * row).toBeLessThanOrEqual(4096);
      const cells: string[] = [];
      for (let head = heads[0]; head < heads[1]; head++)
        for (let tile = tiles[0]; tile < tiles[1]; tile++) cells.push(`${head},${tile}`);
      return cells;
    });
    expect(new Set(seen).size).toBe(30);
    expect(seen).toHaveLength(30);
  });

  it('name what a single tile needs', () => {
    expect(() =>
      unitsOf(whole, () => [{ slot: 0, buffer: 'q', start: 0, end: 9999 }], { ...CAPABILITIES, bindingBytes: 4096 }),
    ).toThrow(/9999|10000/);
  });

  it('are bound from aligned offsets', () => {
    expect(aligned({ start: 300, end: 513 }, 256)).toEqual({ start: 256, end: 516 });
  });
});

describe('the backend on a device that computes nothing', () => {
  let backend: WebgpuBackend;
  beforeAll(() => {
    backend = createWebgpuBackend({ gpu });
  });
  afterAll(() => backend.dispose());

  const zeros = (shape: readonly number[]): Tensor => tensor(new Float32Array(shape.reduce((a, b) => a * b, 1)), shape);
  const spec = (q: TensorView, k: TensorView, v: TensorView) =>
    createProblem(q, k, v, { returnLse: true, isCausal: true });

  it('describes the device', async () => {
    const { available, details } = await backend.availability();
    expect(available).toBe(true);
    expect(details.families).toMatch(/subgroup; base; no matrix/);
    expect(await backend.defaultKernel()).toMatchObject({ name: 'qk-int8-pv-fp16' });
  });

  it('validates every launch of a run, and gives outputs of the right shape', async () => {
    const [q, k] = [zeros([2, 4, 50, 40]), zeros([2, 2, 60, 40])];
    const v = zeros([2, 2, 60, 24]);
    const problem = spec(q, k, v);
    const plan = await backend.plan(problem, chooseOptions(await backend.defaultKernel(), problem, {}));
    const { output, lse } = await plan.run({ q, k, v });
    expect(output).toMatchObject({ location: 'cpu', dtype: 'float32', shape: [2, 4, 50, 24] });
    expect(lse).toMatchObject({ shape: [2, 4, 50] });
    expect(plan.details.launches).toHaveLength(3);
    expect(() => plan.encode({} as GPUCommandEncoder, { q, k, v } as never)).toThrow(/a plan for cpu tensors/);
    plan.dispose();
    await expect(plan.run({ q, k, v })).rejects.toMatchObject({ code: 'disposed' });
  });

  it('has float16 sums in family matrix only, and says so', async () => {
    const [q, k, v] = [zeros([1, 2, 5, 32]), zeros([1, 2, 5, 32]), zeros([1, 2, 5, 32])];
    const problem = spec(q, k, v);
    const choice = chooseOptions(await backend.defaultKernel(), problem, { pvAccumDtype: 'fp16' });
    await expect(backend.plan(problem, choice)).rejects.toMatchObject({
      code: 'unsupported-option',
      argument: 'options.pvAccumDtype',
      received: "'fp16' on family 'subgroup'",
    });
  });

  it('validates varlen, odd 16-bit head dims and masks', async () => {
    const half = (shape: readonly number[]) =>
      tensor(new Uint16Array(shape.reduce((a, b) => a * b, 1)), shape, { dtype: 'bfloat16' });
    const [q, k, v] = [half([30, 2, 33]), half([40, 1, 33]), half([40, 1, 7])];
    const attnMask = tensor(new Uint8Array(20 * 30), [20, 30]);
    const problem = createVarlenProblem(q, k, v, [0, 10, 30], [0, 30, 40], { attnMask, softcap: 5, returnLse: true });
    const plan = await backend.plan(problem, chooseOptions(await backend.defaultKernel(), problem, {}));
    expect((await plan.run({ q, k, v, attnMask })).output.shape).toEqual([30, 2, 7]);
    expect(plan.details.launches.at(-1)).toBe('merge');
    plan.dispose();
  });

  it('encodes GPU tensors and names those unlike the planned ones', async () => {
    const { device: own } = await backend.context();
    const [q, k, v] = [0, 1, 2].map(() => uploadTensor(own, zeros([1, 2, 40, 32]))) as [
      ReturnType<typeof uploadTensor>,
      ReturnType<typeof uploadTensor>,
      ReturnType<typeof uploadTensor>,
    ];
    const problem = createProblem(q, k, v, {});
    const plan = await backend.plan(problem, chooseOptions(await backend.defaultKernel(), problem, {}));
    const encoder = own.createCommandEncoder();
    const { output } = plan.encode(encoder, { q, k, v });
    own.queue.submit([encoder.finish()]);
    expect((await downloadTensor(own, output)).shape).toEqual([1, 2, 40, 32]);
    const run = await plan.run({ q, k, v });
    expect(run.output).toMatchObject({ location: 'webgpu', shape: [1, 2, 40, 32] });
    const other = own.createCommandEncoder();
    const wrong = emptyGpuTensor(own, 'float16', [1, 2, 40, 32]);
    expect(() => plan.encode(other, { q, k, v }, { output: wrong })).toThrow(/outputs.output/);
    expect(() => plan.encode(other, { q: { ...q, offset: 1 }, k, v })).toThrow(/q/);
    plan.dispose();
  });

  it('keeps a cache, appends to it and outgrows it', async () => {
    const problemOf = (tokens: number) =>
      spec(zeros([1, 2, 3, 32]), zeros([1, 2, tokens, 32]), zeros([1, 2, tokens, 32]));
    const tokens = (n: number) => zeros([1, 2, n, 32]);
    const problem = createProblem(tokens(5), tokens(5), tokens(5), {});
    const choice = chooseOptions(await backend.defaultKernel(), problem, {});
    const cache = await backend.prepareKeyValue(problem, choice, tokens(5), tokens(5), {});
    await cache.append(tokens(100), tokens(100), createProblem(tokens(100), tokens(100), tokens(100), {}), {});
    expect(cache.length).toBe(105);
    for (let i = 0; i < 2; i++) {
      expect((await cache.attend(zeros([1, 2, 3, 32]), problemOf(105), {}, {})).output.shape).toEqual([1, 2, 3, 32]);
    }
    cache.dispose();
    await expect(cache.attend(zeros([1, 2, 3, 32]), problemOf(105), {}, {})).rejects.toMatchObject({
      code: 'disposed',
    });
  });

  it("asks the adapter for subgroup matrices that the caller's device does not list", async () => {
    // The null device computes nothing: products that the kernels would use fail the probe, the others stay.
    const { vendor, architecture, device: name, description } = device.adapterInfo;
    const listing = (other: object) => ({
      wgslLanguageFeatures: gpu.wgslLanguageFeatures,
      requestAdapter: async () => ({
        info: { vendor, architecture, device: name, description, subgroupMatrixConfigs: H200, ...other },
      }),
    });
    const configsWith = async (options: object) =>
      (await createWebgpuBackend({ device, ...options }).context()).capabilities.matrixConfigs;
    const floats = H200.filter(({ resultComponentType }) => resultComponentType === 'f16');
    expect(await configsWith({ gpu: listing({}) })).toEqual(floats);
    expect(await configsWith({ adapter: await listing({}).requestAdapter() })).toEqual(floats);
    expect(await configsWith({ gpu: listing({ device: 'another GPU' }) })).toEqual([]);
  });

  it('opens another device after a loss', async () => {
    const own = createWebgpuBackend({ gpu });
    const { device: lost } = await own.context();
    lost.destroy();
    await lost.lost;
    expect((await own.context()).device).not.toBe(lost);
    await own.dispose();
  });
});
