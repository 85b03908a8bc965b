/**
 * A part of many like tests, for a run by hand: where each takes seconds (simulated kernels, software GPUs), `npm test`
 * without `CI` runs those that the run's seed picks, and over time all. `SAGEATTENTION_TESTS=sample` asks for it; all
 * run otherwise.
 */

/** A number in [0, 1) from a seed and a text (FNV-1a, then a finalizer that spreads its bits). */
function chance(seed: number, text: string): number {
  let hash = 0x811c9dc5 ^ seed;
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 0x01000193);
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return ((hash ^ (hash >>> 16)) >>> 0) / 2 ** 32;
}

/**
 * @param share of the tests that a sample has, 0 to 1
 * @param always a sample also where none is asked for: tests that run whole elsewhere, on hardware;
 * SAGEATTENTION_TESTS=all runs all
 * @param group told apart from other groups, which have tests of the same names
 * @returns the tests to run, in their order; at least one of a group that has any
 */
export function sampled<T extends { readonly name: string }>(
  tests: readonly T[],
  seed: number,
  share: number,
  group = '',
  always = false,
): readonly T[] {
  const asked = globalThis.process?.env?.SAGEATTENTION_TESTS;
  if (asked !== 'sample' && (!always || asked === 'all')) return tests;
  const ranked = tests.map((test) => ({ test, at: chance(seed, `${group}: ${test.name}`) }));
  const picked = new Set(
    ranked
      .sort((a, b) => a.at - b.at)
      .slice(0, Math.max(1, Math.round(share * tests.length)))
      .map(({ test }) => test),
  );
  return tests.filter((test) => picked.has(test));
}
