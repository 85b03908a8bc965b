/**
 * What the CUDA backend promises besides the conformance suite: the same bits every time, graphs equal to direct calls,
 * views and raw pointers equal to copies, offsets beyond 2^31. `main.ts` runs them on a GPU, and unit tests the small
 * ones over the simulator. The backend in question must be the one that `sageattn` uses.
 */

import { createProblem } from '../../src/attention/problem.ts';
import {
  type CudaDevice,
  type CudaTensor,
  capture,
  captureAttention,
  cudaTensorFromPointer,
  cudaTensorOn,
  download,
  emptyCudaTensor,
  upload,
} from '../../src/backends/cuda/index.ts';
import { type AttentionOptions, prepareKeyValue, sageattn } from '../../src/index.ts';
import { timeOnHost } from '../../src/measure/cuda-timing.ts';
import { attentionExact } from '../../src/reference/exact.ts';
import { compare } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { elementCount, slice, type Tensor, tensor } from '../../src/tensor/tensor.ts';
import type { Target } from '../conformance/suite.ts';
import { Random } from '../support/random.ts';
import { place, snapshot } from '../support/tensors.ts';

export interface Check {
  readonly name: string;
  /** @returns a remark for the log */
  run(): Promise<string | undefined>;
}

export interface CheckSizes {
  readonly tokens: number;
  readonly headDim: number;
}

type Operands = { readonly q: CudaTensor; readonly k: CudaTensor; readonly v: CudaTensor };

function check(condition: boolean, message: () => string): asserts condition {
  if (!condition) throw new Error(message());
}

/** Bits of a tensor, wherever it is. */
const bits = (view: CudaTensor) => snapshot(download(view));

/** Bits that others are compared with: they must show that something was computed. */
function expectedBits(view: CudaTensor): Uint8Array {
  const found = bits(view);
  check(new Set(found).size > 4, () => 'the result that others are compared with is constant');
  return found;
}

function checkSameBits(actual: CudaTensor, expected: Uint8Array, what: string): void {
  const found = bits(actual);
  const at = found.findIndex((byte, i) => byte !== expected[i]);
  check(at < 0 && found.length === expected.length, () => `${what}: byte ${at} differs`);
}

/** `[1,H,tokens,D]` of normal numbers; keys with an offset per channel. */
function operands(random: Random, device: CudaDevice, { tokens, headDim }: CheckSizes): Operands {
  const make = (heads: number, offset: number) => {
    const values = random.normals(heads * tokens * headDim);
    for (let i = 0; i < values.length; i++) values[i] = (values[i] as number) + offset * Math.sin(i % headDim);
    return upload(place(values, [1, heads, tokens, headDim], 'bfloat16'), device);
  };
  return { q: make(4, 0), k: make(2, 3), v: make(2, 0) };
}

const dispose = (...views: readonly (CudaTensor | undefined)[]) => {
  for (const view of views) view?.memory.dispose();
};

/** Options of a call that gives the output alone. */
type OutputOnly = AttentionOptions & { readonly returnLse?: false };

const settingsOf = ({ kernel, options }: Target): OutputOnly => ({ ...options, kernel, returnLse: false });

const optionsOf = (target: Target): OutputOnly => ({
  ...settingsOf(target),
  isCausal: true,
  causalAlignment: 'bottom-right',
});

async function sameEveryTime(target: Target, device: CudaDevice, sizes: CheckSizes, seed: number, repeats: number) {
  const inputs = operands(new Random(seed), device, sizes);
  const { q, k, v } = inputs;
  const options = { ...optionsOf(target), returnLse: true } as const;
  const first = await sageattn(q, k, v, options);
  const [output, lse] = [expectedBits(first.output), expectedBits(first.lse)];
  for (let i = 0; i < repeats; i++) {
    const again = await sageattn(q, k, v, options);
    checkSameBits(again.output, output, `call ${i + 2}`);
    checkSameBits(again.lse, lse, `LSE of call ${i + 2}`);
    dispose(again.output, again.lse);
  }
  using stream = device.createStream();
  const elsewhere = await sageattn(q, k, v, { ...options, stream });
  checkSameBits(elsewhere.output, output, 'a call on another stream');
  using captured = await captureAttention(inputs, options);
  for (const on of [device.stream, stream, device.stream]) {
    // What an earlier replay wrote must not pass for this one's.
    const { pointer, byteLength } = captured.output.memory;
    device.call('cuMemsetD8Async', 'poisoning', pointer, 0xff, byteLength, device.stream.handle);
    captured.launch({ stream: on });
    checkSameBits(captured.output, output, 'a replay of the captured graph');
    checkSameBits(captured.lse as CudaTensor, lse, 'LSE of a replay');
  }
  dispose(q, k, v, first.output, first.lse, elsewhere.output, elsewhere.lse);
}

