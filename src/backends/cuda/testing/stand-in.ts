/** The backend over the fake driver, with kernels that show which buffers they got. */
import { type AttentionProblem, createProblem } from '../../../attention/problem.ts';
import { toFloat32 } from '../../../tensor/access.ts';
import { type Tensor, tensor } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import { CudaBackend } from '../backend.ts';
import { Cuda } from '../driver/device.ts';
import { descriptorOf } from '../kernel-table.ts';
import type { DeviceFacts, KeyRoom } from '../launches/context.ts';
import type { KernelLaunch, KernelModule, LaunchSequence } from '../launches/launch.ts';
import type { CudaTensor } from '../tensor.ts';
import { FakeCuda, type FakeCudaOptions, type FakeLaunch } from './fake-cuda.ts';

/**
 * Two kernels in place of attention over float32: `gather` copies Q's rows to scratch, `scatter` writes them with the
 * constant and the first element of the mask added to the output. Enough to see every buffer arrive, in order.
 */
export const MODULE: KernelModule = {
  id: 'stand-in',
  ptx: () => `.version 8.0
.target sm_80
.entry gather(.param .u64 q, .param .u64 rows, .param .u32 tokens, .param .u32 stride, .param .u32 dim) { ret; }
.entry scatter(.param .u64 rows, .param .u64 added, .param .u64 mask, .param .u64 output, .param .u64 lse, .param .u32 count) { ret; }`,
};

const u64 = (bytes: Uint8Array) => new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true);
const u32 = (bytes: Uint8Array) => new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);

export function execute({ entry, parameters, memory }: FakeLaunch): void {
  const floats = (pointer: bigint, count: number) => {
    const { buffer, byteOffset } = memory(pointer, 4 * count);
    return new Float32Array(buffer, byteOffset, count);
  };
  const p = (i: number) => parameters[i] as Uint8Array;
  if (entry === 'gather') {
    const [tokens, stride, dim] = [u32(p(2)), u32(p(3)), u32(p(4))];
    const rows = floats(u64(p(1)), tokens * dim);
    for (let token = 0; token < tokens; token++) {
      rows.set(floats(u64(p(0)) + BigInt(4 * token * stride), dim), token * dim);
    }
    return;
  }
  const count = u32(p(5));
  const rows = floats(u64(p(0)), count);
  const added = floats(u64(p(1)), 1)[0] as number;
  const mask = u64(p(2)) === 0n ? 0 : (floats(u64(p(2)), 1)[0] as number);
  const output = floats(u64(p(3)), count);
  for (let i = 0; i < count; i++) output[i] = (rows[i] as number) + added + mask;
  if (u64(p(4)) !== 0n) floats(u64(p(4)), 1)[0] = 42;
}

function planLaunches(problem: AttentionProblem): LaunchSequence {
  const { q, queryLength, valueDim, mask, returnLse } = problem;
  const common = { module: MODULE, grid: [1, 1, 1], block: [32, 1, 1], sharedBytes: 0 } as const;
  const gather: KernelLaunch = {
    ...common,
    name: 'quantizeQuery',
    entry: 'gather',
    arguments: [
      { kind: 'pointer', buffer: 'q', byteOffset: 4 * q.offset },
      { kind: 'pointer', buffer: 'rows' },
      { kind: 'u32', value: queryLength },
      { kind: 'u32', value: q.tokenStride },
      { kind: 'u32', value: valueDim },
    ],
  };
  const scatter: KernelLaunch = {
    ...common,
    name: 'attend',
    entry: 'scatter',
    arguments: [
      { kind: 'pointer', buffer: 'rows' },
      { kind: 'pointer', buffer: 'added', byteOffset: 4 },
      mask === undefined ? { kind: 'null' } : { kind: 'pointer', buffer: 'mask', byteOffset: 4 * mask.offset },
      { kind: 'pointer', buffer: 'output' },
      returnLse ? { kind: 'pointer', buffer: 'lse' } : { kind: 'null' },
      { kind: 'u32', value: queryLength * valueDim },
    ],
  };
  return {
    scratch: { unused: 7, rows: 4 * queryLength * valueDim },
    zeroed: { alsoUnused: 5 },
    constants: { before: new Uint8Array(3), added: new Uint8Array(Float32Array.of(-1, 100).buffer) },
    launches: [gather, scatter],
  };
}

/** "Quantizes" V by copying its first head. */
function planKeyValue(
  { v, keyLength, valueDim }: AttentionProblem,
  _choice: KernelChoice,
  _device: DeviceFacts,
  { room }: { readonly room?: KeyRoom | undefined } = {},
) {
  const gather: KernelLaunch = {
    name: 'quantizeValue',
    module: MODULE,
    entry: 'gather',
    grid: [1, 1, 1],
    block: [32, 1, 1],
    sharedBytes: 0,
    arguments: [
      { kind: 'pointer', buffer: 'v', byteOffset: 4 * v.offset },
      { kind: 'pointer', buffer: 'value' },
      { kind: 'u32', value: keyLength },
      { kind: 'u32', value: v.tokenStride },
      { kind: 'u32', value: valueDim },
    ],
  };
  return {
    kept: { value: 4 * (room?.capacity ?? keyLength) * valueDim },
    scratch: {},
    constants: {},
    launches: keyLength === 0 ? [] : [gather],
  };
}

/** "Attends" by adding the last value to the query; for a query of one row. */
function planAttend({ q, keyLength, valueDim }: AttentionProblem): LaunchSequence {
  const scatter: KernelLaunch = {
    name: 'attend',
    module: MODULE,
    entry: 'scatter',
    grid: [1, 1, 1],
    block: [32, 1, 1],
    sharedBytes: 0,
    arguments: [
      { kind: 'pointer', buffer: 'value', byteOffset: 4 * (keyLength - 1) * valueDim },
      { kind: 'pointer', buffer: 'q', byteOffset: 4 * q.offset },
      { kind: 'null' },
      { kind: 'pointer', buffer: 'output' },
      { kind: 'null' },
      { kind: 'u32', value: valueDim },
    ],
  };
  return { scratch: {}, constants: {}, launches: [scatter] };
}

const none = (): never => {
  throw new Error('not planned here');
};
export const planner = {
  planLaunches,
  planKeyValue,
  planAttend,
  planBackward: none,
  planBlockMap: none,
  planMerge: none,
  planSum: none,
};

export const CHOICE: KernelChoice = {
  descriptor: descriptorOf('qk-int8-pv-fp16-cuda'),
  qkQuantGran: 'per-thread',
  pvAccumDtype: 'fp32',
  smoothK: true,
  smoothV: false,
  smoothQ: false,
};

export function open(options: FakeCudaOptions = {}) {
  const fake = new FakeCuda({ execute, ...options });
  const cuda = new Cuda(fake.api);
  const backend = new CudaBackend({ open: async () => cuda, planner });
  return { fake, cuda, backend, device: cuda.device() };
}

/** `[1,1,tokens,4]` of 1, 2, 3, ... */
export const rows = (tokens: number, first = 1): Tensor =>
  tensor(
    Float32Array.from({ length: 4 * tokens }, (_, i) => first + i),
    [1, 1, tokens, 4],
  );

export const shifted = (by: number, tokens: number, first = 1) =>
  Array.from({ length: 4 * tokens }, (_, i) => first + i + by);

export const problemOf = (q: CudaTensor | Tensor, options = {}) => createProblem(q, q, q, options);
export const both = (view: CudaTensor) => ({ q: view, k: view, v: view });
export const values = (view: Tensor) => [...toFloat32(view)];
