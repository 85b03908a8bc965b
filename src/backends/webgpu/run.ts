/** Running a program: tensors of the CPU go to the device and come back; errors of the device are thrown. */
import { type AttentionProblem, lseShapeOf, outputShapeOf } from '../../attention/problem.ts';
import { BYTES_PER_ELEMENT } from '../../tensor/dtype.ts';
import { contiguousStrides, elementCount, emptyTensor, type Tensor, type TensorView } from '../../tensor/tensor.ts';
import type { AttentionOutputs, RunContext } from '../backend.ts';
import type { GpuContext } from './device.ts';
import type { BufferName } from './launches/launch.ts';
import type { Buffers, Program } from './program.ts';
import {
  arrayOf,
  bufferBytes,
  bytesOf,
  emptyGpuTensor,
  GPU_BUFFER_USAGE,
  GPU_MAP_READ,
  type GpuTensor,
  isGpuTensor,
  validateBuffer,
  writeBytes,
} from './tensor.ts';

/** CPU views are uploaded from their first element on. */
export function rebased(problem: AttentionProblem): AttentionProblem {
  if (problem.location !== 'cpu') return problem;
  const { q, k, v, mask } = problem;
  const first = <T extends { readonly offset: number }>(layout: T): T => ({ ...layout, offset: 0 });
  return { ...problem, q: first(q), k: first(k), v: first(v), mask: mask === undefined ? undefined : first(mask) };
}

/**
 * What `run` shares between plans and caches: moving CPU tensors, outputs, errors.
 *
 * @param held buffers that are neither inputs nor the program's own: a cache's
 */
export async function runProgram(
  context: GpuContext,
  program: Program,
  problem: AttentionProblem,
  inputs: Readonly<Record<string, TensorView | undefined>>,
  run: RunContext,
  held: Buffers = {},
): Promise<AttentionOutputs> {
  run.signal?.throwIfAborted();
  const { device } = context;
  const temporary: GPUBuffer[] = [];
  const onCpu = problem.location === 'cpu';
  const shape = outputShapeOf(problem);
  const lseShape = lseShapeOf(problem);
  for (const [name, view] of Object.entries(inputs)) if (view !== undefined) validateInput(name, view);
  try {
    const [work, outcome] = context.checked(() => {
      const buffers: Buffers = { ...held };
      for (const [name, view] of Object.entries(inputs)) {
        if (view !== undefined) buffers[name as BufferName] = uploaded(device, view, temporary);
      }
      const output = emptyGpuTensor(device, problem.dtype, shape);
      const lse = problem.returnLse ? emptyGpuTensor(device, 'float32', lseShape) : undefined;
      buffers.output = output.buffer;
      if (lse !== undefined) buffers.lse = lse.buffer;
      const encoder = device.createCommandEncoder({ label: 'sageattention' });
      program.encode(encoder, buffers);
      const downloads = onCpu
        ? [output, ...(lse === undefined ? [] : [lse])].map((tensor) => staged(device, encoder, tensor))
        : [];
      if (onCpu) temporary.push(output.buffer, ...(lse === undefined ? [] : [lse.buffer]), ...downloads);
      device.queue.submit([encoder.finish()]);
      return { output, lse, downloads };
    });
    const { output, lse, downloads } = work;
    const failure = await outcome;
    if (failure !== undefined) {
      if (!onCpu) for (const tensor of [output, lse]) tensor?.buffer.destroy();
      throw failure;
    }
    if (!onCpu) return lse === undefined ? { output } : { output, lse };
    const [outputBytes, lseBytes] = await Promise.all(downloads.map((buffer) => read(context, buffer)));
    run.signal?.throwIfAborted();
    return {
      output: cpuTensor(problem.dtype, shape, outputBytes as ArrayBuffer),
      ...(lseBytes === undefined ? {} : { lse: cpuTensor('float32', lseShape, lseBytes) }),
    };
  } finally {
    for (const buffer of temporary) buffer.destroy();
  }
}

function validateInput(name: string, view: TensorView): void {
  if (isGpuTensor(view)) validateBuffer(name, view);
}

/** The buffer of a GPU tensor, or a new one with a CPU tensor's elements from its first on. */
export function uploaded(device: GPUDevice, view: TensorView, temporary: GPUBuffer[]): GPUBuffer {
  if (isGpuTensor(view)) return view.buffer;
  const { data, offset, dtype } = view as Tensor;
  const size = Math.max(0, Math.min(data.length, extent(view)) - offset);
  const buffer = device.createBuffer({
    label: 'sageattention input',
    size: Math.ceil(bufferBytes(dtype, size) / 16) * 16,
    usage: GPU_BUFFER_USAGE.STORAGE | GPU_BUFFER_USAGE.COPY_DST,
  });
  temporary.push(buffer);
  if (size > 0) writeBytes(device, buffer, bytesOf(data, offset, offset + size));
  return buffer;
}

const extent = (view: TensorView) =>
  elementCount(view.shape) === 0
    ? 0
    : view.shape.reduce((end, size, i) => end + (size - 1) * (view.strides[i] as number), view.offset) + 1;

/** A mappable copy of a tensor, recorded. */
function staged(device: GPUDevice, encoder: GPUCommandEncoder, tensor: GpuTensor): GPUBuffer {
  const { size } = tensor.buffer;
  const staging = device.createBuffer({
    label: 'sageattention download',
    size,
    usage: GPU_BUFFER_USAGE.MAP_READ | GPU_BUFFER_USAGE.COPY_DST,
  });
  encoder.copyBufferToBuffer(tensor.buffer, 0, staging, 0, size);
  return staging;
}

async function read(context: GpuContext, staging: GPUBuffer): Promise<ArrayBuffer> {
  await context.unlessLost(staging.mapAsync(GPU_MAP_READ));
  return staging.getMappedRange().slice(0);
}

function cpuTensor(dtype: Tensor['dtype'], shape: readonly number[], bytes: ArrayBuffer): Tensor {
  const length = elementCount(shape) * BYTES_PER_ELEMENT[dtype];
  if (length === 0) return emptyTensor(shape, dtype === 'bool' ? 'float32' : dtype);
  const data = arrayOf(dtype, bytes.byteLength === length ? bytes : bytes.slice(0, length));
  return { location: 'cpu', dtype, shape, strides: contiguousStrides(shape), offset: 0, data };
}
