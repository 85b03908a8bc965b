/** Keys and values in pages against exact attention over the same tokens. Kernels run in the simulator. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type PageCase, pageChecks } from '../../../test/cuda/page-checks.ts';
import { Random, runSeed } from '../../../test/support/random.ts';
import { place } from '../../../test/support/tensors.ts';
import { elementCount, type Tensor } from '../../tensor/tensor.ts';
import { setBackend } from '../registry.ts';
import type { CudaBackend } from './backend.ts';
import type { CudaDevice } from './driver/device.ts';
import { createKeyValuePages, type KeyValuePages } from './key-value-pages.ts';
import { upload } from './tensor.ts';
import { createSimulatedBackend, simulatedPages } from './testing/simulator/backend.ts';

const seed = runSeed();
const random = new Random(seed);
let backend: CudaBackend;
let device: CudaDevice;

beforeAll(async () => {
  backend = createSimulatedBackend(89);
  device = (await backend.cuda()).device(0);
  await setBackend(backend);
});
afterAll(() => backend.dispose());

const make = (shape: readonly number[]): Tensor => place(random.normals(elementCount(shape)), shape, 'float16');

const [kvHeads, headDim, valueDim] = [2, 32, 48];
const poolOf = (pages: number, pageSize: number): KeyValuePages =>
  createKeyValuePages(
    device,
    { kvHeads, headDim, valueDim, dtype: 'float16', pages, pageSize },
    simulatedPages(backend),
  );

const dims = { dtype: 'float16', kvHeads, headDim, valueDim } as const;
const checksOf = (given: PageCase) =>
  pageChecks(() => ({ device, planner: simulatedPages(backend), seed }), [given]).map(
    ({ name, run }) => [name, run] as const,
  );
// Long enough that one token's keys are split.
const ofInt8 = checksOf({ ...dims, kernel: 'qk-int8-pv-fp16-cuda', tokens: [300, 640] });
const ofFp8 = checksOf({ ...dims, kernel: 'qk-int8-pv-fp8-cuda', tokens: [65, 200] });
const ofFp4 = checksOf({ ...dims, kernel: 'qk-fp4-pv-fp4', tokens: [65, 128] });

describe(`keys and values in pages (SAGEATTENTION_SEED=${seed})`, () => {
  // Simulating is slow: what does not depend on the format of V runs with one of them.
  it.each([...ofInt8, ...ofFp8.slice(0, 2), ...ofFp4.slice(0, 1)])('%s', async (_name, run) => {
    await run();
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
    const hopper = createSimulatedBackend(90);
    const onHopper = { kvHeads, headDim, dtype: 'float16', pages: 4, kernel: 'qk-int8-pv-fp8-cuda' } as const;
    const card = (await hopper.cuda()).device(0);
    expect(() => createKeyValuePages(card, onHopper)).toThrow(expect.objectContaining({ code: 'unsupported-option' }));
    await hopper.dispose();
    pool.dispose();
    expect(append({ pages, lengths: Int32Array.of(3) })).toThrow(expect.objectContaining({ code: 'disposed' }));
  });
});
