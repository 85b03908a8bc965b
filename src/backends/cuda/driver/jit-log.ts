/** What the driver's compiler says: the options that ask for it, and its words. */
import {
  CU_JIT_ERROR_LOG_BUFFER,
  CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
  CU_JIT_INFO_LOG_BUFFER,
  CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES,
  CU_JIT_LOG_VERBOSE,
  type CudaApi,
} from './api.ts';

const LOG_BYTES = 16384;

export const terminated = (text: string) => new TextEncoder().encode(`${text}\0`);

function textOf(log: Uint8Array): string {
  const end = log.indexOf(0);
  return new TextDecoder().decode(log.subarray(0, end < 0 ? log.length : end)).trim();
}

/** Buffers of one compilation. The driver writes into them, so this object lives as long as it. */
export class JitLog {
  readonly count: number;
  readonly options: Uint32Array;
  readonly values: BigUint64Array;
  readonly #info: Uint8Array;
  readonly #errors: Uint8Array;

  constructor(api: CudaApi) {
    const logs = new ArrayBuffer(2 * LOG_BYTES);
    this.#info = new Uint8Array(logs, 0, LOG_BYTES);
    this.#errors = new Uint8Array(logs, LOG_BYTES, LOG_BYTES);
    const address = api.addressOf(logs);
    const options: readonly (readonly [option: number, value: bigint])[] = [
      [CU_JIT_INFO_LOG_BUFFER, address],
      [CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES, BigInt(LOG_BYTES)],
      [CU_JIT_ERROR_LOG_BUFFER, address + BigInt(LOG_BYTES)],
      [CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES, BigInt(LOG_BYTES)],
      [CU_JIT_LOG_VERBOSE, 1n],
    ];
    this.count = options.length;
    this.options = Uint32Array.from(options, ([option]) => option);
    this.values = BigUint64Array.from(options, ([, value]) => value);
  }

  /** Registers, spills, warnings. */
  get info(): string {
    return textOf(this.#info);
  }

  get errors(): string {
    return textOf(this.#errors);
  }
}
