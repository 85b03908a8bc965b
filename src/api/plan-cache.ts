import type { AttentionProblem } from '../attention/problem.ts';
import type { Backend, KernelChoice, Plan } from '../backends/backend.ts';

/** Plans kept per backend. A model has a handful of attention shapes; a decoder without a cache one per length. */
const CAPACITY = 64;

interface Entry {
  readonly plan: Promise<Plan>;
  /** The plan, once it is made. */
  made: Plan | undefined;
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

function keyOf(problem: AttentionProblem, choice: KernelChoice): string {
  const { descriptor, qkQuantGran, pvAccumDtype, smoothK, smoothV, smoothQ, ...none } = choice;
  none satisfies Record<string, never>;
  return `${descriptor.name},${qkQuantGran},${pvAccumDtype},${smoothK},${smoothV},${smoothQ},${textOf(problem)}`;
}

const caches = new WeakMap<Backend, Map<string, Entry>>();

function release(entry: Entry): void {
  entry.users--;
  if (entry.evicted && entry.users === 0) {
    entry.plan.then(
      (plan) => plan.dispose(),
      () => undefined,
    );
  }
}

function evict(cache: Map<string, Entry>, key: string): void {
  const entry = cache.get(key) as Entry;
  cache.delete(key);
  entry.evicted = true;
  release(entry);
}

/** Runs `use` with the plan for a problem, made now or kept from an earlier call. A plan in use is never disposed. */
export async function withCachedPlan<R>(
  backend: Backend,
  problem: AttentionProblem,
  choice: KernelChoice,
  use: (plan: Plan) => Promise<R>,
): Promise<R> {
  let cache = caches.get(backend);
  if (cache === undefined) {
    cache = new Map();
    caches.set(backend, cache);
  }
  const key = keyOf(problem, choice);
  let entry = cache.get(key);
  // The backend was disposed since; it starts again with the next call, which is this one.
  if (entry !== undefined) {
    const made = entry.made ?? (await entry.plan.catch(() => undefined));
    if (made?.ended === true && cache.get(key) === entry) evict(cache, key);
  }
  entry = cache.get(key);
  if (entry === undefined) {
    // The cache itself is a user, until the entry is evicted.
    entry = { plan: backend.plan(problem, choice), made: undefined, users: 1, evicted: false };
  }
  // A Map iterates in order of insertion: reinserting makes the first key the one used longest ago.
  cache.delete(key);
  cache.set(key, entry);
  entry.users++;
  if (cache.size > CAPACITY) {
    evict(cache, cache.keys().next().value as string);
  }
  try {
    entry.made ??= await entry.plan;
    return await use(entry.made);
  } catch (error) {
    // A plan that failed may hold a lost device: the next call makes a new one.
    if (cache.get(key) === entry) evict(cache, key);
    throw error;
  } finally {
    release(entry);
  }
}
