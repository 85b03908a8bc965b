/**
 * The exact peer of benches, against float64: every variant of its tiles, both dtypes, odd sizes, poison around
 * everything.
 */
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { itNeeds } from '../../../test/support/requirement.ts';
import { sampled } from '../../../test/support/sample.ts';
import { createProblem, outputShapeOf } from '../../attention/problem.ts';
import {
  createWebgpuBackend,
  downloadTensor,
  gpuTensor,
  uploadTensor,
  type WebgpuBackend,
} from '../../backends/webgpu/index.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { fromFloat32, toFloat32 } from '../../tensor/access.ts';
import { elementCount, type Tensor, tensor } from '../../tensor/tensor.ts';
import { createExactAttention, EXACT_VARIANTS, type ExactAttentionOptions, exactVariants } from './exact-webgpu.ts';
import { exactAttentionKernel } from './exact-webgpu-kernel.ts';

const it = itNeeds(process.env.SAGEATTENTION_SOFTWARE_GPU_MISSING);
const seed = runSeed();
/** SwiftShader runs every size: lavapipe takes six times as long to compile the same kernels. */
const SHARES = process.env.SAGEATTENTION_SOFTWARE_GPU === 'lavapipe' ? { byHand: 0.2, otherwise: 0.3 } : { byHand: 1 };

/** Of the relative L1 error: roundings of float32 sums, and of a float16 output. */
const BOUND = { float32: 3e-6, float16: 6e-4 } as const;

interface Size {
  readonly batch?: number;
  readonly heads?: number;
  readonly kvHeads?: number;
  readonly lq: number;
  readonly lk: number;
  readonly d: number;
  readonly dv?: number;
}

