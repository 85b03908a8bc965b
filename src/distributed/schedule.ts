/**
 * Who computes what and what is sent, as data: the ranks carry it out, the prediction times it, tests count its bytes.
 *
 * Ranks are a table of `ring` rows and `ulysses` columns, rank = row * ulysses + column. A row exchanges heads for tokens
 * (DeepSpeed-Ulysses, arXiv 2309.14509): after it every rank of the row has the row's tokens of its column's heads. Keys and values
 * go round the columns (ring attention, arXiv 2310.01889), so that each rank meets all keys of its heads. Both together are USP
 * (arXiv 2405.07719).
 */
import type { Band } from '../attention/band.ts';
import { InvalidArgumentError } from '../errors.ts';
import { type Block, blocksOf } from './blocks.ts';
import { joinSpans, lengthOf, type Move, movesOf, type Span, spansOf, type TokenOrder, totalOf } from './shards.ts';

export interface Topology {
  /** Ranks among which heads are divided. */
  readonly ulysses: number;
  /** Ranks among which keys and values go round. */
  readonly ring: number;
}

/** What is attended to, over all ranks. */
export interface ShardedShape {
  readonly batch: number;
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly queryLength: number;
  readonly keyLength: number;
  readonly headDim: number;
  readonly valueDim: number;
  readonly queryOrder: TokenOrder;
  readonly keyOrder: TokenOrder;
  /** Of the whole sequence; its alignment is settled. */
  readonly limits: Pick<Band, 'lower' | 'upper'>;
  /** Keys that every rank has, before the others or behind them. */
  readonly joint?: { readonly length: number; readonly where: 'front' | 'back' };
  /** A mask is cut into the spans' rows and columns. */
  readonly masked: boolean;
}

/** Heads of a column. */
export interface HeadRange {
  readonly query: Span;
  readonly kv: Span;
}

/** Keys that a rank attends to at once: one span of one owner's, for the column's heads. */
export interface Meeting {
  /** The rank that quantizes them; `joint`: each rank does itself. */
  readonly owner: number | 'joint';
  /** Which of the owner's spans. */
  readonly part: number;
  readonly keys: Span;
  readonly blocks: readonly Block[];
}

/** A piece of a tensor of tokens that goes to another rank of the row, or stays. */
export interface RowExchange {
  readonly rank: number;
  /** From the rank's own tokens to the row's. */
  readonly moves: readonly Move[];
  readonly heads: Span;
}

export interface RankSchedule {
  readonly rank: number;
  readonly heads: HeadRange;
  /** The rank's own tokens of Q and the output. */
  readonly queries: readonly Span[];
  /** The rank's own tokens of K and V. */
  readonly keys: readonly Span[];
  /** The row's tokens of Q, which the rank attends from. */
  readonly rowQueries: readonly Span[];
  /** What every rank of the row holds of them, and which heads of its own it gets. */
  readonly row: readonly RowExchange[];
  /** Which heads of K and V every rank of the row gets. */
  readonly rowKvHeads: readonly { readonly rank: number; readonly heads: Span }[];
  /** A round attends to what a row of ranks owns; meanwhile it goes to `next`, but for the last round's. */
  readonly rounds: readonly (readonly Meeting[])[];
  readonly next: number;
  readonly previous: number;
}

/** @throws {InvalidArgumentError} heads that cannot be divided, ranks that are not as many as the group's */
export function validateTopology(
  { ulysses, ring }: Topology,
  ranks: number,
  queryHeads: number,
  kvHeads: number,
): void {
  for (const [argument, value] of [
    ['options.ulysses', ulysses],
    ['options.ring', ring],
  ] as const) {
    if (!Number.isInteger(value) || value < 1) {
      throw new InvalidArgumentError('invalid-option', argument, 'a whole number from 1', String(value));
    }
  }
  if (ulysses * ring !== ranks) {
    throw new InvalidArgumentError(
      'invalid-option',
      'options.ulysses',
      `ulysses * ring = ${ranks}, the ranks of the group`,
      `${ulysses} * ${ring}`,
    );
  }
  if (queryHeads % ulysses !== 0) {
    throw new InvalidArgumentError(
      'unsupported-size',
      'q',
      `heads that ulysses = ${ulysses} divides`,
      `${queryHeads} heads`,
    );
  }
  if (kvHeads % ulysses !== 0 && ulysses % kvHeads !== 0) {
    throw new InvalidArgumentError(
      'unsupported-size',
      'k',
      `heads that ulysses = ${ulysses} divides, or that divide it`,
      `${kvHeads} heads`,
    );
  }
}

/** Heads of one column; where there are fewer heads of K than columns, several have the same one. */
function headsOf({ queryHeads, kvHeads }: ShardedShape, { ulysses }: Topology, column: number): HeadRange {
  const each = queryHeads / ulysses;
  const first = Math.floor((column * kvHeads) / ulysses);
  return {
    query: { start: column * each, end: (column + 1) * each },
    kv: { start: first, end: first + Math.max(1, Math.floor(kvHeads / ulysses)) },
  };
}

