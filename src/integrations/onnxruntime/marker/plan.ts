/** What is recorded in the place of a marker, for the dimensions of one run. */

import type { KernelName } from '../../../attention/kernels.ts';
import { createProblem } from '../../../attention/problem.ts';
import { chooseKernel } from '../../../backends/choice.ts';
import type { WebgpuBackend } from '../../../backends/webgpu/index.ts';
import type { WebgpuPlan } from '../../../backends/webgpu/plan.ts';
import type { RecordedBuffers } from '../../../backends/webgpu/program.ts';
import { type GpuTensor, gpuTensor } from '../../../backends/webgpu/tensor.ts';
import { BYTES_PER_ELEMENT } from '../../../tensor/dtype.ts';
import { elementCount } from '../../../tensor/tensor.ts';
import { numbersReadBy } from '../detect/site.ts';
import type { OrtTensor } from '../ort.ts';
import { type AttentionCall, type OperandCall, prepareCall } from '../session/call.ts';
import { inLayout, optionsOf } from '../session/engine.ts';
import type { Entries, Work } from './hooks.ts';
import type { Marker } from './site.ts';
import type { KnownSizes } from './sizes.ts';

export interface MarkerPlan {
  readonly call: AttentionCall;
  readonly kernel: KernelName;
  readonly plan: WebgpuPlan;
  readonly work: Work;
}

export interface MarkerEngine {
  readonly device: GPUDevice;
  readonly backend: WebgpuBackend;
  readonly kernel: KernelName | 'auto';
}

/** The call of a marker as a run will make it, or why it cannot be made before the run. */
export function callOf(
  marker: Marker,
  sizes: KnownSizes,
  { device, backend }: MarkerEngine,
): { readonly call: AttentionCall } | { readonly reason: string } {
  const { site, type } = marker;
  const values = new Map<string, OrtTensor>();
  const give = (value: string, tensor: Partial<OrtTensor>) => values.set(value, tensor as OrtTensor);
  for (const value of numbersReadBy(site)) {
    const numbers = sizes.numbers(value);
    if (numbers === undefined) return { reason: `the numbers of '${value}' are not known before the run` };
    give(value, { type: 'float32', data: numbers, dims: sizes.dims(value) ?? [numbers.length] });
  }
  const bound = [site.q.value, site.k.value, site.v.value, ...(site.mask === undefined ? [] : [site.mask.value])];
  for (const value of [...bound, ...(site.alignedPast ? [site.alignedPast] : [])]) {
    const dims = sizes.dims(value);
    if (dims === undefined) return { reason: `the dimensions of '${value}' are not known before the run` };
    give(value, { type, dims, location: 'gpu-buffer' });
  }
  const prepared = prepareCall(site, values, Math.max(...backend.kernels.map(({ maxHeadDim }) => maxHeadDim)));
  if ('reason' in prepared) return prepared;
  const { call } = prepared;
  const operands = marker.operands.map((operand) => dimsOf(marker, operand, sizes));
  const dims = marker.result.map((size) => (typeof size === 'number' ? size : operands[size.operand]?.[size.axis]));
  if (dims.length !== call.dims.length || dims.some((size, axis) => size !== call.dims[axis])) {
    return { reason: `a result [${call.dims}] where its marker has one of [${dims}]` };
  }
  const most = Math.max(...[...operands, call.dims].map((list) => bytesOf(marker, list)));
  return most > device.limits.maxStorageBufferBindingSize
    ? { reason: 'a tensor that is larger than what the device binds at once' }
    : { call };
}

const dimsOf = ({ site, mask }: Marker, operand: string, sizes: KnownSizes): readonly number[] =>
  sizes.dims(operand === mask && site.mask !== undefined ? site.mask.value : operand) ?? [];

const bytesOf = ({ type }: Marker, dims: readonly number[]) => elementCount(dims) * BYTES_PER_ELEMENT[type];

/** Calls with the same text are made by the same plan. */
export const textOf = ({ q, k, v, mask, ...rest }: AttentionCall): string =>
  JSON.stringify([q.view, k.view, v.view, mask?.view, rest]);

/** A view of a buffer that is known when the dispatch is recorded. */
const laterTensor = (call: AttentionCall, { view }: OperandCall): GpuTensor =>
  gpuTensor({ size: Number.MAX_SAFE_INTEGER } as GPUBuffer, call.type, view.shape, view);

/** @throws as planning does: a kernel that does not take the call, memory that runs out */
export async function planMarker(
  marker: Marker,
  call: AttentionCall,
  sizes: KnownSizes,
  { backend, kernel }: MarkerEngine,
): Promise<MarkerPlan> {
  const [q, k, v] = [call.q, call.k, call.v].map((operand) => inLayout(call, laterTensor(call, operand))) as [
    GpuTensor,
    GpuTensor,
    GpuTensor,
  ];
  const mask = call.mask && laterTensor(call, call.mask);
  const options = { ...optionsOf(call, kernel), ...(mask === undefined ? {} : { attnMask: mask }) };
  const problem = createProblem(q, k, v, options);
  const choice = await chooseKernel(backend, problem, options);
  const plan = await backend.plan(problem, choice);
  await plan.reserve();
  const bytes = [...marker.operands.map((operand) => bytesOf(marker, dimsOf(marker, operand, sizes)))];
  const output = bytesOf(marker, call.dims);
  const { site, mask: masked, operands } = marker;
  const slotOf = (value: string) => operands.indexOf(value);
  const [qSlot, kSlot, vSlot] = [slotOf(site.q.value), slotOf(site.k.value), slotOf(site.v.value)];
  const maskSlot = masked === undefined ? undefined : slotOf(masked);
  const work: Work = (pass, entries) => {
    const bound = (slot: number) => bufferAt(entries, slot, bytes[slot] as number);
    const buffers: RecordedBuffers = {
      q: bound(qSlot),
      k: bound(kSlot),
      v: bound(vSlot),
      ...(maskSlot === undefined ? {} : { mask: bound(maskSlot) }),
      // The constant lies between the operands and the result.
      output: bufferAt(entries, operands.length + 1, output),
    };
    plan.record(pass, buffers);
  };
  return { call, kernel: choice.descriptor.name, plan, work };
}

/** @throws what is unlike a whole tensor from its first element on */
function bufferAt(entries: Entries, slot: number, bytes: number): GPUBuffer {
  const inOrder = entries[slot];
  const entry = inOrder?.binding === slot ? inOrder : entries.find(({ binding }) => binding === slot);
  const resource = entry?.resource as GPUBufferBinding | GPUBuffer | undefined;
  const { buffer, offset = 0 } = resource !== undefined && 'buffer' in resource ? resource : { buffer: resource };
  if (buffer === undefined) throw new Error(`the marker has no binding ${slot}`);
  if (offset !== 0 || buffer.size < bytes) {
    throw new Error(`binding ${slot} of the marker has ${buffer.size} bytes from ${offset}, not ${bytes} from 0`);
  }
  return buffer;
}
