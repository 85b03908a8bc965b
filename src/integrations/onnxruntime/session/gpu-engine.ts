/** The WebGPU backend on onnxruntime's own device: buffers go from one to the other without a copy. */

import { withCachedBlockMap, withCachedPlan } from '../../../api/plan-cache.ts';
import { contiguousBlocks } from '../../../attention/block-choice.ts';
import { type AttentionProblem, createProblem, outputShapeOf } from '../../../attention/problem.ts';
import { type SettledSparsity, settleSparsity } from '../../../attention/sparsity.ts';
import type { BlockMap, BlockMapInputs } from '../../../backends/backend.ts';
import type { WebgpuPlan } from '../../../backends/webgpu/index.ts';
import type { GpuTensor } from '../../../backends/webgpu/tensor.ts';
import { UnsupportedOptionError } from '../../../errors.ts';
import { contiguousStrides, elementCount } from '../../../tensor/tensor.ts';
import { backendOn } from '../../bridge.ts';
import type { OrtModule, OrtSessionOptions, OrtTensorConstructor } from '../ort.ts';
import type { OperandCall } from './call.ts';
import { type Attended, type AttentionEngine, dtypeOf, inLayout, optionsOf } from './engine.ts';

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

/** Output buffers that wait for the next attention: with buffers seen before, neither memory nor bindings are made anew. */
const SPARE_OUTPUTS = 4;

/** Frees the map, which submitted work reads still. */
async function keptOf(chosen: BlockMap): Promise<number> {
  try {
    return (await chosen.fractions()).keptFraction;
  } finally {
    chosen.dispose();
  }
}

export async function gpuEngine(OrtTensorClass: OrtTensorConstructor, device: GPUDevice): Promise<AttentionEngine> {
  const { fromGpuBuffer } = OrtTensorClass;
  if (fromGpuBuffer === undefined) throw new Error('this onnxruntime makes no tensors of GPU buffers');
  const backend = await backendOn(device);
  const { bufferBytes, downloadTensor, emptyGpuTensor, gpuView, uploadTensor } = await import(
    '../../../backends/webgpu/tensor.ts'
  );
  const spare: GPUBuffer[] = [];
  let isReleased = false;

  const outputTensor = (dtype: GpuTensor['dtype'], shape: readonly number[], bytes: number): GpuTensor => {
    const at = spare.findIndex((buffer) => buffer.size === bytes);
    const [buffer] = at < 0 ? [] : spare.splice(at, 1);
    if (buffer === undefined) return emptyGpuTensor(device, dtype, shape);
    return gpuView(buffer, { dtype, shape, strides: contiguousStrides(shape), offset: 0 });
  };
  const giveBack = (buffer: GPUBuffer) => {
    if (isReleased) buffer.destroy();
    else if (spare.push(buffer) > SPARE_OUTPUTS) spare.shift()?.destroy();
  };

  /** Uploads tensors that onnxruntime left on the CPU, which are mostly inputs of the graph; `uploaded` is freed later. */
  const toGpu = ({ tensor, view }: OperandCall, uploaded: GPUBuffer[]): GpuTensor => {
    const dtype = dtypeOf(tensor);
    if (tensor.location === 'gpu-buffer') return gpuView(tensor.gpuBuffer as GPUBuffer, { ...view, dtype });
    const { buffer } = uploadTensor(device, {
      location: 'cpu',
      dtype,
      data: tensor.data as Float32Array,
      shape: [tensor.size],
      strides: [1],
      offset: 0,
    });
    uploaded.push(buffer);
    return gpuView(buffer, { ...view, dtype });
  };

  const chooseBlocks = (problem: AttentionProblem, sparsity: SettledSparsity, inputs: BlockMapInputs) =>
    withCachedBlockMap(
      backend,
      problem,
      sparsity,
      (plan) => plan.run(inputs, {}),
      () => undefined,
    );

  return {
    backend: 'webgpu',
    maxHeadDim: Math.max(...backend.kernels.map(({ maxHeadDim }) => maxHeadDim)),
    async kernels() {
      return backend.kernels.map(({ name }) => name);
    },
    async attend(call, kernel, sparsity): Promise<Attended> {
      const uploaded: GPUBuffer[] = [];
      try {
        const [q, k, v] = [call.q, call.k, call.v].map((operand) => inLayout(call, toGpu(operand, uploaded))) as [
          GpuTensor,
          GpuTensor,
          GpuTensor,
        ];
        const mask = call.mask && toGpu(call.mask, uploaded);
        const options = { ...optionsOf(call, kernel), ...(mask === undefined ? {} : { attnMask: mask }) };
        const settled = sparsity && settleSparsity(sparsity);
        const dense = createProblem(q, k, v, options);
        const problem = settled ? { ...dense, blocks: contiguousBlocks(dense, settled) } : dense;
        const descriptor =
          kernel === 'auto' ? await backend.defaultKernel() : backend.kernels.find(({ name }) => name === kernel);
        if (descriptor === undefined) {
          throw new UnsupportedOptionError(kernel, 'options.kernel', 'a backend that has it, not webgpu', kernel);
        }
        const chosen =
          settled && (await chooseBlocks(problem, settled, mask === undefined ? { q, k } : { q, k, attnMask: mask }));
        const blockMap = chosen && { blockMap: chosen.map as GpuTensor };
        const inputs = { q, k, v, ...blockMap, ...(mask === undefined ? {} : { attnMask: mask }) };
        const shape = outputShapeOf(problem);
        const context = await backend.context();
        const [result, outcome] = await withCachedPlan(backend, problem, options, async (plan) =>
          context.checked(() => {
            const output = outputTensor(problem.dtype, shape, bufferBytes(problem.dtype, elementCount(shape)));
            const encoder = device.createCommandEncoder({ label: 'sageattention' });
            (plan as WebgpuPlan).encode(encoder, inputs, { output });
            device.queue.submit([encoder.finish()]);
            return output;
          }),
        );
        const output = fromGpuBuffer.call(OrtTensorClass, result.buffer, {
          dataType: call.type,
          dims: call.dims,
          download: async () => (await downloadTensor(device, result)).data,
          dispose: () => giveBack(result.buffer),
        });
        const keptFraction = chosen && keptOf(chosen);
        return { output, kernel: descriptor.name, milliseconds: undefined, keptFraction, failure: outcome };
      } finally {
        // Work that reads them is submitted: destroying waits for it.
        for (const buffer of uploaded) buffer.destroy();
      }
    },
    done: () => device.queue.onSubmittedWorkDone(),
    release() {
      isReleased = true;
      for (const buffer of spare.splice(0)) buffer.destroy();
    },
  };
}
