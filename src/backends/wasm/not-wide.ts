/** What browsers get in the place of `wide.ts`: see `browser` in package.json. */

/** Why vectors have 128 bits where the engine is not Node, or an older one. */
export const NO_WIDE_ENGINE = '128 bits: only Node 24 or later can be asked for more';

export const widen = async (): Promise<string> => NO_WIDE_ENGINE;
