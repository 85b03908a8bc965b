/**
 * Where this package keeps files of a user: `$XDG_CACHE_HOME/sageattention`, else in `~/.cache`. Undefined where there is no such place:
 * in browsers, and in Deno, which asks its user before a program reads or writes files.
 */
export function cacheFolder(): string | undefined {
  const { process, Deno } = globalThis as { readonly process?: NodeJS.Process; readonly Deno?: unknown };
  if (process?.getBuiltinModule === undefined || Deno !== undefined) return undefined;
  const home = process.env.XDG_CACHE_HOME || `${process.getBuiltinModule('node:os').homedir()}/.cache`;
  return `${home}/sageattention`;
}
