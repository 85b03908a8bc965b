/** What one rank does in a sharded call; all ranks run it at the same time. */
import type { AttentionOptions } from '../attention/options.ts';
import { createProblem } from '../attention/problem.ts';
import type { KernelChoice, RunContext } from '../backends/backend.ts';
import type { DType } from '../tensor/dtype.ts';
import { contiguousStrides, slice, specOf, type TensorView } from '../tensor/tensor.ts';
import type { Block } from './blocks.ts';
import type { Parcel, Partial, Place, Sent } from './place.ts';
import type { Post } from './post.ts';
import type { Meeting, RankSchedule } from './schedule.ts';
import { lengthOf, type Span, totalOf } from './shards.ts';

/** Tensors are `[B,H,L,D]` views. */
export interface RankCall {
  readonly place: Place;
  /** Where the other ranks are. */
  readonly places: readonly Place[];
  readonly post: Post;
  readonly schedule: RankSchedule;
  readonly kernel: KernelChoice;
  /** Without what the schedule has settled: band, mask, layout. */
  readonly options: Pick<AttentionOptions, 'smScale' | 'softcap'>;
  readonly context: RunContext;
  readonly inputs: {
    readonly q: TensorView;
    readonly k: TensorView;
    readonly v: TensorView;
    readonly joint?: { readonly k: TensorView; readonly v: TensorView };
    /** `[1 or B, 1 or Hq, 1 or Lq, 1 or Lk]` of the whole sequence. */
    readonly attnMask?: TensorView;
  };
  /** `[B,Hq,own tokens,Dv]`, to be written. */
  readonly output: TensorView;
  /** `[B,Hq,own tokens,1]` */
  readonly lse: TensorView | undefined;
}

const HEADS = 1;
const TOKENS = 2;

const headsOf = (view: TensorView, { start, end }: Span) => slice(view, HEADS, start, end);
const tokensOf = (view: TensorView, start: number, length: number) => slice(view, TOKENS, start, start + length);

/** A description of what was quantized, contiguous, without its memory. */
const describe = (view: TensorView): TensorView => ({
  ...specOf('k', view),
  strides: contiguousStrides(view.shape),
  offset: 0,
});

const nameOf = ({ owner, part }: Pick<Meeting, 'owner' | 'part'>) => `kv ${owner} ${part}`;

/** One rank in one call. */
class Rank {
  readonly #call: RankCall;
  /** Freed at the end, whatever happens: what other ranks may read until they have all ended. */
  readonly #prepared: Parcel[] = [];
  readonly #own: TensorView[] = [];

  constructor(call: RankCall) {
    this.#call = call;
  }

