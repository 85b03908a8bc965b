import { describe, expect, it } from 'vitest';
import { BackendUnavailableError } from '../../../errors.ts';
import type { KernelLaunch, KernelModule } from '../launches/launch.ts';
import { FakeCuda, type FakeCudaOptions, type FakeLaunch } from '../testing/fake-cuda.ts';
import { Cuda, type CudaDevice } from './device.ts';
import { CudaGraph } from './graph.ts';
import { PreparedLaunches } from './prepared-launches.ts';
import { CudaError } from './status.ts';

function open(options?: FakeCudaOptions) {
  const fake = new FakeCuda(options);
  const cuda = new Cuda(fake.api);
  return { fake, cuda, device: cuda.device() };
}

/** A kernel that adds one to every byte of a buffer. */
const INCREMENT: KernelModule = {
  id: 'increment',
  ptx: () => `.version 8.0
.target sm_80
.address_size 64
.visible .entry increment(.param .u64 data, .param .u32 count)
{ ret; }`,
};

function increment({ entry, parameters, memory }: FakeLaunch): void {
  if (entry !== 'increment') return;
  const [data, count] = parameters.map((bytes) => new DataView(bytes.buffer)) as [DataView, DataView];
  const bytes = count.getUint32(0, true);
  const target = memory(data.getBigUint64(0, true), bytes);
  for (let i = 0; i < bytes; i++) target[i] = (target[i] as number) + 1;
}

const launchOf = (count: number, name = 'increment'): KernelLaunch => ({
  name,
  module: INCREMENT,
  entry: 'increment',
  grid: [1, 1, 1],
  block: [32, 1, 1],
  sharedBytes: 0,
  arguments: [
    { kind: 'pointer', buffer: 'data', byteOffset: 2 },
    { kind: 'u32', value: count },
  ],
});

function fill(device: CudaDevice, pointer: bigint, value: number, bytes: number, stream = device.stream): void {
  device.call('cuMemsetD8Async', 'filling', pointer, value, bytes, stream.handle);
}

function caught(use: () => unknown): CudaError {
  try {
    use();
  } catch (error) {
    if (error instanceof CudaError) return error;
    throw error;
  }
  throw new Error('nothing was thrown');
}

describe('the driver and its devices', () => {
  it('reports what a device is', () => {
    const { cuda, device } = open({ devices: [80, 120] });
    expect(cuda.driverVersion).toBe(13000);
    expect(cuda.deviceCount).toBe(2);
    expect(device).toMatchObject({ ordinal: 0, name: 'Fake GPU 0', computeCapability: 80, multiprocessors: 4 });
    expect(cuda.device(1).computeCapability).toBe(120);
    expect(cuda.device(1)).toBe(cuda.device(1));
    for (const ordinal of [2, -1, 0.5]) expect(() => cuda.device(ordinal)).toThrow(/expected 0 to 1/);
  });

  it('is unavailable, with the status, when the driver does not start or has no device', () => {
    const broken = new FakeCuda();
    broken.failNext('cuInit', 100);
    expect(() => new Cuda(broken.api)).toThrow(BackendUnavailableError);
    broken.failNext('cuInit', 100);
    expect(() => new Cuda(broken.api)).toThrow(
      /CUDA_ERROR_NO_DEVICE \(no CUDA-capable device is detected\) from cuInit/,
    );
    expect(() => new Cuda(new FakeCuda({ devices: [] }).api)).toThrow(/finds no device/);
  });

  it("leaves the thread's context as it was, after calls that fail too", () => {
    const { fake, device } = open();
    fake.contextStack.push(0xabcdn);
    const memory = device.allocate(64);
    device.stream.synchronize();
    fake.failNext('cuMemsetD8Async', 1);
    expect(() => fill(device, memory.pointer, 0, 64)).toThrow();
    expect(() => new CudaGraph(device, () => device.stream.synchronize())).not.toThrow();
    expect(
      () =>
        new CudaGraph(device, () => {
          throw new Error('stop');
        }),
    ).toThrow('stop');
    expect(fake.contextStack).toEqual([0xabcdn]);
  });

  it('gives every handle and all memory back when it is disposed', async () => {
    const { fake, cuda, device } = open();
    const stream = device.createStream();
    const memory = device.allocate(100, stream);
    new PreparedLaunches(device, [launchOf(1)]).enqueue(stream, () => memory.pointer);
    await stream.completed();
    const pinned = device.allocatePinned(10);
    const graph = new CudaGraph(device, () => undefined);
    graph.dispose();
    pinned.dispose();
    memory.dispose();
    stream.dispose();
    expect(fake.liveAllocations).toBe(0);
    cuda.dispose();
    const none = { streams: 0, events: 0, modules: 0, pools: 0, graphs: 0, registrations: 0, contexts: 0 };
    expect(fake.liveHandles).toEqual(none);
    // What outlives its device does nothing more, and says so when it is used.
    memory.dispose();
    expect(() => device.allocate(1)).toThrow(/has been disposed/);
    expect(cuda.device()).not.toBe(device);
  });
});

