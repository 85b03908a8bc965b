/**
 * What one rank does in a sharded backward pass. It has the final logsumexp of its rows, so that a block's gradients are those of the
 * whole sequence: they are only added. Keys and values go round as in the forward pass, in their own dtype, since the backward kernels
 * read them; gradients of keys go straight to the row that owns them.
 */
import { withCachedBackward } from '../api/plan-cache.ts';
import { type BackwardPrecision, createBackwardProblem, type GradientOptions } from '../attention/backward.ts';
import type { AttentionOptions } from '../attention/options.ts';
import { type AttentionProblem, createProblem } from '../attention/problem.ts';
import type { KernelChoice, RunContext } from '../backends/backend.ts';
import type { DType } from '../tensor/dtype.ts';
import type { TensorView } from '../tensor/tensor.ts';
import type { Incoming, Link, Outgoing } from './link.ts';
import type { Place } from './place.ts';
import { headsOf, RowMember, tokensOf } from './row.ts';
import type { Meeting, RankSchedule } from './schedule.ts';
import { lengthOf, totalOf } from './shards.ts';

/** Tensors are `[B,H,L,D]` views of the rank's own tokens. */
export interface BackwardRankCall {
  readonly place: Place;
  /** Of every rank. */
  readonly schedules: readonly RankSchedule[];
  readonly rank: number;
  /** Ranks of a row. */
  readonly ulysses: number;
  readonly kernel: KernelChoice;
  readonly precision: BackwardPrecision;
  readonly options: Pick<AttentionOptions, 'smScale' | 'softcap'>;
  readonly gradient: Pick<GradientOptions, 'deterministic'>;
  readonly inputs: Readonly<Record<'q' | 'k' | 'v' | 'output' | 'lse' | 'dOutput', TensorView>>;
  /** To be written. */
  readonly gradients: Readonly<Record<'dq' | 'dk' | 'dv', TensorView>>;
  readonly context: RunContext;
}

/** Keys and values of a meeting as they came, contiguous. */
interface Met {
  readonly meeting: Meeting;
  readonly k: TensorView;
  readonly v: TensorView;
}

interface Part {
  readonly start: number;
  readonly values: TensorView;
}

/** Gradients of a meeting's keys and values, float32. */
interface KeyGradients {
  readonly meeting: Meeting;
  readonly dk: TensorView;
  readonly dv: TensorView;
}

type RowTensors = Readonly<Record<'q' | 'output' | 'lse' | 'dOutput', TensorView>>;

const nameOf = (what: string, { owner, part }: Meeting) => `${what} ${owner} ${part}`;

export class BackwardRank {
  readonly #call: BackwardRankCall;
  readonly #member: RowMember;
  readonly #schedule: RankSchedule;

  constructor(call: BackwardRankCall) {
    this.#call = call;
    this.#schedule = call.schedules[call.rank] as RankSchedule;
    this.#member = new RowMember(call.place, this.#schedule);
  }

