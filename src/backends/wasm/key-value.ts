/** Keys and values held as tiles between calls. */

import { type AttentionProblem, keyMaskLayout } from '../../attention/problem.ts';
import { ExecutionError } from '../../errors.ts';
import type { TensorView } from '../../tensor/tensor.ts';
import type {
  AttentionOutputs,
  KernelChoice,
  KeyValueContext,
  PreparedKeyValue,
  RunContext,
  SideInputs,
} from '../backend.ts';
import { type Arithmetic, arithmeticOf, attendCall, flagsOf, placed, workOf } from './calls.ts';
import { type TileGeometry, tileGeometry } from './geometry.ts';
import { BLOCK_K, FLAG_TILE_MEANS } from './job.ts';
import { jobSettings, NO_ADDRESSES, NO_SEQUENCE, prepareUnits, recordBytes, tilesOf, writeRecords } from './records.ts';
import type { CallParts, Runtime } from './runtime.ts';
import { keep, stageMask, stageOperand } from './staging.ts';

/** Tiles of one head that a cache has room for at least. */
const LEAST_TILES = 2;

export class WasmKeyValue implements PreparedKeyValue {
  readonly #runtime: Runtime;
  readonly #arithmetic: Arithmetic;
  readonly #geometry: TileGeometry;
  /** Heads of all sequences. */
  readonly #pairs: number;
  #length = 0;
  /** Tiles that each head has room for. */
  #capacity = 0;
  #tiles = 0;
  readonly #means: number;
  readonly #meanBytes: number;
  /** Values, then keys, of the last tile while it is partly filled, then which of them count. */
  readonly #tail: number;
  readonly #valueTailBytes: number;
  readonly #keyTailBytes: number;
  readonly #tailBytes: number;
  /** Calls that use the memory; it is freed after the last. */
  #users = 0;
  #disposed = false;
  #broken: unknown;

