import { type AttentionOptions, optionNamesBut, UNPLANNED_OPTIONS, validateOptions } from '../../attention/options.ts';
import { createProblem, createVarlenProblem } from '../../attention/problem.ts';
import { InvalidArgumentError } from '../../errors.ts';
import type { AttentionInputs } from '../backend.ts';
import { chooseKernel } from '../choice.ts';
import { getBackend } from '../registry.ts';
import { CudaBackend } from './backend.ts';
import type { CudaStream } from './driver/stream.ts';
import type { CapturedAttention } from './run/captured.ts';
import { type CapturedCalls, captureCalls } from './run/captured-calls.ts';
import { streamOf } from './run/operands.ts';
import type { CudaTensor } from './tensor.ts';

/** Options of {@link captureAttention}: the options of `sageattn` that do not belong to one run. */
export type CaptureOptions = Omit<AttentionOptions, (typeof UNPLANNED_OPTIONS)[number] | 'backend'> & {
  /** Packed sequences, as `sageattnVarlen` takes them. */
  readonly cuSeqlens?: { readonly q: ArrayLike<number>; readonly k: ArrayLike<number> };
};

const TAKEN = optionNamesBut(...UNPLANNED_OPTIONS, 'backend');

/**
 * Captures attention over these tensors into a CUDA graph. Each `launch` of the result replays quantization and
 * attention over what the tensors hold by then, with one call of the driver and the same bits as `sageattn`.
 *
 * @throws {SageAttentionError} as `sageattn`
 */
export async function captureAttention(
  inputs: AttentionInputs<CudaTensor>,
  { cuSeqlens, ...rest }: CaptureOptions = {},
): Promise<CapturedAttention> {
  validateOptions(rest, TAKEN);
  const { q, k, v, attnMask, sinks, blockMap } = inputs;
  if (blockMap !== undefined) {
    throw new InvalidArgumentError('invalid-option', 'inputs.blockMap', 'no block mask in a graph', 'a map');
  }
  const options: AttentionOptions = { ...rest, ...(attnMask && { attnMask }), ...(sinks && { sinks }) };
  const problem =
    cuSeqlens === undefined
      ? createProblem(q, k, v, options)
      : createVarlenProblem(q, k, v, cuSeqlens.q, cuSeqlens.k, options);
  if (problem.location !== 'cuda') {
    throw new InvalidArgumentError('mixed-locations', 'q', "a CudaTensor of 'sageattention/cuda'", problem.location);
  }
  const backend = await cudaBackend();
  return backend.capture(problem, await chooseKernel(backend, problem, options), inputs);
}

/**
 * Captures any number of calls, and launches of the caller's own between them, into one CUDA graph. Each `launch` of the result replays
 * them over what their inputs hold by then, with one call of the driver and the same bits as the calls.
 *
 * Calls of this library in `calls` take `stream` by themselves, the caller's own launches name it. Nothing runs before
 * `launch`, and outputs are the graph's. CPU tensors, copies from and to the host, appends to a cache and synchronizing
 * are refused.
 *
 * @param stream a stream of your own: other calls go on using the device's
 * @throws {SageAttentionError} what a call in `calls` throws; nothing is left of the capture then
 */
export async function capture<T>(stream: CudaStream, calls: () => Promise<T>): Promise<CapturedCalls<T>> {
  if (typeof calls !== 'function') {
    throw new InvalidArgumentError('invalid-option', 'calls', 'an asynchronous function', typeof calls);
  }
  if (typeof stream?.handle !== 'bigint') {
    throw new InvalidArgumentError('invalid-option', 'stream', 'a CudaStream', typeof stream);
  }
  const device = (await (await cudaBackend()).cuda()).device(stream.device);
  return captureCalls(device, streamOf(device, stream), calls);
}

async function cudaBackend(): Promise<CudaBackend> {
  const backend = await getBackend('cuda');
  if (backend instanceof CudaBackend) return backend;
  const expected = "the backend of 'sageattention/cuda'";
  throw new InvalidArgumentError('invalid-option', 'options.backend', expected, backend.name);
}
