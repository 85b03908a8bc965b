/** Lists of registers. */

/** An element that is there. */
export function at<T>(values: readonly T[], index: number): T {
  const value = values[index];
  if (value === undefined) throw new RangeError(`no element ${index} of ${values.length}`);
  return value;
}

export const maxOf = <T>(values: readonly T[], max: (a: T, b: T) => T): T => values.reduce(max);
