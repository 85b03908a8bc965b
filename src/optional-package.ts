import { messageOf } from './errors.ts';

/**
 * Imports a package that may not be installed (`koffi`, `webgpu`, an engine). A bundler must leave it for run time: it
 * is found where the program runs, or not. Each bundler has its comment for that, and none resolves a name that is a
 * variable.
 *
 * @returns its exports; of a CommonJS package the `default` has them
 */
export const importOptional = (name: string): Promise<unknown> =>
  import(/* webpackIgnore: true */ /* turbopackIgnore: true */ /* @vite-ignore */ name);

/**
 * Tells a package that is not installed from one that is and does not load: made for another platform, or without a system library.
 *
 * @param error what {@link importOptional} rejected with
 * @returns undefined: it is not installed; else why it does not load
 */
export function loadFailure(name: string, error: unknown): string | undefined {
  const { code } = Object(error) as { code?: unknown };
  const text = messageOf(error);
  const unfound = code === 'ERR_MODULE_NOT_FOUND' || code === 'MODULE_NOT_FOUND';
  const absent = unfound && (text.includes(`'${name}'`) || text.includes(`"${name}"`));
  return absent ? undefined : `the package '${name}' is installed and does not load: ${text.split('\n', 1)[0]}`;
}

/** What to do about a package that does not load. */
export const REINSTALL = 'Install it again on this machine, for this version of Node';
