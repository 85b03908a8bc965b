import { GENERATOR_DIGEST } from '../generator.ts';
import type { KernelModule } from '../launches/launch.ts';
import {
  CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES,
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
  CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED,
  CU_FUNC_ATTRIBUTE_NUM_REGS,
  CUDA_SUCCESS,
} from './api.ts';
import type { DeviceContext } from './context.ts';
import { JitLog, terminated } from './jit-log.ts';
import { anyDriver, digestOf, type KernelFiles, type KernelPlace } from './kernel-files.ts';
import { canLink, linkPtx } from './link.ts';

/** Dynamic shared memory that every kernel may have without asking. */
const DEFAULT_SHARED_LIMIT = 48 * 1024;
/** Blocks of a cluster that every device of compute capability 9.0 or later runs. */
const PORTABLE_CLUSTER = 8;

/** A kernel of a loaded module. */
export class CudaFunction {
  readonly handle: bigint;
  readonly name: string;
  /** Registers of each thread, as compiled for this device. */
  readonly registers: number;
  /** Bytes of local memory of each thread: 0 when nothing is spilled. */
  readonly localBytes: number;
  readonly #device: DeviceContext;
  #sharedLimit = DEFAULT_SHARED_LIMIT;
  #anyCluster = false;

  constructor(device: DeviceContext, module: bigint, moduleId: string, name: string) {
    this.#device = device;
    this.name = name;
    this.handle = device.create(
      'cuModuleGetFunction',
      `looking up '${name}' in module '${moduleId}'`,
      module,
      terminated(name),
    );
    // Asking loads the code now: under lazy loading the first launch would, which a stream capture may not do.
    this.registers = this.#attribute(CU_FUNC_ATTRIBUTE_NUM_REGS);
    this.localBytes = this.#attribute(CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES);
  }

  #attribute(attribute: number): number {
    const value = new Int32Array(1);
    this.#device.call('cuFuncGetAttribute', `reading an attribute of '${this.name}'`, value, attribute, this.handle);
    return value[0] as number;
  }

  /** Lets launches have this much dynamic shared memory and clusters of this many blocks. */
  allow(sharedBytes: number, clusterBlocks: number): void {
    const set = (attribute: number, value: number, what: string) =>
      this.#device.call('cuFuncSetAttribute', `allowing '${this.name}' ${what}`, this.handle, attribute, value);
    if (sharedBytes > this.#sharedLimit) {
      set(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, sharedBytes, `${sharedBytes} bytes of shared memory`);
      this.#sharedLimit = sharedBytes;
    }
    if (clusterBlocks > PORTABLE_CLUSTER && !this.#anyCluster) {
      set(CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1, `clusters of ${clusterBlocks} blocks`);
      this.#anyCluster = true;
    }
  }
}

/** Where a device's compiled kernels are kept. */
export interface ModuleShelf {
  readonly files: KernelFiles;
  readonly place: KernelPlace;
}

/** PTX compiled by the driver for one device, now or earlier. */
export class CudaModule {
  /** What the driver's compiler said: registers, spills, warnings. Empty where nothing was compiled. */
  readonly log: string;
  readonly #device: DeviceContext;
  readonly #id: string;
  readonly #handle: bigint;
  readonly #functions = new Map<string, CudaFunction>();

  /**
   * @param shelf compiled kernels to look among, and to add this one to
   * @throws {CudaError} with the compiler's log when it refuses the PTX
   */
  constructor(device: DeviceContext, source: KernelModule, shelf?: ModuleShelf) {
    this.#device = device;
    this.#id = source.id;
    const { handle, log } = (shelf && loadKept(device, source, shelf)) ?? loadPtx(device, source.id, source.ptx());
    this.#handle = handle;
    this.log = log;
  }

  /** The kernel of this name. */
  function(name: string): CudaFunction {
    let found = this.#functions.get(name);
    if (found === undefined) {
      found = new CudaFunction(this.#device, this.#handle, this.#id, name);
      this.#functions.set(name, found);
    }
    return found;
  }

  dispose(): void {
    this.#device.release(() => this.#device.call('cuModuleUnload', `unloading module '${this.#id}'`, this.#handle));
  }
}

interface Loaded {
  readonly handle: bigint;
  readonly log: string;
}

function load(device: DeviceContext, image: Uint8Array, log: JitLog): { status: number; handle: bigint } {
  const handle = new BigUint64Array(1);
  const { count, options, values } = log;
  const status = device.inContext(() => device.api.cuModuleLoadDataEx(handle, image, count, options, values));
  return { status, handle: handle[0] as bigint };
}

function loadPtx(device: DeviceContext, id: string, ptx: string): Loaded {
  const log = new JitLog(device.api);
  const { status, handle } = load(device, terminated(ptx), log);
  if (status === CUDA_SUCCESS) return { handle, log: log.info };
  const said = [log.errors, log.info].filter((text) => text !== '').join('\n');
  throw device.error(
    status,
    'cuModuleLoadDataEx',
    `compiling module '${id}' for ${device}${said === '' ? '' : `\n${said}\n`}`,
  );
}

/**
 * The module from a kept kernel, or compiled and kept; undefined where the driver takes or gives no machine code.
 *
 * @throws {CudaError} with the compiler's log when it refuses PTX that is not linked
 */
function loadKept(device: DeviceContext, source: KernelModule, { files, place }: ModuleShelf): Loaded | undefined {
  const digest = digestOf(source, GENERATOR_DIGEST);
  const found = files.find(digest, place);
  // A driver refuses what a newer assembler made, and a file that somebody else put there.
  const take = (code: Uint8Array, log: JitLog): Loaded | undefined => {
    const { status, handle } = load(device, code, new JitLog(device.api));
    return status === CUDA_SUCCESS ? { handle, log: log.info } : undefined;
  };
  const log = new JitLog(device.api);
  if (found?.kind === 'cubin') {
    const loaded = take(found.bytes, log);
    if (loaded !== undefined) return loaded;
  }
  const ptx = found?.kind === 'ptx' ? found.text : source.ptx();
  if (!canLink(ptx)) {
    // The driver's own cache keeps the machine code; here the text is kept, so that the next process does not make it.
    const loaded = loadPtx(device, source.id, ptx);
    if (found === undefined) files.keep(digest, anyDriver(place), 'ptx', new TextEncoder().encode(ptx));
    return loaded;
  }
  const code = linkPtx(device, ptx, log);
  const loaded = code && take(code, log);
  if (code !== undefined && loaded !== undefined) files.keep(digest, place, 'cubin', code);
  return loaded;
}
