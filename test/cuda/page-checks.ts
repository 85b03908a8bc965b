/**
 * Keys and values in pages (`createKeyValuePages`) against exact attention over the same tokens. `main.ts` runs these checks on a GPU, and unit
 * tests smaller ones over the simulator. The backend of the device must be the one that `sageattn` uses.
 */
import { createProblem } from '../../src/attention/problem.ts';
import {
  type CudaDevice,
  type CudaTensor,
  capture,
  createKeyValuePages,
  type DeviceMemory,
  download,
  type KeyValuePages,
  type PagedAttendOptions,
  upload,
} from '../../src/backends/cuda/index.ts';
import { lackedBy, targetFor } from '../../src/backends/cuda/kernel-table.ts';
import type { PagePlanner } from '../../src/backends/cuda/launches/pages.ts';
import { TARGET_FEATURES } from '../../src/backends/cuda/ptx/targets.ts';
import { copyToDevice } from '../../src/backends/cuda/tensor.ts';
import type { KernelName } from '../../src/index.ts';
import { attentionExact } from '../../src/reference/exact.ts';
import { compare } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { elementCount, slice, type Tensor } from '../../src/tensor/tensor.ts';
import { Random } from '../support/random.ts';
import { place, snapshot } from '../support/tensors.ts';
import type { Check } from './checks.ts';

export interface PageCase {
  readonly kernel: KernelName;
  readonly dtype: 'float16' | 'bfloat16';
  readonly kvHeads: number;
  readonly headDim: number;
  readonly valueDim: number;
  /** The longest sequence has between so many tokens and so many. */
  readonly tokens: readonly [least: number, most: number];
}

/** Where a check runs; `planner` stands in for the kernels over a simulated device. */
export interface PageTarget {
  readonly device: CudaDevice;
  readonly planner?: PagePlanner;
  readonly seed: number;
}

/** Relative L1 of an output, and how far a logsumexp may be off, on normal numbers. */
const BOUNDS: Readonly<Partial<Record<KernelName, readonly [relativeL1: number, lse: number]>>> = {
  'qk-int8-pv-fp16': [0.03, 0.07],
  'qk-int8-pv-fp16-cuda': [0.03, 0.07],
  'qk-int8-pv-fp8-cuda': [0.11, 0.07],
  'qk-fp4-pv-fp4': [0.3, 1.27],
};

/** What a card runs: whole pages and odd ones, and dims that no tile has. */
const CASES: readonly PageCase[] = (
  [
    ['qk-int8-pv-fp16-cuda', 'bfloat16', 2, 128, 128],
    ['qk-int8-pv-fp16-cuda', 'float16', 3, 72, 40],
    ['qk-int8-pv-fp16', 'float16', 1, 64, 64],
    ['qk-int8-pv-fp8-cuda', 'bfloat16', 2, 128, 128],
    ['qk-int8-pv-fp8-cuda', 'float16', 1, 72, 40],
    ['qk-fp4-pv-fp4', 'bfloat16', 2, 128, 128],
    ['qk-fp4-pv-fp4', 'float16', 1, 40, 72],
  ] as const
).map(([kernel, dtype, kvHeads, headDim, valueDim]) => ({
  ...{ kernel, dtype, kvHeads, headDim, valueDim },
  tokens: [700, 2600] as const,
}));

function check(condition: boolean, message: () => string): asserts condition {
  if (!condition) throw new Error(message());
}

/** What the checks of one case work with. */
function bench({ device, planner, seed }: PageTarget, { kernel, dtype, kvHeads, headDim, valueDim }: PageCase) {
  const random = new Random(seed);
  const held: { dispose(): void }[] = [];
  const make = (shape: readonly number[]): Tensor => place(random.normals(elementCount(shape)), shape, dtype);
  /** As `make`, but sequences and channels have magnitudes of their own, up to 2^9 apart. */
  const makeUnequal = (shape: readonly [batch: number, heads: number, tokens: number, dim: number]): Tensor => {
    const [batch, heads, tokens, dim] = shape;
    const powers = (count: number, most: number) => Array.from({ length: count }, () => 2 ** random.integer(0, most));
    const [ofSequence, ofChannel] = [powers(batch, 6), powers(dim, 3)];
    const unequal = random.normals(elementCount(shape)).map((value, i) => {
      const sequence = Math.floor(i / (heads * tokens * dim));
      return value * (ofSequence[sequence] as number) * (ofChannel[i % dim] as number);
    });
    return place(unequal, shape, dtype);
  };
  const send = (view: Tensor): CudaTensor => {
    const sent = upload(view, device);
    held.push(sent);
    return sent;
  };
  const onDevice = (numbers: Int32Array): DeviceMemory => {
    const memory = device.allocate(numbers.byteLength);
    held.push(memory);
    copyToDevice(device, memory, new Uint8Array(numbers.buffer), device.stream);
    device.stream.synchronize();
    return memory;
  };
  const poolOf = (pages: number, pageSize: number): KeyValuePages => {
    const pool = createKeyValuePages(
      device,
      { kvHeads, headDim, valueDim, dtype, pages, pageSize, kernel },
      ...(planner === undefined ? [] : [planner]),
    );
    held.push(pool);
    return pool;
  };
  /** A row of pages for each sequence, all different, in any order. */
  const tableOf = (sequences: number, pagesPerSequence: number, poolPages: number): Int32Array => {
    const all = Array.from({ length: poolPages }, (_, i) => ({ i, key: random.uniform() }));
    all.sort((a, b) => a.key - b.key);
    return Int32Array.from(all.slice(0, sequences * pagesPerSequence).map(({ i }) => i));
  };
  const free = () => {
    for (const each of held.reverse()) each.dispose();
  };
  return { random, make, makeUnequal, send, onDevice, poolOf, tableOf, free };
}

