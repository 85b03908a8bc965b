/** What section 3 measures: SageAttention's kernels, and as their peers exact attention, our own and onnxruntime-web's. */
import type * as OnnxRuntime from 'onnxruntime-web';
import { createAttention, getBackend, type KernelName, type Tensor } from '../../src/index.ts';
import { attentionModel } from '../../src/measure/onnx-attention-model.ts';
import { fromFloat32, toFloat32 } from '../../src/tensor/access.ts';
import { bitsOf, NativeFloat16Array, tensor } from '../../src/tensor/tensor.ts';
import { type BrowserBackend, gpuContext, webgpuModule } from './backends.ts';

/** q, k and v, `[1,L,H,D]` float32. */
export interface BenchInputs {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly isCausal: boolean;
}

/** One way to compute attention, made ready for one problem. */
export interface Ready {
  /** Starts a call. On a GPU it is only submitted. */
  run(signal: AbortSignal): Promise<void>;
  /** Resolves when all calls so far are done. */
  finish(): Promise<void>;
  /** The output of one call, `[1,L,H,D]` float32. */
  output(signal: AbortSignal): Promise<Tensor>;
  dispose(): void;
}

export interface Contestant {
  readonly id: string;
  readonly label: string;
  /** Whose it is: the library's, or the exact attention that it is compared with. */
  readonly kind: 'sage' | 'peer';
  readonly where: BrowserBackend;
  /** Of q, k, v and the output. */
  readonly dtype: 'float16' | 'float32';
  /** What the numbers are made of. */
  readonly note: string;
  prepare(inputs: BenchInputs): Promise<Ready>;
}

async function sageOnCpu(kernel: KernelName, { q, k, v, isCausal }: BenchInputs): Promise<Ready> {
  const attention = await createAttention({ q, k, v }, { backend: 'wasm', kernel, isCausal, tensorLayout: 'NHD' });
  return {
    run: async (signal) => {
      await attention.run({ q, k, v }, { signal });
    },
    finish: async () => {},
    output: async (signal) => (await attention.run({ q, k, v }, { signal })).output,
    dispose: () => attention.dispose(),
  };
}

/** The dtype that a GPU multiplies fastest and that a model would hold its tensors in. */
const gpuDtype = (device: GPUDevice) => (device.features.has('shader-f16') ? 'float16' : 'float32');

function asDtype(view: Tensor, dtype: 'float16' | 'float32'): Tensor {
  if (dtype === 'float32') return view;
  return fromFloat32(toFloat32(view), view.shape, dtype);
}

/** Resolves when the GPU has done all of its work; where it went meanwhile, nothing was done and the loss is thrown. */
async function allDone(context: Awaited<ReturnType<typeof gpuContext>>): Promise<void> {
  await context.unlessLost(context.device.queue.onSubmittedWorkDone());
  if (context.lost !== undefined) throw context.lost;
}

async function sageOnGpu(kernel: KernelName, inputs: BenchInputs): Promise<Ready> {
  const [context, { downloadTensor, uploadTensor }] = await Promise.all([gpuContext(), webgpuModule()]);
  const { device } = context;
  const dtype = gpuDtype(device);
  const upload = (view: Tensor) => uploadTensor(device, asDtype(view, dtype));
  const tensors = { q: upload(inputs.q), k: upload(inputs.k), v: upload(inputs.v) };
  const options = { kernel, isCausal: inputs.isCausal, tensorLayout: 'NHD' } as const;
  const attention = await createAttention<(typeof tensors)['q']>(tensors, options);
  const attend = async (signal: AbortSignal) => (await attention.run(tensors, { signal })).output;
  return {
    run: async (signal) => {
      (await attend(signal)).buffer.destroy();
    },
    finish: () => allDone(context),
    output: async (signal) => {
      const output = await attend(signal);
      const downloaded = await context.unlessLost(downloadTensor(device, output));
      output.buffer.destroy();
      return downloaded;
    },
    dispose: () => {
      attention.dispose();
      for (const { buffer } of Object.values(tensors)) buffer.destroy();
    },
  };
}

async function exactOnGpu({ q, k, v, isCausal }: BenchInputs): Promise<Ready> {
  const [context, { downloadTensor, uploadTensor }, { createExactAttention }] = await Promise.all([
    gpuContext(),
    webgpuModule(),
    import('../../src/measure/peers/exact-webgpu.ts'),
  ]);
  const { device } = context;
  const dtype = gpuDtype(device);
  const upload = (view: Tensor) => uploadTensor(device, asDtype(view, dtype));
  const tensors = { q: upload(q), k: upload(k), v: upload(v) };
  const dispose = () => {
    for (const { buffer } of Object.values(tensors)) buffer.destroy();
  };
  try {
    const attention = await createExactAttention(context, tensors, { isCausal, tensorLayout: 'NHD' });
    return {
      run: async () => attention.run().buffer.destroy(),
      finish: () => allDone(context),
      output: async () => {
        const output = attention.run();
        const downloaded = await context.unlessLost(downloadTensor(device, output));
        output.buffer.destroy();
        return downloaded;
      },
      dispose: () => {
        attention.dispose();
        dispose();
      },
    };
  } catch (error) {
    dispose();
    throw error;
  }
}

type Ort = typeof OnnxRuntime;
const runtimes = new Map<string, Promise<Ort>>();

