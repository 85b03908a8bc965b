/** Attention over sequences that are divided among ranks. */
import { bandOf } from '../attention/band.ts';
import { type AttentionOptions, checkOption, oneOf, validateOptions } from '../attention/options.ts';
import { createProblem } from '../attention/problem.ts';
import type { RunContext } from '../backends/backend.ts';
import { chooseKernel, contextOf, takeTensor } from '../backends/choice.ts';
import { InvalidArgumentError, takeOptions, textOf } from '../errors.ts';
import { contiguousStrides, copyOfCpu, requireView, type TensorView, transpose } from '../tensor/tensor.ts';
import { type DeviceGroup, type ShardedTensor, shardedTensor } from './group.ts';
import type { Link } from './link.ts';
import { DIVIDED_OPTIONS } from './options.ts';
import { type RankCall, RankPlan, runRanks } from './rank.ts';
import { type ShardedShape, scheduleOf, type Topology, validateTopology } from './schedule.ts';

const TAKEN = [...DIVIDED_OPTIONS, 'attnMask', 'returnLse'] as const satisfies readonly (keyof AttentionOptions)[];

const OWN = ['ulysses', 'ring', 'joint'] as const;

/** Keys and values that every rank has, such as the text's beside a video's. All rows see them unless the mask is causal. */
export interface JointTokens {
  /** `[B,Hkv,J,D]`, or `[B,J,Hkv,D]` where q is sharded in `'NHD'`, in this process's memory. */
  readonly k: TensorView;
  readonly v: TensorView;
  /** Whether they come before the sequence or behind it, which matters to causality and window. Default `'front'`. */
  readonly where?: 'front' | 'back';
}

export interface ShardedOptions extends Pick<AttentionOptions, (typeof TAKEN)[number]> {
  /** Ranks among which heads are divided; default 1. It must divide Hq, and divide Hkv or be a multiple of it. */
  readonly ulysses?: number;
  /** Ranks among which keys and values go round; default the group's size / `ulysses`. */
  readonly ring?: number;
  readonly joint?: JointTokens;
}

export interface ShardedResult {
  readonly output: ShardedTensor;
  /** `[B,Hq,Lq,1]` float32, natural logarithm. */
  readonly lse: ShardedTensor;
}

/** Of either layout, there and back. */
export const toHnd = (view: TensorView, tokenAxis: number) => (tokenAxis === 2 ? view : transpose(view, [0, 2, 1, 3]));
export const fromHnd = toHnd;

/** The whole of a sharded tensor, as if it lay contiguous in this process's memory beside masks and joint tokens: for checks. */
const wholeOf = ({ shape, dtype }: ShardedTensor): TensorView => ({
  location: 'cpu',
  dtype,
  shape,
  strides: contiguousStrides(shape),
  offset: 0,
});

export function requireSharded(argument: string, value: ShardedTensor, group: DeviceGroup | undefined): void {
  if (!Array.isArray(value?.parts)) {
    throw new InvalidArgumentError(
      'invalid-shape',
      argument,
      'a sharded tensor (group.shard makes one)',
      textOf(value),
    );
  }
  if (value.group !== group) {
    throw new InvalidArgumentError('mixed-locations', argument, 'a tensor of the same group as q', 'one of another');
  }
}

/**
 * `sageattn` over sequences that are divided among the ranks of a group: Ulysses, ring, or both (USP, arXiv 2405.07719). Keys and values
 * are quantized once, by the rank that holds them, and travel as 8-bit codes with their scales; K is smoothed by each span's own
 * mean, which leaves softmax unchanged. Partial outputs are rounded to q's dtype before they are joined.
 *
 * @param q `[B,Hq,Lq,D]` sharded
 * @param k `[B,Hkv,Lk,D]` sharded, as q in layout; its order may be another
 * @param v `[B,Hkv,Lk,Dv]` sharded like k
 * @param options `attnMask`: of the whole sequence, in this process's memory; joint tokens are not masked
 * @returns `[B,Hq,Lq,Dv]` sharded like q
 * @throws {InvalidArgumentError} naming the argument at fault
 * @throws {ExecutionError} a rank failed: the others have ended too
 */
