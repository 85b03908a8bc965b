import type { BackwardProblem } from '../attention/backward.ts';
import type { AttentionOptions } from '../attention/options.ts';
import type { AttentionProblem } from '../attention/problem.ts';
import type { SettledSparsity } from '../attention/sparsity.ts';
import type { Backend, BackwardPlan, BlockMapPlan, KernelChoice, Plan } from '../backends/backend.ts';
import { chooseKernel } from '../backends/choice.ts';
import { ExecutionError, InvalidArgumentError } from '../errors.ts';

/** Plans kept per backend. A model has a handful of attention shapes; a decoder without a cache one per length. */
const CAPACITY = 64;

/** What the cache needs of a plan. */
type Kept = Pick<Plan, 'ended' | 'dispose'>;

interface Entry<P extends Kept> {
  readonly plan: Promise<P>;
  /** The plan, once it is made. */
  made: P | undefined;
  users: number;
  evicted: boolean;
}

/**
 * Text of everything that a value holds; equal for equal values of one type. Every call is looked up with it, and
 * `JSON.stringify` takes several times as long.
 */
function textOf(value: unknown): string {
  if (typeof value !== 'object' || value === null) return `${value},`;
  if (ArrayBuffer.isView(value)) return `[${value}],`;
  let text = '{';
  for (const name in value) text += textOf((value as Record<string, unknown>)[name]);
  return `${text}},`;
}

function keyOf(problem: string, choice: KernelChoice): string {
  const { descriptor, qkQuantGran, pvAccumDtype, scaleSearch, smoothK, smoothV, smoothQ, ...none } = choice;
  none satisfies Record<string, never>;
  return `${descriptor.name},${qkQuantGran},${pvAccumDtype},${scaleSearch},${smoothK},${smoothV},${smoothQ},${problem}`;
}

/** The options that decide a {@link KernelChoice}. */
function askedFor(problem: string, options: AttentionOptions): string {
  const { kernel, qkQuantGran, pvAccumDtype, scaleSearch, smoothK, smoothV, smoothQ } = options;
  return `${kernel},${qkQuantGran},${pvAccumDtype},${scaleSearch},${smoothK},${smoothV},${smoothQ},${problem}`;
}

interface Cache {
  readonly plans: Map<string, Entry<Plan>>;
  readonly backward: Map<string, Entry<BackwardPlan>>;
  readonly blockMaps: Map<string, Entry<BlockMapPlan>>;
  /** What a problem and options came to, so that a backend is asked for its default kernel once. */
  readonly choices: Map<string, KernelChoice>;
}

const caches = new WeakMap<Backend, Cache>();

function release(entry: Entry<Kept>): void {
  entry.users--;
  if (entry.evicted && entry.users === 0) {
    entry.plan.then(
      (plan) => plan.dispose(),
      () => undefined,
    );
  }
}

function evict<P extends Kept>(plans: Map<string, Entry<P>>, key: string): void {
  const entry = plans.get(key) as Entry<P>;
  plans.delete(key);
  entry.evicted = true;
  release(entry);
}

function remember<V>(map: Map<string, V>, key: string, value: V): void {
  // A Map iterates in order of insertion: reinserting makes the first key the one used longest ago.
  map.delete(key);
  map.set(key, value);
}

function cacheOf(backend: Backend): Cache {
  let cache = caches.get(backend);
  if (cache === undefined) {
    cache = { plans: new Map(), backward: new Map(), blockMaps: new Map(), choices: new Map() };
    caches.set(backend, cache);
  }
  return cache;
}

/** Runs `use` with the plan of a key, which `make` makes where it is not kept. A plan in use is never disposed. */
async function withKept<P extends Kept, R>(
  plans: Map<string, Entry<P>>,
  key: string,
  make: () => Promise<P>,
  use: (plan: P) => Promise<R>,
  wait: () => void,
): Promise<R> {
  let entry = plans.get(key);
  // The backend was disposed since; it starts again with the next call, which is this one.
  if (entry !== undefined) {
    if (entry.made === undefined) wait();
    const made = entry.made ?? (await entry.plan.catch(() => undefined));
    if (made?.ended === true && plans.get(key) === entry) evict(plans, key);
  }
  entry = plans.get(key);
  if (entry === undefined) {
    wait();
    // The cache itself is a user, until the entry is evicted.
    entry = { plan: make(), made: undefined, users: 1, evicted: false };
  }
  remember(plans, key, entry);
  entry.users++;
  if (plans.size > CAPACITY) {
    evict(plans, plans.keys().next().value as string);
  }
  try {
    entry.made ??= await entry.plan;
    return await use(entry.made);
  } catch (error) {
    // A plan that failed may hold a lost device: the next call makes a new one.
    if (plans.get(key) === entry) evict(plans, key);
    throw error;
  } finally {
    release(entry);
  }
}

/**
 * Runs `use` with the plan for a problem, made now or kept from an earlier call. A plan in use is never disposed. Where
 * the plan is at hand, `use` is called before this returns; where it is not, `wait` is called before this returns.
 *
 * @throws as `chooseKernel`
 */
export async function withCachedPlan<R>(
  backend: Backend,
  problem: AttentionProblem,
  options: AttentionOptions,
  use: (plan: Plan) => Promise<R>,
  wait: () => void = () => undefined,
): Promise<R> {
  const { plans, choices } = cacheOf(backend);
  const text = textOf(problem);
  const asked = askedFor(text, options);
  let choice = choices.get(asked);
  if (choice === undefined) {
    wait();
    choice = await chooseKernel(backend, problem, options);
  }
  remember(choices, asked, choice);
  if (choices.size > CAPACITY) choices.delete(choices.keys().next().value as string);
  const settled = choice;
  try {
    return await withKept(plans, keyOf(text, settled), () => backend.plan(problem, settled), use, wait);
  } catch (error) {
    choices.delete(asked);
    throw error;
  }
}

/** {@link withCachedPlan} for choosing the blocks of a problem. */
export function withCachedBlockMap<R>(
  backend: Backend,
  problem: AttentionProblem,
  sparsity: SettledSparsity,
  use: (plan: BlockMapPlan) => Promise<R>,
  wait: () => void,
): Promise<R> {
  const make = async () => {
    const plan = await backend.planBlockMap?.(problem, sparsity);
    if (plan !== undefined) return plan;
    const expected = `nothing on backend '${backend.name}', which chooses no blocks: options.blockMask says which`;
    throw new InvalidArgumentError('unsupported-option', 'options.sparsity', expected, 'a sparsity');
  };
  return withKept(cacheOf(backend).blockMaps, textOf({ problem, sparsity }), make, use, wait);
}

/** {@link withCachedPlan} for the backward pass of a forward pass with this kernel. */
export function withCachedBackward<R>(
  backend: Backend,
  problem: BackwardProblem,
  choice: KernelChoice,
  use: (plan: BackwardPlan) => Promise<R>,
  wait: () => void,
): Promise<R> {
  const make = async () => {
    const plan = await backend.planBackward?.(problem, choice);
    if (plan === undefined)
      throw new ExecutionError('execution-failed', `backend '${backend.name}' cannot plan backward`);
    return plan;
  };
  return withKept(cacheOf(backend).backward, keyOf(textOf(problem), choice), make, use, wait);
}
