/**
 * One mask out of all that a graph does to its scores: what its nodes make of scores that are zero, computed by nodes like them. Masks that
 * only hide stay boolean.
 */

import { uniformOf } from '../model/constants.ts';
import type { GraphIndex } from '../model/graph.ts';
import { ELEMENT_TYPES } from '../onnx/codec.ts';
import { type Additions, NotExact } from './additions.ts';
import type { ScaleStep, ScoreStep, Scores } from './scores.ts';
import { lengthOfShape, productShape, reshapedShape } from './stages.ts';
import type { Sizes } from './views.ts';

/** The steps of scores as the operands and options of attention. */
export interface ComposedScores {
  readonly mask: string | undefined;
  /** Stage of the scores whose shape the mask broadcasts to: the number of reshapes before it. */
  readonly maskAt: number;
  readonly scale: number;
  readonly runtimeScales: readonly { readonly value: string; readonly inverse: boolean }[];
  /** Factors of each row, to be taken into q. */
  readonly rowFactors: readonly ScaleStep[];
  readonly softcap: number;
  readonly reshapes: readonly Sizes[];
  /** Dimensions of what stands beside the scores at a stage: they must not make the scores larger. */
  readonly operands: readonly { readonly dims: Sizes; readonly at: number }[];
}

/** A mask under way. Hidden scores become `fill`. */
type Mask =
  | { readonly kind: 'boolean'; readonly attended: string; readonly fill: string }
  | { readonly kind: 'additive'; readonly value: string };

/** @throws {NotExact} where the steps are no attention that kernels compute */
export function composeScores(index: GraphIndex, scores: Scores, add: Additions): ComposedScores {
  const { steps } = scores;
  const stages = stagesOf(steps);
  const reshapes = steps.flatMap((step) => (step.kind === 'reshape' ? [step] : []));
  const masked = steps.flatMap((step, i) =>
    step.kind === 'add' || step.kind === 'where' || step.kind === 'multiplied' ? [stages[i] as number] : [],
  );
  const [first] = masked;
  // Where rows or keys are split up, as for relative positions along both sides of an image, the mask has that shape too.
  const ranks = reshapes.map(({ shape }) => lengthOfShape(index, shape) ?? 0);
  const isSpread = new Set(masked).size > 1 || (first !== undefined && first > 0 && (ranks[first - 1] as number) > 4);
  let mask: Mask | undefined;
  let shape = isSpread ? productShape(index, add, scores.product) : '';
  for (const step of steps) {
    if (isSpread && step.kind === 'reshape') {
      if (mask !== undefined) mask = reshapedMask(mask, add, shape, step.shape);
      shape = reshapedShape(index, add, shape, step.shape);
    } else mask = maskBehind(mask, step, add);
  }
  const { factors, softcap } = factorsOf(steps);
  return {
    mask: mask === undefined ? undefined : mask.kind === 'boolean' ? mask.attended : mask.value,
    maskAt: isSpread ? reshapes.length : (first ?? reshapes.length),
    softcap,
    ...factors,
    reshapes: reshapes.map(({ sizes }) => sizes),
    operands: steps.flatMap((step, i) => {
      const dims = dimsBeside(index, step, add);
      return dims === undefined ? [] : [{ dims, at: stages[i] as number }];
    }),
  };
}

/** How many reshapes stand before each step. */
function stagesOf(steps: readonly ScoreStep[]): number[] {
  let stage = 0;
  return steps.map((step) => (step.kind === 'reshape' ? stage++ : stage));
}