describe(`exact attention on WebGPU (SAGEATTENTION_SEED=${seed})`, () => {
  const random = new Random(seed);
  let backend: WebgpuBackend;
  beforeAll(() => {
    backend = createWebgpuBackend();
  });
  afterAll(() => backend?.dispose());

  /** Runs on tensors with NaN before and behind them, into an output of NaN, and compares with float64. */
  async function check(size: Size, dtype: 'float16' | 'float32', options: ExactAttentionOptions = {}): Promise<void> {
    const { batch = 1, heads = 1, kvHeads = heads, lq, lk, d, dv = d } = size;
    const context = await backend.context();
    const { device } = context;
    const nhd = options.tensorLayout === 'NHD';
    const shapeOf = (h: number, l: number, width: number) => (nhd ? [batch, l, h, width] : [batch, h, l, width]);
    const draw = (shape: number[]) => fromFloat32(random.normals(elementCount(shape)), shape, dtype);
    const cpu = { q: draw(shapeOf(heads, lq, d)), k: draw(shapeOf(kvHeads, lk, d)), v: draw(shapeOf(kvHeads, lk, dv)) };
    const guard = 4 * random.integer(1, 9);
    const poisoned = ({ shape }: Tensor, values?: Float32Array) => {
      const count = elementCount(shape);
      const all = new Float32Array(guard + count + guard).fill(Number.NaN);
      if (values !== undefined) all.set(values, guard);
      const { buffer } = uploadTensor(device, fromFloat32(all, [all.length], dtype));
      return gpuTensor(buffer, dtype, shape, { offset: guard });
    };
    const gpu = {
      q: poisoned(cpu.q, toFloat32(cpu.q)),
      k: poisoned(cpu.k, toFloat32(cpu.k)),
      v: poisoned(cpu.v, toFloat32(cpu.v)),
    };
    const { variant: _, ...meaning } = options;
    const problem = createProblem(cpu.q, cpu.k, cpu.v, meaning);
    const shape = outputShapeOf(problem);
    const target = poisoned(tensor(new Float32Array(elementCount(shape)), shape));
    const attention = await createExactAttention(context, gpu, options);
    attention.run({ ...target, offset: 0 });
    const all = toFloat32(
      await downloadTensor(device, gpuTensor(target.buffer, dtype, [elementCount(shape) + 2 * guard])),
    );
    const { output } = attentionExact(problem, cpu);
    expect(compare(all.subarray(0, output.length), output).relativeL1).toBeLessThan(BOUND[dtype]);
    expect(all.subarray(output.length).every(Number.isNaN)).toBe(true);
    attention.dispose();
    for (const { buffer } of [gpu.q, gpu.k, gpu.v, target]) buffer.destroy();
  }

  const dtypes = async () =>
    (await backend.context()).capabilities.shaderF16 ? (['float32', 'float16'] as const) : (['float32'] as const);

  // Small tiles: software drivers take half a minute to compile one of the table's large ones.
  const tiles = { rows: 16, keys: 16, rowThreads: 8, colThreads: 4 } as const;
  for (const tile of ['f32', 'f16'] as const) {
    for (const staging of ['separate', 'shared', 'none'] as const) {
      it(`stages tiles: ${tile} ${staging}`, async () => {
        const variant = { name: 'small', ...tiles, tile, staging };
        for (const dtype of await dtypes()) {
          if (tile === 'f16' && dtype === 'float32') continue;
          await check({ heads: 2, lq: 77, lk: 101, d: 40, dv: 24 }, dtype, { variant });
        }
      });
    }
  }

  it('writes valid WGSL for every variant of the table', async () => {
    const { device, capabilities } = await backend.context();
    for (const variant of EXACT_VARIANTS) {
      for (const component of ['f32', 'f16'] as const) {
        // Only float16 operands have float16 tiles.
        if (component === 'f16' ? !capabilities.shaderF16 : variant.tile === 'f16') continue;
        for (const [headDim, valueDim] of [
          [64, 64],
          [128, 96],
          [37, 256],
        ] as const) {
          const vectors = headDim % 4 === 0;
          const shape = { ...variant, component, headDim, valueDim, vectors };
          const { subgroups, subgroupId } = capabilities;
          const code = exactAttentionKernel({ ...shape, subgroups, subgroupId: subgroups && subgroupId });
          const { messages } = await device.createShaderModule({ code }).getCompilationInfo();
          expect(
            messages.map(({ message }) => message),
            `${variant.name}, ${headDim}`,
          ).toEqual([]);
        }
      }
    }
  });

  const chosen = [
    [16, 'float32', 64, 32],
    [16, 'float16', 64, 32],
    [32, 'float32', 64, 32],
    [32, 'float16', 64, 64],
    [48, 'float32', 64, 64],
    [48, 'float32', 128, 32],
    [48, 'float16', 128, 64],
    [64, 'float32', 128, 64],
  ] as const;
  for (const [kibibytes, dtype, dim, rows] of chosen) {
    it(`in ${kibibytes} KiB takes for ${dtype} and head dim ${dim} tiles of ${rows} rows, staged`, async () => {
      const { capabilities } = await backend.context();
      const device = { ...capabilities, isSoftware: false, workgroupThreads: 256, workgroupBytes: 1024 * kibibytes };
      const [best] = exactVariants(device, { dtype, headDim: dim, valueDim: dim });
      expect(best).toMatchObject({ rows });
      expect(best?.staging).not.toBe('none');
    });
  }

  const sizes: readonly { readonly name: string; readonly size: Size; readonly options?: ExactAttentionOptions }[] = [
    { name: 'one query and one key', size: { lq: 1, lk: 1, d: 8 } },
    { name: 'odd lengths, grouped heads, batches', size: { batch: 2, heads: 6, kvHeads: 2, lq: 67, lk: 129, d: 64 } },
    {
      name: 'tokens before heads',
      size: { batch: 2, heads: 4, kvHeads: 2, lq: 65, lk: 33, d: 32 },
      options: { tensorLayout: 'NHD' },
    },
    { name: 'head dims that are no multiple of 4', size: { heads: 2, lq: 33, lk: 65, d: 37, dv: 51 } },
    { name: 'head dim 128', size: { lq: 40, lk: 70, d: 128 }, options: { isCausal: true } },
    { name: 'head dim 256', size: { heads: 2, kvHeads: 1, lq: 35, lk: 70, d: 256 } },
    { name: 'head dim 1', size: { lq: 5, lk: 50, d: 1 } },
    { name: 'a causal mask', size: { heads: 2, lq: 131, lk: 131, d: 64 }, options: { isCausal: true } },
    {
      name: 'a causal mask over more keys',
      size: { lq: 50, lk: 131, d: 16 },
      options: { isCausal: true, causalAlignment: 'bottom-right' },
    },
    // The first rows see nothing, and give 0.
    {
      name: 'a causal mask over fewer keys',
      size: { lq: 90, lk: 40, d: 16 },
      options: { isCausal: true, causalAlignment: 'bottom-right' },
    },
    { name: 'a scale of its own', size: { lq: 20, lk: 90, d: 16 }, options: { smScale: 0.7 } },
  ];
  for (const { name, size, options } of sampled(sizes, seed, SHARES, 'sizes')) {
    it(`agrees with float64: ${name}`, async () => {
      for (const dtype of await dtypes()) await check(size, dtype, options);
    });
  }

  it('does without subgroups, and with 16 KiB of workgroup memory', async () => {
    for (const capabilities of [{ subgroups: false }, { workgroupBytes: 16384 }]) {
      const own = createWebgpuBackend({ capabilities });
      const before = backend;
      backend = own;
      try {
        for (const d of [64, 256]) await check({ heads: 2, lq: 37, lk: 70, d }, 'float32', { isCausal: true });
      } finally {
        backend = before;
        await own.dispose();
      }
    }
  });

  it('names what it does not take', async () => {
    const context = await backend.context();
    const upload = (dtype: 'float32' | 'bfloat16') => {
      const view = uploadTensor(context.device, fromFloat32(random.normals(64), [1, 1, 4, 16], dtype));
      return { q: view, k: view, v: view };
    };
    await expect(createExactAttention(context, upload('bfloat16'))).rejects.toMatchObject({
      code: 'unsupported-option',
      argument: 'q.dtype',
    });
    await expect(createExactAttention(context, upload('float32'), { softcap: 3 } as never)).rejects.toMatchObject({
      code: 'unknown-option',
    });
  });
});
