/** The WebGPU backend on onnxruntime's own device: buffers go from one to the other without a copy. */
import { chooseOptions } from '../../attention/choice.ts';
import { ExecutionError, UnsupportedOptionError } from '../../attention/errors.ts';
import { withCachedPlan } from '../../attention/plan-cache.ts';
import { createProblem } from '../../attention/problem.ts';
import type { GpuTensor } from '../../backends/webgpu/gpu-tensor.ts';
import type { WebgpuBackend } from '../../backends/webgpu/index.ts';
import type { OperandCall } from './call.ts';
import { type AttentionEngine, inLayout, optionsOf } from './engine.ts';
import type { OrtModule, OrtSessionOptions, OrtTensor, OrtTensorConstructor } from './ort.ts';

const DTYPES = { float16: 'float16', float32: 'float32', bool: 'bool' } as const;

/** One backend for each device, so that sessions share pipelines. */
const backends = new WeakMap<GPUDevice, Promise<WebgpuBackend>>();

function backendOn(device: GPUDevice): Promise<WebgpuBackend> {
  let backend = backends.get(device);
  if (backend === undefined) {
    backend = import('../../backends/webgpu/index.ts').then((module) => module.createWebgpuBackend({ device }));
    backends.set(device, backend);
  }
  return backend;
}

/** The device of the session options, or the one that onnxruntime has opened by now. */
export async function deviceOf(ort: OrtModule, options: OrtSessionOptions): Promise<GPUDevice> {
  for (const provider of options.executionProviders ?? []) {
    if (typeof provider !== 'string' && provider.name === 'webgpu' && provider.device != null) {
      return provider.device as GPUDevice;
    }
  }
  const device = await (ort.env as { webgpu?: { device?: GPUDevice | Promise<GPUDevice> } }).webgpu?.device;
  if (device === undefined)
    throw new Error('onnxruntime does not say which GPU device it uses; pass one in executionProviders');
  return device;
}

export async function gpuEngine(OrtTensorClass: OrtTensorConstructor, device: GPUDevice): Promise<AttentionEngine> {
  const { fromGpuBuffer } = OrtTensorClass;
  if (fromGpuBuffer === undefined) throw new Error('this onnxruntime makes no tensors of GPU buffers');
  const backend = await backendOn(device);
  const { downloadTensor, uploadTensor } = await import('../../backends/webgpu/index.ts');

  /** What is on the CPU for a reason of onnxruntime's (an input of the graph, mostly) goes up; `uploaded` is freed later. */
  const toGpu = ({ tensor, view }: OperandCall, uploaded: GPUBuffer[]): GpuTensor => {
    const dtype = DTYPES[tensor.type as keyof typeof DTYPES];
    const { shape, strides, offset } = view;
    if (tensor.location === 'gpu-buffer') {
      return { location: 'webgpu', buffer: tensor.gpuBuffer as GPUBuffer, dtype, shape, strides, offset };
    }
    const { buffer } = uploadTensor(device, {
      location: 'cpu',
      dtype,
      data: tensor.data as Float32Array,
      shape: [tensor.size],
      strides: [1],
      offset: 0,
    });
    uploaded.push(buffer);
    return { location: 'webgpu', buffer, dtype, shape, strides, offset };
  };

  return {
    backend: 'webgpu',
    async kernels() {
      return backend.kernels.map(({ name }) => name);
    },
    async attend(call, kernel): Promise<OrtTensor> {
      const uploaded: GPUBuffer[] = [];
      try {
        const [q, k, v] = [call.q, call.k, call.v].map((operand) => inLayout(call, toGpu(operand, uploaded))) as [
          GpuTensor,
          GpuTensor,
          GpuTensor,
        ];
        const mask = call.mask && toGpu(call.mask, uploaded);
        const options = { ...optionsOf(call, kernel), ...(mask === undefined ? {} : { attnMask: mask }) };
        const problem = createProblem(q, k, v, options);
        const descriptor =
          kernel === 'auto' ? await backend.defaultKernel() : backend.kernels.find(({ name }) => name === kernel);
        if (descriptor === undefined) {
          throw new UnsupportedOptionError(kernel, 'options.kernel', 'a backend that has it, not webgpu', kernel);
        }
        const choice = chooseOptions(descriptor, problem, options);
        const inputs = { q, k, v, ...(mask === undefined ? {} : { attnMask: mask }) };
        const { output } = await withCachedPlan(backend, problem, choice, (plan) => plan.run(inputs, {}));
        const result = output as GpuTensor;
        if (result.offset !== 0) throw new ExecutionError('execution-failed', 'the output does not start its buffer');
        return fromGpuBuffer.call(OrtTensorClass, result.buffer, {
          dataType: call.type,
          dims: call.dims,
          download: async () => (await downloadTensor(device, result)).data,
          dispose: () => result.buffer.destroy(),
        });
      } finally {
        // Work that reads them is submitted: destroying waits for it.
        for (const buffer of uploaded) buffer.destroy();
      }
    },
  };
}