/**
 * Two calls and a copy of the caller's own between them, in one graph: over inputs that changed since, and over other
 * buffers, a replay gives the bits of the calls.
 */
async function capturedCallsEqualCalls(target: Target, device: CudaDevice, sizes: CheckSizes, seed: number) {
  const random = new Random(seed);
  const [first, second] = [operands(random, device, sizes), operands(random, device, sizes)];
  const options = optionsOf(target);
  const copy = (from: CudaTensor, to: CudaTensor, stream: bigint) => {
    const bytes = from.memory.byteLength;
    device.call('cuMemcpyDtoDAsync', 'copying', to.memory.pointer, from.memory.pointer, bytes, stream);
  };
  const middle = emptyCudaTensor(device, first.q.shape, first.q.dtype);
  const run = async ({ q, k, v }: Operands, stream: bigint) => {
    using attended = await sageattn(q, k, v, options);
    copy(attended, middle, stream);
    return sageattn(middle, k, v, options);
  };
  using stream = device.createStream();
  using graph = await capture(stream, () => run(first, stream.handle));
  // Keys change where they lie, queries and values are others.
  copy(second.k, first.k, device.stream.handle);
  graph.replace(first.q, second.q);
  graph.replace(first.v, second.v);
  using direct = await run(second, device.stream.handle);
  const expected = expectedBits(direct);
  const { pointer, byteLength } = graph.result.memory;
  device.call('cuMemsetD8Async', 'poisoning', pointer, 0xff, byteLength, device.stream.handle);
  graph.launch();
  checkSameBits(graph.result, expected, 'a replay of two calls');
  for (const { q, k, v } of [first, second]) dispose(q, k, v);
  dispose(middle);
}

/** How much less accurate than aligned operands unaligned ones may be. */
const OTHER_ROUTE_SLACK = 1.15;

/** A packed `[1,L,3,H,D]` projection and unaligned raw pointers against contiguous copies. */
async function viewsEqualCopies(
  target: Target,
  device: CudaDevice,
  { tokens, headDim }: CheckSizes,
  seed: number,
): Promise<string> {
  const heads = 2;
  const random = new Random(seed);
  const packed = upload(
    place(random.normals(tokens * 3 * heads * headDim), [1, tokens, 3, heads, headDim], 'float16'),
    device,
  );
  const part = (index: number): CudaTensor => {
    const [batch, token, , head, channel] = packed.strides as [number, number, number, number, number];
    const view = slice(packed, 2, index, index + 1);
    return { ...view, shape: [1, tokens, heads, headDim], strides: [batch, token, head, channel] };
  };
  const views = [part(0), part(1), part(2)] as const;
  const options = { ...optionsOf(target), tensorLayout: 'NHD' } as const;
  const output = await sageattn(...views, options);
  const contiguous = (view: CudaTensor): Tensor => place(toFloat32(download(view)), view.shape, 'float16');
  const copies = views.map((view) => upload(contiguous(view), device)) as [CudaTensor, CudaTensor, CudaTensor];
  const expected = await sageattn(...copies, options);
  checkSameBits(output, expectedBits(expected), 'views of a packed tensor');

  const shifted = copies.map((copy) => {
    const memory = device.allocate(copy.memory.byteLength + 16);
    const [to, from] = [memory.pointer + 2n, copy.memory.pointer];
    device.call('cuMemcpyDtoDAsync', 'copying', to, from, copy.memory.byteLength, device.stream.handle);
    return { memory, view: cudaTensorFromPointer(device, to, copy.shape, 'float16') };
  });
  const [q, k, v] = shifted.map(({ view }) => view) as [CudaTensor, CudaTensor, CudaTensor];
  const unaligned = await sageattn(q, k, v, options);
  // Other loads may be another route, which groups the rows of Q that share a scale in its own way: as accurate, not
  // the same.
  const hosts = views.map(contiguous) as [Tensor, Tensor, Tensor];
  const inputs = { q: hosts[0], k: hosts[1], v: hosts[2] };
  const exact = attentionExact(createProblem(...hosts, options), inputs).output;
  const errorOf = (view: CudaTensor) => compare(toFloat32(download(view)), exact).relativeL1;
  const [aligned, other] = [errorOf(expected), errorOf(unaligned)];
  check(aligned <= target.relativeL1, () => `relative L1 ${aligned}, limit ${target.relativeL1}`);
  const limit = OTHER_ROUTE_SLACK * aligned;
  check(other <= limit, () => `pointers that are multiples of 2 only: relative L1 ${other}, limit ${limit}`);
  dispose(packed, output, expected, unaligned, ...copies);
  for (const { memory } of shifted) memory.dispose();
  return `relative L1 ${aligned.toFixed(4)}, of unaligned pointers ${other.toFixed(4)}`;
}

