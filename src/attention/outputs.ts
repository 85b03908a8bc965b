/** What a run makes: a list of named tensors, which every backend allocates, binds and reads back alike. */
import type { DType } from '../tensor/dtype.ts';
import type { TensorLocation, TensorView } from '../tensor/tensor.ts';
import { type AttentionProblem, lseShapeOf, outputShapeOf } from './problem.ts';

/** `dq`, `dk`, `dv` and `dMask` are gradients of a loss with respect to q, k, v and an additive mask. */
export type OutputName = 'output' | 'lse' | 'dq' | 'dk' | 'dv' | 'dMask';

/** A tensor that a run makes: contiguous, at offset 0. */
export interface OutputSpec {
  readonly name: OutputName;
  readonly shape: readonly number[];
  readonly dtype: DType;
}

/** What the runs of a plan make, and where. */
export interface PlannedOutputs {
  /** Where the inputs are: outputs come back there. */
  readonly location: TensorLocation;
  readonly outputs: readonly OutputSpec[];
}

/** What a run made, by name: exactly the names of its plan's list. */
export type Outputs<T extends TensorView = TensorView> = Readonly<Partial<Record<OutputName, T>>>;

/** The outputs of attention. */
export function attentionOutputs(problem: AttentionProblem): OutputSpec[] {
  const output: OutputSpec = { name: 'output', shape: outputShapeOf(problem), dtype: problem.dtype };
  if (!problem.returnLse) return [output];
  return [output, { name: 'lse', shape: lseShapeOf(problem), dtype: 'float32' }];
}