/** Factors before and behind a tanh. `A tanh(B x)` is softcap A of scores scaled by A B. */
function factorsOf(steps: readonly ScoreStep[]): {
  factors: Pick<ComposedScores, 'scale' | 'runtimeScales' | 'rowFactors'>;
  softcap: number;
} {
  const runtimeScales: { value: string; inverse: boolean }[] = [];
  const rowFactors: ScaleStep[] = [];
  let scale = 1;
  let softcap = 0;
  let isReshaped = false;
  for (const step of steps) {
    if (step.kind === 'reshape') isReshaped = true;
    else if (step.kind === 'tanh') {
      if (softcap !== 0) throw new NotExact('a softcap of another kind');
      softcap = 1;
    } else if (step.kind === 'scale') {
      if (step.of.kind === 'number') {
        scale *= step.of.factor;
        if (softcap !== 0) softcap *= step.of.factor;
        continue;
      }
      if (softcap !== 0) throw new NotExact('a softcap of another kind');
      if (step.of.kind === 'sizes') runtimeScales.push({ value: step.operand, inverse: step.opType === 'Div' });
      else if (isReshaped) throw new NotExact('a factor for each row of reshaped scores');
      else rowFactors.push(step);
    }
  }
  if (softcap !== 0 && !(softcap > 0 && Number.isFinite(softcap))) throw new NotExact('a softcap of another kind');
  return { factors: { scale, runtimeScales, rowFactors }, softcap };
}

/** What a step makes of the mask before it. */
function maskBehind(mask: Mask | undefined, step: ScoreStep, add: Additions): Mask | undefined {
  switch (step.kind) {
    case 'add':
      return withSummand(mask, step.isNegated ? add.op('Neg', [step.mask]) : step.mask, add);
    case 'where': {
      const attended = step.hides ? add.op('Not', [step.condition]) : step.condition;
      return hiddenBehind(mask, attended, step.fill, add);
    }
    case 'multiplied': {
      const attended = add.op('Cast', [step.mask], { to: ELEMENT_TYPES.bool });
      const fill = step.isNegated ? add.op('Neg', [step.fill]) : step.fill;
      return hiddenBehind(mask, attended, fill, add);
    }
    case 'cast':
      return mask && mapped(mask, (value) => add.op('Cast', [value], { to: step.to }));
    case 'scale':
      return mask && mapped(mask, (value) => add.op(step.opType, [value, step.operand]));
    case 'tanh':
      if (mask !== undefined) throw new NotExact('a mask before the softcap');
      return mask;
    case 'floor':
    case 'reshape':
      return mask;
  }
}

/** Scores become `fill` where they are not attended. */
function hiddenBehind(mask: Mask | undefined, attended: string, fill: string, add: Additions): Mask {
  if (mask === undefined) return { kind: 'boolean', attended, fill };
  return mask.kind === 'boolean'
    ? { ...mask, attended: add.op('And', [mask.attended, attended]) }
    : { kind: 'additive', value: add.op('Where', [attended, mask.value, fill]) };
}

function withSummand(mask: Mask | undefined, summand: string, add: Additions): Mask {
  if (mask === undefined) return { kind: 'additive', value: summand };
  return mask.kind === 'boolean'
    ? { kind: 'additive', value: add.op('Where', [mask.attended, summand, mask.fill]) }
    : { kind: 'additive', value: add.op('Add', [mask.value, summand]) };
}

/** Applied to the numbers of a mask: a boolean one has its fill value only. */
const mapped = (mask: Mask, map: (value: string) => string): Mask =>
  mask.kind === 'boolean' ? { ...mask, fill: map(mask.fill) } : { ...mask, value: map(mask.value) };

/** Spread over all scores and reshaped with them. */
function reshapedMask(mask: Mask, add: Additions, shape: string, target: string): Mask {
  const move = (value: string) => add.op('Reshape', [add.op('Expand', [value, shape]), target]);
  return mask.kind === 'boolean' ? { ...mask, attended: move(mask.attended) } : { ...mask, value: move(mask.value) };
}

/** Dimensions of the constant that a step puts beside the scores, which a run shows if need be. */
function dimsBeside(index: GraphIndex, step: ScoreStep, add: Additions): Sizes | undefined {
  if (step.kind === 'scale') return step.of.kind === 'number' ? step.of.dims : undefined;
  const value =
    step.kind === 'where' || step.kind === 'multiplied' ? step.fill : step.kind === 'floor' ? step.floor : undefined;
  return value === undefined ? undefined : (uniformOf(index, value)?.dims ?? add.op('Shape', [value]));
}