/** One row of Q over many keys: the keys are split over the card. */
async function decoding(target: Target, keys: number, seed: number): Promise<string> {
  const random = new Random(seed);
  const make = (heads: number, tokens: number) =>
    place(random.normals(heads * tokens * 64), [1, heads, tokens, 64], 'float16');
  const [q, k, v] = [make(8, 1), make(2, keys), make(2, keys)];
  const options: OutputOnly = { ...settingsOf(target), backend: 'cuda' };
  const output = await sageattn(q, k, v, options);
  const exact = attentionExact(createProblem(q, k, v, options), { q, k, v }).output;
  const { relativeL1 } = compare(toFloat32(output), exact);
  // Averages of many values are small beside the values, which is what errors scale with.
  const limit = 2 * target.relativeL1;
  check(relativeL1 <= limit, () => `relative L1 ${relativeL1}, limit ${limit}`);
  return `relative L1 ${relativeL1.toFixed(4)}`;
}

/** Prepared keys and values on the device, appended to past the point where only new tiles are quantized. */
async function cacheGrows(target: Target, device: CudaDevice, headDim: number, seed: number): Promise<string> {
  const [heads, steps] = [2, [520, 1, 70, 190]];
  const total = steps.reduce((sum, step) => sum + step, 0);
  const random = new Random(seed);
  const values = (count: number, offset: number) => {
    const made = random.normals(count * headDim);
    for (let i = 0; i < made.length; i++) made[i] = (made[i] as number) + offset * Math.sin(i % headDim);
    return made;
  };
  const q = place(values(2 * heads, 0), [1, 2 * heads, 1, headDim], 'float16');
  const k = place(values(heads * total, 3), [1, heads, total, headDim], 'float16');
  const v = place(values(heads * total, 0), [1, heads, total, headDim], 'float16');
  const [there, keys, contents] = [q, k, v].map((view) => upload(view, device)) as [CudaTensor, CudaTensor, CudaTensor];
  const part = <T extends Tensor | CudaTensor>(view: T, start: number, end: number) => slice(view, 2, start, end);
  const { kernel, options } = target;
  const first = steps[0] as number;
  const cache = await prepareKeyValue(part(keys, 0, first), part(contents, 0, first), { ...options, kernel });
  let worst = 0;
  let held = first;
  for (const step of [0, ...steps.slice(1)]) {
    if (step > 0) await cache.append(part(keys, held, held + step), part(contents, held, held + step));
    held += step;
    const output = await cache.attend(there);
    const inputs = { q, k: part(k, 0, held), v: part(v, 0, held) };
    const exact = attentionExact(createProblem(inputs.q, inputs.k, inputs.v, {}), inputs).output;
    const { relativeL1 } = compare(toFloat32(download(output)), exact);
    // Averages of many values are small beside the values, which is what errors scale with.
    const limit = 2 * target.relativeL1;
    check(relativeL1 <= limit, () => `after ${held} tokens: relative L1 ${relativeL1}, limit ${limit}`);
    worst = Math.max(worst, relativeL1);
    dispose(output);
  }
  cache.dispose();
  dispose(there, keys, contents);
  return `relative L1 up to ${worst.toFixed(4)}`;
}