/** What one rank does. The topology must have passed {@link validateTopology}. */
export function scheduleOf(shape: ShardedShape, topology: Topology, rank: number): RankSchedule {
  const { ulysses, ring } = topology;
  const ranks = ulysses * ring;
  const [row, column] = [Math.floor(rank / ulysses), rank % ulysses];
  const rowRanks = (of: number) => Array.from({ length: ulysses }, (_, i) => of * ulysses + i);
  const queriesOf = (of: number) => spansOf(shape.queryLength, ranks, of, shape.queryOrder);
  const keysOf = (of: number) => spansOf(shape.keyLength, ranks, of, shape.keyOrder);
  const rowQueries = joinSpans(rowRanks(row).flatMap(queriesOf));
  const meet = (owner: number | 'joint', part: number, keys: Span, bySpan: boolean): Meeting => ({
    owner,
    part,
    keys,
    blocks: blocksOf(rowQueries, keys, shape.limits, bySpan),
  });
  const rounds = Array.from({ length: ring }, (_, round) =>
    rowRanks((row - round + ring) % ring).flatMap((owner) =>
      keysOf(owner).map((keys, part) => meet(owner, part, keys, shape.masked)),
    ),
  );
  const { joint } = shape;
  if (joint !== undefined && joint.length > 0) {
    const start = joint.where === 'front' ? -joint.length : shape.keyLength;
    // With what is at hand at once, while the others are on their way.
    rounds[0]?.unshift(meet('joint', 0, { start, end: start + joint.length }, false));
  }
  return {
    rank,
    heads: headsOf(shape, topology, column),
    queries: queriesOf(rank),
    keys: keysOf(rank),
    rowQueries,
    row: rowRanks(row).map((other) => ({
      rank: other,
      moves: movesOf(queriesOf(other), rowQueries),
      heads: headsOf(shape, topology, other % ulysses).query,
    })),
    rowKvHeads: rowRanks(row).map((other) => ({ rank: other, heads: headsOf(shape, topology, other % ulysses).kv })),
    rounds,
    next: (((row + 1) % ring) * ulysses + column) % ranks,
    previous: (((row - 1 + ring) % ring) * ulysses + column) % ranks,
  };
}

/** Bytes of one element of what travels. */
export interface WireFormat {
  /** Of Q and the output. */
  readonly query: number;
  /** Of K and V, their scales included. */
  readonly keyValue: number;
}

/** What a rank sends in one call. */
export interface SentBytes {
  /** To other ranks of its row: Q and output both ways, and K and V. */
  readonly ulysses: number;
  /** To the next row. */
  readonly ring: number;
}

/**
 * Bytes that a rank sends. For equal shards of length L / P: Ulysses `(L/P) (P-1)/P (2 Hq e_q + 2 Hkv e_kv) D`, ring
 * `2 L Hkv D e_kv (P-1)/P`.
 */
export function sentBytes(shape: ShardedShape, schedule: RankSchedule, { query, keyValue }: WireFormat): SentBytes {
  const { batch, headDim, valueDim } = shape;
  const { rank, row, rowKvHeads, rounds, heads } = schedule;
  const [own, ownKeys] = [totalOf(schedule.queries), totalOf(schedule.keys)];
  let ulysses = 0;
  for (const other of row) {
    if (other.rank === rank) continue;
    ulysses += batch * own * lengthOf(other.heads) * headDim * query;
    // The output of the other's tokens goes back to it.
    const others = other.moves.reduce((sum, { length }) => sum + length, 0);
    ulysses += batch * others * lengthOf(heads.query) * valueDim * query;
  }
  for (const other of rowKvHeads) {
    if (other.rank !== rank) ulysses += batch * ownKeys * lengthOf(other.heads) * (headDim + valueDim) * keyValue;
  }
  let ring = 0;
  for (const meetings of rounds.slice(0, -1)) {
    for (const { owner, keys } of meetings) {
      if (owner !== 'joint') ring += batch * lengthOf(keys) * lengthOf(heads.kv) * (headDim + valueDim) * keyValue;
    }
  }
  return { ulysses, ring };
}

/** `1 + 2 + ... + n` */
const triangle = (n: number) => (n > 0 ? (n * (n + 1)) / 2 : 0);

/** Scores of rows 0 to `rows - 1` and keys 0 to `keys - 1` in a band. */
function visibleScores(rows: number, keys: number, { lower, upper }: Pick<Band, 'lower' | 'upper'>): number {
  if (lower > upper) return 0;
  // Keys up to i + limit, of row i, over all rows: those below 0 and beyond the last are cut.
  const upTo = (limit: number) => {
    const first = Math.max(0, -limit);
    const full = Math.max(first, Math.min(rows, keys - 1 - limit));
    const partial = triangle(full - 1 + limit + 1) - triangle(first + limit);
    return (full > first ? partial : 0) + Math.max(0, rows - full) * keys;
  };
  const below = (limit: number) => (limit <= -rows ? 0 : upTo(limit));
  return below(upper) - below(lower - 1);
}

/** Scores that a rank computes, over all heads: 4 D operations each where D = Dv. */
export function scoresOf({ batch }: ShardedShape, { rounds, heads }: RankSchedule, round?: number): number {
  const chosen = round === undefined ? rounds : [rounds[round] ?? []];
  let scores = 0;
  for (const { blocks, keys } of chosen.flat()) {
    const columns = lengthOf(keys);
    for (const { queries, band } of blocks) {
      const rows = lengthOf(queries);
      scores += visibleScores(rows, columns, band);
    }
  }
  return scores * batch * lengthOf(heads.query);
}
