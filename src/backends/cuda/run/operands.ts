/** The inputs and outputs of a run: the checks on them, their addresses, and the stream that they are used on. */

import type { BackwardProblem } from '../../../attention/backward.ts';
import type { StreamHandle } from '../../../attention/options.ts';
import type { Outputs } from '../../../attention/outputs.ts';
import type { AttentionProblem } from '../../../attention/problem.ts';
import { ExecutionError, InvalidArgumentError } from '../../../errors.ts';
import { BYTES_PER_ELEMENT } from '../../../tensor/dtype.ts';
import type { TensorView } from '../../../tensor/tensor.ts';
import type { AttentionInputs, BackwardInputs, SideInputs } from '../../backend.ts';
import type { CudaDevice } from '../driver/device.ts';
import type { DeviceMemory } from '../driver/memory.ts';
import { CudaStream } from '../driver/stream.ts';
import type { BufferName } from '../launches/launch.ts';
import { type CudaTensor, isCudaTensor, validateStorage } from '../tensor.ts';
import { capturingStream } from './capturing-stream.ts';

/** The stream of a run: the caller's, or the device's own. */
export function streamOf(device: CudaDevice, handle: StreamHandle | undefined): CudaStream {
  if (handle === undefined) return capturingStream(device) ?? device.stream;
  if (handle.device !== device.ordinal) {
    throw new InvalidArgumentError(
      'mixed-locations',
      'options.stream',
      `a stream of device ${device.ordinal}, where the tensors are`,
      `one of device ${handle.device}`,
    );
  }
  const stream = handle instanceof CudaStream ? handle : device.streamFromHandle(handle.handle);
  stream.requireUsable();
  if (!stream.owned && stream.capture === undefined && stream.isCapturing) {
    throw new InvalidArgumentError(
      'invalid-option',
      'options.stream',
      "a stream that is not being captured (use capture or captureAttention of 'sageattention/cuda' for graphs)",
      'one under capture',
    );
  }
  return stream;
}

/**
 * The stream that gives the tokens of an append. A replay would write the same tokens at the same place, so none is captured.
 *
 * @throws {InvalidArgumentError} it is under capture
 */
export function streamOfAppend(device: CudaDevice, handle: StreamHandle | undefined): CudaStream {
  const stream = streamOf(device, handle);
  if (stream.capture === undefined) return stream;
  throw new InvalidArgumentError('invalid-option', 'stream', 'keys appended outside of a capture', 'one under capture');
}

/** Alike for problems of one plan. */
export const planKeyOf = (problem: AttentionProblem): string =>
  JSON.stringify(problem, (_, value) => (value === Number.POSITIVE_INFINITY ? 'Infinity' : value));

/**
 * Address of element 0 as the kernels count: they add the offset of the problem, and the tensor of this run may lie at
 * another one (an upload leaves out what lies before the view).
 */
export const addressOf = (tensor: CudaTensor, plannedOffset: number): bigint =>
  tensor.memory.pointer + BigInt((tensor.offset - plannedOffset) * BYTES_PER_ELEMENT[tensor.dtype]);

/** Checks that a tensor lies on the device that was planned for, in memory that holds it. */
export function requireTensorOn(device: CudaDevice, argument: string, view: TensorView): CudaTensor {
  if (isCudaTensor(view) && view.memory.device !== device && view.device === device.ordinal) {
    throw new ExecutionError('disposed', `${argument} was lost when ${device} was disposed`);
  }
  if (!isCudaTensor(view) || view.memory.device !== device) {
    const where = isCudaTensor(view) ? `${view.memory.device}` : `location '${view.location}'`;
    throw new InvalidArgumentError('mixed-locations', argument, `a CudaTensor of ${device}`, where);
  }
  validateStorage(argument, view);
  return view;
}

/**
 * Runs `work` on a stream between what its operands wait for and what waits for them. On a caller's own stream the
 * outputs belong to the device's stream, which waits: callers may destroy their own streams.
 *
 * @param work makes its outputs on the stream `home`
 */
export function ordered<T>(
  stream: CudaStream,
  device: CudaDevice,
  tensors: readonly CudaTensor[],
  work: (home: CudaStream) => T,
): T {
  for (const { memory } of tensors) memory.useOn(stream);
  if (stream.owned || stream.capture !== undefined) return work(stream);
  const home = device.stream;
  stream.waitFor(home);
  const result = work(home);
  stream.mark();
  home.waitFor(stream);
  return result;
}

/** An input of a run. */
export interface Operand {
  readonly buffer: BufferName;
  /** In the caller's spelling. */
  readonly argument: string;
  readonly view: TensorView;
  /** Offset that the launches were planned with. */
  readonly offset: number;
}

/** Memory of the library's own that a run reads besides its inputs. */
export interface HeldBuffer {
  readonly buffer: BufferName;
  readonly memory: DeviceMemory;
  readonly byteOffset: number;
}

/** The inputs of a call as operands. */
export function operandsOf(problem: AttentionProblem, inputs: AttentionInputs): Operand[] {
  const { q, k, v } = inputs;
  return [
    { buffer: 'q', argument: 'q', view: q, offset: problem.q.offset },
    { buffer: 'k', argument: 'k', view: k, offset: problem.k.offset },
    { buffer: 'v', argument: 'v', view: v, offset: problem.v.offset },
    ...sideOperands(problem, inputs),
  ];
}

/** What a call has beside q, k and v. */
export function sideOperands(problem: AttentionProblem, { attnMask, sinks, blockMap }: SideInputs): Operand[] {
  const operands: Operand[] = [];
  const add = (buffer: BufferName, argument: string, view: TensorView | undefined, offset = 0) => {
    if (view !== undefined) operands.push({ buffer, argument, view, offset });
  };
  add('mask', 'options.attnMask', attnMask, problem.mask?.offset);
  add('blockMap', 'options.blockMask.map', blockMap, problem.blocks?.offset);
  add('sinks', 'options.sinks', sinks, problem.sinks?.offset);
  return operands;
}

/** The inputs of a backward call as operands. */
export function backwardOperandsOf(problem: BackwardProblem, inputs: BackwardInputs): Operand[] {
  const { output, lse, dOutput } = inputs;
  return [
    ...operandsOf(problem.attention, inputs),
    { buffer: 'output', argument: 'output', view: output, offset: problem.output.offset },
    { buffer: 'lse', argument: 'lse', view: lse, offset: problem.lseOffset },
    { buffer: 'dOutput', argument: 'dOutput', view: dOutput, offset: problem.dOutput.offset },
  ];
}

export function disposeOutputs(outputs: Outputs<CudaTensor>): void {
  for (const { memory } of Object.values(outputs)) memory.dispose();
}
