/** Plans, tensors and the backend over the fake driver, with a kernel that records its arguments. */
import fc from 'fast-check';
import { beforeEach, describe, expect, it } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { place } from '../../../test/support/tensors.ts';
import { prepareKeyValue } from '../../api/key-value-cache.ts';
import { sageattn } from '../../api/sageattn.ts';
import { createProblem } from '../../attention/problem.ts';
import { SageAttentionError } from '../../errors.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { slice, type Tensor, tensor, transpose } from '../../tensor/tensor.ts';
import { setBackend } from '../registry.ts';
import { CudaBackend } from './backend.ts';
import { captureAttention } from './capture.ts';
import type { DriverFunctions } from './driver/api.ts';
import { Cuda } from './driver/device.ts';
import { CudaError } from './driver/status.ts';
import { descriptorOf } from './kernel-table.ts';
import { packBuffers } from './run/bound-launches.ts';
import {
  type CudaTensor,
  cudaTensorFromPointer,
  cudaTensorOn,
  download,
  downloadAsync,
  emptyCudaTensor,
  upload,
  uploadAsync,
} from './tensor.ts';
import { FakeCuda } from './testing/fake-cuda.ts';
import { both, CHOICE, execute, open, problemOf, rows, shifted, values } from './testing/stand-in.ts';

let setup: ReturnType<typeof open>;
beforeEach(() => {
  setup = open();
});

describe('tensors', () => {
  it('travel to the device and back with strides, offsets and dtypes', async () => {
    const { fake, device } = setup;
    const numbers = Float32Array.from({ length: 24 }, (_, i) => i / 4);
    for (const dtype of ['float32', 'float16', 'bfloat16'] as const) {
      for (const [strides, offset] of [
        [[24, 12, 4, 1], 0],
        [[99, 5, 11, 1], 0],
        [[0, 5, 11, 1], 3],
        [[99, 5, 11, 1], 13],
      ] as const) {
        const source = place(numbers, [1, 2, 3, 4], dtype, strides, offset);
        const there = upload(source, device);
        expect(there).toMatchObject({ location: 'cuda', device: 0, dtype, shape: [1, 2, 3, 4], strides });
        // Element k of the view keeps its alignment, which kernels read from the offset.
        const bytes = dtype === 'float32' ? 4 : 2;
        expect((there.offset * bytes) % 16).toBe((offset * bytes) % 16);
        expect(values(download(there))).toEqual([...numbers]);
        expect(values(await downloadAsync(there))).toEqual([...numbers]);
        const half = slice(transpose(there, [0, 2, 1, 3]), 1, 1, 3);
        expect(values(download(half))).toEqual(values(slice(transpose(source, [0, 2, 1, 3]), 1, 1, 3)));
        half[Symbol.dispose]();
        expect(there.memory.disposed).toBe(true);
      }
    }
    const mask = tensor(Uint8Array.of(0, 1, 1), [3]);
    expect(download(upload(mask, device)).data).toEqual(mask.data);
    expect(download(upload(tensor(new Float32Array(0), [0, 4]), device)).shape).toEqual([0, 4]);
    expect(fake.liveHandles.registrations).toBe(0);
  });

  it('travel without blocking, and through page-locked memory beside the program', async () => {
    const { fake, device } = setup;
    const stream = device.createStream();
    const { tensor: there, done } = uploadAsync(rows(3), device, { stream });
    expect(values(await done)).toEqual(shifted(0, 3));
    using pinned = device.allocatePinned(200);
    const into = await downloadAsync(there, { stream, into: pinned });
    expect(values(into)).toEqual(shifted(0, 3));
    expect(into.data.buffer).toBe(pinned.bytes.buffer);
    expect([...pinned.view(Float32Array).slice(0, 12)]).toEqual(shifted(0, 3));
    expect(pinned.view(Uint16Array)).toHaveLength(100);
    // The other stream waits for the upload's.
    expect(values(download(there))).toEqual(shifted(0, 3));
    using small = device.allocatePinned(8);
    await expect(downloadAsync(there, { into: small })).rejects.toMatchObject({ code: 'buffer-too-small' });
    expect(fake.liveHandles.registrations).toBe(2);
  });

  it('over a raw pointer keep its alignment in the offset and are never freed', () => {
    const { fake, device } = setup;
    const memory = device.allocate(64);
    device.call('cuMemsetD8Async', 'filling', memory.pointer, 0, 64, device.stream.handle);
    device.stream.synchronize();
    const there = cudaTensorFromPointer(device, memory.pointer + 4n, [2, 3], 'float32');
    expect(there).toMatchObject({ offset: 1, shape: [2, 3], strides: [3, 1] });
    expect(there.memory.pointer).toBe(memory.pointer);
    expect(values(download(there))).toEqual(new Array(6).fill(0));
    there.memory.dispose();
    expect(fake.liveAllocations).toBe(1);
    expect(() => cudaTensorFromPointer(device, memory.pointer + 2n, [1], 'float32')).toThrow(/multiple of 4/);
    expect(() => cudaTensorFromPointer(device, 0n, [1], 'float32')).toThrow(/device address/);
    expect(() => cudaTensorFromPointer(device, memory.pointer, [5], 'float32', { byteLength: 16 })).toThrow(
      /at least 5/,
    );
  });

  it('do not exceed their memory', () => {
    const { device } = setup;
    const memory = device.allocate(16);
    expect(() => cudaTensorOn(memory, 'float32', [5])).toThrow(/at least 5 float32 elements/);
    expect(cudaTensorOn(memory, 'float16', [2, 3], { strides: [5, 1] }).strides).toEqual([5, 1]);
    expect(emptyCudaTensor(device, [3, 2], 'bfloat16').memory.byteLength).toBe(12);
  });
});

