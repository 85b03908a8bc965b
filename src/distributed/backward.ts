/** Gradients of attention over sequences that are divided among ranks. */
import type { BackwardPrecision } from '../attention/backward.ts';
import { BACKWARD_PRECISIONS } from '../attention/backward.ts';
import { checkOption, oneOf } from '../attention/options.ts';
import type { Backend } from '../backends/backend.ts';
import { chooseKernel, contextOf, settleBackward } from '../backends/choice.ts';
import { InvalidArgumentError, takeOptions, textOf } from '../errors.ts';
import type { DType } from '../tensor/dtype.ts';
import type { TensorView } from '../tensor/tensor.ts';
import { type DeviceGroup, type ShardedTensor, shardedTensor } from './group.ts';
import { runRanks } from './rank.ts';
import { BackwardRank } from './rank-backward.ts';
import { scheduleOf } from './schedule.ts';
import { requireSharded, type ShardedOptions, takeSharded, toHnd } from './sharded.ts';

const TAKEN = [
  'kernel',
  'isCausal',
  'causalAlignment',
  'windowSize',
  'smScale',
  'softcap',
  'smoothK',
  'smoothQ',
  'qkQuantGran',
  'pvAccumDtype',
  'signal',
  'ulysses',
  'ring',
  'backwardPrecision',
  'deterministic',
  'gradientDtype',
] as const;

/** Options of {@link sageattnShardedBackward}: those of the forward call, and of its backward pass. */
export interface ShardedBackwardOptions
  extends Pick<
    ShardedOptions,
    Exclude<(typeof TAKEN)[number], 'backwardPrecision' | 'deterministic' | 'gradientDtype'>
  > {
  /** Default: the backend's first. */
  readonly backwardPrecision?: BackwardPrecision;
  /** The same inputs give the same bits. Default true. */
  readonly deterministic?: boolean;
  /** dtype of the gradients: q's (the default), or `float32`. */
  readonly gradientDtype?: 'float32';
}

/** What the forward call took and gave, and the gradient of its output. */
export interface ShardedBackwardInputs {
  readonly q: ShardedTensor;
  readonly k: ShardedTensor;
  readonly v: ShardedTensor;
  /** Of `sageattnSharded` with `returnLse: true`. */
  readonly output: ShardedTensor;
  readonly lse: ShardedTensor;
  /** Sharded like `output`. */
  readonly dOutput: ShardedTensor;
}

/** Sharded like q, k and v. */
export interface ShardedGradients {
  readonly dq: ShardedTensor;
  readonly dk: ShardedTensor;
  readonly dv: ShardedTensor;
}

/** @throws {InvalidArgumentError} a tensor that is not one of the forward call's */
function requireLike(
  argument: string,
  view: ShardedTensor,
  like: ShardedTensor,
  shape: readonly number[],
  dtype: DType,
) {
  requireSharded(argument, view, like.group);
  const tokenAxis = argument === 'lse' ? 2 : like.tokenAxis;
  const fits =
    textOf(view.shape) === textOf(shape) &&
    view.dtype === dtype &&
    view.order === like.order &&
    view.tokenAxis === tokenAxis;
  if (fits) return;
  const expected = `${dtype} ${textOf(shape)} in '${like.order}' order, tokens in dimension ${tokenAxis}`;
  const received = `${view.dtype} ${textOf(view.shape)} in '${view.order}' order, tokens in dimension ${view.tokenAxis}`;
  throw new InvalidArgumentError('invalid-shape', argument, expected, received);
}

async function settleKernel(
  backend: Backend,
  { problem, own }: ReturnType<typeof takeSharded>,
  asked: BackwardPrecision | undefined,
) {
  const support = await backend.backwardSupport?.(problem);
  const { kernel, precision } = settleBackward(backend, support, own.kernel, asked);
  return { kernel: await chooseKernel(backend, problem, { ...own, kernel }, true), precision };
}

