/// <reference lib="esnext.disposable" preserve="true" />
/**
 * The names of the methods that `using` and `await using` call. Engines without them (WebKit) get the symbols that
 * compilers fall back on there: a computed name of `undefined` would make a method called "undefined".
 */
export const DISPOSE: typeof Symbol.dispose = (Symbol.dispose ?? Symbol.for('Symbol.dispose')) as never;
export const ASYNC_DISPOSE: typeof Symbol.asyncDispose = (Symbol.asyncDispose ??
  Symbol.for('Symbol.asyncDispose')) as never;
