/**
 * Brings the tiles that new tokens touch together, so that they are quantized as sequences of one tile each. Codes of K share scales over a tile:
 * the tokens that its unfinished tile holds already are kept as they came, a tile for each page.
 *
 * One CTA takes one tile of one head. The first of a sequence's also keeps what its last tile holds, after it has read what was kept: they
 * may be of the same page.
 */
import type { DType } from '../../../../tensor/dtype.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Parameter, Reg } from '../../ptx/types.ts';
import { BLOCK_K } from '../mma-sync/config.ts';
import { divide, integers, KEY_VALUE_STRIDES, offset, offset64, pointers } from '../parts/addresses.ts';
import { BYTES, type LoadWidth } from '../parts/elements.ts';
import { loadHeld, loadPage, type PageParameters, pageParameters } from '../parts/pages.ts';
import { SEQUENCE_INTS } from '../parts/sequences.ts';

export interface GatherConfig {
  readonly target: Target;
  readonly dtype: DType;
  readonly headDim: number;
  readonly valueDim: number;
  /** Elements of the largest load that the caller's K and V allow. */
  readonly loadWidths: Readonly<Record<'key' | 'value', LoadWidth>>;
  readonly pageTokens: number;
}

export const GATHER_THREADS = 128;
/**
 * The caller's `k` and `v`; `[head, page, tile, dim]` of each page's unfinished tile; `[head, row, tile, dim]` of the tiles touched; and
 * the table of these (`parts/sequences.ts`).
 */
export const GATHER_POINTERS = ['k', 'v', 'keptKey', 'keptValue', 'gatheredKey', 'gatheredValue', 'sequences'] as const;
/** `tilesOfSequence`: at most touched; `appended`: tokens. */
export const GATHER_INTEGERS = ['heads', 'rows', 'tilesOfSequence', 'appended'] as const;

interface Place {
  readonly b: KernelBuilder;
  readonly pages: PageParameters;
  readonly thread: Reg<'u32'>;
  readonly sequence: Reg<'u32'>;
  readonly head: Reg<'u32'>;
  readonly row: Reg<'u32'>;
  readonly rows: Reg<'u32'>;
  /** Position of the first new token. */
  readonly start: Reg<'s32'>;
}

/** One of K and V: where it comes from and goes to. */
interface Operand {
  readonly dim: number;
  /** Bytes of a load. */
  readonly chunk: number;
  readonly rowBytes: number;
  /** Of the head in the caller's tensor. */
  readonly given: Reg<'global'>;
  readonly stride: Reg<'u64'>;
  readonly kept: Parameter<'u64'>;
  readonly gathered: Parameter<'u64'>;
}

export function gatherPages(config: GatherConfig): Kernel {
  const { pageTokens } = config;
  const b = new KernelBuilder({ name: 'gatherPages', target: config.target, threads: GATHER_THREADS });
  const pointer = pointers(b, GATHER_POINTERS);
  const integer = integers(b, GATHER_INTEGERS);
  const stride = pointers(b, KEY_VALUE_STRIDES);
  const pages = pageParameters(b);

  b.section('which tile');
  const thread = b.special('%tid.x');
  const [head, row] = divide(b, b.special('%ctaid.x'), b.loadParameter(integer.heads));
  const [number, sequence] = divide(b, row, b.loadParameter(integer.tilesOfSequence));
  const { length, validPages } = loadHeld(b, pages, pageTokens, sequence);
  const appended = b.as(b.loadParameter(integer.appended), 's32');
  const start = b.sub(b.as(length, 's32'), appended);
  const tile = b.add(b.shr(b.as(b.max(start, 0), 'u32'), 6), number);
  const tileStart = b.shl(tile, 6);
  // Beyond the last token there is nothing to look up, and of a bad page nothing to do.
  const [count, page] = [b.constant('u32', 0), b.loadParameter(pages.poolPages)];
  const tokens = b.mov(b.constant('u32', 0));
  b.if(b.setp('lt', tileStart, length), () => {
    b.mov(loadPage(b, pages, sequence, pageOf(b, tile, pageTokens), validPages), page);
    b.min(b.sub(length, tileStart), BLOCK_K, tokens);
  });
  b.when(b.setp('lt', page, validPages), () => b.mov(tokens, count));

  b.when(b.setp('eq', b.or(b.as(thread, 'b32'), b.as(head, 'b32')), 0), () => {
    const zero = b.constant('u32', 0);
    const tilesOfPage = pageTokens / BLOCK_K;
    const tileInPool = b.mad(page, tilesOfPage, b.and(tile, tilesOfPage - 1));
    const own = offset(b, b.loadPointer(pointer.sequences), row, SEQUENCE_INTS * 4);
    b.stVector([zero, zero, b.shl(row, 6), count], own);
    b.stVector([zero, b.shl(tileInPool, 6), zero, count], own, 16);
  });

  const place = { b, pages, thread, sequence, head, row, rows: b.loadParameter(integer.rows), start };
  const operands = (['key', 'value'] as const).map((which): Operand => {
    const bytes = BYTES[config.dtype];
    const [dim, name] = which === 'key' ? [config.headDim, 'Key' as const] : [config.valueDim, 'Value' as const];
    const given = offset64(
      b,
      b.loadPointer(which === 'key' ? pointer.k : pointer.v),
      sequence,
      b.loadParameter(stride[`${which}Batch`]),
    );
    return {
      ...{ dim, chunk: Math.min(16, config.loadWidths[which] * bytes), rowBytes: dim * bytes },
      given: offset64(b, given, head, b.loadParameter(stride[`${which}Head`])),
      stride: b.loadParameter(stride[`${which}Token`]),
      ...{ kept: pointer[`kept${name}`], gathered: pointer[`gathered${name}`] },
    };
  });

  for (const operand of operands) gather(place, operand, { page, tileStart, count });
  b.barSync();
  const last = b.shr(b.sub(length, 1), 6);
  // A tile that is full is done with.
  const isOpen = b.setp('ne', b.and(length, BLOCK_K - 1), 0);
  b.if(b.andPred(b.setp('eq', number, 0), isOpen), () => {
    const lastPage = loadPage(b, pages, sequence, pageOf(b, last, pageTokens), validPages);
    b.if(b.setp('lt', lastPage, validPages), () => {
      for (const operand of operands) keep(place, operand, { page: lastPage, tileStart: b.shl(last, 6), length });
    });
  });
  return b.build();
}

