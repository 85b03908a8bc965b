/** What one rank does in a sharded call; all ranks run it at the same time. */
import type { AttentionOptions } from '../attention/options.ts';
import { type AttentionProblem, createProblem } from '../attention/problem.ts';
import type { KernelChoice, RunContext } from '../backends/backend.ts';
import type { DType } from '../tensor/dtype.ts';
import { contiguousStrides, slice, specOf, type TensorView } from '../tensor/tensor.ts';
import type { Block } from './blocks.ts';
import type { Connection, Incoming, Link, Outgoing } from './link.ts';
import type { KeyValueSlot, Mark, Merge, Partial, Place } from './place.ts';
import { headsOf, RowMember, tokensOf } from './row.ts';
import type { Meeting, RankSchedule } from './schedule.ts';
import { lengthOf, type Span, totalOf } from './shards.ts';

/** Tensors are `[B,H,L,D]` views. */
export interface RankInputs {
  readonly q: TensorView;
  readonly k: TensorView;
  readonly v: TensorView;
  readonly joint?: { readonly k: TensorView; readonly v: TensorView };
  /** `[1 or B, 1 or Hq, 1 or Lq, 1 or Lk]` of the whole sequence. */
  readonly attnMask?: TensorView;
}

export interface RankSetup {
  readonly place: Place;
  readonly schedule: RankSchedule;
  readonly kernel: KernelChoice;
  /** Without what the schedule has settled: band, mask, layout. */
  readonly options: Pick<AttentionOptions, 'smScale' | 'softcap'>;
  /** Of the shapes, strides and offsets that all calls have. */
  readonly inputs: RankInputs;
}

/** One call of a rank. */
export interface RankCall {
  readonly inputs: RankInputs;
  /** `[B,Hq,own tokens,Dv]`, to be written. */
  readonly output: TensorView;
  /** `[B,Hq,own tokens,1]` */
  readonly lse: TensorView | undefined;
  readonly context: RunContext;
}

/** A contiguous tensor like another, of a shape of its own, without its memory. */
const describe = (view: TensorView, shape: readonly number[]): TensorView => ({
  ...specOf('k', view),
  shape,
  strides: contiguousStrides(shape),
  offset: 0,
});

const withHeads = (view: TensorView, heads: Span, tokens: number) =>
  describe(view, [view.shape[0] as number, lengthOf(heads), tokens, view.shape[3] as number]);

const nameOf = ({ owner, part }: Pick<Meeting, 'owner' | 'part'>) => `kv ${owner} ${part}`;

/** A span of the rank's own keys, quantized for one rank of the row. */
interface OwnKeys {
  readonly to: number;
  readonly part: number;
  readonly heads: Span;
  readonly start: number;
  readonly length: number;
  readonly slot: KeyValueSlot;
}

/** A meeting with its slot, and a problem for each of its blocks. */
interface PlannedMeeting {
  readonly meeting: Meeting;
  readonly slot: KeyValueSlot;
  readonly blocks: readonly { readonly block: Block; readonly problem: AttentionProblem }[];
}

/** What one rank does in every call of the same shapes: problems, slots and launches are made once. */
export class RankPlan {
  readonly #setup: RankSetup;
  readonly #own: readonly OwnKeys[];
  readonly #rounds: readonly (readonly PlannedMeeting[])[];
  readonly #merge: Merge;
  readonly #member: RowMember;

  constructor(setup: RankSetup) {
    this.#setup = setup;
    this.#member = new RowMember(setup.place, setup.schedule);
    this.#merge = setup.place.merge();
    let rooms = 0;
    const slot = (k: TensorView, v: TensorView, room = rooms++) => {
      const problem = createProblem(k, k, v, { ...setup.options, tensorLayout: 'HND' });
      return setup.place.keyValue(problem, setup.kernel, room);
    };
    this.#own = this.#planOwn(slot);
    const first = (setup.schedule.rounds[0] ?? []).map((meeting) =>
      this.#planMeeting(meeting, this.#slotOf(meeting, slot)),
    );
    // Two sets of rooms: one is attended to while the other is written to.
    const meetings = Math.max(0, ...setup.schedule.rounds.slice(1).map(({ length }) => length));
    const base = rooms;
    const later = setup.schedule.rounds.slice(1).map((round, r) =>
      round.map((meeting, i) => {
        const [k, v] = this.#describe(meeting);
        return this.#planMeeting(meeting, slot(k, v, base + (r % 2) * meetings + i));
      }),
    );
    this.#rounds = [first, ...later];
  }

