/** What a run makes: a list of named tensors, which every backend allocates, binds and reads back alike. */
import type { DType, MaskDType } from '../tensor/dtype.ts';
import type { TensorLocation, TensorView } from '../tensor/tensor.ts';
import { BLOCK_LINE, blockShapeOf } from './block-choice.ts';
import { type AttentionProblem, lseShapeOf, outputShapeOf } from './problem.ts';

/**
 * `dq`, `dk`, `dv` and `dMask` are gradients of a loss with respect to q, k, v and an additive mask; `map` has blocks that were chosen, and
 * `lines` what each line of it comes to.
 */
export type OutputName = 'output' | 'lse' | 'dq' | 'dk' | 'dv' | 'dMask' | 'map' | 'lines';

/** A tensor that a run makes: contiguous, at offset 0. */
export interface OutputSpec<D extends MaskDType = DType> {
  readonly name: OutputName;
  readonly shape: readonly number[];
  readonly dtype: D;
}

/** What the runs of a plan make, and where. */
export interface PlannedOutputs<D extends MaskDType = MaskDType> {
  /** Where the inputs are: outputs come back there. */
  readonly location: TensorLocation;
  readonly outputs: readonly OutputSpec<D>[];
}

/** What a run made, by name: exactly the names of its plan's list. */
export type Outputs<T extends TensorView = TensorView> = Readonly<Partial<Record<OutputName, T>>>;

/** The outputs of attention. */
export function attentionOutputs(problem: AttentionProblem): OutputSpec[] {
  const output: OutputSpec = { name: 'output', shape: outputShapeOf(problem), dtype: problem.dtype };
  if (!problem.returnLse) return [output];
  return [output, { name: 'lse', shape: lseShapeOf(problem), dtype: 'float32' }];
}

/** What choosing blocks makes: the map of `problem.blocks`, and a {@link BLOCK_LINE} of each of its lines. */
export function blockMapOutputs(problem: AttentionProblem): OutputSpec<MaskDType>[] {
  const { rows = 1, keys = 1 } = problem.blocks ?? {};
  const shape = blockShapeOf(problem, { rows, keys });
  const [batch, heads, rowBlocks] = shape;
  return [
    { name: 'map', shape, dtype: 'bool' },
    { name: 'lines', shape: [batch * heads * rowBlocks, BLOCK_LINE.length], dtype: 'float32' },
  ];
}