const pageOf = (b: KernelBuilder, tile: Reg<'u32'>, pageTokens: number) => b.shr(tile, Math.log2(pageTokens / BLOCK_K));

/** Emits `copy` for each load of a tile's tokens, those of a thread one after the other. */
function eachChunk(
  { b, thread }: Place,
  { rowBytes, chunk }: Operand,
  tokens: Reg<'u32'>,
  copy: (token: Reg<'u32'>, byte: Reg<'u32'>) => void,
): void {
  const perRow = rowBytes / chunk;
  const index = b.mov(thread);
  b.loop(
    () => b.setp('lt', index, b.mul(tokens, perRow)),
    () => {
      const token = b.div(index, perRow);
      copy(token, b.mul(b.sub(index, b.mul(token, perRow)), chunk));
      b.add(index, GATHER_THREADS, index);
    },
  );
}

/** Where a tile's token lies among tiles of whole rows. */
function inTiles(
  { b }: Place,
  { rowBytes }: Operand,
  tiles: Parameter<'u64'>,
  tile: Reg<'u32'>,
  token: Reg<'u32'>,
  byte: Reg<'u32'>,
): Reg<'global'> {
  const row = offset(b, offset(b, b.loadPointer(tiles), tile, BLOCK_K * rowBytes), token, rowBytes);
  return offset(b, row, byte, 1);
}

const keptTile = ({ b, pages, head }: Place, page: Reg<'u32'>) => b.mad(head, b.loadParameter(pages.poolPages), page);

/** Where a new token lies. */
const givenAt = ({ b, start }: Place, { given, stride }: Operand, position: Reg<'u32'>, byte: Reg<'u32'>) =>
  offset(b, offset64(b, given, b.as(b.sub(b.as(position, 's32'), start), 'u32'), stride), byte, 1);

interface Tile {
  readonly page: Reg<'u32'>;
  readonly tileStart: Reg<'u32'>;
}

function gather(place: Place, operand: Operand, { page, tileStart, count }: Tile & { count: Reg<'u32'> }): void {
  const { b, head, row, rows, start } = place;
  b.section('tokens of the tile: kept ones and new ones');
  eachChunk(place, operand, count, (token, byte) => {
    const position = b.add(tileStart, token);
    const source = inTiles(place, operand, operand.kept, keptTile(place, page), token, byte);
    b.if(b.setp('ge', b.as(position, 's32'), start), () => b.mov(givenAt(place, operand, position, byte), source));
    const target = inTiles(place, operand, operand.gathered, b.mad(head, rows, row), token, byte);
    copyChunk(b, operand.chunk, source, target);
  });
}

function keep(place: Place, operand: Operand, { page, tileStart, length }: Tile & { length: Reg<'u32'> }): void {
  const { b, start } = place;
  b.section('new tokens of the last tile');
  const first = b.max(b.as(tileStart, 's32'), start);
  const skipped = b.as(b.sub(first, b.as(tileStart, 's32')), 'u32');
  eachChunk(place, operand, b.sub(length, b.as(first, 'u32')), (fresh, byte) => {
    const token = b.add(skipped, fresh);
    const target = inTiles(place, operand, operand.kept, keptTile(place, page), token, byte);
    copyChunk(b, operand.chunk, givenAt(place, operand, b.add(tileStart, token), byte), target);
  });
}

function copyChunk(b: KernelBuilder, bytes: number, source: Reg<'global'>, target: Reg<'global'>): void {
  if (bytes === 16 || bytes === 8) b.stVector(b.ldVector('b32', bytes === 16 ? 4 : 2, source), target);
  else b.st(b.ld(bytes === 4 ? 'b32' : 'b16', source), target);
}