describe('a plan', () => {
  it('binds operands, scratch, constants and outputs, and can run again before an earlier run has ended', async () => {
    const { fake, backend, device } = setup;
    const [first, second] = [upload(rows(2), device), upload(rows(2, 50), device)];
    const plan = await backend.plan(problemOf(first, { returnLse: true }), CHOICE);
    expect(plan.kernels.map(({ name }) => name)).toEqual(['quantizeQuery', 'attend']);
    const results = [plan.enqueue(both(first)), plan.enqueue(both(second))];
    expect(fake.executed).toEqual([]);
    expect(results.map(({ output }) => values(download(output)))).toEqual([shifted(100, 2), shifted(100, 2, 50)]);
    expect(values(download(results[0]?.lse as CudaTensor))[0]).toBe(42);
    expect(results[0]?.output).toMatchObject({ shape: [1, 1, 2, 4], dtype: 'float32', device: 0 });
    plan.dispose();
    plan.dispose();
    expect(() => plan.enqueue(both(first))).toThrow(/plan has been disposed/);
    for (const { output, lse } of results) for (const view of [output, lse]) view?.memory.dispose();
    for (const view of [first, second]) view.memory.dispose();
    // The stream keeps its scratch and its zeros for the next run.
    expect(fake.liveAllocations).toBe(2);
    device.trimMemory();
    expect(fake.liveAllocations).toBe(0);
  });

  it('becomes a graph over addresses that come again, which few calls of the driver replay', async () => {
    const { fake, backend, device } = open({ reuse: true });
    const [first, second] = [upload(rows(2), device), upload(rows(2, 50), device)];
    const plan = await backend.plan(problemOf(first), CHOICE);
    /** Runs, and gives the output's memory back for the next run to find. */
    const run = (q: CudaTensor) => {
      const before = fake.calls.length;
      const { output } = plan.enqueue(both(q));
      const calls = fake.calls.slice(before);
      const result = values(download(output));
      output.memory.dispose();
      device.stream.synchronize();
      return { calls, result };
    };
    const launches = (calls: readonly string[]) => calls.filter((name) => /cu(Graph)?Launch/.test(name));
    const GRAPH = ['cuCtxPushCurrent', 'cuMemAllocFromPoolAsync', 'cuGraphLaunch', 'cuCtxPopCurrent'];
    for (let i = 0; i < 8; i++) {
      expect(run(first).result).toEqual(shifted(100, 2));
      expect(run(second).result).toEqual(shifted(100, 2, 50));
    }
    // Two graphs, each with the template that its nodes belong to.
    expect(fake.liveHandles.graphs).toBe(4);
    // New contents at the known addresses.
    const next = rows(2, 30).data as Float32Array;
    device.call('cuMemcpyHtoDAsync', 'copying', first.memory.pointer, next, 32, device.stream.handle);
    const replayed = run(first);
    expect(replayed.result).toEqual(shifted(100, 2, 30));
    expect(replayed.calls).toEqual(GRAPH);
    // Unknown addresses are launched as ever, and those used longest ago make room for them.
    const others = Array.from({ length: 4 }, (_, i) => upload(rows(2, i), device));
    others.forEach((other, i) => {
      const { calls, result } = run(other);
      expect(result).toEqual(shifted(100, 2, i));
      expect(launches(calls)).toEqual(['cuLaunchKernel', 'cuLaunchKernel']);
    });
    expect(fake.liveHandles.graphs).toBe(0);
    for (let i = 0; i < 4; i++) run(others[0] as CudaTensor);
    expect(fake.liveHandles.graphs).toBe(2);
    plan.dispose();
    expect(fake.liveHandles.graphs).toBe(0);
  });

  it('keeps what a run needs, though plan and inputs are disposed before it has happened', async () => {
    const { backend, device } = setup;
    const stream = device.createStream();
    const q = upload(rows(2), device);
    const plan = await backend.plan(problemOf(q), CHOICE);
    const { output } = plan.enqueue(both(q), stream);
    q.memory.dispose();
    plan.dispose();
    expect(values(download(output))).toEqual(shifted(100, 2));
  });

  it('serves tensors at another offset than the planned one', async () => {
    const { backend, device } = setup;
    const source = place(Float32Array.from(shifted(0, 2)), [1, 1, 2, 4], 'float32', [99, 99, 6, 1], 9);
    const there = upload(source, device);
    expect(there.offset).not.toBe(source.offset);
    const plan = await backend.plan(problemOf(source), CHOICE);
    expect(values(download(plan.enqueue(both(there)).output))).toEqual(shifted(100, 2));
  });

  it("runs on the caller's streams, the library's and foreign ones", async () => {
    const { fake, backend, device } = setup;
    const q = upload(rows(2), device);
    const plan = await backend.plan(problemOf(q), CHOICE);
    const own = device.createStream();
    const handle = fake.foreignStream();
    const outputs = [own, { handle, device: 0 }].map((stream) => plan.enqueue(both(q), stream).output);
    fake.contextStack.push(0xc000n);
    fake.api.cuStreamDestroy(handle);
    for (const output of outputs) {
      expect(values(download(output))).toEqual(shifted(100, 2));
      output.memory.dispose();
    }
    // Nothing of it is done on the default stream, and the caller's context is as it was.
    expect(fake.contextStack).toEqual([0xc000n]);
    expect(() => plan.enqueue(both(q), { handle: 0n, device: 0 })).toThrow(/default stream/);
    expect(() => plan.enqueue(both(q), { handle, device: 1 })).toThrow(/a stream of device 0/);
    own.dispose();
    expect(() => plan.enqueue(both(q), own)).toThrow(/stream has been disposed/);
    const captured = fake.foreignStream();
    fake.api.cuStreamBeginCapture(captured, 1);
    expect(() => plan.enqueue(both(q), { handle: captured, device: 0 })).toThrow(/captureAttention/);
  });

  it('reads outputs of one stream on another in order', async () => {
    const { backend, device } = setup;
    const [a, b] = [device.createStream(), device.createStream()];
    const q = upload(rows(2), device);
    const plan = await backend.plan(problemOf(q), CHOICE);
    const first = plan.enqueue(both(q), a).output;
    const second = plan.enqueue(both(first), b).output;
    first.memory.dispose();
    a.dispose();
    expect(values(await downloadAsync(second))).toEqual(shifted(200, 2));
  });

  it('refuses tensors of another device, of too little memory, or disposed', async () => {
    const { cuda, backend, device } = open({ devices: [90, 90], execute });
    const q = upload(rows(2), device);
    const plan = await backend.plan(problemOf(q), CHOICE);
    const elsewhere = upload(rows(2), cuda.device(1));
    expect(() => plan.enqueue(both(elsewhere))).toThrow(
      /q: expected a CudaTensor of CUDA device 0 .* received CUDA device 1/,
    );
    expect(() => plan.enqueue({ ...both(q), k: rows(2) })).toThrow(/k: .*location 'cpu'/);
    const short = { ...q, memory: device.allocate(16) };
    expect(() => plan.enqueue({ ...both(q), v: short })).toThrow(/v: expected storage of at least 8/);
    q.memory.dispose();
    expect(() => plan.enqueue(both(q))).toThrow(/memory has been disposed/);
    cuda.dispose();
    const later = await backend.plan(problemOf(q), CHOICE);
    expect(() => later.enqueue(both(q))).toThrow(/q was lost when CUDA device 0 \(Fake GPU 0\) was disposed/);
  });

  it('of a problem without output elements runs nothing', async () => {
    const { fake, backend, device } = setup;
    const q = upload(rows(0), device);
    const plan = await backend.plan(problemOf(q, { returnLse: true }), CHOICE);
    const { output, lse } = await plan.run(both(q), {});
    expect([output.shape, lse?.shape]).toEqual([
      [1, 1, 0, 4],
      [1, 1, 0],
    ]);
    expect(values(download(output as CudaTensor))).toEqual([]);
    expect(fake.executed).toEqual([]);
  });

  it('works on the device of its tensors', async () => {
    const { fake, cuda, backend } = open({ devices: [90, 89, 80], execute });
    for (const ordinal of [2, 0]) {
      const q = upload(rows(2), cuda.device(ordinal));
      const problem = problemOf(q);
      expect(problem.device).toBe(ordinal);
      const { output } = (await backend.plan(problem, CHOICE)).enqueue(both(q));
      expect(output.device).toBe(ordinal);
      expect(values(download(output))).toEqual(shifted(100, 2));
    }
    // The one that nobody used was not opened.
    expect(fake.liveHandles.contexts).toBe(2);
    expect((await backend.defaultKernel(problemOf(upload(rows(1), cuda.device(1))))).name).toBe('qk-int8-pv-fp8-cuda');
  });

  it('places buffers apart, each at a multiple of 256', () => {
    const { offsets, byteLength } = packBuffers({ a: 1, b: 256, c: 0, d: 257 });
    expect([...offsets]).toEqual([
      ['a', 0],
      ['b', 256],
      ['c', 512],
      ['d', 512],
    ]);
    expect(byteLength).toBe(1024);
  });
});

