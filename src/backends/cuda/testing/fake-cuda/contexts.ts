/** Devices of the fake driver and their contexts. */
import type { DriverFunctions } from '../../driver/api.ts';
import type { FakeHost } from './host.ts';

export interface FakeContext {
  readonly handle: bigint;
  readonly device: number;
  retained: number;
  /** A fault that every call returns from now on. */
  fault: number;
}

/** Most shared memory of a thread block. */
export const MAX_SHARED = 227 * 1024;

type DeviceFunction =
  | 'cuInit'
  | 'cuDriverGetVersion'
  | 'cuDeviceGetCount'
  | 'cuDeviceGet'
  | 'cuDeviceGetName'
  | 'cuDeviceGetAttribute'
  | 'cuDeviceTotalMem'
  | 'cuDeviceCanAccessPeer'
  | 'cuCtxEnablePeerAccess'
  | 'cuDevicePrimaryCtxRetain'
  | 'cuDevicePrimaryCtxRelease'
  | 'cuCtxPushCurrent'
  | 'cuCtxPopCurrent'
  | 'cuCtxGetCurrent';

export interface FakeDeviceOptions {
  readonly devices: readonly number[];
  readonly memoryBytes: number;
  readonly pools: boolean;
}

export class FakeContexts {
  /** Contexts made current and not popped, newest last. */
  readonly stack: bigint[] = [];
  readonly #options: FakeDeviceOptions;
  readonly #host: FakeHost;
  readonly #contexts: FakeContext[];
  readonly #peers = new Set<string>();
  #nextHandle = 0x1000n;

  constructor(options: FakeDeviceOptions, host: FakeHost) {
    this.#options = options;
    this.#host = host;
    this.#contexts = options.devices.map((_, device) => ({
      handle: 0xc000n + BigInt(device),
      device,
      retained: 0,
      fault: 0,
    }));
  }

  get retained(): number {
    return this.#contexts.reduce((sum, { retained }) => sum + retained, 0);
  }

  has(handle: bigint): boolean {
    return this.#contexts.some((context) => context.handle === handle && context.retained > 0);
  }

  of(device: number): FakeContext {
    return this.#contexts[device] as FakeContext;
  }

  /** The context that is current. */
  get current(): FakeContext | undefined {
    const top = this.stack.at(-1);
    return this.#contexts.find(({ handle }) => handle === top);
  }

  /** Ordinal of its device; there must be one. */
  get currentDevice(): number {
    return (this.current as FakeContext).device;
  }

  capability(device: number): number {
    return this.#options.devices[device] as number;
  }

  /** A handle of something new. */
  newHandle(): bigint {
    this.#nextHandle += 0x10n;
    return this.#nextHandle;
  }

  /** Functions that need no current context. */
  readonly functions: Pick<DriverFunctions, DeviceFunction> = {
    cuInit: () => 0,
    cuDriverGetVersion: (version) => {
      this.#host.write32(version, 13000);
      return 0;
    },
    cuDeviceGetCount: (count) => {
      this.#host.write32(count, this.#options.devices.length);
      return 0;
    },
    cuDeviceGet: (device, ordinal) => {
      if (ordinal < 0 || ordinal >= this.#options.devices.length) return 101;
      this.#host.write32(device, ordinal);
      return 0;
    },
    cuDeviceGetName: (name, length, device) => {
      const text = new TextEncoder().encode(`Fake GPU ${device}\0`);
      this.#host.bytes(name, length).set(text);
      return 0;
    },
    cuDeviceGetAttribute: (value, attribute, device) => {
      const values: Readonly<Record<number, number>> = {
        16: 4,
        // Bus, device and domain of PCI.
        33: device,
        34: 0,
        50: 0,
        75: Math.floor(this.capability(device) / 10),
        76: this.capability(device) % 10,
        97: MAX_SHARED,
        115: this.#options.pools ? 1 : 0,
      };
      const found = values[attribute];
      if (found === undefined) return 1;
      this.#host.write32(value, found);
      return 0;
    },
    cuDeviceTotalMem: (bytes) => {
      this.#host.write64(bytes, BigInt(this.#options.memoryBytes));
      return 0;
    },
    cuDeviceCanAccessPeer: (can, device, peer) => {
      this.#host.write32(can, device === peer ? 0 : 1);
      return 0;
    },
    cuCtxEnablePeerAccess: (peer) => {
      const device = this.#contexts.findIndex(({ handle }) => handle === BigInt(peer));
      if (device < 0 || this.current === undefined || device === this.currentDevice) return 101;
      const pair = `${this.currentDevice} ${device}`;
      if (this.#peers.has(pair)) return 704;
      this.#peers.add(pair);
      return 0;
    },
    cuDevicePrimaryCtxRetain: (context, device) => {
      const found = this.#contexts[device];
      if (found === undefined) return 101;
      found.retained++;
      this.#host.write64(context, found.handle);
      return 0;
    },
    cuDevicePrimaryCtxRelease: (device) => {
      const found = this.#contexts[device];
      if (found === undefined || found.retained === 0) return 201;
      found.retained--;
      return 0;
    },
    cuCtxPushCurrent: (context) => {
      this.stack.push(BigInt(context));
      return 0;
    },
    cuCtxPopCurrent: (context) => {
      const popped = this.stack.pop();
      if (popped === undefined) return 201;
      this.#host.write64(context, popped);
      return 0;
    },
    cuCtxGetCurrent: (context) => {
      this.#host.write64(context, this.stack.at(-1) ?? 0n);
      return 0;
    },
  };
}
