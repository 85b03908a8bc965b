/**
 * Which tokens share a scale: the table of docs/how-it-works.md as index functions. The indices point
 * into the reference implementation's scale tensors, padding included: a last block that is not full still has as many
 * scales as a whole block.
 */
import type { Granularity, Tiling } from './schemes.ts';

/** Scales of one warp's rows of Q, and of one warp's columns of K, with per-thread granularity. */
const THREAD_SCALES = { query: 8, key: 4 } as const;

/** Groups of consecutive tokens of one operand of one head and sequence. */
export interface Grouping {
  /** Number of scales for so many tokens. */
  count(length: number): number;
  /** Index of a token's scale. */
  indexOf(token: number): number;
}

/** Groups of Q's tokens; see the table in docs/how-it-works.md. */
export function queryGrouping(granularity: Granularity, { blockQ, warpQ }: Tiling): Grouping {
  const blocks = (length: number) => Math.ceil(length / blockQ);
  switch (granularity) {
    case 'per-block':
      return { count: blocks, indexOf: (token) => Math.floor(token / blockQ) };
    case 'per-warp':
      return { count: (length) => blocks(length) * (blockQ / warpQ), indexOf: (token) => Math.floor(token / warpQ) };
    case 'per-thread':
      // A thread of mma.m16n8 owns rows lane / 4 and lane / 4 + 8: equal modulo 8.
      return {
        count: (length) => blocks(length) * (blockQ / warpQ) * THREAD_SCALES.query,
        indexOf: (token) => Math.floor(token / warpQ) * THREAD_SCALES.query + (token % 8),
      };
  }
}

/** Groups of K's tokens; per-warp K groups are whole blocks. */
export function keyGrouping(granularity: Granularity, { blockK, warpK }: Tiling): Grouping {
  const blocks = (length: number) => Math.ceil(length / blockK);
  if (granularity !== 'per-thread') return { count: blocks, indexOf: (token) => Math.floor(token / blockK) };
  // A thread of mma.m16n8 owns columns 2 * (lane % 4) and the next.
  return {
    count: (length) => blocks(length) * (blockK / warpK) * THREAD_SCALES.key,
    indexOf: (token) => Math.floor(token / warpK) * THREAD_SCALES.key + Math.floor((token % 8) / 2),
  };
}
