/** Running a program: tensors of the CPU go to the device and come back; errors of the device are thrown. */
import type { Outputs, PlannedOutputs } from '../../attention/outputs.ts';
import type { AttentionProblem } from '../../attention/problem.ts';
import type { ExecutionError } from '../../errors.ts';
import { BYTES_PER_ELEMENT } from '../../tensor/dtype.ts';
import { contiguousStrides, elementCount, type Tensor, type TensorView, validateData } from '../../tensor/tensor.ts';
import type { RunContext } from '../backend.ts';
import type { GpuContext } from './device.ts';
import type { BufferName } from './launches/launch.ts';
import type { Program } from './program.ts';
import type { Buffers } from './scratch.ts';
import {
  arrayOf,
  bufferBytes,
  bytesOf,
  GPU_BUFFER_USAGE,
  GPU_MAP_READ,
  type GpuTensor,
  gpuView,
  isGpuTensor,
  validateBuffer,
  writeBytes,
} from './tensor.ts';

/** CPU views are uploaded from their first element on. */
export function rebased(problem: AttentionProblem): AttentionProblem {
  if (problem.location !== 'cpu') return problem;
  const { q, k, v, mask, sinks, blocks } = problem;
  const first = <T extends { readonly offset: number }>(layout: T): T => ({ ...layout, offset: 0 });
  return {
    ...problem,
    q: first(q),
    k: first(k),
    v: first(v),
    mask: mask && first(mask),
    sinks: sinks && first(sinks),
    blocks: blocks && first(blocks),
  };
}

/** A copy of a CPU tensor; a GPU tensor as it is. */
export function copied(view: TensorView): TensorView {
  if (view.location !== 'cpu') return view;
  const tensor = view as Tensor;
  validateData('inputs', tensor);
  const bytes = bytesOf(tensor.data, 0, tensor.data.length).slice();
  const copy: Tensor = { ...tensor, data: arrayOf(tensor.dtype, bytes.buffer) };
  return copy;
}

/** The inputs of a run on the device: GPU tensors' own buffers, and copies of CPU tensors. */
export interface DeviceInputs {
  readonly buffers: Buffers;
  /** Destroys the copies; what was submitted with them survives. */
  release(): void;
  /** What went wrong when they were made. */
  readonly outcome: Promise<ExecutionError | undefined>;
}

/**
 * Takes the inputs: a CPU tensor is copied before this returns, and may change afterwards.
 *
 * @throws {InvalidArgumentError} a buffer or an array that does not hold its tensor
 */
export function takeInputs(
  context: GpuContext,
  inputs: Readonly<Record<string, TensorView | undefined>>,
): DeviceInputs {
  const { device } = context;
  const copies: GPUBuffer[] = [];
  for (const [name, view] of Object.entries(inputs)) if (view !== undefined) validateInput(name, view);
  const [buffers, outcome] = context.checked(() => {
    const made: Buffers = {};
    for (const [name, view] of Object.entries(inputs)) {
      if (view !== undefined) made[name as BufferName] = uploaded(device, view, copies);
    }
    return made;
  });
  const release = () => {
    for (const buffer of copies) buffer.destroy();
  };
  return { buffers, release, outcome };
}

/**
 * Runs a program over inputs that were taken: commands are submitted before this returns.
 *
 * Where memory runs out, scratch that other plans left is given back and the run is tried once more.
 *
 * @param held buffers that are neither inputs nor scratch: a cache's
 */
export async function runProgram(
  context: GpuContext,
  program: Program,
  planned: PlannedOutputs,
  inputs: DeviceInputs,
  run: RunContext,
  held: Buffers = {},
): Promise<Outputs> {
  try {
    const first = submit(context, program, planned, inputs, held);
    const failure = (await inputs.outcome) ?? (await first.outcome);
    if (failure === undefined) return await first.outputs(run);
    first.discard();
    if (failure.code !== 'out-of-memory') throw failure;
    context.scratch.clear();
    context.outputs.clear();
    if ((await inputs.outcome) !== undefined) throw failure;
    const second = submit(context, program, planned, inputs, held);
    const again = await second.outcome;
    if (again === undefined) return await second.outputs(run);
    second.discard();
    throw again;
  } finally {
    inputs.release();
  }
}

/** One try of a run. */
function submit(context: GpuContext, program: Program, planned: PlannedOutputs, inputs: DeviceInputs, held: Buffers) {
  const { device } = context;
  const onCpu = planned.location === 'cpu';
  const [{ made, downloads }, outcome] = context.checked(() => {
    const encoder = device.createCommandEncoder({ label: 'sageattention' });
    const made = planned.outputs.map((spec) => ({ ...spec, tensor: outputTensor(context, encoder, spec) }));
    const buffers: Buffers = {
      ...context.scratch.reserve(program.scratch),
      ...held,
      ...inputs.buffers,
      ...Object.fromEntries(made.map(({ name, tensor }) => [name, tensor.buffer])),
    };
    program.encode(encoder, buffers);
    const downloads = onCpu ? made.map(({ tensor }) => staged(device, encoder, tensor)) : [];
    device.queue.submit([encoder.finish()]);
    return { made, downloads };
  });
  /** After a failure nothing is known of the outputs' buffers. */
  const discard = () => {
    for (const buffer of [...made.map(({ tensor }) => tensor.buffer), ...downloads]) buffer.destroy();
  };
  const release = () => {
    for (const { tensor } of made) tensor.dispose();
    for (const buffer of downloads) buffer.destroy();
  };
  const named = (tensorOf: (output: (typeof made)[number], index: number) => TensorView): Outputs =>
    Object.fromEntries(made.map((output, i) => [output.name, tensorOf(output, i)]));
  return {
    outcome,
    discard,
    async outputs(run: RunContext): Promise<Outputs> {
      if (!onCpu) return named(({ tensor }) => tensor);
      try {
        const bytes = await Promise.all(downloads.map((buffer) => read(context, buffer)));
        run.signal?.throwIfAborted();
        return named(({ dtype, shape }, i) => cpuTensor(dtype, shape, bytes[i] as ArrayBuffer));
      } finally {
        release();
      }
    },
  };
}

/** A zeroed output, whose buffer serves later outputs once it is disposed of. */
function outputTensor(
  { outputs }: GpuContext,
  encoder: GPUCommandEncoder,
  { dtype, shape }: PlannedOutputs['outputs'][number],
): GpuTensor {
  const buffer = outputs.take(bufferBytes(dtype, elementCount(shape)), encoder);
  const layout = { dtype, shape: [...shape], strides: contiguousStrides(shape), offset: 0 };
  let given = false;
  return gpuView(buffer, layout, () => {
    if (!given) outputs.give(buffer);
    given = true;
  });
}

function validateInput(name: string, view: TensorView): void {
  if (isGpuTensor(view)) validateBuffer(name, view);
  else validateData(name, view as Tensor);
}

/** The buffer of a GPU tensor, or a new one with a CPU tensor's elements from its first on. */
function uploaded(device: GPUDevice, view: TensorView, temporary: GPUBuffer[]): GPUBuffer {
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
  const data = arrayOf(dtype, bytes.byteLength === length ? bytes : bytes.slice(0, length));
  return { location: 'cpu', dtype, shape, strides: contiguousStrides(shape), offset: 0, data };
}
