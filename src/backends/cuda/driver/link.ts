/** PTX compiled by the driver to machine code that can be kept. */
import { CU_JIT_INPUT_PTX, CUDA_SUCCESS } from './api.ts';
import type { DeviceContext } from './context.ts';
import { type JitLog, terminated } from './jit-log.ts';

/**
 * The machine code of a PTX text for the device; undefined where the driver does not give it, whatever the reason: loading the text
 * itself then says it.
 */
export function linkPtx(device: DeviceContext, ptx: string, log: JitLog): Uint8Array<ArrayBuffer> | undefined {
  const { api } = device;
  if (!api.has('cuLinkCreate')) return undefined;
  const { count, options, values } = log;
  return device.inContext(() => {
    const state = new BigUint64Array(1);
    if (api.cuLinkCreate(count, options, values, state) !== CUDA_SUCCESS) return undefined;
    const handle = state[0] as bigint;
    try {
      const text = terminated(ptx);
      const added = api.cuLinkAddData(handle, CU_JIT_INPUT_PTX, text, text.length, null, 0, null, null);
      if (added !== CUDA_SUCCESS) return undefined;
      const [address, bytes] = [new BigUint64Array(1), new BigUint64Array(1)];
      if (api.cuLinkComplete(handle, address, bytes) !== CUDA_SUCCESS) return undefined;
      // It is the link's, and goes with it.
      return api.bytesAt(address[0] as bigint, Number(bytes[0]));
    } finally {
      api.cuLinkDestroy(handle);
    }
  });
}