describe('CPU tensors', () => {
  it('are uploaded and read back, through sageattn too', async () => {
    const { fake, backend, device } = setup;
    await setBackend(backend);
    const q = rows(3);
    const mask = tensor(Float32Array.of(0, 1000), [1, 1, 1, 1], { offset: 1 });
    const { output, lse } = await sageattn(q, q, q, { backend: 'cuda', attnMask: mask, returnLse: true });
    expect(output.location).toBe('cpu');
    expect(values(output)).toEqual(shifted(1100, 3));
    expect([lse.shape, values(lse)[0]]).toEqual([[1, 1, 3], 42]);
    device.trimMemory();
    // Only the cached plan's constants remain.
    expect(fake.liveAllocations).toBe(1);
    const strided = place(Float32Array.from(shifted(0, 3)), [1, 1, 3, 4], 'float32', [50, 50, 7, 1], 21);
    expect(values(await sageattn(strided, strided, strided, { backend: 'cuda' }))).toEqual(shifted(100, 3));
    device.trimMemory();
    expect(fake.liveAllocations).toBe(2);
  });

  it.each([
    ['small', 1, 100],
    // Above what is copied before it is sent.
    ['large', 270_000, 280_000],
  ])('are taken when the call is made: %s ones may be overwritten or given away at once', async (_, least, most) => {
    const { backend, device } = setup;
    const property = fc.asyncProperty(
      fc.integer({ min: least, max: most }),
      fc.constantFrom('overwritten', 'transferred'),
      async (tokens, then) => {
        const [q, k, v] = [rows(tokens), rows(tokens, 7), rows(tokens, 9)];
        const plan = await backend.plan(createProblem(q, k, v, {}), CHOICE);
        const running = plan.run({ q, k, v }, {});
        for (const { data } of [q, k, v]) {
          if (then === 'overwritten') (data as Float32Array).fill(Number.NaN);
          else structuredClone(data.buffer, { transfer: [data.buffer as ArrayBuffer] });
        }
        const output = ((await running).output as Tensor).data as Float32Array;
        expect(output.findIndex((value, i) => value !== 101 + i)).toBe(-1);
        plan.dispose();
      },
    );
    await fc.assert(property, { seed: runSeed(), numRuns: least === 1 ? 20 : 2 });
    expect(device.stream.pendingKernels).toEqual([]);
  });

  it('whose storage is gone are refused', async () => {
    const q = rows(3);
    const plan = await setup.backend.plan(problemOf(q), CHOICE);
    structuredClone(q.data.buffer, { transfer: [q.data.buffer as ArrayBuffer] });
    await expect(plan.run({ q, k: q, v: q }, {})).rejects.toMatchObject({ code: 'buffer-too-small', argument: 'q' });
  });

  it('leave nothing behind when the call is aborted', async () => {
    const { fake, backend, device } = setup;
    const q = rows(3);
    const plan = await backend.plan(problemOf(q), CHOICE);
    const controller = new AbortController();
    const running = plan.run({ q, k: q, v: q }, { signal: controller.signal });
    controller.abort(new Error('enough'));
    await expect(running).rejects.toThrow('enough');
    await expect(plan.run({ q, k: q, v: q }, { signal: controller.signal })).rejects.toThrow('enough');
    device.trimMemory();
    expect(fake.liveAllocations).toBe(1);
  });
});

