/** Seeded random numbers for tests. A failure prints its seed; SAGEATTENTION_SEED runs it again. */
export { Random } from '../../src/measure/random.ts';

/** The run's seed: SAGEATTENTION_SEED, or a fresh one. */
export function runSeed(): number {
  const given = globalThis.process?.env?.SAGEATTENTION_SEED;
  return given === undefined || given === '' ? Math.floor(Math.random() * 2 ** 32) : Number(given);
}
