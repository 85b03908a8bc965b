/** PTX compiled by the driver to machine code that can be kept. */
import { CU_JIT_INPUT_PTX, CUDA_SUCCESS } from './api.ts';
import type { DeviceContext } from './context.ts';
import { type JitLog, terminated } from './jit-log.ts';

/**
 * What the driver's compiler makes slow in code that is to be linked, which any function might call: it ignores `setmaxnreg`, so that
 * consumers spill, and waits after each `wgmma` (its notes C7504 and C7509; two thirds of the speed on an H200).
 */
const NOT_TO_LINK = /\b(setmaxnreg|wgmma)\./;

/** Whether linking gives the machine code that loading would. */
export const canLink = (ptx: string): boolean => !NOT_TO_LINK.test(ptx);

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