describe('a captured call', () => {
  it('replays over what its inputs hold by then, equal to direct calls', async () => {
    const { fake, backend, device } = setup;
    await setBackend(backend);
    const q = upload(rows(2), device);
    const captured = await captureAttention(both(q), { returnLse: true });
    expect(fake.executed).toEqual([]);
    const direct = await sageattn(q, q, q);
    captured.launch();
    expect(download(captured.output).data).toEqual(download(direct).data);
    expect(values(download(captured.lse as CudaTensor))[0]).toBe(42);
    // New contents, another stream, the caller's own stream.
    const next = rows(2, 30);
    device.call('cuMemcpyHtoDAsync', 'copying', q.memory.pointer, next.data as Float32Array, 32, device.stream.handle);
    captured.launch({ stream: device.createStream() });
    expect(values(download(captured.output))).toEqual(shifted(100, 2, 30));
    captured.launch({ stream: { handle: fake.foreignStream(), device: 0 } });
    expect(values(download(captured.output))).toEqual(shifted(100, 2, 30));
    captured.dispose();
    expect(() => captured.launch()).toThrow(/disposed/);
    q.memory.dispose();
    direct.memory.dispose();
    device.trimMemory();
    expect(fake.liveAllocations).toBe(1);
    expect(fake.liveHandles.graphs).toBe(0);
  });

  it('takes options that belong to the call and CUDA tensors only', async () => {
    const { backend, device } = setup;
    await setBackend(backend);
    const q = upload(rows(2), device);
    await expect(captureAttention(both(q), { stream: device.stream } as never)).rejects.toThrow(/options.stream/);
    const cpu = rows(2);
    await expect(captureAttention({ q: cpu, k: cpu, v: cpu } as never)).rejects.toThrow(/CudaTensor/);
    q.memory.dispose();
    await expect(captureAttention(both(q))).resolves.toBeDefined();
    await expect(captureAttention(both(q)).then((captured) => captured.launch())).rejects.toThrow(/disposed/);
  });
});