export function sageattnSharded(
  q: ShardedTensor,
  k: ShardedTensor,
  v: ShardedTensor,
  options: ShardedOptions & { readonly returnLse: true },
): Promise<ShardedResult>;
export function sageattnSharded(
  q: ShardedTensor,
  k: ShardedTensor,
  v: ShardedTensor,
  options?: ShardedOptions & { readonly returnLse?: false },
): Promise<ShardedTensor>;
export function sageattnSharded(
  q: ShardedTensor,
  k: ShardedTensor,
  v: ShardedTensor,
  options?: ShardedOptions,
): Promise<ShardedTensor | ShardedResult>;
export async function sageattnSharded(
  q: ShardedTensor,
  k: ShardedTensor,
  v: ShardedTensor,
  options: ShardedOptions = {},
): Promise<ShardedTensor | ShardedResult> {
  const taken = takeSharded(q, k, v, options);
  const { group, problem, own, shape } = taken;
  const { backend } = (group.members[0] as DeviceGroup['members'][number]).place;
  const context = contextOf(own.signal === undefined ? {} : { signal: own.signal }, backend.name);
  return group.inTurn(async (connection) => {
    const made: (() => void)[] = [];
    const lent: (() => void)[] = [];
    const calls = callsOf(q, k, v, taken, context, { made, lent });
    const key = keyOf(q, k, taken, calls);
    try {
      const plans = await group.plansOf(key, () => plansFor(taken, calls));
      const works = plans.map((plan, i) => ({
        run: (link: Link) => plan.run(link, calls[i] as RankCall),
        endCall: () => plan.endCall(),
      }));
      await runRanks(connection, works, group.ranks);
    } catch (error) {
      await group.forgetPlans(key);
      for (const free of made) free();
      throw error;
    } finally {
      for (const free of lent) free();
    }
    const { dtype, tokenAxis, order } = q;
    const outputs = calls.map(({ output }) => fromHnd(output, tokenAxis));
    const output = shardedTensor(group, outputs, { shape: withDim(q.shape, shape.valueDim), dtype, tokenAxis, order });
    if (!problem.returnLse) return output;
    const sums = calls.map(({ lse }) => lse as TensorView);
    const { batch, queryHeads, queryLength } = shape;
    const whole = { shape: [batch, queryHeads, queryLength, 1], dtype: 'float32', tokenAxis: 2, order } as const;
    return { output, lse: shardedTensor(group, sums, whole) };
  });
}

type Taken = ReturnType<typeof takeSharded>;

/** What each rank of this process works on, with room for its outputs. */
function callsOf(
  q: ShardedTensor,
  k: ShardedTensor,
  v: ShardedTensor,
  { group, problem, joint, attnMask, shape }: Taken,
  context: RunContext,
  { made, lent }: Record<'made' | 'lent', (() => void)[]>,
): RankCall[] {
  return group.members.map(({ place }, i) => {
    const keep = (view: TensorView) => {
      made.push(() => place.free(view));
      return view;
    };
    const lend = (view: TensorView) => {
      const there = place.upload(view);
      if (there !== view) lent.push(() => place.free(there));
      return there;
    };
    const part = q.parts[i] as TensorView;
    const output = keep(place.empty(withDim(part.shape, shape.valueDim), q.dtype));
    const [batch, heads, rows] = toHnd(part, q.tokenAxis).shape as [number, number, number];
    return {
      context,
      inputs: {
        q: toHnd(part, q.tokenAxis),
        k: toHnd(k.parts[i] as TensorView, k.tokenAxis),
        v: toHnd(v.parts[i] as TensorView, v.tokenAxis),
        ...(joint && { joint: { k: lend(joint.k), v: lend(joint.v) } }),
        ...(attnMask && { attnMask: lend(attnMask) }),
      },
      output: toHnd(output, q.tokenAxis),
      lse: problem.returnLse ? keep(place.empty([batch, heads, rows, 1], 'float32')) : undefined,
    };
  });
}

/** What calls that share plans have in common. */
function keyOf(
  q: ShardedTensor,
  k: ShardedTensor,
  { own, joint, shape, topology }: Taken,
  calls: readonly RankCall[],
): string {
  const { signal: _, attnMask: __, ...rest } = own;
  const layoutOf = (view: TensorView | undefined) => view && [view.shape, view.strides, view.offset, view.dtype];
  const layouts = calls.map(({ inputs, output }) => [
    ...[inputs.q, inputs.k, inputs.v, inputs.attnMask, inputs.joint?.k, inputs.joint?.v, output].map(layoutOf),
  ]);
  const all = [q.order, k.order, joint?.where, rest, shape, topology, layouts];
  return JSON.stringify(all, (_key, value) =>
    typeof value === 'number' && !Number.isFinite(value) ? `${value}` : value,
  );
}