/** Prompts of unequal lengths, then one token and then several: each sequence's rows are those over its own tokens. */
async function growing(target: PageTarget, given: PageCase): Promise<string> {
  const { kernel, kvHeads, headDim, valueDim, tokens } = given;
  const { random, make, makeUnequal, send, onDevice, poolOf, tableOf, free } = bench(target, given);
  const [least, room] = tokens;
  const pageSize = random.pick([64, 128, 256]);
  const pagesPerSequence = Math.ceil(room / pageSize);
  const lengths = [random.integer(least, room), random.integer(1, 60), 0];
  const batch = lengths.length;
  const pool = poolOf(batch * pagesPerSequence + 2, pageSize);
  const pages = tableOf(batch, pagesPerSequence, pool.pages);
  const most = Math.max(...lengths);
  // FP8 has scales for the channels of each tile, which must be those of the right page.
  const makeValues = kernel === 'qk-int8-pv-fp8-cuda' ? makeUnequal : make;
  const [k, v] = [make([batch, kvHeads, most, headDim]), makeValues([batch, kvHeads, most, valueDim])];
  // Prompts of unequal lengths end together: what is missing stands before them.
  const held = (until: number) => Int32Array.from(lengths.map((length) => Math.max(0, length - (most - until))));
  const prompt = random.integer(1, most - 2);
  const ends = [prompt, prompt + 1, random.integer(prompt + 2, most), most];
  for (const [i, until] of ends.entries()) {
    const part = (view: Tensor) => send(slice(view, 2, ends[i - 1] ?? 0, until));
    pool.append(part(k), part(v), { pages, lengths: held(until) });
  }
  const table = { pages: onDevice(pages), lengths: onDevice(Int32Array.from(lengths)) };
  const heads = kvHeads * random.pick([1, 4]);
  const bottom = { causalAlignment: 'bottom-right' } as const;
  const cases: readonly (readonly [number, PagedAttendOptions])[] = [
    [1, {}],
    [1, { windowSize: [random.integer(1, 100), 0], ...bottom }],
    [random.integer(2, 20), { isCausal: true, ...bottom }],
  ];
  const [bound, off] = BOUNDS[kernel] ?? [];
  let worst = 0;
  for (const [queries, options] of cases) {
    const q = make([batch, heads, queries, headDim]);
    const { output, lse } = await pool.attend(send(q), table, { ...options, returnLse: true });
    const [out, logs] = [toFloat32(download(output)), toFloat32(download(lse))];
    output.dispose();
    lse.dispose();
    const size = heads * queries;
    for (const [sequence, length] of lengths.entries()) {
      const where = () => `${queries} queries, ${length} tokens in pages of ${pageSize}, ${JSON.stringify(options)}`;
      const own = (view: Tensor) => slice(view, 0, sequence, sequence + 1);
      const keys = (view: Tensor) => slice(own(view), 2, most - length, most);
      const operands = { q: own(q), k: keys(k), v: keys(v) };
      const problem = createProblem(operands.q, operands.k, operands.v, { ...options, returnLse: true });
      const exact = attentionExact(problem, operands);
      const rows = out.subarray(sequence * size * valueDim, (sequence + 1) * size * valueDim);
      if (length === 0) {
        check(
          rows.every((value) => value === 0),
          () => `a row of no tokens is not 0: ${where()}`,
        );
      } else {
        const { relativeL1 } = compare(rows, exact.output);
        check(relativeL1 < (bound as number), () => `relative L1 ${relativeL1}: ${where()}`);
        worst = Math.max(worst, relativeL1);
      }
      logs.subarray(sequence * size, (sequence + 1) * size).forEach((value, i) => {
        const expected = exact.lse[i] as number;
        const isRight = Number.isFinite(expected) ? Math.abs(value - expected) < (off as number) : value === expected;
        check(isRight, () => `logsumexp ${value} where ${expected} was expected: ${where()}`);
      });
    }
  }
  free();
  return `relative L1 ${worst.toFixed(4)}, pages of ${pageSize}`;
}

