/**
 * What a sharded call takes, on a virtual clock: the schedule that the ranks carry out, with measured rates of the device and of the
 * links instead of devices. A prediction, to choose a topology by; not a measurement.
 */
import { NO_LIMIT } from '../attention/band.ts';
import {
  type RankSchedule,
  type ShardedShape,
  scheduleOf,
  scoresOf,
  sentBytes,
  type Topology,
  validateTopology,
  type WireFormat,
} from './schedule.ts';
import { lengthOf, totalOf } from './shards.ts';

/** Rates of one rank's device and of its link to any other. */
export interface Rates {
  /** Operations a second of the attention kernel. */
  readonly attention: number;
  /** Bytes a second of device memory, which quantizing and merging are bound by. */
  readonly memory: number;
  /** Bytes a second that one rank sends while it receives as many. */
  readonly link: number;
  /** Seconds before the first byte of a copy. */
  readonly latency: number;
}

/** Seconds. */
export interface Prediction {
  /** When the last rank has its output. */
  readonly total: number;
  /** Of it, what the rank that computes longest does not compute. */
  readonly exposed: number;
  /** What the rank that computes longest computes. */
  readonly compute: number;
  /** Bytes that the rank that sends most sends. */
  readonly sent: number;
}

/** Bytes of q, k, v or output that one rank reads or writes. */
const bytesOf = (shape: ShardedShape, tokens: number, heads: number, dim: number, bytes: number) =>
  shape.batch * tokens * heads * dim * bytes;

/** One rank's times that need no other rank. */
function ownTimes(shape: ShardedShape, schedule: RankSchedule, wire: WireFormat, rates: Rates) {
  const { headDim, valueDim } = shape;
  const { heads, keys, rowQueries } = schedule;
  const ownKeys = bytesOf(shape, totalOf(keys), shape.kvHeads, headDim + valueDim, 1);
  // K is read twice (statistics, codes), V once; codes are written.
  const quantize = (ownKeys * (1.5 * wire.query + wire.keyValue)) / rates.memory;
  const parts = schedule.rounds.flat().reduce((sum, { blocks }) => sum + blocks.length, 0);
  const rows = bytesOf(shape, totalOf(rowQueries), lengthOf(heads.query), valueDim, wire.query);
  const merge = ((parts + 1) * rows) / rates.memory;
  const rounds = schedule.rounds.map((_, round) => {
    return (2 * scoresOf(shape, schedule, round) * (headDim + valueDim)) / rates.attention;
  });
  return { quantize, merge, rounds };
}

/** What is attended to, for {@link predictSharded}. */
export interface PredictOptions {
  /** Tokens of the whole sequence. */
  readonly tokens: number;
  /** Heads of Q. */
  readonly heads: number;
  /** Heads of K and V; default as many. */
  readonly kvHeads?: number;
  readonly headDim: number;
  /** Default false. With it tokens are in `'zigzag'` order. */
  readonly isCausal?: boolean;
  /** Bytes an element of K and V as they travel; default 1, as they do; 2 is what 16-bit K and V would take. */
  readonly keyValueBytes?: number;
}

/**
 * What a topology would take on devices of these rates: a virtual clock runs the ranks' schedules. A prediction to choose by, not a
 * measurement; see the guide for both side by side.
 */
export function predictSharded(options: PredictOptions, topology: Topology, rates: Rates): Prediction {
  const { heads, kvHeads = heads, keyValueBytes = 1 } = options;
  validateTopology(topology, topology.ulysses * topology.ring, heads, kvHeads);
  return predict(shapeOf(options), topology, rates, { query: 2, keyValue: keyValueBytes });
}

/** One sequence's attention to itself, in the order that divides its work evenly. */
export function shapeOf(options: Omit<PredictOptions, 'keyValueBytes'>): ShardedShape {
  const { tokens, heads, kvHeads = heads, headDim, isCausal = false } = options;
  const order = isCausal ? 'zigzag' : 'contiguous';
  return {
    batch: 1,
    queryHeads: heads,
    kvHeads,
    queryLength: tokens,
    keyLength: tokens,
    headDim,
    valueDim: headDim,
    queryOrder: order,
    keyOrder: order,
    limits: { lower: -NO_LIMIT, upper: isCausal ? 0 : NO_LIMIT },
    masked: false,
  };
}

/** Runs the ranks' schedules on a virtual clock. */
export function predict(shape: ShardedShape, topology: Topology, rates: Rates, wire: WireFormat): Prediction {
  const ranks = topology.ulysses * topology.ring;
  const schedules = Array.from({ length: ranks }, (_, rank) => scheduleOf(shape, topology, rank));
  const own = schedules.map((schedule) => ownTimes(shape, schedule, wire, rates));
  const sent = schedules.map((schedule) => sentBytes(shape, schedule, wire));
  const send = (bytes: number) => (bytes === 0 ? 0 : rates.latency + bytes / rates.link);
  // Q, K and V of the row are there before the first product; the output goes back after the last.
  const outputShare =
    (2 * wire.query * shape.queryHeads) / (2 * wire.query * shape.queryHeads + 2 * wire.keyValue * shape.kvHeads) / 2;
  const compute = own.map(
    ({ quantize, merge, rounds }) => quantize + merge + rounds.reduce((sum, each) => sum + each, 0),
  );
  const start = own.map(
    ({ quantize }, rank) => quantize + send((sent[rank] as { ulysses: number }).ulysses * (1 - outputShare)),
  );
  const rowStart = start.map((_, rank) => {
    const row = (schedules[rank] as RankSchedule).row.map((other) => start[other.rank] as number);
    return Math.max(...row);
  });
  const done = rowStart.map((time) => time);
  let arrived = rowStart.map((time) => time);
  for (let round = 0; round < topology.ring; round++) {
    const computing = done.map((time, rank) => Math.max(time, arrived[rank] as number));
    // A rank passes on what it has got while it attends to it.
    const next = arrived.map((_, rank) => {
      const { previous } = schedules[rank] as RankSchedule;
      const bytes = (sent[previous] as { ring: number }).ring / Math.max(1, topology.ring - 1);
      return Math.max(arrived[previous] as number, arrived[rank] as number) + send(bytes);
    });
    for (let rank = 0; rank < ranks; rank++) {
      done[rank] = (computing[rank] as number) + ((own[rank] as { rounds: number[] }).rounds[round] as number);
    }
    arrived = next;
  }
  const finished = done.map((time, rank) => time + (own[rank] as { merge: number }).merge);
  const total = Math.max(
    ...finished.map((time, rank) => {
      const row = (schedules[rank] as RankSchedule).row.map((other) => finished[other.rank] as number);
      return Math.max(time, ...row) + send((sent[rank] as { ulysses: number }).ulysses * outputShare);
    }),
  );
  const most = Math.max(...compute);
  return {
    total,
    compute: most,
    exposed: total - most,
    sent: Math.max(...sent.map(({ ulysses, ring }) => ulysses + ring)),
  };
}