describe('memory', () => {
  it('is freed in stream order, once, and after every stream that used it', () => {
    const { fake, device } = open({ execute: increment });
    const other = device.createStream();
    const memory = device.allocate(8);
    fill(device, memory.pointer, 5, 8);
    memory.useOn(other);
    const copy = device.allocate(8, other);
    device.call('cuMemcpyDtoDAsync', 'copying', copy.pointer, memory.pointer, 8, other.handle);
    memory.dispose();
    memory.dispose();
    expect(memory.disposed).toBe(true);
    // The free has run, and with it all that it had to wait for.
    device.stream.synchronize();
    expect(() => fake.memory(memory.pointer, 8)).toThrow(/700/);
    other.synchronize();
    expect([...fake.memory(copy.pointer, 8)]).toEqual(new Array(8).fill(5));
    expect(() => memory.useOn(other)).toThrow(/disposed/);
    copy.dispose();
    expect(fake.liveAllocations).toBe(0);
  });

  it('on a stream that is gone is freed after its work', () => {
    const { fake, device } = open();
    const gone = device.createStream();
    const memory = device.allocate(8, gone);
    fill(device, memory.pointer, 3, 8, gone);
    gone.dispose();
    const copy = device.allocate(8);
    memory.useOn(device.stream);
    device.call('cuMemcpyDtoDAsync', 'copying', copy.pointer, memory.pointer, 8, device.stream.handle);
    memory.dispose();
    device.stream.synchronize();
    expect([...fake.memory(copy.pointer, 8)]).toEqual(new Array(8).fill(3));
    expect(() => fill(device, copy.pointer, 0, 8, gone)).toThrow(/CUDA_ERROR_INVALID_HANDLE/);
    expect(() => gone.synchronize()).toThrow(/disposed/);
    copy.dispose();
    expect(fake.liveAllocations).toBe(0);
  });

  it('that does not fit is an out-of-memory error with the size and the device', () => {
    const { device } = open({ memoryBytes: 1000 });
    const error = caught(() => device.allocate(1001));
    expect(error.code).toBe('out-of-memory');
    expect(error).toMatchObject({ status: 2, statusName: 'CUDA_ERROR_OUT_OF_MEMORY', call: 'cuMemAllocFromPoolAsync' });
    expect(error.message).toBe(
      'allocating 1001 bytes on CUDA device 0 (Fake GPU 0): CUDA_ERROR_OUT_OF_MEMORY (out of memory) from cuMemAllocFromPoolAsync',
    );
    device.allocate(1000).dispose();
  });

  it('of no bytes needs no driver', () => {
    const { fake, device } = open();
    const memory = device.allocate(0);
    expect(memory.pointer).toBe(0n);
    memory.dispose();
    expect(fake.calls).not.toContain('cuMemAllocFromPoolAsync');
  });

  it('works without the stream-ordered allocator', () => {
    const { fake, cuda, device } = open({ pools: false });
    const memory = device.allocate(16);
    expect(fake.liveAllocations).toBe(1);
    memory.dispose();
    device.trimMemory();
    expect(fake.liveAllocations).toBe(0);
    cuda.dispose();
    expect(fake.calls.filter((name) => name.startsWith('cuMemPool'))).toEqual([]);
  });

  it('pinned on the host covers whole pages of its own', () => {
    const { fake, device } = open();
    const buffers = [1, 4096, 5000, 100].map((bytes) => device.allocatePinned(bytes));
    for (const buffer of buffers) {
      expect(buffer.address % 4096n).toBe(0n);
      buffer.bytes.fill(7);
    }
    expect(buffers[2]?.bytes).toHaveLength(5000);
    expect(fake.liveHandles.registrations).toBe(4);
    for (const buffer of buffers) {
      buffer.dispose();
      buffer.dispose();
      // Ordinary memory of the process again, not a dangling view.
      expect(buffer.bytes[0]).toBe(7);
    }
    expect(fake.liveHandles.registrations).toBe(0);
  });
});