/** A captured call over prepared keys attends to those held when it is launched, as long as they do not move. */
async function captureFollows(target: Target, device: CudaDevice, headDim: number, seed: number): Promise<undefined> {
  const [heads, steps] = [2, [520, 1, 70, 190]];
  const total = steps.reduce((sum, step) => sum + step, 0);
  const random = new Random(seed);
  const values = (count: number) => random.normals(count * headDim);
  const q = place(values(4 * heads), [1, 4 * heads, 1, headDim], 'float16');
  const k = place(values(heads * total), [1, heads, total, headDim], 'float16');
  const v = place(values(heads * total), [1, heads, total, headDim], 'float16');
  const [there, keys, contents] = [q, k, v].map((view) => upload(view, device)) as [CudaTensor, CudaTensor, CudaTensor];
  const part = <T extends Tensor | CudaTensor>(view: T, start: number, end: number) => slice(view, 2, start, end);
  const { kernel, options } = target;
  let held = steps[0] as number;
  const cache = await prepareKeyValue(part(keys, 0, held), part(contents, 0, held), { ...options, kernel });
  const stream = device.createStream();
  const graph = await capture(stream, () => cache.attend(there));
  for (const step of [0, ...steps.slice(1)]) {
    if (step > 0) await cache.append(part(keys, held, held + step), part(contents, held, held + step));
    held += step;
    // Room for 768 tokens was made first.
    if (held > 768) {
      const threw = await Promise.resolve()
        .then(() => graph.launch())
        .then(
          () => false,
          () => true,
        );
      check(threw, () => 'a launch over keys that have moved');
      break;
    }
    graph.launch();
    const inputs = { q, k: part(k, 0, held), v: part(v, 0, held) };
    const exact = attentionExact(createProblem(inputs.q, inputs.k, inputs.v, {}), inputs).output;
    const { relativeL1 } = compare(toFloat32(download(graph.result)), exact);
    const limit = 2 * target.relativeL1;
    check(relativeL1 <= limit, () => `after ${held} tokens: relative L1 ${relativeL1}, limit ${limit}`);
  }
  graph.dispose();
  cache.dispose();
  stream.dispose();
  dispose(there, keys, contents);
  return undefined;
}

async function noLeak(target: Target, device: CudaDevice, sizes: CheckSizes, seed: number): Promise<string> {
  const { q, k, v } = operands(new Random(seed), device, sizes);
  const options = optionsOf(target);
  const call = async () => dispose(await sageattn(q, k, v, options));
  for (let i = 0; i < 20; i++) await call();
  await device.stream.completed();
  const before = device.memoryInfo().free;
  for (let i = 0; i < 500; i++) await call();
  await device.stream.completed();
  const taken = before - device.memoryInfo().free;
  // The driver counts in pages of 2 MiB.
  check(taken <= 64 * 2 ** 20, () => `500 calls took ${taken} bytes more`);
  dispose(q, k, v);
  return `${taken} bytes`;
}

/** Keys behind a mask, a window or the diagonal hold zeros or garbage: the output is the same. */
async function hiddenKeysChangeNothing(
  target: Target,
  device: CudaDevice,
  { tokens, headDim }: CheckSizes,
  seed: number,
) {
  const hides = (key: number) => key % 3 === 1 || key >= tokens - 9;
  const shown = Uint8Array.from({ length: tokens }, (_, key) => (hides(key) ? 0 : 1));
  const boolean = tensor(shown, [tokens], { dtype: 'bool' });
  // Where nothing is quantized, the scores of the garbage are far above 1e4.
  const hiding = target.kernel === 'exact' ? Number.NEGATIVE_INFINITY : -1e4;
  const additive = place(
    Float32Array.from(shown, (s) => (s ? 0.5 : hiding)),
    [tokens],
    'bfloat16',
  );
  const cases: readonly (readonly [OutputOnly, Tensor | undefined, (key: number) => boolean])[] = [
    [{}, boolean, hides],
    [{ isCausal: true }, additive, hides],
    [{ windowSize: [2, 3] }, undefined, (key) => key >= 5 + 4],
  ];
  for (const [options, mask, isHidden] of cases) {
    const results: Float32Array[] = [];
    // Rows of the window are the first five.
    const rows = mask === undefined ? 5 : tokens;
    for (const garbage of [0, 3e4]) {
      const random = new Random(seed);
      const make = (heads: number, length: number, fill?: number) => {
        const values = random.normals(heads * length * headDim).map((x, i) => {
          const hidden = fill !== undefined && isHidden(Math.floor(i / headDim) % length);
          return hidden ? fill * x : x;
        });
        return upload(place(values, [1, heads, length, headDim], 'bfloat16'), device);
      };
      const [q, k, v] = [make(4, rows), make(2, tokens, garbage), make(2, tokens, garbage)];
      const attnMask = mask === undefined ? undefined : upload(mask, device);
      const output = await sageattn(q, k, v, {
        ...settingsOf(target),
        ...options,
        ...(attnMask === undefined ? {} : { attnMask }),
      });
      results.push(toFloat32(download(output)));
      dispose(q, k, v, attnMask, output);
    }
    const [clean, dirty] = results as [Float32Array, Float32Array];
    // Smoothing Q takes the scores of its means from K itself: rows beyond the last may change a warp's order of sums.
    const bound = target.kernel === 'qk-int4-pv-fp8-cuda' ? 0.01 : 0;
    const apart = clean.reduce((most, x, i) => Math.max(most, Math.abs(x - (dirty[i] as number))), 0);
    check(apart <= bound, () => `hidden keys change the output by ${apart} (${JSON.stringify(options)})`);
  }
}

