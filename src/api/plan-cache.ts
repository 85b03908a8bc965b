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
const CHOICE_OPTIONS = [
  'kernel',
  'qkQuantGran',
  'pvAccumDtype',
  'scaleSearch',
  'smoothK',
  'smoothV',
  'smoothQ',
] as const satisfies readonly (keyof AttentionOptions)[];

const askedFor = (problem: string, options: AttentionOptions): string =>
  `${CHOICE_OPTIONS.map((name) => options[name])},${problem}`;

/** Whether two values of one type hold the same, as {@link textOf} tells it, without making a text. */
function holdsSame(a: unknown, b: unknown): boolean {
  if (typeof a !== 'object' || a === null || typeof b !== 'object' || b === null) return a === b;
  let names = 0;
  for (const name in a) {
    names++;
    if (!holdsSame((a as Record<string, unknown>)[name], (b as Record<string, unknown>)[name])) return false;
  }
  for (const _ in b) names--;
  return names === 0;
}

/** A call, and what it came to. */
interface Recent {
  readonly problem: AttentionProblem;
  /** Of {@link CHOICE_OPTIONS}. */
  readonly options: readonly unknown[];
  readonly asked: string;
  readonly choice: KernelChoice;
  readonly key: string;
}

/** Calls that are recognized by their numbers: making texts of them takes longer than a call over few tokens. */
const MOST_RECENT = 4;

interface Cache {
  readonly plans: MapByUse<Entry<Plan>>;
  readonly backward: MapByUse<Entry<BackwardPlan>>;
  readonly blockMaps: MapByUse<Entry<BlockMapPlan>>;
  /** What a problem and options came to, so that a backend is asked for its default kernel once. */
  readonly choices: MapByUse<KernelChoice>;
  /** The last calls' choices and keys, the last one first. */
  readonly recent: Recent[];
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

function evict<P extends Kept>(plans: MapByUse<Entry<P>>, key: string): void {
  const entry = plans.get(key) as Entry<P>;
  plans.delete(key);
  entry.evicted = true;
  release(entry);
}

/** A map whose first key is the one used longest ago. */
class MapByUse<V> extends Map<string, V> {
  #last: string | undefined;

  use(key: string, value: V): void {
    // What was used last already is at the end; putting it there again makes garbage in every call.
    if (this.#last === key && this.get(key) === value) return;
    // A Map iterates in order of insertion.
    this.delete(key);
    this.set(key, value);
    this.#last = key;
  }
}

function cacheOf(backend: Backend): Cache {
  let cache = caches.get(backend);
  if (cache === undefined) {
    cache = {
      plans: new MapByUse(),
      backward: new MapByUse(),
      blockMaps: new MapByUse(),
      choices: new MapByUse(),
      recent: [],
    };
    caches.set(backend, cache);
  }
  return cache;
}

/** Runs `use` with the plan of a key, which `make` makes where it is not kept. A plan in use is never disposed. */
async function withKept<P extends Kept, R>(
  plans: MapByUse<Entry<P>>,
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
  plans.use(key, entry);
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
  const cache = cacheOf(backend);
  const { plans, choices } = cache;
  let call = recentCall(cache, problem, options);
  if (call === undefined) {
    const text = textOf(problem);
    const asked = askedFor(text, options);
    let choice = choices.get(asked);
    if (choice === undefined) {
      wait();
      choice = await chooseKernel(backend, problem, options);
    }
    const settled = CHOICE_OPTIONS.map((name) => options[name]);
    call = { problem, options: settled, asked, choice, key: keyOf(text, choice) };
    cache.recent.unshift(call);
    cache.recent.length = Math.min(cache.recent.length, MOST_RECENT);
  }
  const { asked, choice, key } = call;
  choices.use(asked, choice);
  if (choices.size > CAPACITY) choices.delete(choices.keys().next().value as string);
  try {
    return await withKept(plans, key, () => backend.plan(problem, choice), use, wait);
  } catch (error) {
    choices.delete(asked);
    cache.recent.length = 0;
    throw error;
  }
}

/** One of the last calls that was like this one, which it becomes the last of. */
function recentCall({ recent }: Cache, problem: AttentionProblem, options: AttentionOptions): Recent | undefined {
  const index = recent.findIndex(
    (call) => CHOICE_OPTIONS.every((name, i) => call.options[i] === options[name]) && holdsSame(call.problem, problem),
  );
  if (index > 0) recent.unshift(...recent.splice(index, 1));
  return index < 0 ? undefined : recent[0];
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