/**
 * The backward pass of {@link sageattnSharded}, divided as the forward pass was: keys and values go round once more, in their own dtype,
 * and gradients of keys go back to their owners in float32. The forward call's kernel should be one of a backward pass
 * (`qk-int8-pv-fp16` and its like): gradients of another kernel's output are less accurate. No masks and no joint tokens.
 *
 * @param inputs `lse` `[B,Hq,Lq,1]` float32; `output` and `dOutput` `[B,Hq,Lq,Dv]`, or as q's layout has it
 * @returns gradients of q, k and v, sharded as they are
 * @throws {InvalidArgumentError} naming the argument at fault
 * @throws {ExecutionError} a rank failed: the others have ended too
 */
export async function sageattnShardedBackward(
  { q, k, v, output, lse, dOutput }: ShardedBackwardInputs,
  options: ShardedBackwardOptions = {},
): Promise<ShardedGradients> {
  const { backwardPrecision, deterministic, gradientDtype, ...forward } = takeOptions(options, [...TAKEN]);
  if (backwardPrecision !== undefined)
    checkOption('backwardPrecision', backwardPrecision, oneOf(...BACKWARD_PRECISIONS));
  if (gradientDtype !== undefined) checkOption('gradientDtype', gradientDtype, oneOf('float32'));
  if (deterministic !== undefined)
    checkOption('deterministic', deterministic, [(value) => typeof value === 'boolean', 'a boolean']);
  const taken = takeSharded(q, k, v, forward);
  const { group, own, shape, topology } = taken;
  const outputShape = [...q.shape.slice(0, 3), shape.valueDim];
  requireLike('output', output, q, outputShape, q.dtype);
  requireLike('dOutput', dOutput, q, outputShape, q.dtype);
  requireLike('lse', lse, q, [shape.batch, shape.queryHeads, shape.queryLength, 1], 'float32');
  const { backend } = (group.members[0] as DeviceGroup['members'][number]).place;
  const context = contextOf(own.signal === undefined ? {} : { signal: own.signal }, backend.name);
  const dtype = gradientDtype ?? q.dtype;
  const schedules = Array.from({ length: group.size }, (_, rank) => scheduleOf(shape, topology, rank));
  const { smScale, softcap } = own;
  const forwardOptions = { ...(smScale !== undefined && { smScale }), ...(softcap !== undefined && { softcap }) };
  return group.inTurn(async (connection) => {
    const settled = await settleKernel(backend, taken, backwardPrecision);
    const made = group.members.map(({ place }, i) => ({
      dq: place.empty((q.parts[i] as TensorView).shape, dtype),
      dk: place.empty((k.parts[i] as TensorView).shape, dtype),
      dv: place.empty((v.parts[i] as TensorView).shape, dtype),
    }));
    const part = (x: ShardedTensor, i: number) => toHnd(x.parts[i] as TensorView, x.tokenAxis);
    const ranks = group.members.map(
      ({ place, rank }, i) =>
        new BackwardRank({
          place,
          schedules,
          rank,
          ulysses: topology.ulysses,
          ...settled,
          options: forwardOptions,
          gradient: deterministic === undefined ? {} : { deterministic },
          inputs: {
            q: part(q, i),
            k: part(k, i),
            v: part(v, i),
            output: part(output, i),
            lse: part(lse, i),
            dOutput: part(dOutput, i),
          },
          gradients: {
            dq: toHnd(made[i]?.dq as TensorView, q.tokenAxis),
            dk: toHnd(made[i]?.dk as TensorView, k.tokenAxis),
            dv: toHnd(made[i]?.dv as TensorView, v.tokenAxis),
          },
          context,
        }),
    );
    try {
      await runRanks(connection, ranks, group.ranks);
    } catch (error) {
      for (const [i, each] of made.entries()) {
        for (const view of Object.values(each)) group.members[i]?.place.free(view);
      }
      throw error;
    }
    const sharded = (name: 'dq' | 'dk' | 'dv', like: ShardedTensor) =>
      shardedTensor(
        group,
        made.map((each) => each[name]),
        { ...like, dtype },
      );
    return { dq: sharded('dq', q), dk: sharded('dk', k), dv: sharded('dv', v) };
  });
}