  constructor(runtime: Runtime, problem: AttentionProblem, choice: KernelChoice) {
    this.#runtime = runtime;
    this.#arithmetic = arithmeticOf(choice);
    this.#geometry = tileGeometry(problem.headDim, problem.valueDim, runtime.simd, this.#arithmetic);
    const { headDimPadded, valueDimPadded } = this.#geometry;
    this.#pairs = problem.batch * problem.kvHeads;
    this.#meanBytes = this.#pairs * (headDimPadded + valueDimPadded) * 4;
    this.#valueTailBytes = this.#pairs * BLOCK_K * valueDimPadded * 4;
    this.#keyTailBytes = this.#pairs * BLOCK_K * headDimPadded * 4;
    this.#tailBytes = this.#valueTailBytes + this.#keyTailBytes + this.#pairs * BLOCK_K;
    const { memory } = runtime.executor;
    this.#means = memory.allocate(this.#meanBytes);
    try {
      this.#tail = memory.allocate(this.#tailBytes);
    } catch (error) {
      memory.free(this.#means, this.#meanBytes);
      throw error;
    }
    // Tiles have means of their own.
    runtime.executor.write(this.#means, new Uint8Array(this.#meanBytes));
  }

  get length(): number {
    return this.#length;
  }

  /**
   * Makes room for so many tokens; doubles, so that appending token by token copies each tile a bounded number of
   * times.
   */
  #reserve(tokens: number): void {
    const needed = tilesOf(tokens);
    if (needed <= this.#capacity) return;
    const { memory } = this.#runtime.executor;
    const capacity = Math.max(LEAST_TILES, needed, this.#length === 0 ? 0 : 2 * this.#capacity);
    const { bytes } = this.#geometry;
    const tiles = memory.allocate(this.#pairs * capacity * bytes);
    const held = tilesOf(this.#length) * bytes;
    for (let pair = 0; pair < this.#pairs && held > 0; pair++) {
      this.#runtime.executor.copy(this.#tiles + pair * this.#capacity * bytes, tiles + pair * capacity * bytes, held);
    }
    this.#freeTiles();
    this.#tiles = tiles;
    this.#capacity = capacity;
  }

  #freeTiles(): void {
    if (this.#capacity === 0) return;
    this.#runtime.executor.memory.free(this.#tiles, this.#pairs * this.#capacity * this.#geometry.bytes);
    this.#capacity = 0;
  }

  /** Throws where the memory no longer holds what it should: an earlier call failed, or the executor ended. */
  #assertIntact(): void {
    const { ended } = this.#runtime.executor;
    if (ended?.code === 'disposed') {
      throw new ExecutionError('disposed', 'the backend that held the prepared keys and values was disposed', ended);
    }
    const cause = this.#broken ?? ended;
    if (cause !== undefined) {
      throw new ExecutionError('execution-failed', 'the prepared keys and values were lost in a failure', cause);
    }
  }

  /** Runs `work` with the memory held. */
  async #use<R>(work: () => Promise<R>): Promise<R> {
    if (this.#disposed) throw new ExecutionError('disposed', 'the prepared keys and values have been disposed');
    this.#assertIntact();
    this.#users++;
    try {
      return await work();
    } finally {
      this.#users--;
      this.#freeUnused();
    }
  }

  #appendCall(
    k: TensorView,
    v: TensorView,
    problem: AttentionProblem,
    keyMask: TensorView | undefined,
  ): CallParts<void> {
    const { batch, kvHeads, headDim, valueDim, keyLength: added } = problem;
    const extent = { batch, heads: kvHeads, tokens: added };
    let stagedK = stageOperand('k', k, problem.k, { ...extent, dim: headDim });
    let stagedV = stageOperand('v', v, problem.v, { ...extent, dim: valueDim });
    let stagedMask = keyMask && stageMask(keyMask, keyMaskLayout(keyMask), [batch, 1, 1, added]);
    return {
      keepInputs: () => {
        stagedK = keep(stagedK);
        stagedV = keep(stagedV);
        stagedMask &&= keep(stagedMask);
      },
      prepare: (lease) => {
        this.#assertIntact();
        const start = this.#length;
        const end = start + added;
        this.#reserve(end);
        const layouts = {
          q: undefined,
          k: stagedK.layout,
          v: stagedV.layout,
          mask: stagedMask?.layout,
          blocks: undefined,
        };
        const sequences = Array.from({ length: batch }, (_, i) => ({
          ...NO_SEQUENCE,
          rowsDiffer: true,
          mask: i * (stagedMask?.layout.strides[0] ?? 0),
          k: stagedK.layout.offset + i * stagedK.layout.batchStride,
          v: stagedV.layout.offset + i * stagedV.layout.batchStride,
          keyLength: end,
          firstTile: i * this.#capacity,
          tiles: this.#capacity,
          start,
        }));
        const units = prepareUnits(sequences, kvHeads);
        const flags = flagsOf(this.#arithmetic) | FLAG_TILE_MEANS;
        const address = lease.allocate(recordBytes(sequences.length, units.length));
        const records = writeRecords(
          address,
          jobSettings(problem, this.#geometry, flags, layouts),
          {
            ...NO_ADDRESSES,
            mask: placed(lease, stagedMask),
            k: placed(lease, stagedK),
            v: placed(lease, stagedV),
            tiles: this.#tiles,
            means: this.#means,
            tail: this.#tail,
            keyTail: this.#tail + this.#valueTailBytes,
            tailSeen: this.#tail + this.#valueTailBytes + this.#keyTailBytes,
          },
          sequences,
          units,
        );
        this.#runtime.executor.write(address, records);
        return {
          stages: [{ entry: 'prepare', job: address }],
          units: units.length,
          extraScratch: 0,
          // Quantizing is all there is, so its share of a call's work is counted over the tokens that are new.
          work: workOf({ ...problem, queryLength: 0, keyLength: added }),
          finish: async () => {
            this.#length = end;
          },
        };
      },
    };
  }

  /** Adds tokens. It is short and cannot be aborted half way, which would leave the cache incomplete. */
  append(k: TensorView, v: TensorView, problem: AttentionProblem, context: KeyValueContext): Promise<void> {
    return this.#use(async () => {
      context.signal?.throwIfAborted();
      const added = problem.keyLength;
      if (added === 0 || this.#pairs === 0) {
        this.#length += added;
        return;
      }
      const call = this.#appendCall(k, v, problem, context.keyMask);
      try {
        await this.#runtime.run({}, call);
      } catch (error) {
        // Memory that could not be had changes nothing; anything else may have come half way.
        if (!(error instanceof ExecutionError && error.code === 'out-of-memory')) this.#broken = error;
        throw error;
      }
    });
  }

  attend(q: TensorView, problem: AttentionProblem, side: SideInputs, context: RunContext): Promise<AttentionOutputs> {
    return this.#use(() =>
      this.#runtime.run(
        context,
        attendCall(
          this.#runtime,
          problem,
          this.#arithmetic,
          q,
          side,
          () => {
            // Calls that waited their turn may find what an earlier one left.
            this.#assertIntact();
            return { tiles: this.#tiles, means: this.#means, tilesPerHead: this.#capacity };
          },
          context.out,
        ),
      ),
    );
  }

  #freeUnused(): void {
    if (!this.#disposed || this.#users > 0) return;
    const { memory } = this.#runtime.executor;
    this.#freeTiles();
    memory.free(this.#means, this.#meanBytes);
    memory.free(this.#tail, this.#tailBytes);
  }

  dispose(): void {
    if (this.#disposed) return;
    this.#disposed = true;
    this.#freeUnused();
  }
}