describe('prepared keys and values', () => {
  const query = () => tensor(Float32Array.of(1000, 2000, 3000, 4000), [1, 1, 1, 4]);
  /** What `attend` gives: the last value and, on every channel, the query's first. */
  const expected = (last: number) => [0, 1, 2, 3].map((channel) => 4 * last + channel + 1001);

  it('grow, keep what came in any layout, and serve tensors of host and device', async () => {
    const { fake, backend, device } = setup;
    await setBackend(backend);
    for (const location of ['cpu', 'cuda'] as const) {
      const place = (view: Tensor) => (location === 'cpu' ? view : upload(view, device));
      const all = rows(1200);
      // NHD and HND, with gaps, and a part of a longer tensor.
      const nhd = place(tensor(all.data, [1, 1200, 1, 4]));
      const part = (start: number, end: number) => slice(nhd, 1, start, end);
      const cache = await prepareKeyValue(part(0, 0), part(0, 0), { backend: 'cuda', tensorLayout: 'NHD' });
      let held = 0;
      for (const step of [1, 2, 300, 1, 700]) {
        await cache.append(part(held, held + step), part(held, held + step));
        held += step;
        expect(cache.length).toBe(held);
        const output = await cache.attend(place(query()));
        const there = output.location === 'cpu' ? (output as Tensor) : download(output as CudaTensor);
        expect(values(there)).toEqual(expected(held - 1));
        if (output.location === 'cuda') (output as CudaTensor).memory.dispose();
      }
      cache.dispose();
      await new Promise(setImmediate);
      if (location === 'cuda') (nhd as CudaTensor).memory.dispose();
    }
    // The queries that went to the device.
    expect(fake.liveAllocations).toBe(5);
  });

  it('wait, before they are appended to, for calls that attend to them on any stream', async () => {
    const { fake, backend, device } = setup;
    const view = upload(rows(600), device);
    const one = slice(view, 2, 0, 1);
    const [problem, single] = [createProblem(view, view, view, {}), createProblem(one, one, one, {})];
    const streams = [device.stream, device.createStream(), device.createStream()];
    const random = new Random(runSeed());
    const prepared = await backend.prepareKeyValue(problem, CHOICE, view, view, {});
    device.stream.synchronize();
    const attended = () => fake.executed.filter((entry) => entry === 'scatter').length;
    let calls = 0;
    // Room ends at 768 tokens: some are appended in place, some where they move.
    for (let step = 0; step < 40; step++) {
      for (let left = random.integer(0, 3); left > 0; left--) {
        const stream = random.pick(streams);
        const { output } = await prepared.attend(one, single, {}, { stream });
        (output as CudaTensor).memory.dispose();
        calls++;
      }
      const part = slice(view, 2, 0, random.integer(1, 30));
      await prepared.append(part, part, createProblem(part, part, part, {}), {});
      // What the appended tokens waited for has run by now.
      device.stream.synchronize();
      expect(attended()).toBe(calls);
    }
    prepared.dispose();
  });

  it('know which of their tokens count', async () => {
    const { fake, backend, device } = setup;
    const [batch, capacity] = [3, 256];
    const view = upload(place(new Float32Array(batch * 32), [batch, 1, 8, 4], 'float32'), device);
    const problem = createProblem(view, view, view, {});
    // Every other byte of longer rows.
    const bytes = Uint8Array.from({ length: batch * 20 }, (_, i) => (i % 6 === 0 ? 3 : 0));
    const whole = upload(tensor(bytes, [batch, 20]), device);
    const keyMask = { ...whole, shape: [batch, 8], strides: [20, 2] };
    const marked = (row: number) => Array.from({ length: 8 }, (_, i) => bytes[row * 20 + 2 * i] as number);
    const prepared = await backend.prepareKeyValue(problem, CHOICE, view, view, {});
    const held = () => fake.allocationsOf(batch * capacity)[0];
    expect(held()).toBeUndefined();
    await prepared.append(view, view, problem, { keyMask });
    await prepared.append(view, view, problem, {});
    device.stream.synchronize();
    const ones = new Array(8).fill(1);
    for (let row = 0; row < batch; row++) {
      const own = held()?.slice(row * capacity, row * capacity + 24);
      expect([...(own ?? [])]).toEqual([...ones, ...marked(row), ...ones]);
    }
    prepared.dispose();
    device.trimMemory();
    // The view and the mask.
    expect(fake.liveAllocations).toBe(2);
  });

  it('of several heads and gapped rows are copied row by row', async () => {
    const { fake, backend, device } = setup;
    const numbers = Float32Array.from({ length: 2 * 3 * 5 * 4 }, (_, i) => i);
    for (const strides of [
      [60, 20, 4, 1],
      [100, 33, 6, 1],
      [4, 4, 8, 1],
    ]) {
      const source = place(numbers, [2, 3, 5, 4], 'float32', strides, 3);
      const view = upload(source, device);
      const problem = createProblem(view, view, view, {});
      const prepared = await backend.prepareKeyValue(problem, CHOICE, view, view, {});
      await prepared.append(view, view, problem, {});
      const one = slice(view, 2, 3, 4);
      await prepared.append(one, one, createProblem(one, one, one, {}), {});
      device.stream.synchronize();
      const kept = fake.allocationsOf(2 * 3 * 256 * 4 * 4);
      expect(kept).toHaveLength(2);
      const floats = new Float32Array(kept[0]?.slice().buffer as ArrayBuffer);
      const there = toFloat32(source);
      for (let head = 0; head < 6; head++) {
        for (let token = 0; token < 11; token++) {
          const at = (head * 256 + token) * 4;
          const from = (head * 5 + (token === 10 ? 3 : token % 5)) * 4;
          expect([...floats.slice(at, at + 4)]).toEqual([...there.slice(from, from + 4)]);
        }
      }
      prepared.dispose();
      view.memory.dispose();
    }
    expect(fake.calls).toContain('cuMemcpy2DAsync');
    expect(fake.liveAllocations).toBe(0);
  });
});

