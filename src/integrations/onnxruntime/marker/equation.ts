/**
 * The `Einsum` that stands for an attention. onnxruntime never computes it: it infers the shape of the result from it, allocates that, and makes one
 * dispatch that binds the operands in order and the result behind them. What it computes does not matter, so every axis has a
 * letter of its own. Two more letters, over axes of one element of a constant, tell kinds of markers apart: they are in the shader's text.
 */

/** A size of the result: that of an axis of an operand, or a number. */
export type ResultSize = number | { readonly operand: number; readonly axis: number };

export interface Equation {
  readonly text: string;
  /** Dimensions of the constant, which is the last operand. */
  readonly constant: readonly number[];
}

const LETTERS = 'abcdefghijklmnopqrstuvwxyz'.split('');
const TAGS = LETTERS.map((letter) => letter.toUpperCase());

/** How many kinds of markers a device can tell apart. */
export const MAX_TAGS = TAGS.length * (TAGS.length - 1);

/** Two letters, unlike those of any other tag. */
function lettersOf(tag: number): string {
  const first = Math.floor(tag / (TAGS.length - 1));
  const second = tag % (TAGS.length - 1);
  return `${TAGS[first]}${TAGS[second + (second >= first ? 1 : 0)]}`;
}

/** Undefined where there are not enough letters. */
export function equationOf(ranks: readonly number[], result: readonly ResultSize[], tag: number): Equation | undefined {
  const letters = [...LETTERS];
  const take = (count: number) => letters.splice(0, count).join('');
  const terms = ranks.map(take);
  const numbers = result.filter((size) => typeof size === 'number');
  const own = take(numbers.length);
  const isShort = terms.some((term, i) => term.length < (ranks[i] as number)) || own.length < numbers.length;
  if (isShort || tag >= MAX_TAGS) return undefined;
  let next = 0;
  const output = result.map((size) => (typeof size === 'number' ? own[next++] : terms[size.operand]?.[size.axis]));
  return { text: `${[...terms, own + lettersOf(tag)].join(',')}->${output.join('')}`, constant: [...numbers, 1, 1] };
}
