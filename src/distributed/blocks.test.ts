import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { NO_LIMIT } from '../attention/band.ts';
import { blocksOf } from './blocks.ts';
import { lengthOf, movesOf, type Span, spansOf, TOKEN_ORDERS, totalOf } from './shards.ts';

const order = fc.constantFrom(...TOKEN_ORDERS);
const tokensOf = (spans: readonly Span[]) =>
  spans.flatMap(({ start, end }) => Array.from({ length: end - start }, (_, i) => start + i));

describe('shards', () => {
  it('hold every token once, as evenly as can be, each rank in the order of its tokens', () => {
    fc.assert(
      fc.property(fc.nat(100), fc.integer({ min: 1, max: 9 }), order, (length, ranks, dealt) => {
        const shards = Array.from({ length: ranks }, (_, rank) => spansOf(length, ranks, rank, dealt));
        const held = shards.flatMap(tokensOf);
        expect([...held].sort((a, b) => a - b)).toEqual(Array.from({ length }, (_, i) => i));
        for (const shard of shards) expect(tokensOf(shard)).toEqual([...tokensOf(shard)].sort((a, b) => a - b));
        const sizes = shards.map(totalOf);
        expect(Math.max(...sizes) - Math.min(...sizes)).toBeLessThanOrEqual(dealt === 'zigzag' ? 2 : 1);
      }),
    );
  });

  it('are found again in a memory that holds several', () => {
    fc.assert(
      fc.property(fc.nat(60), fc.integer({ min: 1, max: 5 }), order, fc.nat(4), (length, ranks, dealt, of) => {
        const source = spansOf(length, ranks, of % ranks, dealt);
        const target: Span[] = length === 0 ? [] : [{ start: 0, end: length }];
        const memory = new Array<number>(length).fill(-1);
        const held = tokensOf(source);
        for (const { from, to, length: count } of movesOf(source, target)) {
          for (let i = 0; i < count; i++) memory[to + i] = held[from + i] as number;
        }
        for (const token of held) expect(memory[token]).toBe(token);
        expect(memory.filter((token) => token >= 0)).toHaveLength(held.length);
      }),
    );
  });
});

describe('blocksOf', () => {
  const limit = fc.oneof(fc.integer({ min: -40, max: 40 }), fc.constantFrom(-NO_LIMIT, NO_LIMIT));

  it('covers what rows see, every score once', () => {
    fc.assert(
      fc.property(
        fc.tuple(fc.nat(24), fc.nat(24), fc.integer({ min: 1, max: 4 }), fc.nat(3), fc.nat(3)),
        order,
        limit,
        limit,
        fc.boolean(),
        ([queryLength, keyLength, ranks, a, b], dealt, lower, upper, bySpan) => {
          const queries = spansOf(queryLength, ranks, a % ranks, dealt);
          for (const keys of spansOf(keyLength, ranks, b % ranks, dealt)) {
            const blocks = blocksOf(queries, keys, { lower, upper }, bySpan);
            if (bySpan) expect(blocks.length).toBeLessThanOrEqual(queries.length);
            tokensOf(queries).forEach((token, row) => {
              for (let key = 0; key < lengthOf(keys); key++) {
                const holding = blocks.filter(({ queries: rows, band }) => {
                  const distance = key - (row - rows.start);
                  const isIn = row >= rows.start && row < rows.end;
                  return isIn && distance >= band.lower && distance <= band.upper;
                });
                const distance = keys.start + key - token;
                expect(holding).toHaveLength(distance >= lower && distance <= upper ? 1 : 0);
              }
            });
          }
        },
      ),
      { numRuns: 300 },
    );
  });

  const causal = { lower: -NO_LIMIT, upper: 0 };
  it('a causal zigzag is one block for each span of keys, and all ranks compute as much', () => {
    const [length, ranks] = [64, 4];
    const spans = (rank: number) => spansOf(length, ranks, rank, 'zigzag');
    for (let rank = 0; rank < ranks; rank++) {
      for (let source = 0; source < ranks; source++) {
        const rows = spans(source).map((keys) =>
          blocksOf(spans(rank), keys, causal, false).map(({ queries }) => lengthOf(queries)),
        );
        expect(rows).toEqual(
          source === rank
            ? rank === 3
              ? [[16]]
              : [[16], [8]]
            : source < rank
              ? [[16], []]
              : source === 3
                ? [[8]]
                : [[8], [8]],
        );
      }
    }
  });

  it('a contiguous ring sees whole earlier shards and no later ones', () => {
    const spans = (rank: number) => spansOf(40, 4, rank, 'contiguous');
    const [earlier, later] = [spans(1)[0], spans(3)[0]] as [Span, Span];
    expect(blocksOf(spans(2), earlier, causal, false)).toEqual([
      { queries: { start: 0, end: 10 }, token: 20, band: { lower: -NO_LIMIT, upper: NO_LIMIT, align: 0 } },
    ]);
    expect(blocksOf(spans(2), later, causal, false)).toEqual([]);
  });
});