describe('whatever is disposed, in whatever order', () => {
  const ACTIONS = ['run', 'enqueue', 'outputs', 'synchronize', 'plan', 'inputs', 'stream', 'device'] as const;
  type Action = (typeof ACTIONS)[number];

  /** One program: what was made, and what has been disposed of it. */
  async function playedBy(steps: readonly Action[], ownStream: boolean) {
    const { fake, cuda, backend, device } = open({ reuse: true });
    const hosted = rows(2);
    const there = upload(hosted, device);
    const onHost = await backend.plan(problemOf(hosted), CHOICE);
    const onDevice = await backend.plan(problemOf(there), CHOICE);
    const stream = ownStream ? device.createStream() : undefined;
    const running: Promise<void>[] = [];
    const outputs: CudaTensor[] = [];
    const gone = new Set<Action>();
    const run = async () => {
      const refused = gone.has('plan') || (ownStream && gone.has('stream'));
      try {
        const { output } = await onHost.run(
          { q: hosted, k: hosted, v: hosted },
          stream === undefined ? {} : { stream },
        );
        expect(values(output as Tensor)).toEqual(shifted(100, 2));
      } catch (error) {
        // Disposing the device also ends work that is under way.
        expect(refused || gone.has('device'), String(error)).toBe(true);
        expect(error).toMatchObject({ code: 'disposed' });
      }
    };
    const disposals: Partial<Record<Action, () => void>> = {
      plan: () => [onHost, onDevice].forEach((plan) => void plan.dispose()),
      inputs: () => there.dispose(),
      stream: () => stream?.dispose(),
      device: () => cuda.dispose(),
    };
    const others: Partial<Record<Action, () => void>> = {
      run: () => running.push(run()),
      enqueue: () => outputs.push(onDevice.enqueue(both(there), stream).output),
      outputs: () => outputs.splice(0).forEach((output) => void output.dispose()),
      synchronize: () => (stream ?? device.stream).synchronize(),
    };
    for (const step of steps) {
      const disposal = disposals[step];
      if (disposal !== undefined) gone.add(step);
      try {
        (disposal ?? others[step])?.();
      } catch (error) {
        expect(gone.size).toBeGreaterThan(0);
        expect(error).toMatchObject({ code: 'disposed' });
      }
    }
    await Promise.all(running);
    if (!gone.has('device')) for (const output of outputs) expect(values(download(output))).toEqual(shifted(100, 2));
    others.outputs?.();
    for (const disposal of Object.values(disposals)) disposal();
    return fake.liveHandles;
  }

  it('runs that were made before give their results, and later ones a typed error; nothing leaks', async () => {
    const property = fc.asyncProperty(
      fc.array(fc.constantFrom(...ACTIONS), { minLength: 1, maxLength: 12 }),
      fc.boolean(),
      async (steps, ownStream) => {
        const left = Object.entries(await playedBy(steps, ownStream)).filter(([, count]) => count > 0);
        expect(left).toEqual([]);
      },
    );
    await fc.assert(property, { seed: runSeed(), numRuns: 150 });
  });
});