describe('modules', () => {
  it("that the driver refuses are an error with its compiler's log", () => {
    const { device } = open();
    const error = caught(() => device.module({ id: 'broken', ptx: () => 'nonsense' }));
    expect(error.code).toBe('execution-failed');
    expect(error.message).toContain("compiling module 'broken' for CUDA device 0 (Fake GPU 0)");
    expect(error.message).toContain('Missing .version directive');
    expect(error.message).toContain('CUDA_ERROR_INVALID_PTX');
    const newer = { id: 'newer', ptx: () => INCREMENT.ptx().replace('sm_80', 'sm_120a') };
    expect(caught(() => device.module(newer)).message).toMatch(/SM version specified by .target is higher/);
    expect(() => device.module(INCREMENT).function('absent')).toThrow(
      /'absent' in module 'increment': CUDA_ERROR_NOT_FOUND/,
    );
  });

  it('are compiled once per id and device', () => {
    const { cuda, device } = open({ devices: [90, 90] });
    let compiled = 0;
    const counted: KernelModule = {
      id: 'counted',
      ptx: () => {
        compiled++;
        return INCREMENT.ptx();
      },
    };
    expect(device.module(counted)).toBe(device.module(counted));
    expect(device.module(counted).log).toContain('increment');
    expect(compiled).toBe(1);
    cuda.device(1).module(counted);
    expect(compiled).toBe(2);
  });
});

describe('launches', () => {
  it('carry every kind of argument, geometry, shared memory and cluster to the driver', () => {
    let seen: FakeLaunch | undefined;
    const { device } = open({
      execute: (launch) => {
        seen = launch;
      },
    });
    const module: KernelModule = {
      id: 'all',
      ptx: () => `.version 8.6\n.target sm_90a\n.visible .entry all(
        .param .u64 a, .param .u32 b, .param .s32 c, .param .f32 d, .param .u64 e, .param .s64 f, .param .u64 g,
        .param .align 64 .b8 h[128])\n{ ret; }`,
    };
    const description = {
      buffer: 'tiles',
      byteOffset: 32,
      elementType: 'u8',
      dimensions: [128, 1000, 2 ** 32],
      byteStrides: [128, 128_000],
      box: [128, 64, 1],
      swizzle: '128B',
    } as const;
    const launch: KernelLaunch = {
      name: 'everything',
      module,
      entry: 'all',
      grid: [6, 5, 4],
      block: [128, 2, 1],
      cluster: [2, 1, 1],
      sharedBytes: 200_000,
      arguments: [
        { kind: 'pointer', buffer: 'x', byteOffset: 2 ** 33 },
        { kind: 'u32', value: 0xffff_fffe },
        { kind: 's32', value: -7 },
        { kind: 'f32', value: Number.NEGATIVE_INFINITY },
        { kind: 'u64', value: 2n ** 63n },
        { kind: 's64', value: -(2 ** 40) },
        { kind: 'null' },
        { kind: 'tensor-map', map: description },
      ],
    };
    const prepared = new PreparedLaunches(device, [launch]);
    prepared.enqueue(device.stream, (buffer) => (buffer === 'x' ? 0x7777_0000_0000n : 0x1000n));
    device.stream.synchronize();
    if (seen === undefined) throw new Error('not launched');
    expect(seen).toMatchObject({ grid: [6, 5, 4], block: [128, 2, 1], cluster: [2, 1, 1], sharedBytes: 200_000 });
    const views = seen.parameters.map((bytes) => new DataView(bytes.buffer)) as DataView[];
    const at = (i: number) => views[i] as DataView;
    expect(at(0).getBigUint64(0, true)).toBe(0x7777_0000_0000n + 2n ** 33n);
    expect(at(1).getUint32(0, true)).toBe(0xffff_fffe);
    expect(at(2).getInt32(0, true)).toBe(-7);
    expect(at(3).getFloat32(0, true)).toBe(Number.NEGATIVE_INFINITY);
    expect(at(4).getBigUint64(0, true)).toBe(2n ** 63n);
    expect(at(5).getBigInt64(0, true)).toBe(-(2n ** 40n));
    expect(at(6).getBigUint64(0, true)).toBe(0n);
    expect(seen.tensorMap(seen.parameters[7] as Uint8Array)).toEqual({
      elementType: 0,
      pointer: 0x1020n,
      dimensions: [128n, 1000n, 2n ** 32n],
      byteStrides: [128n, 128_000n],
      box: [128, 64, 1],
      elementStrides: [1, 1, 1],
      interleave: 0,
      swizzle: 3,
    });
    expect(prepared.kernels).toEqual([{ name: 'everything', registers: 168, localBytes: 0 }]);
  });

  it('encode a tensor map again only when its tensor has moved', () => {
    const { fake, device } = open();
    const module = {
      id: 'map',
      ptx: () => '.target sm_90a\n.entry map(.param .align 64 .b8 m[128])\n{ ret; }',
    };
    const prepared = new PreparedLaunches(device, [
      {
        ...launchOf(0),
        module,
        entry: 'map',
        arguments: [
          {
            kind: 'tensor-map',
            map: { buffer: 't', elementType: 'f16', dimensions: [64], byteStrides: [], box: [64], swizzle: 'none' },
          },
        ],
      },
    ]);
    const encoded = () => fake.calls.filter((name) => name === 'cuTensorMapEncodeTiled').length;
    for (const [tensor, count] of [
      [256n, 1],
      [256n, 1],
      [512n, 2],
    ] as const) {
      prepared.enqueue(device.stream, () => tensor);
      expect(encoded()).toBe(count);
    }
    expect(() => prepared.enqueue(device.stream, () => 8n)).toThrow(/tensor map of 't' \(\[64\], innermost first\)/);
  });

  it('take the addresses of each run, though an earlier run has not ended', () => {
    const { fake, device } = open({ execute: increment });
    const prepared = new PreparedLaunches(device, [launchOf(3)]);
    const buffers = [device.allocate(8), device.allocate(8)];
    for (const { pointer } of buffers) {
      fill(device, pointer, 0, 8);
      prepared.enqueue(device.stream, () => pointer);
    }
    device.stream.synchronize();
    for (const { pointer } of buffers) expect([...fake.memory(pointer, 8)]).toEqual([0, 0, 1, 1, 1, 0, 0, 0]);
  });

  it('over an empty grid are nothing, and over too large a one an error', () => {
    const { fake, device } = open();
    new PreparedLaunches(device, [{ ...launchOf(0), grid: [4, 0, 1] }]).enqueue(device.stream, () => 0n);
    expect(fake.calls).not.toContain('cuLaunchKernel');
    expect(() => new PreparedLaunches(device, [{ ...launchOf(0), grid: [1, 65536, 1] }])).toThrow(/65535/);
  });

  it('that the driver refuses name the kernel', () => {
    const { fake, device } = open();
    const prepared = new PreparedLaunches(device, [launchOf(0, 'attend')]);
    fake.failNext('cuLaunchKernel', 719);
    expect(() => prepared.enqueue(device.stream, () => 0n)).toThrow(/launching kernel 'attend'/);
  });
});