/** Checks of one kernel with one setting of its options, of sizes that a simulator can bear too. */
export function kernelChecks(
  target: Target,
  device: CudaDevice,
  sizes: CheckSizes,
  seed: number,
  repeats = 3,
): Check[] {
  return [
    {
      name: 'the same bits every time, on any stream, and from a captured graph',
      run: async () => {
        await sameEveryTime(target, device, sizes, seed, repeats);
        return undefined;
      },
    },
    {
      name: 'views and unaligned pointers give what contiguous copies give',
      run: () => viewsEqualCopies(target, device, { ...sizes, tokens: Math.ceil(sizes.tokens / 2) }, seed),
    },
    {
      name: 'what no row sees changes nothing',
      run: async () => {
        await hiddenKeysChangeNothing(target, device, sizes, seed);
        return undefined;
      },
    },
    {
      name: 'prepared keys and values grow',
      run: () => cacheGrows(target, device, sizes.headDim, seed),
    },
  ];
}

/** Calls captured into one graph. Beside {@link kernelChecks}, since a simulator takes long for it. */
export const captureCheck = (target: Target, device: CudaDevice, sizes: CheckSizes, seed: number): Check => ({
  name: 'calls captured into one graph give the same bits, over changed inputs and other buffers too',
  run: async () => {
    await capturedCallsEqualCalls(target, device, sizes, seed);
    return undefined;
  },
});

/** Of kernels whose captured calls follow a cache: all but those that read K as it came. */
export const followingChecks = (target: Target, device: CudaDevice, headDim: number, seed: number): Check[] =>
  target.kernel === 'exact' || target.kernel.startsWith('qk-int4')
    ? []
    : [
        {
          name: 'a captured call attends to what its cache has grown to',
          run: () => captureFollows(target, device, headDim, seed),
        },
      ];

/** {@link kernelChecks}, and what only a GPU has the speed and memory for. */
export function deviceChecks(target: Target, device: CudaDevice, seed: number): Check[] {
  return [
    ...kernelChecks(target, device, { tokens: 1000, headDim: 128 }, seed, 50),
    captureCheck(target, device, { tokens: 1000, headDim: 128 }, seed),
    ...followingChecks(target, device, 128, seed),
    { name: 'decoding over 20,000 keys', run: () => decoding(target, 20_000, seed) },
  ];
}

/** Checks that count the device's memory, which other processes must not take meanwhile. */
export const memoryChecks = (target: Target, device: CudaDevice, seed: number): Check[] => [
  { name: '500 calls take no more memory', run: () => noLeak(target, device, { tokens: 512, headDim: 64 }, seed) },
];

/** Microseconds of the host for a call that has been planned. */
const HOST_LIMIT = 50;