  /** The rank of this column `rows` rows further back, or ahead where it is negative. */
  #neighbour(rows: number): number {
    const { rank, ulysses, schedules } = this.#call;
    const ranks = schedules.length;
    return (((rank - rows * ulysses) % ranks) + ranks) % ranks;
  }

  #emptyKeys(keys: Meeting['keys']): [k: TensorView, v: TensorView] {
    const { k, v } = this.#call.inputs;
    const heads = lengthOf(this.#schedule.heads.kv);
    const shape = (view: TensorView) => [view.shape[0] as number, heads, lengthOf(keys), view.shape[3] as number];
    return [this.#member.empty(shape(k), k.dtype as DType), this.#member.empty(shape(v), v.dtype as DType)];
  }

  /** The rank's own keys of some heads, by span. */
  #ownKeys(part: number, heads: RankSchedule['heads']['kv']): [k: TensorView, v: TensorView] {
    const { keys } = this.#schedule;
    const start = totalOf(keys.slice(0, part));
    const { k, v } = this.#call.inputs;
    const cut = (view: TensorView) =>
      this.#member.packed(tokensOf(headsOf(view, heads), start, lengthOf(keys[part] as Meeting['keys'])));
    return [cut(k), cut(v)];
  }

  /** Every rank of the row gets its heads of everything that this rank holds. */
  async #exchangeInputs(link: Link): Promise<{ readonly rows: RowTensors; readonly met: Met[] }> {
    const { inputs, place, rank } = this.#call;
    const { rowKvHeads, keys, rounds, heads } = this.#schedule;
    const outgoing: Outgoing[] = [];
    const incoming: Incoming[] = [];
    for (const other of rowKvHeads) {
      if (other.rank === rank) continue;
      for (const part of keys.keys()) {
        const [k, v] = this.#ownKeys(part, other.heads);
        outgoing.push({ to: other.rank, name: `k ${part}`, value: k }, { to: other.rank, name: `v ${part}`, value: v });
      }
    }
    const met = (rounds[0] ?? []).map((meeting): Met => {
      const owner = meeting.owner as number;
      if (owner === rank) {
        const [k, v] = this.#ownKeys(meeting.part, heads.kv);
        return { meeting, k, v };
      }
      const [k, v] = this.#emptyKeys(meeting.keys);
      incoming.push(
        { from: owner, name: `k ${meeting.part}`, into: k },
        { from: owner, name: `v ${meeting.part}`, into: v },
      );
      return { meeting, k, v };
    });
    const names = ['q', 'output', 'lse', 'dOutput'] as const;
    const transfers = names.map((name) => this.#member.toRow(inputs[name], name));
    const ready = await link.exchange(
      [...outgoing, ...transfers.flatMap((each) => each.outgoing)],
      [...incoming, ...transfers.flatMap((each) => each.incoming)],
    );
    place.waitFor(ready);
    const rows = Object.fromEntries(names.map((name, i) => [name, transfers[i]?.take()])) as unknown as RowTensors;
    return { rows, met };
  }

  /** Gradients of one meeting's blocks; those of queries are added to `queryParts`. */
  async #differentiate(
    rows: RowTensors,
    { meeting, k, v }: Met,
    queryParts: Part[],
  ): Promise<KeyGradients | undefined> {
    const { place, options, kernel, precision, gradient, context } = this.#call;
    const { backend } = place;
    const parts: { dk: Part; dv: Part }[] = [];
    for (const { queries, band } of meeting.blocks) {
      context.signal?.throwIfAborted();
      const length = lengthOf(queries);
      const rowsOf = (view: TensorView) => tokensOf(view, queries.start, length);
      const [q, output, dOutput] = [rows.q, rows.output, rows.dOutput].map(rowsOf) as [
        TensorView,
        TensorView,
        TensorView,
      ];
      const lse = flat(this.#member.packed(rowsOf(rows.lse)));
      const attention: AttentionProblem = {
        ...createProblem(q, k, v, { ...options, tensorLayout: 'HND', returnLse: true }),
        band,
      };
      const results = { output, lse, dOutput };
      const options32 = { ...gradient, gradientDtype: 'float32' } as const;
      const problem = {
        ...createBackwardProblem(attention, results as never, undefined, options32, precision),
        // Of one round; the others' keys are elsewhere.
        partOfKeys: true as const,
      };
      const { dq, dk, dv } = await withCachedBackward(
        backend,
        problem,
        kernel,
        (plan) => plan.run({ q, k, v, ...results } as never, context),
        () => undefined,
      );
      this.#member.keep(dq, dk, dv);
      queryParts.push({ start: queries.start, values: dq });
      parts.push({ dk: { start: 0, values: dk }, dv: { start: 0, values: dv } });
    }
    if (parts.length === 0) return undefined;
    return { meeting, dk: this.#added(parts.map(({ dk }) => dk)), dv: this.#added(parts.map(({ dv }) => dv)) };
  }

  /** Parts of the same rows as one, float32. */
  #added(parts: readonly Part[]): TensorView {
    const [first, ...rest] = parts as [Part, ...Part[]];
    if (rest.length === 0) return first.values;
    const sum = this.#member.empty(first.values.shape, 'float32');
    this.#call.place.sum(parts, sum);
    return sum;
  }

  /** What goes along with the keys of a round: gradients of the round before, to the row that owns the keys. */
  #gradientsBack(round: number, found: readonly KeyGradients[], received: KeyGradients[]): [Outgoing[], Incoming[]] {
    if (round <= 0) return [[], []];
    const to = this.#neighbour(round);
    const outgoing = found.flatMap(({ meeting, dk, dv }): Outgoing[] => [
      { to, name: nameOf('dk', meeting), value: dk },
      { to, name: nameOf('dv', meeting), value: dv },
    ]);
    const from = this.#neighbour(-round);
    const theirs = this.#call.schedules[from] as RankSchedule;
    const incoming = (theirs.rounds[round] ?? []).flatMap((meeting): Incoming[] => {
      if (meeting.blocks.length === 0) return [];
      const [dk, dv] = this.#emptyGradients(meeting);
      received.push({ meeting, dk, dv });
      return [
        { from, name: nameOf('dk', meeting), into: dk },
        { from, name: nameOf('dv', meeting), into: dv },
      ];
    });
    return [outgoing, incoming];
  }

  #emptyGradients({ keys }: Meeting, heads = lengthOf(this.#schedule.heads.kv)): [dk: TensorView, dv: TensorView] {
    const { k, v } = this.#call.inputs;
    const shape = (view: TensorView) => [view.shape[0] as number, heads, lengthOf(keys), view.shape[3] as number];
    return [this.#member.empty(shape(k), 'float32'), this.#member.empty(shape(v), 'float32')];
  }

  async run(link: Link): Promise<void> {
    const { place } = this.#call;
    const { rounds, next, previous } = this.#schedule;
    const { rows, met } = await this.#exchangeInputs(link);
    const queryParts: Part[] = [];
    const keyParts: KeyGradients[] = [];
    let [here, before]: [Met[], KeyGradients[]] = [met, []];
    for (let round = 0; round <= rounds.length; round++) {
      const [outgoing, incoming] = this.#gradientsBack(round - 1, before, keyParts);
      const coming = (rounds[round + 1] ?? []).map((meeting): Met => {
        const [k, v] = this.#emptyKeys(meeting.keys);
        return { meeting, k, v };
      });
      const passed = round + 1 < rounds.length ? here : [];
      const ready = await link.exchange(
        [...passed.flatMap(({ meeting, k, v }) => keysTo(next, meeting, k, v)), ...outgoing],
        [...coming.flatMap(({ meeting, k, v }) => keysFrom(previous, meeting, k, v)), ...incoming],
      );
      before = [];
      for (const each of round < rounds.length ? here : []) {
        const found = await this.#differentiate(rows, each, queryParts);
        if (found !== undefined) before.push(found);
      }
      if (round === 0) keyParts.push(...before);
      place.waitFor(ready);
      here = coming;
    }
    await this.#finishKeys(link, keyParts);
    await this.#finishQueries(link, rows, queryParts);
    await link.finish();
  }

  /** Adds what the rows found of this row's keys, and gives each rank of the row its own. */
  async #finishKeys(link: Link, found: readonly KeyGradients[]): Promise<void> {
    const { rank, place, gradients, schedules } = this.#call;
    const { rounds, row, rowKvHeads, keys } = this.#schedule;
    const outgoing: Outgoing[] = [];
    const incoming: Incoming[] = [];
    /** Of this rank's own keys, by span and heads. */
    const own: { part: number; heads: RankSchedule['heads']['kv']; dk: TensorView; dv: TensorView }[] = [];
    for (const meeting of rounds[0] ?? []) {
      const same = found.filter(({ meeting: other }) => other.owner === meeting.owner && other.part === meeting.part);
      const [dk, dv] = this.#emptyGradients(meeting);
      place.sum(
        same.map((each) => ({ start: 0, values: each.dk })),
        dk,
      );
      place.sum(
        same.map((each) => ({ start: 0, values: each.dv })),
        dv,
      );
      if (meeting.owner === rank) own.push({ part: meeting.part, heads: this.#schedule.heads.kv, dk, dv });
      else {
        const to = meeting.owner as number;
        outgoing.push({ to, name: nameOf('dk', meeting), value: dk }, { to, name: nameOf('dv', meeting), value: dv });
      }
    }
    for (const { rank: from } of row) {
      if (from === rank) continue;
      const { heads } = rowKvHeads.find((other) => other.rank === from) as RankSchedule['rowKvHeads'][number];
      for (const meeting of (schedules[from] as RankSchedule).rounds[0] ?? []) {
        if (meeting.owner !== rank) continue;
        const [dk, dv] = this.#emptyGradients(meeting, lengthOf(heads));
        own.push({ part: meeting.part, heads, dk, dv });
        incoming.push({ from, name: nameOf('dk', meeting), into: dk }, { from, name: nameOf('dv', meeting), into: dv });
      }
    }
    place.waitFor(await link.exchange(outgoing, incoming));
    let start = 0;
    for (const [part, span] of keys.entries()) {
      // Where columns have the same head of K, each has found a part of its gradient.
      const ranges = [...new Set(own.filter((each) => each.part === part).map(({ heads }) => heads.start))];
      for (const first of ranges) {
        const same = own.filter((each) => each.part === part && each.heads.start === first);
        const { heads } = same[0] as (typeof own)[number];
        const into = (view: TensorView) => tokensOf(headsOf(view, heads), start, lengthOf(span));
        place.sum(
          same.map(({ dk }) => ({ start: 0, values: dk })),
          into(gradients.dk),
        );
        place.sum(
          same.map(({ dv }) => ({ start: 0, values: dv })),
          into(gradients.dv),
        );
      }
      start += lengthOf(span);
    }
  }

  async #finishQueries(link: Link, { q }: RowTensors, parts: readonly Part[]): Promise<void> {
    const { place, gradients } = this.#call;
    if (this.#schedule.row.length === 1) {
      place.sum(parts, gradients.dq);
      return;
    }
    const gathered = this.#member.empty(q.shape, gradients.dq.dtype as DType);
    place.sum(parts, gathered);
    const { outgoing, incoming, take } = this.#member.fromRow(gathered, gradients.dq, 'dq');
    place.waitFor(await link.exchange(outgoing, incoming));
    take();
  }

  /** Frees what the call made, after what was enqueued for it. */
  endCall(): void {
    this.#member.free();
  }
}

const keysTo = (to: number, meeting: Meeting, k: TensorView, v: TensorView): Outgoing[] => [
  { to, name: nameOf('k', meeting), value: k },
  { to, name: nameOf('v', meeting), value: v },
];
const keysFrom = (from: number, meeting: Meeting, k: TensorView, v: TensorView): Incoming[] => [
  { from, name: nameOf('k', meeting), into: k },
  { from, name: nameOf('v', meeting), into: v },
];

/** `[B,H,L,1]` as `[B,H,L]`. */
const flat = (view: TensorView): TensorView => ({
  ...view,
  shape: view.shape.slice(0, 3),
  strides: view.strides.slice(0, 3),
});