describe('faults of the device', () => {
  it('surface at the next synchronization, with the kernels that were under way', async () => {
    const { fake, device } = open({ execute: increment });
    const memory = device.allocate(64);
    const run = (name: string) =>
      new PreparedLaunches(device, [launchOf(4, name)]).enqueue(device.stream, () => memory.pointer);
    run('earlier');
    await device.stream.completed();
    fake.faultIn('increment', 700);
    run('attend');
    run('quantizeKey');
    const error = await device.stream.completed().then(
      () => undefined,
      (reason: unknown) => reason,
    );
    expect(error).toBeInstanceOf(CudaError);
    expect(error).toMatchObject({ code: 'device-lost', statusName: 'CUDA_ERROR_ILLEGAL_ADDRESS' });
    expect((error as CudaError).message).toMatch(/one of the kernels under way caused it: 'attend', 'quantizeKey'/);
    expect((error as CudaError).message).not.toContain('earlier');
    expect(device.lost).toBe(error);
    // The context is gone: nothing works any more, and releasing what it held is no further error.
    expect(caught(() => device.allocate(1)).code).toBe('device-lost');
    memory.dispose();
    device.dispose();
  });

  it('surface at a blocking synchronization and at other calls as well', () => {
    for (const use of [
      (device: CudaDevice) => device.stream.synchronize(),
      (device: CudaDevice) => device.createEvent().record(device.stream).synchronize(),
      (device: CudaDevice) => {
        // Time passes; then any call reports it.
        device.api.cuStreamSynchronize(device.stream.handle);
        device.inContext(() => device.api.cuStreamSynchronize(device.stream.handle));
        device.allocate(5);
      },
    ]) {
      const { fake, device } = open();
      fake.faultIn('increment', 719);
      new PreparedLaunches(device, [launchOf(0, 'attend')]).enqueue(device.stream, () => 0n);
      const error = caught(() => use(device));
      expect(error.code).toBe('device-lost');
      expect(error.message).toContain("kernel 'attend' was under way");
    }
  });
});