/** What the host pays for a repeated call: looking the plan up, and launching. */
export async function hostCost(device: CudaDevice, seed: number): Promise<string> {
  const { q, k, v } = operands(new Random(seed), device, { tokens: 128, headDim: 64 });
  const { median, p95 } = await timeOnHost(device, async () => dispose(await sageattn(q, k, v)));
  check(median <= HOST_LIMIT, () => `${median} us, limit ${HOST_LIMIT}`);
  dispose(q, k, v);
  return `${median.toFixed(1)} us, 95% below ${p95.toFixed(1)} us`;
}

const FAR = 2 ** 31;

/** Copies rows of a CPU tensor's bytes to element `at` of device memory. */
function writeAt(device: CudaDevice, view: CudaTensor, at: number, source: Tensor): void {
  // What `place` has put behind the elements stays here.
  const bytes = snapshot(source).subarray(0, 2 * elementCount(source.shape));
  const target = view.memory.pointer + BigInt(at) * 2n;
  device.call('cuMemcpyHtoDAsync', 'copying', target, bytes, bytes.byteLength, device.stream.handle);
  device.stream.synchronize();
}

/** Operands whose second head lies more than 2^31 elements behind the first: about 13 GB in all. */
async function farStrides(target: Target, device: CudaDevice, seed: number): Promise<undefined> {
  const [tokens, dim] = [130, 64];
  const random = new Random(seed);
  const options = optionsOf(target);
  const near: CudaTensor[] = [];
  const far: CudaTensor[] = [];
  for (let i = 0; i < 3; i++) {
    const values = random.normals(2 * tokens * dim);
    const source = place(values, [1, 2, tokens, dim], 'bfloat16');
    near.push(upload(source, device));
    const headStride = FAR + 64;
    const memory = device.allocate(2 * (headStride + tokens * dim));
    const view = cudaTensorOn(memory, 'bfloat16', [1, 2, tokens, dim], {
      strides: [2 * headStride, headStride, dim, 1],
    });
    for (const head of [0, 1]) {
      const part = place(values.subarray(head * tokens * dim, (head + 1) * tokens * dim), [tokens, dim], 'bfloat16');
      writeAt(device, view, head * headStride, part);
    }
    far.push(view);
  }
  const [q, k, v] = near as [CudaTensor, CudaTensor, CudaTensor];
  const [farQ, farK, farV] = far as [CudaTensor, CudaTensor, CudaTensor];
  const expected = await sageattn(q, k, v, options);
  const output = await sageattn(farQ, farK, farV, options);
  checkSameBits(output, expectedBits(expected), 'operands with strides above 2^31');
  dispose(...near, ...far, expected, output);
  return undefined;
}

/** An output of more than 2^31 elements: its last rows against the same rows alone. About 12 GB. */
async function farOutput(target: Target, device: CudaDevice, seed: number): Promise<undefined> {
  const [heads, dim, tokens, keys] = [33, 256, 2 ** 18, 64];
  const random = new Random(seed);
  const few = 256;
  const rows = place(random.normals(few * dim), [1, 1, few, dim], 'bfloat16');
  const small = (count: number) =>
    upload(place(random.normals(count * keys * dim), [1, count, keys, dim], 'bfloat16'), device);
  const [k, v] = [small(1), small(1)];
  const q = emptyCudaTensor(device, [1, heads, tokens, dim], 'bfloat16');
  device.call('cuMemsetD8Async', 'clearing', q.memory.pointer, 0, q.memory.byteLength, device.stream.handle);
  const last = heads * tokens * dim - few * dim;
  check(last > FAR, () => 'the output is too small for this check');
  writeAt(device, q, last, rows);
  const options = settingsOf(target);
  const output = await sageattn(q, k, v, options);
  const alone = upload(rows, device);
  const expected = await sageattn(alone, k, v, options);
  const tail: CudaTensor = {
    ...output,
    shape: [1, 1, few, dim],
    strides: [few * dim, few * dim, dim, 1],
    offset: last,
  };
  checkSameBits(tail, expectedBits(expected), 'the last rows');
  dispose(q, k, v, output, alone, expected);
  return undefined;
}

/** Offsets above 2^31 elements; one kernel of each kind of V is enough, as the address arithmetic is shared. */
export function largeChecks(target: Target, device: CudaDevice, seed: number): Check[] {
  return [
    { name: 'heads more than 2^31 elements apart', run: () => farStrides(target, device, seed) },
    { name: 'an output of more than 2^31 elements', run: () => farOutput(target, device, seed) },
  ];
}
