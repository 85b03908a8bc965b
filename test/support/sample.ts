/**
 * A part of many like tests, where each takes seconds (simulated kernels, software GPUs). The run's seed picks it, so
 * that over several runs every test has its turn. `SAGEATTENTION_TESTS=sample` is what `npm test` sets without `CI`,
 * and `SAGEATTENTION_TESTS=all` runs every test.
 */

/** Shares of a list of tests, each 0 to 1. */
export interface Shares {
  /** `npm test` without `CI`. */
  readonly byHand: number;
  /** Every other run, CI's too. Less than 1 is for tests that all run on hardware (`test/cuda`). Default 1. */
  readonly otherwise?: number;
}

/** A number in [0, 1) from a seed and a text (FNV-1a, then a finalizer that spreads its bits). */
function chance(seed: number, text: string): number {
  let hash = 0x811c9dc5 ^ seed;
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 0x01000193);
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return ((hash ^ (hash >>> 16)) >>> 0) / 2 ** 32;
}

/** The kind of a test named `mask: additive float16` is `mask`. */
const kindOf = (name: string): string => name.split(':', 1)[0] as string;

function shareNow({ byHand, otherwise = 1 }: Shares): number {
  const asked = globalThis.process?.env?.SAGEATTENTION_TESTS;
  return asked === 'all' ? 1 : asked === 'sample' ? byHand : otherwise;
}

/**
 * Every test is as likely as any other. The sample is spread over the kinds of tests: a kind of at least 1 / share tests
 * is in every sample.
 *
 * @param list name of the list, so that lists with tests of the same names get different samples
 * @returns the tests to run, in their order; at least one unless there is none
 */
export function sampled<T extends { readonly name: string }>(
  tests: readonly T[],
  seed: number,
  shares: Shares,
  list = '',
): readonly T[] {
  const share = shareNow(shares);
  if (share >= 1 || tests.length === 0) return tests;
  const kinds = [...new Set(tests.map(({ name }) => kindOf(name)))];
  const order = tests
    .map((test) => ({ test, kind: kinds.indexOf(kindOf(test.name)), at: chance(seed, `${list}: ${test.name}`) }))
    .sort((a, b) => a.kind - b.kind || a.at - b.at);
  // Evenly spaced places of that order, from a random one on.
  const count = Math.max(1, Math.round(share * tests.length));
  const start = chance(seed, list);
  const picked = new Set(
    Array.from({ length: count }, (_, i) => order[Math.floor(((i + start) * tests.length) / count)]?.test),
  );
  return tests.filter((test) => picked.has(test));
}
