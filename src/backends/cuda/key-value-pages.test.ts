/** Keys and values in pages against exact attention over the same tokens. Kernels run in the simulator. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { place } from '../../../test/support/tensors.ts';
import { createProblem } from '../../attention/problem.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { elementCount, slice, type Tensor } from '../../tensor/tensor.ts';
import { setBackend } from '../registry.ts';
import type { CudaBackend } from './backend.ts';
import { capture } from './capture.ts';
import type { CudaDevice } from './driver/device.ts';
import type { DeviceMemory } from './driver/memory.ts';
import {
  createKeyValuePages,
  type KeyValuePages,
  type KeyValuePagesOptions,
  type PagedAttendOptions,
} from './key-value-pages.ts';
import { type CudaTensor, copyToDevice, download, upload } from './tensor.ts';
import { createSimulatedBackend, simulatedPages } from './testing/simulator/backend.ts';

const seed = runSeed();
const random = new Random(seed);
let backend: CudaBackend;
let device: CudaDevice;

beforeAll(async () => {
  backend = createSimulatedBackend(80);
  device = (await backend.cuda()).device(0);
});
afterAll(() => backend.dispose());

const make = (shape: readonly number[]): Tensor => place(random.normals(elementCount(shape)), shape, 'float16');

/** A table of one row of pages for each sequence, all different, in any order. */
function tableOf(sequences: number, pagesPerSequence: number, poolPages: number): Int32Array {
  const all = Array.from({ length: poolPages }, (_, i) => i).sort(() => random.uniform() - 0.5);
  return Int32Array.from(all.slice(0, sequences * pagesPerSequence));
}

function onDevice(numbers: Int32Array): DeviceMemory {
  const memory = device.allocate(numbers.byteLength);
  copyToDevice(device, memory, new Uint8Array(numbers.buffer), device.stream);
  device.stream.synchronize();
  return memory;
}

const [kvHeads, headDim, valueDim] = [2, 32, 48];
const poolOf = (pages: number, pageSize: number, more: Partial<KeyValuePagesOptions> = {}): KeyValuePages =>
  createKeyValuePages(
    device,
    { kvHeads, headDim, valueDim, dtype: 'float16', pages, pageSize, ...more },
    simulatedPages(backend),
  );

