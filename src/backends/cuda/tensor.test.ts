/** What the tensor functions refuse, and how tensors are freed. */
import fc from 'fast-check';
import { beforeEach, describe, expect, it } from 'vitest';
import { runSeed } from '../../../test/support/random.ts';
import { SageAttentionError } from '../../errors.ts';
import { type Tensor, tensor, transpose } from '../../tensor/tensor.ts';
import { Cuda, type CudaDevice } from './driver/device.ts';
import {
  type CudaTensor,
  cudaTensorFromPointer,
  cudaTensorOn,
  download,
  downloadAsync,
  emptyCudaTensor,
  isCudaTensor,
  upload,
  uploadAsync,
} from './tensor.ts';
import { FakeCuda } from './testing/fake-cuda.ts';

let fake: FakeCuda;
let device: CudaDevice;
let other: CudaDevice;
beforeEach(() => {
  fake = new FakeCuda({ devices: [90, 90] });
  const cuda = new Cuda(fake.api);
  device = cuda.device(0);
  other = cuda.device(1);
});

const four = () => tensor(Float32Array.of(1, 2, 3, 4), [2, 2]);

/** Anything except a valid argument. */
const wrongNumber = fc.oneof(
  fc.constantFrom(Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, -1, 0.5, 2 ** 53, 1e300, -(2 ** 60)),
  fc.constantFrom(undefined, null, '8', 8n, {}, [], true),
  fc.double({ noInteger: true }),
  fc.integer({ max: -1 }),
);

/** Runs what must be refused, and checks that it is by a short typed error and leaves nothing behind. */
async function refused(use: () => unknown): Promise<void> {
  const before = fake.liveAllocations;
  let error: unknown;
  try {
    await use();
  } catch (reason) {
    error = reason;
  }
  expect(error).toBeInstanceOf(SageAttentionError);
  expect((error as Error).message.length).toBeLessThan(400);
  expect(fake.liveAllocations).toBe(before);
}

describe('sizes', () => {
  it('that are no number of bytes are refused wherever bytes are asked for', async () => {
    const property = fc.asyncProperty(wrongNumber, async (wrong) => {
      const bytes = wrong as number;
      await refused(() => device.allocate(bytes));
      await refused(() => device.allocatePinned(bytes));
      await refused(() => device.memoryFromPointer(0x1000n, bytes));
      if (wrong !== undefined) {
        await refused(() => device.trimMemory(bytes));
        await refused(() => cudaTensorFromPointer(device, 0x1000n, [2], 'float32', { byteLength: bytes ?? -1 }));
      }
    });
    await fc.assert(property, { seed: runSeed() });
  });

  it('beyond the device are out of memory, and it goes on', async () => {
    for (const bytes of [2 ** 40, Number.MAX_SAFE_INTEGER]) {
      expect(() => device.allocate(bytes)).toThrow(expect.objectContaining({ code: 'out-of-memory' }));
      expect(() => emptyCudaTensor(device, [Math.floor(bytes / 4)], 'float32')).toThrow(
        expect.objectContaining({ code: 'out-of-memory' }),
      );
    }
    expect(() => device.allocatePinned(2 ** 52)).toThrow(expect.objectContaining({ code: 'out-of-memory' }));
    await refused(() => emptyCudaTensor(device, [2 ** 52], 'float32'));
    const tensors = upload(four(), device);
    expect(download(tensors).data).toEqual(four().data);
  });
});

describe('tensor functions', () => {
  it('refuse shapes, strides, offsets, dtypes and addresses before they allocate', async () => {
    const memory = device.allocate(64);
    const property = fc.asyncProperty(wrongNumber, fc.integer({ min: 0, max: 2 }), async (wrong, at) => {
      const spoiled = [1, 2, 1].map((size, i) => (i === at ? wrong : size)) as number[];
      await refused(() => emptyCudaTensor(device, spoiled, 'float32'));
      await refused(() => cudaTensorOn(memory, 'float32', spoiled));
      await refused(() => cudaTensorFromPointer(device, 0x1000n, spoiled, 'float32'));
      await refused(() => cudaTensorOn(memory, 'float32', [1, 2, 1], { strides: spoiled }));
      await refused(() => cudaTensorFromPointer(device, 0x1000n, [1, 2, 1], 'float32', { strides: spoiled }));
      if (wrong !== undefined && wrong !== null) {
        await refused(() => cudaTensorOn(memory, 'float32', [2], { offset: wrong as number }));
      }
      const pointer = typeof wrong === 'bigint' ? -wrong : wrong;
      await refused(() => cudaTensorFromPointer(device, pointer as never, [2], 'float32'));
      // An empty list is the shape of a scalar.
      if (!Array.isArray(wrong)) await refused(() => emptyCudaTensor(device, wrong as never, 'float32'));
      await refused(() => emptyCudaTensor(device, [2], wrong as never));
      await refused(() => cudaTensorFromPointer(device, 0x1000n, [2], wrong as never));
    });
    await fc.assert(property, { seed: runSeed() });
    await refused(() => cudaTensorFromPointer(device, 2n ** 64n, [2], 'float32'));
    await refused(() => cudaTensorFromPointer(device, 0x1002n, [2], 'float32'));
    await refused(() => cudaTensorOn(memory, 'float32', [17]));
  });

  it('refuse tensors of another place, storage that is gone, and streams of another device', async () => {
    const there = upload(four(), device);
    const pinned = device.allocatePinned(64);
    pinned.dispose();
    const gone = four();
    structuredClone(gone.data.buffer, { transfer: [gone.data.buffer as ArrayBuffer] });
    const shaped = { ...four(), shape: [2, 3] } as Tensor;
    for (const use of [
      () => upload(there as never, device),
      () => uploadAsync(there as never, device),
      () => upload(gone, device),
      () => upload(shaped, device),
      () => upload(four(), device, { stream: other.stream }),
      () => download(four() as never),
      () => downloadAsync(four() as never),
      () => download({ ...there, shape: [2, 3] } as CudaTensor),
      () => download({ ...there, memory: {} } as never),
      () => download(undefined as never),
      () => download(there, { stream: other.stream }),
      () => downloadAsync(there, { into: pinned }),
      () => emptyCudaTensor(device, [2], 'float32', { stream: other.stream }),
      () => device.allocate(8, other.stream),
      () => device.streamFromHandle(5 as never),
      () => device.streamFromHandle(2n ** 64n),
    ]) {
      await refused(use);
    }
    expect(isCudaTensor({ ...there, memory: {} } as never)).toBe(false);
    expect(download(there).data).toEqual(four().data);
  });

  it('make tensors that dispose() frees, views of them too, once', () => {
    const there = upload(four(), device);
    const view = transpose(there, [1, 0]);
    expect(typeof view.dispose).toBe('function');
    view.dispose();
    there.dispose();
    there[Symbol.dispose]();
    expect(fake.liveAllocations).toBe(0);
    expect(() => download(there)).toThrow(expect.objectContaining({ code: 'disposed' }));
  });
});
