/**
 * SageAttention on arrays of jax-js. jax-js has no hook for operations, so attention is a function that a model calls.
 *
 * @module sageattention/jax
 */
import { getWebGPUDevice } from '@jax-js/jax';
import { sageattn as attend } from '../../api/sageattn.ts';
import { attendOnDevice, type BridgeOptions, validateBridgeOptions } from '../bridge.ts';
import {
  convert,
  fromCpu,
  fromGpu,
  type JaxArray,
  type JaxAttentionOptions,
  type Operands,
  onCpu,
  onGpu,
  operandsOf,
  release,
  validateOperands,
} from './arrays.ts';

export type { JaxAttentionOptions } from './arrays.ts';
export { type JaxGradients, type JaxTrainableAttention, sageattnTrainable } from './trainable.ts';

/**
 * Attention on jax-js arrays `[B,H,L,D]` (or as `tensorLayout` says), float32, or float16 where the platform has a
 * `Float16Array`. On jax-js' WebGPU backend it runs on its device and buffers; elsewhere on the WASM backend of this
 * package.
 *
 * Like every function of jax-js it consumes its arguments, the mask among them, and also when it fails: pass `q.ref` to
 * keep `q`. It reads values, so it cannot be traced: call it outside of `jit`, `grad` and `vmap`.
 *
 * @throws {SageAttentionError} as `sageattn`
 */
export async function sageattn(
  q: JaxArray,
  k: JaxArray,
  v: JaxArray,
  options: JaxAttentionOptions = {},
): Promise<JaxArray> {
  const operands = operandsOf(q, k, v, options);
  try {
    validateBridgeOptions(options);
    validateOperands(operands);
    const { attnMask: _, ...rest } = options;
    return await (q.device === 'webgpu' ? attendOnGpu(operands, rest) : attendOnCpu(operands, rest));
  } finally {
    release(Object.values(operands));
  }
}

async function attendOnCpu(operands: Operands<JaxArray>, options: BridgeOptions): Promise<JaxArray> {
  const { device } = operands.q;
  const { q, k, v, ...mask } = await convert(operands, onCpu);
  return fromCpu(await attend(q, k, v, { ...options, ...mask, backend: 'wasm' }), device);
}

async function attendOnGpu(operands: Operands<JaxArray>, options: BridgeOptions): Promise<JaxArray> {
  const { q, k, v, ...mask } = await convert(operands, onGpu);
  const output = await attendOnDevice(getWebGPUDevice(), q, k, v, { ...options, ...mask });
  const result = await fromGpu(output);
  output.dispose?.();
  return result;
}