describe(`keys and values in pages (SAGEATTENTION_SEED=${seed})`, () => {
  it.each([
    // Long enough that one token's keys are split.
    ['qk-int8-pv-fp16-cuda', [300, 640], 0.03, 0.07],
    ['qk-fp4-pv-fp4', [65, 128], 0.3, 1.27],
  ] as const)(
    'are those of each sequence, however they were appended: %s',
    async (kernel, [least, room], bound, off) => {
      const pageSize = random.pick([64, 128]);
      const pagesPerSequence = Math.ceil(room / pageSize);
      const lengths = [random.integer(least, room), random.integer(1, 60), ...(kernel === 'qk-fp4-pv-fp4' ? [] : [0])];
      const batch = lengths.length;
      using pool = poolOf(batch * pagesPerSequence + 2, pageSize, { kernel });
      const pages = tableOf(batch, pagesPerSequence, pool.pages);
      const most = Math.max(...lengths);
      const [k, v] = [make([batch, kvHeads, most, headDim]), make([batch, kvHeads, most, valueDim])];
      // Prompts of unequal lengths end together: what is missing stands before them. Then one token, then several.
      const held = (until: number) => Int32Array.from(lengths.map((length) => Math.max(0, length - (most - until))));
      const prompt = random.integer(1, most - 2);
      const ends = [prompt, prompt + 1, random.integer(prompt + 2, most), most];
      for (const [i, until] of ends.entries()) {
        const parts = [k, v].map((view) => upload(slice(view, 2, ends[i - 1] ?? 0, until), device));
        const [newKeys, newValues] = parts as [CudaTensor, CudaTensor];
        pool.append(newKeys, newValues, { pages, lengths: held(until) });
        for (const view of parts) view.dispose();
      }
      const onCard = { pages: onDevice(pages), lengths: onDevice(Int32Array.from(lengths)) };
      const heads = kvHeads * random.pick([1, 4]);
      const bottom = { causalAlignment: 'bottom-right' } as const;
      const cases: readonly (readonly [number, PagedAttendOptions])[] = [
        [1, {}],
        [1, { windowSize: [random.integer(1, 100), 0], ...bottom }],
        [random.integer(2, 20), { isCausal: true, ...bottom }],
      ];
      for (const [queries, options] of cases) {
        const q = make([batch, heads, queries, headDim]);
        using onGpu = upload(q, device);
        const { output, lse } = await pool.attend(onGpu, onCard, { ...options, returnLse: true });
        const [out, logs] = [toFloat32(download(output)), toFloat32(download(lse))];
        output.dispose();
        lse.dispose();
        const size = heads * queries;
        lengths.forEach((length, sequence) => {
          const own = (view: Tensor) => slice(view, 0, sequence, sequence + 1);
          const keys = (view: Tensor) => slice(own(view), 2, most - length, most);
          const given = { q: own(q), k: keys(k), v: keys(v) };
          const problem = createProblem(given.q, given.k, given.v, { ...options, returnLse: true });
          const exact = attentionExact(problem, given);
          const rows = out.subarray(sequence * size * valueDim, (sequence + 1) * size * valueDim);
          if (length === 0) expect(rows.every((value) => value === 0)).toBe(true);
          else expect(compare(rows, exact.output).relativeL1).toBeLessThan(bound);
          logs.subarray(sequence * size, (sequence + 1) * size).forEach((value, i) => {
            const expected = exact.lse[i] as number;
            if (Number.isFinite(expected)) expect(Math.abs(value - expected)).toBeLessThan(off);
            else expect(value).toBe(expected);
          });
        });
      }
      for (const memory of Object.values(onCard)) memory.dispose();
    },
  );

  it('become NaN where a table is out of range, and nothing else does', async () => {
    const [pageSize, batch] = [64, 4];
    using pool = poolOf(8, pageSize, { kernel: random.pick(['qk-int8-pv-fp16-cuda', 'qk-fp4-pv-fp4']) });
    const pages = tableOf(batch, 2, 8);
    const lengths = Int32Array.from({ length: batch }, () => random.integer(65, 128));
    const view = (dim: number) => make([batch, kvHeads, 128, dim]);
    const [k, v, q] = [view(headDim), view(valueDim), make([batch, kvHeads, 1, headDim])].map((x) => upload(x, device));
    if (k === undefined || v === undefined || q === undefined) throw new Error('three tensors');
    pool.append(k, v, { pages, lengths });
    const attend = async (table: { pages: Int32Array; lengths: Int32Array }) => {
      const onCard = { pages: onDevice(table.pages), lengths: onDevice(table.lengths) };
      const output = await pool.attend(q, onCard);
      return toFloat32(download(output));
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
    const rows = (output: Float32Array, sequence: number) => [...output.slice(sequence * size, (sequence + 1) * size)];
    expect(rows(wrong, 0)).toEqual(rows(right, 0));
    for (const sequence of [1, 2]) expect(rows(wrong, sequence).every(Number.isNaN)).toBe(true);
    expect(rows(wrong, 3).every(Number.isFinite)).toBe(true);
  });

  it('grow under a captured call, which gives the bits of a call made then', async () => {
    await setBackend(backend);
    using pool = poolOf(4, 64);
    const [count, pages] = [random.integer(1, 120), onDevice(Int32Array.of(2, 0))];
    const lengths = onDevice(Int32Array.of(count));
    const append = (tokens: number) => {
      const view = (dim: number) => upload(make([1, kvHeads, tokens, dim]), device);
      pool.append(view(headDim), view(valueDim), { pages, lengths });
    };
    append(count);
    const q = upload(make([1, 2 * kvHeads, 1, headDim]), device);
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
      expect(download(graph.result).data).toEqual(download(eager).data);
    }
  });

  it('refuse what does not fit, typed, where it is known here', async () => {
    using pool = poolOf(4, 64);
    const tensors = (shape: readonly number[]) => upload(make(shape), device);
    const [k, v] = [tensors([1, kvHeads, 3, headDim]), tensors([1, kvHeads, 3, valueDim])];
    const append =
      (table: object, keys = k) =>
      () =>
        pool.append(keys, v, table as never);
    const pages = Int32Array.of(0, 3);
    const refusals = [
      [append({ pages: Int32Array.of(4, 0), lengths: Int32Array.of(3) }), 'table.pages[0]'],
      [append({ pages: Int32Array.of(0, -1), lengths: Int32Array.of(65) }), 'table.pages[1]'],
      [append({ pages, lengths: Int32Array.of(129) }), 'table.lengths[0]'],
      [append({ pages, lengths: Int32Array.of(1, 1) }), 'table.lengths'],
      [append({ pages: [0, 3], lengths: Int32Array.of(3) }), 'table.pages'],
      [append({ pages, lengths: Int32Array.of(3), length: 1 }), 'table.length'],
      [append({ pages, lengths: Int32Array.of(3) }, tensors([1, kvHeads, 3, 16])), 'k'],
      [() => pool.append(undefined as never, v, { pages, lengths: Int32Array.of(3) }), 'k'],
      [() => createKeyValuePages(undefined as never, {} as never), 'device'],
      [() => poolOf(4, 96), 'options.pageSize'],
      [() => poolOf(0, 64), 'options.pages'],
    ] as const;
    for (const [call, argument] of refusals) {
      expect(call).toThrow(expect.objectContaining({ argument }));
    }
    const kernel = 'qk-int8-pv-fp8-cuda-sm90';
    const options = { kvHeads, headDim, dtype: 'float16', pages: 4, kernel } as const;
    expect(() => createKeyValuePages(device, options)).toThrow(expect.objectContaining({ code: 'unsupported-option' }));
    pool.dispose();
    expect(append({ pages, lengths: Int32Array.of(3) })).toThrow(expect.objectContaining({ code: 'disposed' }));
  });
});