describe('failures of the driver', () => {
  /** Every action of a program, after which only what the program still holds may be left. */
  async function program(backend: CudaBackend, cuda: Cuda): Promise<void> {
    const device = cuda.device();
    const q = rows(2);
    const there = upload(q, device);
    try {
      const plan = await backend.plan(problemOf(there, { returnLse: true }), CHOICE);
      try {
        const { output, lse } = plan.enqueue(both(there));
        try {
          await downloadAsync(output);
        } finally {
          output.memory.dispose();
          lse?.memory.dispose();
        }
        const hosted = await backend.plan(problemOf(q), CHOICE);
        try {
          await hosted.run({ q, k: q, v: q }, {});
        } finally {
          hosted.dispose();
        }
        const captured = await backend.capture(problemOf(there), CHOICE, both(there));
        try {
          captured.launch();
          download(captured.output);
        } finally {
          captured.dispose();
        }
      } finally {
        plan.dispose();
      }
    } finally {
      there.memory.dispose();
      device.trimMemory();
    }
  }

  /** When a call that frees something fails (or what comes before or after it), what it should have freed stays. */
  const FREEING = /Free|Destroy|Release|PushCurrent|PopCurrent/;

  it('are each a typed error, and leak nothing', async () => {
    const calm = open();
    await program(calm.backend, calm.cuda);
    expect(calm.fake.liveAllocations).toBe(0);
    const counts = new Map<string, number>();
    for (const name of calm.fake.calls) counts.set(name, (counts.get(name) ?? 0) + 1);
    let tried = 0;
    for (const [name, count] of counts) {
      if (/cuGetError|cuInit|cuDriver|cuDevice(Get|Total)|Fake/.test(name)) continue;
      for (let skip = 0; skip < Math.min(count, 12); skip++) {
        const { fake, cuda, backend } = open();
        fake.failNext(name as keyof DriverFunctions, ...new Array<number>(skip).fill(0), 1);
        const error = await program(backend, cuda).then(
          () => undefined,
          (reason: unknown) => reason,
        );
        // A failed wait is repeated by the next; every other failure reaches the caller.
        expect(error, `${name} #${skip}`).toBeInstanceOf(SageAttentionError);
        expect((error as Error).message, `${name} #${skip}`).toContain('CUDA_ERROR_INVALID_VALUE');
        expect((error as CudaError).call, `${name} #${skip}`).toBe(name);
        if (!FREEING.test(name)) expect(fake.liveAllocations, `${name} #${skip}`).toBe(0);
        // A context that could not be popped is there still.
        if (name !== 'cuCtxPopCurrent') expect(fake.contextStack, `${name} #${skip}`).toEqual([]);
        tried++;
      }
    }
    expect(tried).toBeGreaterThan(80);
  });

  it('during the kernel reach the caller who reads the result, and nobody gets wrong data', async () => {
    for (const entry of ['gather', 'scatter']) {
      const { fake, cuda, backend } = open();
      fake.faultIn(entry, 700);
      const error = await program(backend, cuda).then(
        () => undefined,
        (reason: unknown) => reason,
      );
      expect(error).toBeInstanceOf(CudaError);
      expect(error).toMatchObject({ code: 'device-lost', statusName: 'CUDA_ERROR_ILLEGAL_ADDRESS' });
      expect((error as Error).message).toMatch(/'quantizeQuery', 'attend'/);
      const { available, reason } = await backend.availability();
      expect(available).toBe(false);
      expect(reason).toMatch(/lost to a fault in this process \(CUDA_ERROR_ILLEGAL_ADDRESS\)/);
    }
  });

  it('for want of memory are an out-of-memory error, and the device goes on', async () => {
    const { fake, backend, device } = open({ memoryBytes: 4096 });
    const q = upload(rows(2), device);
    const plan = await backend.plan(problemOf(q), CHOICE);
    const hog = device.allocate(3500);
    expect(() => plan.enqueue(both(q))).toThrow(/allocating \d+ bytes on CUDA device 0.*out of memory/);
    hog.dispose();
    device.stream.synchronize();
    expect(values(download(plan.enqueue(both(q)).output))).toEqual(shifted(100, 2));
    expect(fake.calls.length).toBeGreaterThan(0);
  });
});

