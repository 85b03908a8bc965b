/** Runs a whole call's launches in the simulator, from CPU tensors to CPU tensors. */
import { attentionOutputs } from '../../../../attention/outputs.ts';
import type { AttentionProblem } from '../../../../attention/problem.ts';
import { emptyTensor, type Tensor } from '../../../../tensor/tensor.ts';
import type { AttentionOutputs, KernelChoice } from '../../../backend.ts';
import type { DeviceFacts } from '../../launches/context.ts';
import type { LaunchSequence } from '../../launches/launch.ts';
import { planLaunches } from '../../launches/plan.ts';
import { GlobalMemory } from './memory.ts';
import { simulateLaunches } from './simulator.ts';

export interface SimulatedInputs {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly attnMask?: Tensor | undefined;
}

export interface SimulatedOutputs {
  readonly output: Tensor;
  readonly lse?: Tensor;
  /** Any buffer of the run by name: what the quantization kernels wrote. */
  buffer(name: string): { bytes: Uint8Array; written: Uint8Array };
}

const bytesOf = ({ data }: Tensor) => new Uint8Array(data.buffer, data.byteOffset, data.byteLength);

/** Fills a tensor from a buffer, every byte of which must have been written. */
export function readBack(memory: GlobalMemory, name: string, target: Tensor): void {
  const { bytes, written } = memory.read(name);
  const missing = written.indexOf(0);
  if (missing >= 0 && missing < target.data.byteLength) throw new Error(`byte ${missing} of '${name}' was not written`);
  bytesOf(target).set(bytes.subarray(0, target.data.byteLength));
}

/**
 * Runs `planLaunches` of a problem. Outputs that a kernel leaves unwritten are errors.
 *
 * @param plan default: the launches of {@link planLaunches}
 */
export function simulateAttention(
  problem: AttentionProblem,
  choice: KernelChoice,
  device: DeviceFacts,
  inputs: SimulatedInputs,
  plan: LaunchSequence = planLaunches(problem, choice, device),
): SimulatedOutputs {
  const memory = new GlobalMemory();
  const addresses = new Map<string, number>();
  const place = (name: string, byteLength: number, contents?: Uint8Array) =>
    addresses.set(name, memory.allocate(name, byteLength, contents));
  for (const name of ['q', 'k', 'v'] as const) place(name, inputs[name].data.byteLength, bytesOf(inputs[name]));
  if (inputs.attnMask !== undefined) place('mask', inputs.attnMask.data.byteLength, bytesOf(inputs.attnMask));
  const outputs = attentionOutputs(problem).map(({ name, shape, dtype }) => [name, emptyTensor(shape, dtype)] as const);
  for (const [name, { data }] of outputs) place(name, data.byteLength);
  for (const [name, bytes] of Object.entries(plan.scratch)) place(name, bytes);
  const zeroed = Object.entries(plan.zeroed ?? {});
  for (const [name, bytes] of zeroed) place(name, bytes, new Uint8Array(bytes));
  for (const [name, contents] of Object.entries(plan.constants)) place(name, contents.byteLength, contents);
  simulateLaunches(plan.launches, addresses, memory);
  for (const [name] of zeroed) {
    if (memory.read(name).bytes.some((byte) => byte !== 0)) throw new Error(`'${name}' was not left as zeros`);
  }
  for (const [name, tensor] of outputs) readBack(memory, name, tensor);
  const { output, lse } = Object.fromEntries(outputs) as unknown as AttentionOutputs<Tensor>;
  const buffer = (name: string) => memory.read(name);
  return lse === undefined ? { output, buffer } : { output, lse, buffer };
}
