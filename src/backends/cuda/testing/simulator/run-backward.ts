/** Runs a whole backward pass's launches in the simulator, from CPU tensors to CPU tensors. */
import { type BackwardProblem, gradientOutputs } from '../../../../attention/backward.ts';
import { emptyTensor, type Tensor } from '../../../../tensor/tensor.ts';
import type { KernelChoice } from '../../../backend.ts';
import { planBackward } from '../../launches/backward.ts';
import type { DeviceFacts } from '../../launches/context.ts';
import type { LaunchSequence } from '../../launches/launch.ts';
import { GlobalMemory } from './memory.ts';
import { readBack, type SimulatedInputs } from './run.ts';
import { simulateLaunches } from './simulator.ts';

export interface SimulatedBackwardInputs extends SimulatedInputs {
  readonly output: Tensor;
  readonly lse: Tensor;
  readonly dOutput: Tensor;
}

/** Gradients of {@link planBackward}'s launches. Elements that a kernel leaves unwritten are errors. */
export function simulateBackward(
  problem: BackwardProblem,
  choice: KernelChoice,
  device: DeviceFacts,
  inputs: SimulatedBackwardInputs,
  plan: LaunchSequence = planBackward(problem, choice, device),
): Record<'dq' | 'dk' | 'dv', Tensor> & { readonly dMask?: Tensor } {
  const memory = new GlobalMemory();
  const addresses = new Map<string, number>();
  const place = (name: string, byteLength: number, contents?: Uint8Array) =>
    addresses.set(name, memory.allocate(name, byteLength, contents));
  const { attnMask, ...others } = inputs;
  for (const [name, { data }] of Object.entries({ ...others, ...(attnMask === undefined ? {} : { mask: attnMask }) })) {
    place(name, data.byteLength, new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  }
  const gradients = Object.fromEntries(
    gradientOutputs(problem).map(({ name, shape, dtype }) => [name, emptyTensor(shape, dtype)]),
  ) as ReturnType<typeof simulateBackward>;
  for (const [name, { data }] of Object.entries(gradients)) place(name, data.byteLength);
  for (const [name, bytes] of Object.entries(plan.scratch)) place(name, bytes);
  for (const [name, contents] of Object.entries(plan.constants)) place(name, contents.byteLength, contents);
  simulateLaunches(plan.launches, addresses, memory);
  for (const [name, gradient] of Object.entries(gradients)) readBack(memory, name, gradient);
  return gradients;
}