  #empty(shape: readonly number[], dtype: DType): TensorView {
    const view = this.#call.place.empty(shape, dtype);
    this.#own.push(view);
    return view;
  }

  #send(to: number, name: string, value: TensorView | Parcel, ready = this.#call.place.mark()): void {
    const { post, schedule } = this.#call;
    post.send(schedule.rank, to, name, { value, ready });
  }

  async #bring(from: number, name: string): Promise<TensorView> {
    const { post, schedule, place, places } = this.#call;
    const sent = await post.receive<Sent<TensorView>>(from, schedule.rank, name);
    const { value, ready } = place.bring(sent, places[from] as Place);
    if (value !== sent.value) this.#own.push(value);
    place.waitFor(ready);
    return value;
  }

  /** Begins to bring it; whoever uses it waits until it is ready. */
  async #bringParcel(from: number, name: string): Promise<Sent<Parcel>> {
    const { post, schedule, place, places } = this.#call;
    const sent = await post.receive<Sent<Parcel>>(from, schedule.rank, name);
    const brought = place.bringParcel(sent, places[from] as Place);
    if (brought.value !== sent.value) this.#prepared.push(brought.value);
    return brought;
  }

  /** Quantizes keys and values of some heads once, for whoever attends to them. */
  async #quantize(k: TensorView, v: TensorView): Promise<Parcel> {
    const { place, kernel, options, context } = this.#call;
    const problem = createProblem(k, k, v, { ...options, tensorLayout: 'HND' });
    const prepared = await place.backend.prepareKeyValue(problem, kernel, k, v, context);
    const parcel = { prepared, k: describe(k), v: describe(v) };
    this.#prepared.push(parcel);
    return parcel;
  }

  /** Sends every rank of the row its heads of this rank's tokens, and puts together what they send. */
  async #exchangeQueries(): Promise<TensorView> {
    const { schedule, inputs, place } = this.#call;
    const { rank, row, rowQueries, heads } = schedule;
    if (row.length === 1) return inputs.q;
    for (const other of row) {
      if (other.rank !== rank) this.#send(other.rank, 'q', headsOf(inputs.q, other.heads));
    }
    const [batch, , , dim] = inputs.q.shape as [number, number, number, number];
    const shape = [batch, lengthOf(heads.query), totalOf(rowQueries), dim];
    const gathered = this.#empty(shape, inputs.q.dtype as DType);
    for (const other of row) {
      const piece = other.rank === rank ? headsOf(inputs.q, heads.query) : await this.#bring(other.rank, 'q');
      for (const { from, to, length } of other.moves) {
        place.copy(tokensOf(piece, from, length), tokensOf(gathered, to, length));
      }
    }
    return gathered;
  }

  /** The other way round: every rank of the row gets its tokens of this rank's heads. */
  async #exchangeOutput(gathered: TensorView, target: TensorView, what: string): Promise<void> {
    const { schedule, place } = this.#call;
    const { rank, row } = schedule;
    for (const { rank: to, moves } of row) {
      for (const [i, move] of moves.entries()) this.#send(to, `${what} ${i}`, tokensOf(gathered, move.to, move.length));
    }
    const moves = row.find((other) => other.rank === rank)?.moves ?? [];
    for (const other of row) {
      const heads = headsOf(target, other.heads);
      for (const [i, { from, length }] of moves.entries()) {
        place.copy(await this.#bring(other.rank, `${what} ${i}`), tokensOf(heads, from, length));
      }
    }
  }

  /** The rows and columns of the mask that are a block's. */
  #maskOf({ queries, token }: Block, keys: Span): TensorView | undefined {
    const { inputs, schedule } = this.#call;
    const { attnMask } = inputs;
    if (attnMask === undefined) return undefined;
    const cut = (view: TensorView, axis: number, start: number, length: number) =>
      view.shape[axis] === 1 ? view : slice(view, axis, start, start + length);
    const { query } = schedule.heads;
    const ofHeads = cut(attnMask, HEADS, query.start, lengthOf(query));
    return cut(cut(ofHeads, 2, token, lengthOf(queries)), 3, keys.start, lengthOf(keys));
  }

  async #attend(q: TensorView, { prepared, k, v }: Parcel, { owner, keys, blocks }: Meeting): Promise<Partial[]> {
    const { options, context } = this.#call;
    const parts: Partial[] = [];
    for (const block of blocks) {
      context.signal?.throwIfAborted();
      const { queries, band } = block;
      const rows = tokensOf(q, queries.start, lengthOf(queries));
      const attnMask = owner === 'joint' ? undefined : this.#maskOf(block, keys);
      const problem = createProblem(rows, k, v, {
        ...options,
        tensorLayout: 'HND',
        returnLse: true,
        ...(attnMask && { attnMask }),
      });
      const made = await prepared.attend(
        rows,
        { ...problem, band },
        attnMask === undefined ? {} : { attnMask },
        context,
      );
      const { output, lse } = made as { output: TensorView; lse: TensorView };
      this.#own.push(output, lse);
      parts.push({ queries, output, lse });
    }
    return parts;
  }

  #quantizeJoint(): Promise<Parcel> {
    const { inputs, schedule } = this.#call;
    const { k, v } = inputs.joint as { k: TensorView; v: TensorView };
    return this.#quantize(headsOf(k, schedule.heads.kv), headsOf(v, schedule.heads.kv));
  }

  /** Every rank of the row gets its heads of this rank's keys, each span by itself; the rank's own stay. */
  async #shareKeys(): Promise<void> {
    const { schedule, inputs } = this.#call;
    const { rank, keys, rowKvHeads } = schedule;
    // The rank's own heads first: it can begin with them.
    const [own, others] = [
      rowKvHeads.filter((other) => other.rank === rank),
      rowKvHeads.filter((other) => other.rank !== rank),
    ];
    for (const other of [...own, ...others]) {
      let at = 0;
      for (const [part, span] of keys.entries()) {
        const [k, v] = [inputs.k, inputs.v].map((view) => tokensOf(headsOf(view, other.heads), at, lengthOf(span))) as [
          TensorView,
          TensorView,
        ];
        this.#send(other.rank, nameOf({ owner: rank, part }), await this.#quantize(k, v));
        at += lengthOf(span);
      }
    }
  }

  async run(): Promise<void> {
    const { schedule, inputs, place, output, lse } = this.#call;
    const { rounds, next, previous, rowQueries, heads } = schedule;
    await this.#shareKeys();
    const q = await this.#exchangeQueries();
    const parts: Partial[] = [];
    /** Begins to bring what a round meets. */
    const bringRound = (round: number) =>
      (rounds[round] ?? []).map((meeting) => {
        const { owner } = meeting;
        if (owner === 'joint') return { meeting, coming: undefined };
        const coming = this.#bringParcel(round === 0 ? owner : previous, nameOf(meeting));
        // Whoever fails first is reported; what comes then is nobody's.
        coming.catch(() => undefined);
        return { meeting, coming };
      });
    let here = bringRound(0);
    for (let round = 0; round < rounds.length; round++) {
      const parcels: { meeting: Meeting; sent: Sent<Parcel> | undefined }[] = [];
      for (const { meeting, coming } of here) {
        const sent = await coming;
        parcels.push({ meeting, sent });
        // On its way while this rank attends to it.
        if (sent !== undefined && round + 1 < rounds.length) this.#send(next, nameOf(meeting), sent.value, sent.ready);
      }
      here = bringRound(round + 1);
      for (const { meeting, sent } of parcels) {
        if (sent !== undefined) place.waitFor(sent.ready);
        parts.push(...(await this.#attend(q, sent?.value ?? (await this.#quantizeJoint()), meeting)));
      }
    }
    if (schedule.row.length === 1) {
      place.merge(parts, output, lse);
      return;
    }
    const rows = [inputs.q.shape[0] as number, lengthOf(heads.query), totalOf(rowQueries)];
    const gathered = this.#empty([...rows, output.shape[3] as number], output.dtype as DType);
    const gatheredLse = lse && this.#empty([...rows, 1], 'float32');
    place.merge(parts, gathered, gatheredLse);
    await this.#exchangeOutput(gathered, output, 'output');
    if (lse !== undefined) await this.#exchangeOutput(gatheredLse as TensorView, lse, 'lse');
  }

  dispose(): void {
    for (const { prepared } of this.#prepared) prepared.dispose();
    for (const view of this.#own) this.#call.place.free(view);
  }
}

/**
 * Runs all ranks of one process.
 *
 * @throws {SageAttentionError} the error of the rank that failed first; every rank has ended then, and nothing is held
 */
export async function runRanks(post: Post, calls: readonly RankCall[]): Promise<void> {
  const ranks = calls.map((call) => new Rank(call));
  let failed: { readonly error: unknown } | undefined;
  await Promise.all(
    ranks.map(async (rank, i) => {
      try {
        await rank.run();
      } catch (error) {
        failed ??= { error };
        post.abort((calls[i] as RankCall).schedule.rank, error);
      }
    }),
  );
  const places = [...new Set(calls.map(({ place }) => place))];
  try {
    for (const place of places) place.settle(places);
  } catch (error) {
    // A device that was lost; what it made is given up all the same.
    failed ??= { error };
  }
  for (const rank of ranks) rank.dispose();
  if (failed !== undefined) throw failed.error;
}
