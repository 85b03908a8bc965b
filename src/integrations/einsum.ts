/** Equations of Einsum that are batched products: `[.., row, contraction]` times `[.., contraction, column]`. */
import { namedOrder, type Order } from './onnxruntime/detect/order.ts';

export interface ProductOrders {
  /** Order of the axes `[.., row, contraction]` in the left operand. */
  readonly leftOrder: Order;
  /** Order of the axes `[.., column, contraction]` in the right operand. */
  readonly rightOrder: Order;
  /** Order of the axes `[.., row, column]` in the output. */
  readonly outOrder: Order;
}

/** Undefined for any other equation. */
export function parseEquation(equation: string): ProductOrders | undefined {
  const match = /^([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)$/.exec(equation.replaceAll(' ', ''));
  if (match === null) return undefined;
  const [, a, b, out] = match as unknown as [string, string, string, string];
  const isRegular = [a, b, out].every(
    (letters) => letters.length === out.length && letters.length >= 3 && new Set(letters).size === out.length,
  );
  const only = (letters: string, ...excluded: string[]) =>
    [...letters].filter((letter) => excluded.every((other) => !other.includes(letter)));
  const row = only(a, b);
  const column = only(b, a);
  const contraction = only(a, out);
  const batch = only(out, row.join(''), column.join(''));
  if (!isRegular || row.length !== 1 || column.length !== 1 || contraction.length !== 1) return undefined;
  const order = (letters: string, ...axes: string[]) => namedOrder(axes.map((letter) => letters.indexOf(letter)));
  return {
    leftOrder: order(a, ...batch, ...row, ...contraction),
    rightOrder: order(b, ...batch, ...column, ...contraction),
    outOrder: order(out, ...batch, ...row, ...column),
  };
}