describe('streams', () => {
  it('run in no order but the one that waits make', () => {
    const { fake, device } = open();
    const [a, b] = [device.createStream(), device.createStream()];
    const memory = device.allocate(4, a);
    fill(device, memory.pointer, 1, 4, a);
    fill(device, memory.pointer, 2, 4, b);
    b.synchronize();
    a.synchronize();
    expect(fake.memory(memory.pointer, 4)[0]).toBe(1);
    fill(device, memory.pointer, 1, 4, a);
    b.waitFor(a);
    fill(device, memory.pointer, 2, 4, b);
    b.synchronize();
    a.synchronize();
    expect(fake.memory(memory.pointer, 4)[0]).toBe(2);
  });

  it('of the caller are used by handle, waited for by their last mark, and never destroyed', () => {
    const { fake, device } = open();
    const handle = fake.foreignStream();
    const foreign = device.streamFromHandle(handle);
    expect(device.streamFromHandle(handle)).toBe(foreign);
    const memory = device.allocate(4);
    fill(device, memory.pointer, 9, 4, foreign);
    foreign.mark();
    // The caller destroys it; its pending work still runs before the work that waits for it.
    fake.api.cuCtxPushCurrent(0xc000n);
    expect(fake.api.cuStreamDestroy(handle)).toBe(0);
    device.stream.waitFor(foreign);
    const calls = fake.calls.filter((name) => name === 'cuStreamDestroy').length;
    foreign.dispose();
    expect(fake.calls.filter((name) => name === 'cuStreamDestroy')).toHaveLength(calls);
    device.stream.synchronize();
    expect(fake.memory(memory.pointer, 4)[0]).toBe(9);
    for (const standard of [0n, 1n, 2n]) expect(() => device.streamFromHandle(standard)).toThrow(/default stream/);
  });

  it('give times between events', () => {
    const { device } = open();
    using start = device.createEvent().record(device.stream);
    using end = device.createEvent().record(device.stream);
    end.synchronize();
    expect(start.millisecondsTo(end)).toBe(0.25);
  });
});

describe('graphs', () => {
  it('run nothing while they are captured, and the same work at each replay', () => {
    const { fake, device } = open({ execute: increment });
    const memory = device.allocate(8);
    fill(device, memory.pointer, 0, 8);
    const prepared = new PreparedLaunches(device, [launchOf(2), launchOf(4)]);
    using graph = new CudaGraph(device, (stream) => prepared.enqueue(stream, () => memory.pointer));
    device.stream.synchronize();
    expect(fake.executed).toEqual([]);
    // The captured arguments are the graph's own: later runs elsewhere do not move them.
    prepared.enqueue(device.stream, () => memory.pointer + 1n);
    device.stream.synchronize();
    expect([...fake.memory(memory.pointer, 8)]).toEqual([0, 0, 0, 2, 2, 1, 1, 0]);
    const other = device.createStream();
    other.waitFor(device.stream);
    graph.launch(other);
    graph.launch(other);
    other.synchronize();
    expect([...fake.memory(memory.pointer, 8)]).toEqual([0, 0, 4, 6, 4, 3, 1, 0]);
    expect(device.stream.isCapturing).toBe(false);
  });

  it('that cannot be captured leave the device usable', () => {
    const { fake, device } = open({ execute: increment });
    expect(() => new CudaGraph(device, (stream) => device.allocate(8, stream))).toThrow(/CAPTURE_UNSUPPORTED/);
    expect(() => new CudaGraph(device, (stream) => stream.synchronize())).toThrow(/CAPTURE_UNSUPPORTED/);
    device.allocate(8).dispose();
    device.stream.synchronize();
    expect(fake.liveHandles).toMatchObject({ streams: 1, graphs: 0 });
  });

  it('name their kernels in a later fault', () => {
    const { fake, device } = open();
    const prepared = new PreparedLaunches(device, [launchOf(0, 'attend')]);
    const graph = new CudaGraph(device, (stream) => prepared.enqueue(stream, () => 0n));
    fake.faultIn('increment', 700);
    graph.launch();
    expect(caught(() => device.stream.synchronize()).message).toContain("'attend'");
    graph.dispose();
    expect(() => graph.launch()).toThrow(/disposed/);
  });
});

it('several devices each have their own context, stream and memory', () => {
  const { fake, cuda } = open({ devices: [90, 89], execute: increment });
  for (const ordinal of [1, 0]) {
    const device = cuda.device(ordinal);
    const memory = device.allocate(8);
    expect(memory.device.ordinal).toBe(ordinal);
    fill(device, memory.pointer, ordinal, 8);
    new PreparedLaunches(device, [launchOf(1)]).enqueue(device.stream, () => memory.pointer);
    device.stream.synchronize();
    expect(fake.memory(memory.pointer, 8)[2]).toBe(ordinal + 1);
  }
  expect(cuda.device(0).stream.handle).not.toBe(cuda.device(1).stream.handle);
});
