/** Plans that were made before: equal problems have equal launches, which are data that nobody changes. */
import type { LaunchPlanner } from './plan.ts';

/** Plans that are kept: those of the layers of a model and of the ranks on a device. */
const KEPT = 128;

/** Infinity and -0 are not what JSON makes of them. */
const exact = (_: string, value: unknown) =>
  typeof value === 'number' && (!Number.isFinite(value) || Object.is(value, -0)) ? `${value}` : value;

function remember<Given extends readonly unknown[], Plan>(make: (...given: Given) => Plan): (...given: Given) => Plan {
  const plans = new Map<string, Plan>();
  return (...given) => {
    // Packed sequences have a length of their own each time, and long keys.
    if ((given[0] as { readonly sequences?: unknown }).sequences !== undefined) return make(...given);
    const key = JSON.stringify(given, exact);
    let plan = plans.get(key);
    if (plan === undefined) {
      plan = make(...given);
      plans.set(key, plan);
      if (plans.size > KEPT) plans.delete(plans.keys().next().value as string);
    }
    return plan;
  };
}

/**
 * A planner that keeps the latest plans of keys and values, of attention over them and of merges: these are planned in every call where
 * others belong to a plan of the caller's.
 */
export const remembered = (planner: LaunchPlanner): LaunchPlanner => ({
  ...planner,
  planKeyValue: remember(planner.planKeyValue),
  planAttend: remember(planner.planAttend),
  planMerge: remember(planner.planMerge),
  planSum: remember(planner.planSum),
});
