/** The CUDA backend as it is, over a driver without a GPU whose kernels the simulator runs. */
import { type CudaBackend, createCudaBackend } from '../../backend.ts';
import { Cuda } from '../../driver/device.ts';
import type { SimulatableModule } from '../../launches/arguments.ts';
import { planBackward } from '../../launches/backward.ts';
import { planBlockMap } from '../../launches/block-map.ts';
import type { LaunchSequence } from '../../launches/launch.ts';
import { planMerge, planSum } from '../../launches/merge.ts';
import { PAGE_PLANNER, type PagePlanner } from '../../launches/pages.ts';
import { planAttend, planKeyValue, planLaunches } from '../../launches/plan.ts';
import type { Kernel } from '../../ptx/types.ts';
import { FakeCuda, type FakeLaunch } from '../fake-cuda.ts';
import type { SimulatedTensorMap } from './mbarrier.ts';
import { type Allocation, type DeviceAddresses, SimulationError } from './memory.ts';
import { simulateKernel } from './simulator.ts';

/** Memory of the fake driver, whose allocations it knows and poisons. */
class FakeMemory implements DeviceAddresses {
  readonly #launch: FakeLaunch;
  readonly #found: Allocation[] = [];
  #last: Allocation | undefined;

  constructor(launch: FakeLaunch) {
    this.#launch = launch;
  }

  at(address: number, length: number, what: string): Allocation {
    if (address % length !== 0) throw new SimulationError(`${what}: address ${address} is not a multiple of ${length}`);
    const last = this.#last;
    if (last !== undefined && address >= last.address && address + length <= last.address + last.bytes.length) {
      return last;
    }
    let found = this.#found.find(
      (allocation) => address >= allocation.address && address + length <= allocation.address + allocation.bytes.length,
    );
    if (found === undefined) {
      const bytes = this.#launch.memory(BigInt(address), length);
      const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
      found = { name: 'device memory', address, bytes, view };
      this.#found.unshift(found);
    }
    this.#last = found;
    return found;
  }
}

function parameterValue(kind: string, bytes: Uint8Array): number | bigint {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (kind === 'u64') return view.getBigUint64(0, true);
  if (kind === 'f32') return view.getFloat32(0, true);
  return kind === 's32' ? view.getInt32(0, true) : view.getUint32(0, true);
}

function tensorMapOf(launch: FakeLaunch, bytes: Uint8Array): SimulatedTensorMap {
  const { elementType, pointer, dimensions, byteStrides, box, swizzle } = launch.tensorMap(bytes);
  return {
    address: Number(pointer),
    // CU_TENSOR_MAP_DATA_TYPE_UINT8 and _FLOAT16: what the kernels use.
    elementBytes: elementType === 0 ? 1 : 2,
    dimensions: dimensions.map(Number),
    byteStrides: byteStrides.map(Number),
    box,
    swizzleBytes: ([0, 32, 64, 128] as const)[swizzle as 0 | 1 | 2 | 3],
  };
}

/** What makes the kernels of plans known to a backend. */
const rememberers = new WeakMap<CudaBackend, <T extends LaunchSequence>(sequence: T) => T>();

/** The planner of pages on a simulated device. */
export function simulatedPages(backend: CudaBackend): PagePlanner {
  const remember = rememberers.get(backend);
  if (remember === undefined) throw new Error('that backend is not simulated');
  const { poolBytes, planLastPage, planPoolMean, planAppendPages, planAttendPages } = PAGE_PLANNER;
  return {
    poolBytes,
    planLastPage: (...args) => remember(planLastPage(...args)),
    planPoolMean: (...args) => remember(planPoolMean(...args)),
    planAppendPages: (...args) => remember(planAppendPages(...args)),
    planAttendPages: (...args) => remember(planAttendPages(...args)),
  };
}

/** A backend for simulated devices of a compute capability (major * 10 + minor). */
export function createSimulatedBackend(computeCapability: number, devices = 1): CudaBackend {
  // The driver gets text; the simulator runs the instructions that it was printed from.
  const kernels = new Map<string, Kernel>();
  const remember = <T extends LaunchSequence>(sequence: T): T => {
    for (const { module } of sequence.launches) {
      kernels.set(module.ptx(), (module as SimulatableModule).kernel());
    }
    return sequence;
  };
  const execute = (launch: FakeLaunch) => {
    const kernel = kernels.get(launch.ptx);
    if (kernel === undefined) throw new Error(`${launch.entry} was not planned here`);
    if (launch.block[0] !== kernel.threads) throw new SimulationError(`${kernel.name}: ${launch.block[0]} threads`);
    const parameters: Record<string, number | bigint> = {};
    const maps = new Map<string, SimulatedTensorMap>();
    kernel.parameters.forEach(({ name, kind }, i) => {
      const bytes = launch.parameters[i] as Uint8Array;
      if (kind === 'tensorMap') maps.set(name, tensorMapOf(launch, bytes));
      else parameters[name] = parameterValue(kind, bytes);
    });
    simulateKernel(kernel, launch.grid[0], parameters, new FakeMemory(launch), maps);
  };
  const backend = createCudaBackend({
    open: async () => new Cuda(new FakeCuda({ devices: new Array(devices).fill(computeCapability), execute }).api),
    planner: {
      planLaunches: (...args) => remember(planLaunches(...args)),
      planKeyValue: (...args) => remember(planKeyValue(...args)),
      planAttend: (...args) => remember(planAttend(...args)),
      planBackward: (...args) => remember(planBackward(...args)),
      planBlockMap: (...args) => remember(planBlockMap(...args)),
      planMerge: (...args) => remember(planMerge(...args)),
      planSum: (...args) => remember(planSum(...args)),
    },
  });
  rememberers.set(backend, remember);
  return backend;
}

/** Gives back what runs keep: the next ones get memory that holds NaN. */
export async function forgetMemory(backend: CudaBackend): Promise<void> {
  (await backend.cuda()).device().trimMemory();
}
