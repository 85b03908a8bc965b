import { it } from 'vitest';

type Test = (name: string, run: () => unknown) => void;

/**
 * `it` for tests that need something beyond npm (a compiler, a driver). Where it is missing they fail in CI; elsewhere
 * they are skipped under a name that says what to install, which the closing lines of `npm test` list.
 *
 * @param missing what is missing and how to get it; `undefined` when all is there
 */
export function itNeeds(missing: string | undefined): Test {
  if (missing === undefined) return it;
  if (process.env.CI !== undefined) {
    return (name) =>
      it(name, () => {
        throw new Error(`could not run: ${missing}`);
      });
  }
  return (name, run) => it.skip(`${name} [not run: ${missing}]`, run as () => Promise<void>);
}