  /** The rank's own heads first: it can begin with them. */
  #planOwn(slot: (k: TensorView, v: TensorView) => KeyValueSlot): OwnKeys[] {
    const { schedule, inputs } = this.#setup;
    const isOwn = (other: { readonly rank: number }) => other.rank === schedule.rank;
    const mates = [...schedule.rowKvHeads.filter(isOwn), ...schedule.rowKvHeads.filter((other) => !isOwn(other))];
    return mates.flatMap(({ rank: to, heads }) => {
      let start = 0;
      return schedule.keys.map((span, part) => {
        const length = lengthOf(span);
        const [k, v] = [inputs.k, inputs.v].map((view) => tokensOf(headsOf(view, heads), start, length)) as [
          TensorView,
          TensorView,
        ];
        const own = { to, part, heads, start, length, slot: slot(k, v) };
        start += length;
        return own;
      });
    });
  }

  /** K and V of a meeting as they would lie here before they were quantized. */
  #describe({ owner, keys }: Meeting): [k: TensorView, v: TensorView] {
    const { inputs, schedule } = this.#setup;
    const { kv } = schedule.heads;
    if (owner === 'joint') {
      const { k, v } = inputs.joint as { k: TensorView; v: TensorView };
      return [headsOf(k, kv), headsOf(v, kv)];
    }
    return [withHeads(inputs.k, kv, lengthOf(keys)), withHeads(inputs.v, kv, lengthOf(keys))];
  }

  #slotOf(meeting: Meeting, slot: (k: TensorView, v: TensorView) => KeyValueSlot): KeyValueSlot {
    const { rank } = this.#setup.schedule;
    const own = this.#own.find(({ to, part }) => to === rank && meeting.owner === rank && part === meeting.part);
    return own?.slot ?? slot(...this.#describe(meeting));
  }

  #planMeeting(meeting: Meeting, slot: KeyValueSlot): PlannedMeeting {
    const { schedule, inputs, options } = this.#setup;
    const [k, v] = this.#describe(meeting);
    const q =
      schedule.row.length === 1 ? inputs.q : withHeads(inputs.q, schedule.heads.query, totalOf(schedule.rowQueries));
    const blocks = meeting.blocks.map((block) => {
      const { queries, band } = block;
      const attnMask = this.#maskOf(inputs, meeting, block);
      const problem = createProblem(tokensOf(q, queries.start, lengthOf(queries)), k, v, {
        ...options,
        tensorLayout: 'HND',
        returnLse: true,
        ...(attnMask && { attnMask }),
      });
      return { block, problem: { ...problem, band } };
    });
    return { meeting, slot, blocks };
  }

  /** The rows and columns of the mask that are a block's. */
  #maskOf({ attnMask }: RankInputs, { owner, keys }: Meeting, { queries, token }: Block): TensorView | undefined {
    if (attnMask === undefined || owner === 'joint') return undefined;
    const cut = (view: TensorView, axis: number, start: number, length: number) =>
      view.shape[axis] === 1 ? view : slice(view, axis, start, start + length);
    const { query } = this.#setup.schedule.heads;
    const ofHeads = cut(attnMask, 1, query.start, lengthOf(query));
    return cut(cut(ofHeads, 2, token, lengthOf(queries)), 3, keys.start, lengthOf(keys));
  }

  async #quantize({ inputs, context }: RankCall): Promise<void> {
    for (const { heads, start, length, slot } of this.#own) {
      await slot.fill(
        tokensOf(headsOf(inputs.k, heads), start, length),
        tokensOf(headsOf(inputs.v, heads), start, length),
        context,
      );
    }
    const joint = this.#rounds[0]?.find(({ meeting }) => meeting.owner === 'joint');
    if (joint === undefined) return;
    const { k, v } = inputs.joint as { k: TensorView; v: TensorView };
    const { kv } = this.#setup.schedule.heads;
    await joint.slot.fill(headsOf(k, kv), headsOf(v, kv), context);
  }

  /**
   * Every rank of the row gets its heads of this rank's queries, keys and values.
   *
   * @returns the row's queries of this rank's heads
   */
  async #exchangeInputs(link: Link, { inputs: { q } }: RankCall): Promise<TensorView> {
    const { schedule, place } = this.#setup;
    const { rank, row } = schedule;
    if (row.length === 1) return q;
    const outgoing: Outgoing[] = this.#own
      .filter(({ to }) => to !== rank)
      .map(({ to, part, slot }) => ({ to, name: nameOf({ owner: rank, part }), value: slot }));
    const incoming: Incoming[] = (this.#rounds[0] ?? []).flatMap(({ meeting, slot }) =>
      meeting.owner === 'joint' || meeting.owner === rank
        ? []
        : [{ from: meeting.owner, name: nameOf(meeting), into: slot }],
    );
    const queries = this.#member.toRow(q, 'q');
    place.waitFor(await link.exchange([...outgoing, ...queries.outgoing], [...incoming, ...queries.incoming]));
    return queries.take();
  }

  /** What a round attends to goes to the next rank while this one attends to it, and what the next round attends to comes. */
  async #passOn(link: Link, round: number): Promise<Mark | undefined> {
    const { next, previous } = this.#setup.schedule;
    const coming = this.#rounds[round + 1];
    if (coming === undefined) return undefined;
    const travelling = (meetings: readonly PlannedMeeting[]) =>
      meetings.filter(({ meeting }) => meeting.owner !== 'joint');
    return link.exchange(
      travelling(this.#rounds[round] ?? []).map(({ meeting, slot }) => ({
        to: next,
        name: nameOf(meeting),
        value: slot,
      })),
      travelling(coming).map(({ meeting, slot }) => ({ from: previous, name: nameOf(meeting), into: slot })),
    );
  }

  async #attend(
    q: TensorView,
    planned: PlannedMeeting,
    { inputs, context }: RankCall,
    parts: Partial[],
  ): Promise<void> {
    const { meeting, slot, blocks } = planned;
    for (const { block, problem } of blocks) {
      context.signal?.throwIfAborted();
      const { queries } = block;
      const attnMask = this.#maskOf(inputs, meeting, block);
      const rows = tokensOf(q, queries.start, lengthOf(queries));
      const made = await slot.attend(rows, problem, attnMask === undefined ? {} : { attnMask }, context);
      const { output, lse } = made as { output: TensorView; lse: TensorView };
      this.#member.keep(output, lse);
      parts.push({ queries, output, lse });
    }
  }

  /** Enqueues the rank's work of one call. */
  async run(link: Link, call: RankCall): Promise<void> {
    const { place, schedule } = this.#setup;
    const { output, lse, inputs } = call;
    const own = new Set(this.#own.map(({ slot }) => slot));
    for (const { meeting, slot } of this.#rounds.flat()) if (meeting.owner !== 'joint' && !own.has(slot)) slot.open();
    await this.#quantize(call);
    const q = await this.#exchangeInputs(link, call);
    const parts: Partial[] = [];
    for (const [round, meetings] of this.#rounds.entries()) {
      const coming = await this.#passOn(link, round);
      for (const planned of meetings) await this.#attend(q, planned, call, parts);
      if (coming !== undefined) place.waitFor(coming);
    }
    if (schedule.row.length === 1) this.#merge.run(parts, output, lse);
    else {
      const rows = [inputs.q.shape[0] as number, lengthOf(schedule.heads.query), totalOf(schedule.rowQueries)];
      const gathered = this.#member.empty([...rows, output.shape[3] as number], output.dtype as DType);
      const gatheredLse = lse && this.#member.empty([...rows, 1], 'float32');
      this.#merge.run(parts, gathered, gatheredLse);
      const back = [this.#member.fromRow(gathered, output, 'output')];
      if (lse !== undefined) back.push(this.#member.fromRow(gatheredLse as TensorView, lse, 'lse'));
      const outgoing = back.flatMap((each) => each.outgoing);
      place.waitFor(
        await link.exchange(
          outgoing,
          back.flatMap((each) => each.incoming),
        ),
      );
      for (const { take } of back) take();
    }
    await link.finish();
  }

  /** Frees what the call made, after what was enqueued for it. */
  endCall(): void {
    this.#member.free();
    for (const { slot } of [...this.#own, ...this.#rounds.flat()]) slot.release();
  }

  dispose(): void {
    for (const { slot } of [...this.#own, ...this.#rounds.flat()]) slot.dispose();
    this.#merge.dispose();
  }
}

/** A rank's part of a call. */
export interface RankWork {
  run(link: Link): Promise<void>;
  /** Frees what the call made, after what was enqueued for it. */
  endCall(): void;
}

/**
 * Runs the ranks of this process.
 *
 * @param ranks of the works
 * @throws {SageAttentionError} the error of the rank that failed first; every rank has ended then, and nothing is held
 */
export async function runRanks(
  connection: Connection,
  works: readonly RankWork[],
  ranks: readonly number[],
): Promise<void> {
  let failed: { readonly error: unknown } | undefined;
  await Promise.all(
    works.map(async (work, i) => {
      try {
        await work.run(connection.links[i] as Link);
      } catch (error) {
        failed ??= { error };
        connection.abort(ranks[i] as number, error);
      }
    }),
  );
  try {
    await connection.close();
  } catch (error) {
    // A device that was lost; what it made is given up all the same.
    failed ??= { error };
  }
  for (const work of works) work.endCall();
  if (failed !== undefined) throw failed.error;
}