/** onnxruntime-web from beside the page; it is not part of its bundle, being several times as large. */
function loadOrt(base: string, bundle: 'wasm' | 'webgpu'): Promise<Ort> {
  const url = `${base}ort.${bundle}.bundle.min.mjs`;
  let loaded = runtimes.get(url);
  if (loaded === undefined) {
    loaded = (import(/* @vite-ignore */ url) as Promise<Ort>).then((ort) => {
      ort.env.wasm.wasmPaths = base;
      ort.env.wasm.numThreads = crossOriginIsolated ? navigator.hardwareConcurrency : 1;
      ort.env.logLevel = 'fatal';
      return ort;
    });
    loaded.catch(() => runtimes.delete(url));
    runtimes.set(url, loaded);
  }
  return loaded;
}

const packedDims = ([batch = 1, length = 0, heads = 0, dim = 0]: readonly number[]) => [batch, length, heads * dim];

function requireUnmasked({ isCausal }: BenchInputs): void {
  if (isCausal) throw new Error('this operator takes no causal mask');
}

async function ortOnCpu(base: string, inputs: BenchInputs): Promise<Ready> {
  requireUnmasked(inputs);
  const ort = await loadOrt(base, 'wasm');
  const session = await ort.InferenceSession.create(attentionModel(inputs.q.shape[2] as number), {
    executionProviders: ['wasm'],
    logSeverityLevel: 4,
  });
  const input = (view: Tensor) => new ort.Tensor('float32', view.data as Float32Array, packedDims(view.shape));
  const feeds = { q: input(inputs.q), k: input(inputs.k), v: input(inputs.v) };
  return {
    run: async () => {
      await session.run(feeds);
    },
    finish: async () => {},
    output: async () => tensor((await session.run(feeds)).output?.data as Float32Array, inputs.q.shape),
    dispose: () => void session.release(),
  };
}

async function ortOnGpu(base: string, inputs: BenchInputs): Promise<Ready> {
  requireUnmasked(inputs);
  const [ort, { uploadTensor }] = await Promise.all([loadOrt(base, 'webgpu'), webgpuModule()]);
  const dtype = gpuDtype((await gpuContext()).device);
  const session = await ort.InferenceSession.create(attentionModel(inputs.q.shape[2] as number, { dtype }), {
    executionProviders: ['webgpu'],
    preferredOutputLocation: 'gpu-buffer',
    logSeverityLevel: 4,
  });
  // onnxruntime runs on a device of its own, which exists once there is a session.
  const device = (await ort.env.webgpu.device) as GPUDevice;
  const uploaded = [inputs.q, inputs.k, inputs.v].map((view) => uploadTensor(device, asDtype(view, dtype)));
  const feeds = Object.fromEntries(
    uploaded.map(({ buffer, shape }, i) => [
      ['q', 'k', 'v'][i] as string,
      ort.Tensor.fromGpuBuffer(buffer, { dataType: dtype, dims: packedDims(shape) }),
    ]),
  );
  const attend = async () => (await session.run(feeds)).output as OnnxRuntime.Tensor;
  return {
    run: async () => (await attend()).dispose(),
    finish: () => device.queue.onSubmittedWorkDone(),
    output: async () => {
      const output = await attend();
      const data = await output.getData(true);
      const half = dtype === 'float16';
      return tensor(half ? halves(data) : (data as Float32Array), inputs.q.shape, { dtype });
    },
    dispose: () => {
      for (const { buffer } of uploaded) buffer.destroy();
      void session.release();
    },
  };
}

/** onnxruntime gives float16 as a `Float16Array` where there is one, else as bits. */
function halves(data: OnnxRuntime.Tensor.DataType): Uint16Array {
  if (data instanceof Uint16Array) return data;
  if (NativeFloat16Array !== undefined && data instanceof NativeFloat16Array) return bitsOf(data);
  throw new Error('onnxruntime-web gave no float16');
}

/** Everything that this device can be asked to run. */
export async function contestants(
  available: readonly BrowserBackend[],
  ortBase: string | undefined,
): Promise<Contestant[]> {
  const found: Contestant[] = [];
  for (const where of available) {
    const dtype = where === 'webgpu' ? gpuDtype((await gpuContext()).device) : 'float32';
    const short = dtype === 'float16' ? 'f16' : 'f32';
    const title = where === 'webgpu' ? 'WebGPU' : 'WASM';
    for (const { name, summary } of (await getBackend(where)).kernels) {
      if (name === 'exact') continue;
      found.push({
        id: `${where}:${name}`,
        label: `${title} ${name}`,
        kind: 'sage',
        where,
        dtype,
        note: summary,
        prepare: (inputs) => (where === 'webgpu' ? sageOnGpu(name, inputs) : sageOnCpu(name, inputs)),
      });
    }
    found.push({
      id: `${where}:exact`,
      label: `${title} exact ${short}`,
      kind: 'peer',
      where,
      dtype,
      note: where === 'webgpu' ? 'FlashAttention in WGSL, sums in float32, no matrix units' : 'FlashAttention in SIMD',
      prepare: where === 'webgpu' ? exactOnGpu : (inputs) => sageOnCpu('exact', inputs),
    });
    if (ortBase === undefined) continue;
    found.push({
      id: `${where}:onnxruntime`,
      label: `onnxruntime-web ${short}, ${title}`,
      kind: 'peer',
      where,
      dtype,
      note: 'com.microsoft.MultiHeadAttention',
      prepare: (inputs) => (where === 'webgpu' ? ortOnGpu(ortBase, inputs) : ortOnCpu(ortBase, inputs)),
    });
  }
  return found;
}
