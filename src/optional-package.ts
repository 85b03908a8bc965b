/**
 * Imports a package that may not be installed (`koffi`, `webgpu`, an engine). A bundler must leave it for run time: it
 * is found where the program runs, or not. Each bundler has its comment for that, and none resolves a name that is a
 * variable.
 *
 * @returns its exports; of a CommonJS package the `default` has them
 */
export const importOptional = (name: string): Promise<unknown> =>
  import(/* webpackIgnore: true */ /* turbopackIgnore: true */ /* @vite-ignore */ name);
