/** What only a real driver can show: its errors, its compiler, streams of others, clusters, a fault. */
import { createProblem } from '../../src/attention/problem.ts';
import { PreparedLaunches } from '../../src/backends/cuda/driver/prepared-launches.ts';
import {
  type Cuda,
  type CudaBackend,
  type CudaDevice,
  CudaError,
  type CudaTensor,
  download,
  downloadAsync,
  type KernelLaunch,
  type KernelModule,
  upload,
  uploadAsync,
} from '../../src/backends/cuda/index.ts';
import { sageattn } from '../../src/index.ts';
import { attentionExact } from '../../src/reference/exact.ts';
import { compare } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { tensor } from '../../src/tensor/tensor.ts';
import { Random } from '../support/random.ts';
import { place } from '../support/tensors.ts';
import type { Check } from './checks.ts';

function check(condition: boolean, message: () => string): asserts condition {
  if (!condition) throw new Error(message());
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

/** Each block writes the size of its cluster and its rank there. */
export const CLUSTER_KERNEL: KernelModule = {
  id: 'cluster check',
  ptx: () => `.version 8.0
.target sm_90
.address_size 64
.visible .entry clusterCheck(.param .u64 output)
{
  .reg .b32 %r<5>;
  .reg .b64 %d<4>;
  ld.param.u64 %d1, [output];
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r2, %cluster_nctarank;
  mov.u32 %r3, %cluster_ctarank;
  mad.lo.u32 %r4, %r2, 16, %r3;
  mul.wide.u32 %d2, %r1, 4;
  add.u64 %d3, %d1, %d2;
  st.global.u32 [%d3], %r4;
  ret;
}
`,
};

/** Writes where nothing is. */
export const FAULTING_KERNEL: KernelModule = {
  id: 'fault check',
  ptx: () => `.version 7.0
.target sm_80
.address_size 64
.visible .entry faultCheck(.param .u64 output)
{
  .reg .b64 %d<2>;
  ld.param.u64 %d1, [output];
  st.global.u32 [%d1], 1;
  ret;
}
`,
};

const launchOf = (
  name: string,
  module: KernelModule,
  entry: string,
  rest: Partial<KernelLaunch> = {},
): KernelLaunch => ({
  name,
  module,
  entry,
  grid: [1, 1, 1],
  block: [1, 1, 1],
  sharedBytes: 0,
  arguments: [{ kind: 'pointer', buffer: 'output' }],
  ...rest,
});

function clusters(device: CudaDevice): string | undefined {
  if (device.computeCapability < 90) return 'no clusters before compute capability 9.0';
  using memory = device.allocate(32);
  const launch = launchOf('cluster check', CLUSTER_KERNEL, 'clusterCheck', { grid: [8, 1, 1], cluster: [4, 1, 1] });
  new PreparedLaunches(device, [launch]).enqueue(device.stream, () => memory.pointer);
  const found = new Uint32Array(8);
  device.call('cuMemcpyDtoHAsync', 'reading', found, memory.pointer, 32, device.stream.handle);
  device.stream.synchronize();
  const expected = Uint32Array.from({ length: 8 }, (_, i) => 4 * 16 + (i % 4));
  check(found.join() === expected.join(), () => `blocks saw ${found}`);
  return undefined;
}

function refusedModule(device: CudaDevice): string {
  const broken = { id: 'broken', ptx: () => CLUSTER_KERNEL.ptx().replace('mad.lo', 'mad.lower') };
  const error = caught(() => device.module(broken));
  check(/mad\.lower|line 12/.test(error.message), () => `the compiler's log is missing: ${error.message}`);
  return error.statusName;
}

function outOfMemory(device: CudaDevice): string {
  const error = caught(() => device.allocate(2 * device.totalMemory));
  check(error.code === 'out-of-memory', () => error.message);
  device.allocate(2 ** 20).dispose();
  device.stream.synchronize();
  return error.message;
}

async function pageLocked(device: CudaDevice, random: Random): Promise<undefined> {
  const count = 2 ** 22;
  using from = device.allocatePinned(4 * count);
  using into = device.allocatePinned(4 * count);
  const source = from.view(Float32Array<ArrayBuffer>);
  source.set(random.normals(count));
  const { tensor: there, done } = uploadAsync(tensor(source, [count]), device);
  await done;
  const back = await downloadAsync(there, { into });
  check(
    source.every((value, i) => value === back.data[i]),
    () => 'what came back is not what was sent',
  );
  there.memory.dispose();
  return undefined;
}

/** A call on a stream that someone else made; the thread's context stays as it was. */
async function foreignStream(cuda: Cuda, device: CudaDevice, random: Random): Promise<undefined> {
  const { api } = cuda;
  const context = new BigUint64Array(1);
  api.cuCtxGetCurrent(context);
  const before = context[0];
  const handle = device.create('cuStreamCreate', 'creating a stream', 1);
  const host = place(random.normals(2 * 100 * 64), [1, 2, 100, 64], 'float16');
  const q = upload(host, device);
  const options = { stream: { handle, device: device.ordinal }, returnLse: false } as const;
  const output: CudaTensor = await sageattn(q, q, q, options);
  device.call('cuStreamDestroy', 'destroying a stream', handle);
  const inputs = { q: host, k: host, v: host };
  const exact = attentionExact(createProblem(host, host, host, {}), inputs).output;
  const { relativeL1 } = compare(toFloat32(download(output)), exact);
  check(relativeL1 < 0.06, () => `relative L1 ${relativeL1}`);
  api.cuCtxGetCurrent(context);
  check(context[0] === before, () => 'the current context of the thread has changed');
  return undefined;
}

/** Each call on its tensors' device. */
async function otherDevice(cuda: Cuda, random: Random): Promise<string | undefined> {
  if (cuda.deviceCount < 2) return 'one device here';
  const host = place(random.normals(2 * 100 * 64), [1, 2, 100, 64], 'float16');
  const outputs = [0, 1].map(async (ordinal) => {
    const q = upload(host, cuda.device(ordinal));
    return sageattn(q, q, q);
  });
  const [first, second] = (await Promise.all(outputs)) as [CudaTensor, CudaTensor];
  check(first.device === 0 && second.device === 1, () => `outputs on ${first.device} and ${second.device}`);
  const { relativeL1 } = compare(toFloat32(download(second)), toFloat32(download(first)));
  check(relativeL1 < 0.06, () => `relative L1 ${relativeL1} between devices`);
  return undefined;
}

/** The last check of its process: the device is lost to it. */
async function fault(backend: CudaBackend, device: CudaDevice): Promise<string> {
  const prepared = new PreparedLaunches(device, [launchOf('fault check', FAULTING_KERNEL, 'faultCheck')]);
  prepared.enqueue(device.stream, () => 0x1000n);
  const error = await device.stream.completed().then(
    () => undefined,
    (reason: unknown) => reason,
  );
  check(error instanceof CudaError && error.code === 'device-lost', () => `no fault, but ${error}`);
  check(error.message.includes("'fault check'"), () => `the kernel is not named: ${error.message}`);
  const { available, reason } = await backend.availability();
  check(!available, () => 'the device counts as available');
  return reason ?? '';
}

export function driverChecks(backend: CudaBackend, cuda: Cuda, device: CudaDevice, seed: number): Check[] {
  const random = new Random(seed);
  return [
    {
      name: "a module that does not compile is an error with the compiler's log",
      run: async () => refusedModule(device),
    },
    { name: 'clusters, launched with their attribute', run: async () => clusters(device) },
    { name: 'more memory than there is', run: async () => outOfMemory(device) },
    { name: 'copies through page-locked memory', run: () => pageLocked(device, random) },
    { name: 'a stream made elsewhere, and the context of the thread', run: () => foreignStream(cuda, device, random) },
    { name: 'a second device', run: () => otherDevice(cuda, random) },
    { name: 'a fault names its kernel', run: () => fault(backend, device) },
  ];
}
