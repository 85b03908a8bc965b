/**
 * The blocks of scores that a rank computes from its queries and some keys: each is an ordinary attention problem with a band
 * of its own, and what no row sees is no block.
 */
import { type Band, NO_LIMIT } from '../attention/band.ts';
import { lengthOf, type Span } from './shards.ts';

/** Keys `lower` to `upper` of a row, counted from the row's own place. */
export type Limits = Pick<Band, 'lower' | 'upper'>;

/** Some rows, which count in the rank's memory, and all the keys. */
export interface Block {
  readonly queries: Span;
  /** Token of the first row. */
  readonly token: number;
  /** Of the block's first row and the first key. */
  readonly band: Band;
}

const clip = (limit: number) => Math.max(-NO_LIMIT, Math.min(NO_LIMIT, limit));
/** The same band where keys count from a place `by` further on; no limit stays none. */
const moved = ({ lower, upper }: Limits, by: number): Limits => ({
  lower: lower <= -NO_LIMIT ? lower : clip(lower - by),
  upper: upper >= NO_LIMIT ? upper : clip(upper - by),
});

type Seen = 'none' | 'all' | 'some';

/** What rows of one span see of keys of another, all counted on one line. */
function seen(queries: Span, keys: Span, { lower, upper }: Limits): Seen {
  const least = keys.start - (queries.end - 1);
  const most = keys.end - 1 - queries.start;
  if (lower > upper || most < lower || least > upper) return 'none';
  return least >= lower && most <= upper ? 'all' : 'some';
}

/** A span of rows where it lies in memory. */
interface Rows {
  readonly tokens: Span;
  readonly local: Span;
}

/** One band in memory's own places that shows all of these rows exactly what the tokens' band does; undefined: there is none. */
function commonLimits(rows: readonly Rows[], keys: Span, limits: Limits): Limits | undefined {
  const shiftOf = ({ tokens, local }: Rows) => tokens.start - local.start;
  const cut = rows.find(({ tokens }) => seen(tokens, keys, limits) === 'some');
  const common = cut === undefined ? { lower: -NO_LIMIT, upper: NO_LIMIT } : moved(limits, -shiftOf(cut));
  const agrees = rows.every((row) => {
    const sees = seen(row.tokens, keys, limits);
    return sees === 'some' ? shiftOf(row) === shiftOf(cut as Rows) : seen(row.local, keys, common) === sees;
  });
  return agrees ? common : undefined;
}

/**
 * Blocks that cover what rows of `queries` see of `keys`, no score twice.
 *
 * @param queries spans that lie one after another in memory
 * @param limits the band of the whole sequence: a row at token i sees keys `i + lower` to `i + upper`
 * @param bySpan a block's rows are of one span, as where the rows of a mask must be cut
 */
export function blocksOf(queries: readonly Span[], keys: Span, limits: Limits, bySpan: boolean): Block[] {
  if (lengthOf(keys) === 0) return [];
  const groups: Rows[][] = [];
  let at = 0;
  let broken = true;
  for (const tokens of queries) {
    const row = { tokens, local: { start: at, end: at + lengthOf(tokens) } };
    at = row.local.end;
    const isSeen = lengthOf(tokens) > 0 && seen(tokens, keys, limits) !== 'none';
    const group = broken || bySpan ? undefined : groups.at(-1);
    if (isSeen) {
      if (group !== undefined && commonLimits([...group, row], keys, limits) !== undefined) group.push(row);
      else groups.push([row]);
    }
    broken = !isSeen;
  }
  return groups.map((rows) => {
    const [first, last] = [rows[0] as Rows, rows.at(-1) as Rows];
    const { lower, upper } = moved(commonLimits(rows, keys, limits) as Limits, keys.start - first.local.start);
    return {
      queries: { start: first.local.start, end: last.local.end },
      token: first.tokens.start,
      band: { lower, upper, align: 0 as const },
    };
  });
}