async function plansFor(
  { group, problem, own, shape, topology }: Taken,
  calls: readonly RankCall[],
): Promise<RankPlan[]> {
  const { backend } = (group.members[0] as DeviceGroup['members'][number]).place;
  const kernel = await chooseKernel(backend, problem, own, true);
  const { smScale, softcap } = own;
  const options = { ...(smScale !== undefined && { smScale }), ...(softcap !== undefined && { softcap }) };
  return group.members.map(
    ({ place, rank }, i) =>
      new RankPlan({
        place,
        schedule: scheduleOf(shape, topology, rank),
        kernel,
        options,
        inputs: (calls[i] as RankCall).inputs,
      }),
  );
}

const withDim = (shape: readonly number[], dim: number) => [...shape.slice(0, 3), dim];

/** A mask as `[B or 1, Hq or 1, Lq or 1, Lk or 1]`, as it is now. */
function takeMask(mask: TensorView | undefined): TensorView | undefined {
  if (mask === undefined) return undefined;
  const own = copyOfCpu(takeTensor('options.attnMask', mask));
  const missing = Array.from({ length: 4 - own.shape.length }, () => 1);
  return { ...own, shape: [...missing, ...own.shape], strides: [...missing.map(() => 0), ...own.strides] };
}

function takeJoint({ k, v, where = 'front' }: JointTokens, q: TensorView, tokenAxis: number) {
  checkOption('joint.where', where, oneOf('front', 'back'));
  requireView('options.joint.k', k);
  requireView('options.joint.v', v);
  const [ownK, ownV] = [k, v].map((view) => toHnd(copyOfCpu(view), tokenAxis)) as [TensorView, TensorView];
  // Names the argument at fault as k or v, which the joint tokens are.
  createProblem(q, ownK, ownV, { tensorLayout: 'HND' });
  return { k: ownK, v: ownV, where };
}

/** A call's arguments, checked, and what they mean together. */
export function takeSharded(q: ShardedTensor, k: ShardedTensor, v: ShardedTensor, options: ShardedOptions) {
  const group = q?.group;
  for (const [argument, value] of Object.entries({ q, k, v })) requireSharded(argument, value, group);
  group.requireUsable();
  const { ulysses = 1, ring = group.size / ulysses, joint, ...rest } = takeOptions(options, [...TAKEN, ...OWN]);
  const own = validateOptions(rest, TAKEN);
  for (const [argument, { tokenAxis, order }] of Object.entries({ k, v })) {
    if (tokenAxis === q.tokenAxis && order === k.order) continue;
    const expected = `tokens in dimension ${q.tokenAxis} as q has, in the order of k ('${k.order}')`;
    throw new InvalidArgumentError('invalid-option', argument, expected, `dimension ${tokenAxis}, '${order}'`);
  }
  const [wholeQ, wholeK, wholeV] = [q, k, v].map((x) => toHnd(wholeOf(x), x.tokenAxis)) as [
    TensorView,
    TensorView,
    TensorView,
  ];
  const { location, device = 0 } = q.parts[0] as TensorView;
  // Kernels are chosen for where the ranks work.
  const problem = { ...createProblem(wholeQ, wholeK, wholeV, { ...own, tensorLayout: 'HND' }), location, device };
  const { batch, queryHeads, kvHeads, queryLength, keyLength, headDim, valueDim } = problem;
  const topology: Topology = { ulysses, ring };
  validateTopology(topology, group.size, queryHeads, kvHeads);
  const attnMask = takeMask(own.attnMask);
  const jointTokens = joint && takeJoint(joint, wholeQ, q.tokenAxis);
  const shape: ShardedShape = {
    batch,
    queryHeads,
    kvHeads,
    queryLength,
    keyLength,
    headDim,
    valueDim,
    queryOrder: q.order,
    keyOrder: k.order,
    limits: bandOf(problem, { queryLength, keyLength }),
    ...(jointTokens && { joint: { length: jointTokens.k.shape[2] as number, where: jointTokens.where } }),
    masked: attnMask !== undefined,
  };
  return { group, problem, own, joint: jointTokens, attnMask, shape, topology };
}
