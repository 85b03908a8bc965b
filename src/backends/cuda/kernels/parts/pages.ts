/**
 * Keys and values in pages: runs of a fixed number of tokens anywhere in a pool, in the order that a table on the device says, as serving
 * engines keep them (PagedAttention, arXiv 2309.06180). The pool is laid out as one sequence of all its pages, so only the
 * place of a tile of keys is another.
 *
 * A number that is no page's is never followed: in its place stands the page behind the last, whose keys are not finite, so that rows
 * that see it become NaN. A length that its sequence has no room for makes all of its pages that one.
 */
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Parameter, Reg } from '../../ptx/types.ts';
import { integers, offset, pointers } from './addresses.ts';

/** `pages`: int32 `[sequence, pagesPerSequence]`; `lengths`: int32, tokens of each sequence. */
export const PAGE_POINTERS = ['pages', 'lengths'] as const;
/** `poolPages`: pages that a table may name. */
export const PAGE_INTEGERS = ['poolPages', 'pagesPerSequence'] as const;

export type PageParameters = Readonly<
  Record<(typeof PAGE_POINTERS)[number], Parameter<'u64'>> & Record<(typeof PAGE_INTEGERS)[number], Parameter<'u32'>>
>;

export const pageParameters = (b: KernelBuilder): PageParameters => ({
  ...pointers(b, PAGE_POINTERS),
  ...integers(b, PAGE_INTEGERS),
});

/** Tokens that a sequence holds, and how many of the pages in the pool count for it: none where its length is out of range. */
export interface HeldTokens {
  readonly length: Reg<'u32'>;
  readonly validPages: Reg<'u32'>;
}

/**
 * Reads a sequence's length.
 *
 * @param inside default: always; elsewhere the length is 0
 */
export function loadHeld(
  b: KernelBuilder,
  parameters: PageParameters,
  pageTokens: number,
  sequence: Reg<'u32'>,
  inside?: Reg<'pred'>,
): HeldTokens {
  const length = b.constant('u32', 0);
  const address = offset(b, b.loadPointer(parameters.lengths), sequence, 4);
  const load = () => b.ld('u32', address, 0, { into: length });
  if (inside === undefined) load();
  else b.when(inside, load);
  const room = b.mul(b.loadParameter(parameters.pagesPerSequence), pageTokens);
  // Negative ones are above all others.
  const fits = b.setp('le', length, room);
  const validPages = b.selp(b.loadParameter(parameters.poolPages), b.constant('u32', 0), fits);
  return { length: b.min(length, room), validPages };
}

/** The page that a sequence has at a place in its row of the table; `poolPages`, the one behind the last, where that is none. */
export function loadPage(
  b: KernelBuilder,
  parameters: PageParameters,
  sequence: Reg<'u32'>,
  place: Reg<'u32'>,
  validPages: Reg<'u32'>,
): Reg<'u32'> {
  const entry = b.mad(sequence, b.loadParameter(parameters.pagesPerSequence), place);
  const page = b.ld('u32', offset(b, b.loadPointer(parameters.pages), entry, 4));
  return b.selp(page, b.loadParameter(parameters.poolPages), b.setp('lt', page, validPages));
}