/** A table on the device that is out of range: rows of that sequence are NaN, and nothing is read or written elsewhere. */
async function outOfRange(target: PageTarget, given: PageCase): Promise<undefined> {
  const { kvHeads, headDim, valueDim } = given;
  const { random, make, send, onDevice, poolOf, tableOf, free } = bench(target, given);
  const [pageSize, batch] = [64, 4];
  const pool = poolOf(8, pageSize);
  const pages = tableOf(batch, 2, 8);
  const lengths = Int32Array.from({ length: batch }, () => random.integer(65, 128));
  const view = (dim: number) => send(make([batch, kvHeads, 128, dim]));
  const [k, v, q] = [view(headDim), view(valueDim), send(make([batch, kvHeads, 1, headDim]))];
  pool.append(k, v, { pages, lengths });
  const attend = async (table: { pages: Int32Array; lengths: Int32Array }) => {
    const output = await pool.attend(q, { pages: onDevice(table.pages), lengths: onDevice(table.lengths) });
    const found = toFloat32(download(output));
    output.dispose();
    return found;
  };
  const right = await attend({ pages, lengths });
  const bad = { pages: pages.slice(), lengths: lengths.slice() };
  // Sequence 1 names pages that are none, 2 has a length that its row has no room for; an entry that nobody needs may be anything.
  bad.pages[random.integer(2, 3)] = random.pick([-1, 8, 1 << 30]);
  bad.lengths[2] = random.pick([-1, 129, 0x7fffffff]);
  bad.pages[7] = 99;
  bad.lengths[3] = 64;
  // Nothing is written by such a table either.
  pool.append(k, v, {
    pages: onDevice(bad.pages),
    lengths: onDevice(Int32Array.of(0, 128, bad.lengths[2] as number, 0)),
  });
  const wrong = await attend(bad);
  const size = kvHeads * valueDim;
  const rows = (output: Float32Array, sequence: number) => output.slice(sequence * size, (sequence + 1) * size);
  const same = rows(wrong, 0).every((value, i) => Object.is(value, right[i]) && Number.isFinite(value));
  check(same, () => 'a sequence beside those out of range has other bits');
  for (const sequence of [1, 2]) {
    check(rows(wrong, sequence).every(Number.isNaN), () => `sequence ${sequence} is out of range and not NaN`);
  }
  check(rows(wrong, 3).every(Number.isFinite), () => 'an entry that nobody needs was read');
  free();
  return undefined;
}

/** One graph serves a pool that grows: the bits of a call made then. */
async function captured(target: PageTarget, given: PageCase): Promise<undefined> {
  const { device } = target;
  const { kvHeads, headDim, valueDim } = given;
  const { random, make, send, onDevice, poolOf, free } = bench(target, given);
  const pool = poolOf(4, 64);
  const count = random.integer(1, 120);
  const [pages, lengths] = [onDevice(Int32Array.of(2, 0)), onDevice(Int32Array.of(count))];
  const append = (tokens: number) => {
    const view = (dim: number) => send(make([1, kvHeads, tokens, dim]));
    pool.append(view(headDim), view(valueDim), { pages, lengths });
  };
  append(count);
  const q = send(make([1, 2 * kvHeads, 1, headDim]));
  using stream = device.createStream();
  const options = { windowSize: [70, 0], causalAlignment: 'bottom-right' } as const;
  using graph = await capture(stream, () => pool.attend(q, { pages, lengths }, options));
  for (const more of [0, 1, 7]) {
    if (more > 0) {
      const grown = Int32Array.of(count + more);
      copyToDevice(device, lengths, new Uint8Array(grown.buffer), device.stream);
      device.stream.synchronize();
      append(more);
    }
    device.stream.synchronize();
    graph.launch();
    const eager = await pool.attend(q, { pages, lengths }, options);
    const bits = (view: CudaTensor) => snapshot(download(view));
    const [ofGraph, ofCall] = [bits(graph.result), bits(eager)];
    eager.dispose();
    check(new Set(ofCall).size > 4, () => 'the result that a replay is compared with is constant');
    check(
      ofGraph.every((byte, i) => byte === ofCall[i]),
      () => `a replay over ${count + more} tokens has other bits than a call`,
    );
  }
  free();
  return undefined;
}

const nameOf = ({ kernel, dtype, headDim, valueDim }: PageCase) => `${kernel} ${dtype} D${headDim} Dv${valueDim}`;

/** The cases that a card runs; V in FP8 in pages needs FP8 products on mma.sync. */
export function pageCases(computeCapability: number): readonly PageCase[] {
  const target = targetFor(computeCapability);
  const hasFp8 = target !== undefined && TARGET_FEATURES[target].fp8Mma;
  return CASES.filter(
    ({ kernel }) => lackedBy(kernel, computeCapability) === undefined && (hasFp8 || kernel !== 'qk-int8-pv-fp8-cuda'),
  );
}

export function pageChecks(targetOf: () => PageTarget, cases: readonly PageCase[]): Check[] {
  return cases.flatMap((given) => [
    {
      name: `${nameOf(given)}: rows are those of each sequence, however its tokens were appended`,
      run: () => growing(targetOf(), given),
    },
    {
      name: `${nameOf(given)}: a sequence whose table is out of range is NaN, and nothing else`,
      run: () => outOfRange(targetOf(), given),
    },
    {
      name: `${nameOf(given)}: a captured call follows a pool that grows`,
      run: () => captured(targetOf(), given),
    },
  ]);
}
