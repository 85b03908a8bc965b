import type { KernelModule } from '../launches/launch.ts';
import {
  CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES,
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
  CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED,
  CU_FUNC_ATTRIBUTE_NUM_REGS,
  CU_JIT_ERROR_LOG_BUFFER,
  CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
  CU_JIT_INFO_LOG_BUFFER,
  CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES,
  CU_JIT_LOG_VERBOSE,
} from './api.ts';
import type { DeviceContext } from './context.ts';

const LOG_BYTES = 16384;
/** Dynamic shared memory that every kernel may have without asking. */
const DEFAULT_SHARED_LIMIT = 48 * 1024;
/** Blocks of a cluster that every device of compute capability 9.0 or later runs. */
const PORTABLE_CLUSTER = 8;

const terminated = (text: string) => new TextEncoder().encode(`${text}\0`);

function textOf(log: Uint8Array): string {
  const end = log.indexOf(0);
  return new TextDecoder().decode(log.subarray(0, end < 0 ? log.length : end)).trim();
}

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

/** PTX compiled by the driver for one device. */
export class CudaModule {
  /** What the driver's compiler said: registers, spills, warnings. */
  readonly log: string;
  readonly #device: DeviceContext;
  readonly #id: string;
  readonly #handle: bigint;
  readonly #functions = new Map<string, CudaFunction>();

  /** @throws {CudaError} with the compiler's log when it refuses the PTX */
  constructor(device: DeviceContext, { id, ptx }: KernelModule) {
    const { api } = device;
    const logs = new ArrayBuffer(2 * LOG_BYTES);
    const info = new Uint8Array(logs, 0, LOG_BYTES);
    const errors = new Uint8Array(logs, LOG_BYTES, LOG_BYTES);
    const logAddress = api.addressOf(logs);
    const options: readonly (readonly [option: number, value: bigint])[] = [
      [CU_JIT_INFO_LOG_BUFFER, logAddress],
      [CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES, BigInt(LOG_BYTES)],
      [CU_JIT_ERROR_LOG_BUFFER, logAddress + BigInt(LOG_BYTES)],
      [CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES, BigInt(LOG_BYTES)],
      [CU_JIT_LOG_VERBOSE, 1n],
    ];
    const handle = new BigUint64Array(1);
    const status = device.inContext(() =>
      api.cuModuleLoadDataEx(
        handle,
        terminated(ptx()),
        options.length,
        Uint32Array.from(options, ([option]) => option),
        BigUint64Array.from(options, ([, value]) => value),
      ),
    );
    this.log = textOf(info);
    if (status !== 0) {
      const said = [textOf(errors), this.log].filter((text) => text !== '').join('\n');
      throw device.error(
        status,
        'cuModuleLoadDataEx',
        `compiling module '${id}' for ${device}${said === '' ? '' : `\n${said}\n`}`,
      );
    }
    this.#device = device;
    this.#id = id;
    this.#handle = handle[0] as bigint;
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
