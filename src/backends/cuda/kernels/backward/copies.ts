/** Copies of own tokens and of those that pass by from global to shared memory. */
import type { SharedTile } from '../../ptx/layouts.ts';
import type { Reg } from '../../ptx/types.ts';
import { offset } from '../parts/addresses.ts';
import { type TileCopy, tileCopy } from '../parts/copies.ts';
import { CODE_ROW_TOKENS, needsTrueScores, OPERAND_BYTES } from './config.ts';
import { type Frame, GRADIENT_THREADS, type Passing, type ThreadPlace, type Work } from './frame.ts';

/** A buffer `[head, token, ...]`. */
type Buffer = 'query' | 'key' | 'queryOperand' | 'keyOperand' | 'valueOperand' | 'outputGradient';
/** Codes `[head, 32 tokens, channel, 32 codes]`. */
type Transposed = 'queryTransposed' | 'keyTransposed' | 'outputGradientTransposed';

export class StreamCopies {
  readonly #frame: Frame;
  readonly #place: ThreadPlace;
  readonly #work: Work;
  readonly #copies = new Map<SharedTile, TileCopy>();

  constructor(frame: Frame, place: ThreadPlace, work: Work) {
    this.#frame = frame;
    this.#place = place;
    this.#work = work;
    const { own, stream } = frame;
    const widths = this.#rowBytes();
    const tiles = [
      [own.codes, widths.codes],
      [own.values, widths.values],
      [stream.codes, widths.codes],
      [stream.values, widths.values],
      [stream.valueCodes, CODE_ROW_TOKENS],
      [stream.channels, widths.channels],
    ] as const;
    for (const [tile, bytes] of tiles) {
      if (tile !== undefined) this.#copies.set(tile, tileCopy(frame.b, tile, GRADIENT_THREADS, bytes));
    }
  }

  #rowBytes() {
    const { codeBytes, paddedDim, paddedValueDim, precision } = this.#frame.config;
    const channels = precision === 'fp16' ? paddedDim * OPERAND_BYTES : CODE_ROW_TOKENS;
    return { codes: codeBytes, values: paddedValueDim * OPERAND_BYTES, channels };
  }

  /** @param row padded row of the tile's first token in the buffer */
  #copy(
    buffer: Buffer | Transposed,
    row: Reg<'u32'>,
    rowBytes: number,
    tile: SharedTile,
    stageOffset?: Reg<'u32'>,
  ): void {
    const { b, pointer, shared } = this.#frame;
    const copy = this.#copies.get(tile) as TileCopy;
    const { row: ownRow, column } = copy.place();
    const first = offset(b, b.loadPointer(pointer[buffer]), b.add(row, ownRow), rowBytes);
    const source = b.add(first, b.as(b.mulWide(column, 16), 'global'));
    const into = b.add(shared, copy.destination);
    copy.emit(source, stageOffset === undefined ? into : b.add(into, b.as(stageOffset, 'shared')), rowBytes);
  }

  /** @param row padded row of the tile's first token, a multiple of 32 */
  #copyTransposed(
    buffer: Transposed,
    row: Reg<'u32'>,
    dim: number,
    tile: SharedTile,
    stageOffset: Reg<'u32'> | undefined,
  ): void {
    const { b } = this.#frame;
    const firstRow = b.mul(b.shr(row, Math.log2(CODE_ROW_TOKENS)), dim);
    this.#copy(buffer, firstRow, CODE_ROW_TOKENS, tile, stageOffset);
  }

  /** Padded row of a token of the queries of a head, or of the keys. */
  #queryRow(head: Reg<'u32'>, token: Reg<'u32'>): Reg<'u32'> {
    const { b, integer } = this.#frame;
    return b.add(b.mad(head, b.loadParameter(integer.paddedQueries), this.#work.paddedQueryStart), token);
  }

  #keyRow(token: Reg<'u32'>): Reg<'u32'> {
    const { b, integer } = this.#frame;
    const { keyHead, paddedKeyStart } = this.#work;
    return b.add(b.mad(keyHead, b.loadParameter(integer.paddedKeys), paddedKeyStart), token);
  }

  copyOwn(): void {
    const { own, ownsQueries } = this.#frame;
    const { head, firstOwn } = this.#work;
    const widths = this.#rowBytes();
    const row = ownsQueries ? this.#queryRow(head, firstOwn) : this.#keyRow(firstOwn);
    this.#copy(ownsQueries ? 'query' : 'key', row, widths.codes, own.codes);
    if (own.values === undefined) return;
    this.#copy(ownsQueries ? 'outputGradient' : 'valueOperand', row, widths.values, own.values);
  }

  /** {@link copyStream} and all before it, there for every thread. */
  bringStream(now: Passing): void {
    const { b } = this.#frame;
    this.copyStream(now);
    b.cpAsyncCommitGroup();
    b.cpAsyncWaitGroup(0);
    b.barSync();
  }

  copyStream({ head, tile, stage }: Passing): void {
    const { b, config, stream, stageBytes, ownsQueries } = this.#frame;
    const widths = this.#rowBytes();
    const token = b.as(b.shl(tile, Math.log2(config.streamTokens)), 'u32');
    const row = ownsQueries ? this.#keyRow(token) : this.#queryRow(head, token);
    const stageOffset = config.stages === 1 ? undefined : b.mul(stage, stageBytes);
    this.#copy(ownsQueries ? 'key' : 'query', row, widths.codes, stream.codes, stageOffset);
    if (stream.values !== undefined) {
      this.#copy(ownsQueries ? 'valueOperand' : 'outputGradient', row, widths.values, stream.values, stageOffset);
    }
    const { paddedDim, paddedValueDim, precision } = config;
    if (stream.valueCodes !== undefined) {
      this.#copyTransposed('outputGradientTransposed', row, paddedValueDim, stream.valueCodes, stageOffset);
    }
    if (stream.channels !== undefined && precision !== 'fp16') {
      const buffer = ownsQueries ? 'keyTransposed' : 'queryTransposed';
      this.#copyTransposed(buffer, row, paddedDim, stream.channels, stageOffset);
    } else if (stream.channels !== undefined) {
      const buffer = ownsQueries ? 'keyOperand' : 'queryOperand';
      this.#copy(buffer, row, widths.channels, stream.channels, stageOffset);
    }
    if (stream.rows !== undefined) this.#copyRows(stream.rows, row, stageOffset);
  }

  /** The numbers of the queries: 16 bytes for each of the first threads. */
  #copyRows(tile: SharedTile, row: Reg<'u32'>, stageOffset: Reg<'u32'> | undefined): void {
    const { b, config, pointer, shared } = this.#frame;
    const { thread } = this.#place;
    const into = b.add(b.add(shared, tile.base), b.as(b.shl(thread, 4), 'shared'));
    const at = stageOffset === undefined ? into : b.add(into, b.as(stageOffset, 'shared'));
    const quarter = b.add(row, b.shl(thread, 2));
    const names = [
      [0, 'rowScale'],
      [1, 'rowShift'],
      [2, 'rowDelta'],
      ...(needsTrueScores(config) ? ([[3, 'rowBias']] as const) : []),
      ...(config.rowWeights ? ([[4, 'rowWeight']] as const) : []),
    ] as const;
    const chunk = b.setp('lt', thread, config.streamTokens / 4);
    for (const [i, name] of names) {
      const source = offset(b, b.loadPointer(pointer[name]), quarter, 4);
      b.when(chunk, () => b.cpAsync16(at, source, i * tile.layout.rowBytes));
    }
  }
}
