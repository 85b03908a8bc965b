/** How the axes of a value lie: which of them are the batch, the rows and the columns of a product. */

/** Axes of `[.., row, column]` in a value: as they lie or with the last two exchanged, at any rank; or a permutation. */
export type Order = readonly number[] | 'natural' | 'swapped';

/** The last two axes exchanged, of the value and thus of the tensor that it is read as. */
export function swapped(order: Order): Order {
  if (order === 'natural') return 'swapped';
  if (order === 'swapped') return 'natural';
  return [...order.slice(0, -2), order.at(-1) as number, order.at(-2) as number];
}

/** The order as a permutation of `rank` axes; undefined where it is one of another rank. */
export function permutationOf(order: Order, rank: number): readonly number[] | undefined {
  if (typeof order !== 'string') return order.length === rank ? order : undefined;
  const natural = Array.from({ length: rank }, (_, axis) => axis);
  return order === 'natural' ? natural : (swapped(natural) as readonly number[]);
}

/** The order that gives back what an order takes apart. */
export const inverse = (order: Order): Order =>
  typeof order === 'string' ? order : order.map((_, axis) => order.indexOf(axis));

/** The order in a Transpose's input of what has an order in its output. */
export function throughTranspose(order: Order, permutation: readonly number[]): readonly number[] | undefined {
  return permutationOf(order, permutation.length)?.map((axis) => permutation[axis] as number);
}

/** The order with its name where it has one. */
export function namedOrder(order: Order): Order {
  if (typeof order === 'string') return order;
  const isNatural = (axes: readonly number[]) => axes.every((axis, i) => axis === i);
  if (isNatural(order)) return 'natural';
  return isNatural(swapped(order) as readonly number[]) ? 'swapped' : order;
}

/** The rank that an order is one of, where it says. */
export const rankOf = (order: Order): number | undefined => (typeof order === 'string' ? undefined : order.length);

/** True where the columns are the value's last axis. */
export const hasColumnsLast = (order: Order): boolean =>
  order === 'natural' || (order !== 'swapped' && order.at(-1) === order.length - 1);

/** The columns' axis, counted from the last of the value (0). */
export function columnsFromLast(order: Order): number {
  if (typeof order === 'string') return order === 'natural' ? 0 : 1;
  return order.length - 1 - (order.at(-1) as number);
}
