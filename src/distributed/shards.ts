/** Which tokens of a sequence a rank holds. */

/** Tokens `start` to `end` (not included) of a sequence. */
export interface Span {
  readonly start: number;
  readonly end: number;
}

/**
 * How a sequence is dealt out. `'contiguous'`: rank r of P holds the r-th of P parts. `'zigzag'`: parts r and 2P-1-r of 2P, so that
 * with a causal mask every rank has the same work (Llama 3's and ring-flash-attention's order for context parallelism).
 */
export type TokenOrder = 'contiguous' | 'zigzag';
export const TOKEN_ORDERS: readonly TokenOrder[] = ['contiguous', 'zigzag'];

export const lengthOf = ({ start, end }: Span): number => end - start;
export const totalOf = (spans: readonly Span[]): number => spans.reduce((sum, span) => sum + lengthOf(span), 0);

/** Part `i` of `parts` of `length` tokens; sizes differ by at most one. */
const part = (length: number, parts: number, i: number): Span => ({
  start: Math.floor((i * length) / parts),
  end: Math.floor(((i + 1) * length) / parts),
});

/** Spans in the order of their tokens, without empty ones, neighbours as one. */
export function joinSpans(spans: readonly Span[]): Span[] {
  const joined: Span[] = [];
  for (const span of [...spans].sort((a, b) => a.start - b.start)) {
    if (lengthOf(span) === 0) continue;
    const last = joined.at(-1);
    if (last?.end === span.start) joined[joined.length - 1] = { start: last.start, end: span.end };
    else joined.push(span);
  }
  return joined;
}

/**
 * What `rank` of `ranks` holds of a sequence, in the order in which it lies in its memory. No rank holds anything where
 * `length` is 0, and some hold nothing where it is below the number of parts.
 */
export function spansOf(length: number, ranks: number, rank: number, order: TokenOrder): Span[] {
  if (order === 'contiguous') return joinSpans([part(length, ranks, rank)]);
  return joinSpans([part(length, 2 * ranks, rank), part(length, 2 * ranks, 2 * ranks - 1 - rank)]);
}

/** A stretch of tokens that is moved: `length` of them from `from` on in one memory to `to` on in another. */
export interface Move {
  readonly from: number;
  readonly to: number;
  readonly length: number;
}

/** Where the tokens of `source` lie in a memory that holds `target`, which contains them all. */
export function movesOf(source: readonly Span[], target: readonly Span[]): Move[] {
  const moves: Move[] = [];
  let from = 0;
  for (const { start, end } of source) {
    let to = 0;
    for (const inside of target) {
      const [first, last] = [Math.max(start, inside.start), Math.min(end, inside.end)];
      if (first < last) {
        moves.push({ from: from + first - start, to: to + first - inside.start, length: last - first });
      }
      to += lengthOf(inside);
    }
    from += end - start;
  }
  return moves;
}