describe('availability', () => {
  it('says what was found', async () => {
    const { fake, backend } = open({ devices: [89, 80] });
    expect(await backend.availability()).toEqual({
      available: true,
      accelerated: true,
      details: {
        library: 'fake',
        'driver supports': 'CUDA 13.0',
        'device 0': 'Fake GPU 0, sm_89, 4 multiprocessors, 1.0 GiB',
        'device 1': 'Fake GPU 1, sm_80, 4 multiprocessors, 1.0 GiB',
        'default kernel': 'qk-int8-pv-fp8-cuda',
      },
    });
    // Looking takes no context, which would take memory of every GPU.
    expect(fake.liveHandles.contexts).toBe(0);
  });

  it('says why not and what to do', async () => {
    const old = open({ devices: [75] });
    expect(await old.backend.availability()).toMatchObject({
      available: false,
      reason: 'CUDA device 0 (Fake GPU 0) is of compute capability 7.5',
      remedy: "Use a GPU of compute capability 8 or later (Ampere), or backend 'webgpu'",
    });
    await expect(old.backend.defaultKernel(problemOf(rows(1)))).rejects.toThrow(/compute capability 7.5/);
    await expect(old.backend.plan(problemOf(rows(1)), CHOICE)).rejects.toThrow(/compute capability 7.5/);
    const hopper = { ...CHOICE, descriptor: descriptorOf('qk-int8-pv-fp8-cuda-sm90') };
    await expect(open({ devices: [89] }).backend.plan(problemOf(rows(1)), hopper)).rejects.toMatchObject({
      code: 'unsupported-option',
      expected: 'compute capability 9.0',
    });
    const none = new CudaBackend({ open: async () => new Cuda(new FakeCuda({ devices: [] }).api) });
    expect(await none.availability()).toMatchObject({ available: false, reason: 'the NVIDIA driver finds no device' });
    // This machine: with a driver or without, there is an answer.
    const here = await new CudaBackend().availability();
    if (!here.available) expect([here.reason, here.remedy].every((text) => (text ?? '').length > 10)).toBe(true);
  });

  it('is asked again after a failure, and after dispose', async () => {
    const { fake, cuda } = open();
    let attempts = 0;
    const backend = new CudaBackend({
      open: async () => {
        attempts++;
        if (attempts === 1) throw new TypeError('not yet');
        return cuda;
      },
    });
    await expect(backend.availability()).rejects.toThrow('not yet');
    expect((await backend.availability()).available).toBe(true);
    await backend.cuda();
    expect(attempts).toBe(2);
    await backend.dispose();
    await backend.dispose();
    await backend.availability();
    expect(attempts).toBe(3);
    expect(fake.liveHandles.contexts).toBe(0);
  });
});
