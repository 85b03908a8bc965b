/** Attention with its gradients on arrays of jax-js, which has no custom derivatives yet: a training step calls both passes itself. */
import { getWebGPUDevice } from '@jax-js/jax';
import { sageattnTrainable as attend, type TrainableAttention, trainableOn } from '../../api/trainable.ts';
import type { GpuTensor } from '../../backends/webgpu/tensor.ts';
import { DISPOSE } from '../../dispose.ts';
import { ExecutionError } from '../../errors.ts';
import type { Tensor, TensorView } from '../../tensor/tensor.ts';
import { backendOn, validateBridgeOptions } from '../bridge.ts';
import {
  convert,
  fromCpu,
  fromGpu,
  type JaxArray,
  type JaxAttentionOptions,
  onCpu,
  onGpu,
  operandsOf,
  release,
  validateArray,
  validateOperands,
} from './arrays.ts';

/** Gradients of q, k and v, of their shapes and dtype, on their device. */
export interface JaxGradients {
  readonly dq: JaxArray;
  readonly dk: JaxArray;
  readonly dv: JaxArray;
}

/** Where tensors of one kind come from and go to. */
interface Place<T extends TensorView> {
  take(value: JaxArray): Promise<T>;
  give(value: T): Promise<JaxArray>;
  /** Frees what `sageattnTrainable` made. */
  free(value: T): void;
}

const GPU: Place<GpuTensor> = { take: onGpu, give: fromGpu, free: (value) => value.dispose?.() };
const cpuPlace = (device: JaxArray['device']): Place<Tensor> => ({
  take: onCpu,
  give: async (value) => fromCpu(value, device),
  free: () => {},
});

/** What {@link sageattnTrainable} gives: the output, and the way to its gradients. */
export class JaxTrainableAttention {
  /** As `sageattn` returns it. */
  readonly output: JaxArray;
  readonly #like: JaxArray['dtype'];
  readonly #backward: (dOutput: JaxArray) => Promise<JaxGradients>;
  #free: (() => void) | undefined;

  /** @internal */
  constructor(output: JaxArray, backward: (dOutput: JaxArray) => Promise<JaxGradients>, free: () => void) {
    this.output = output;
    this.#like = output.dtype;
    this.#backward = backward;
    this.#free = free;
  }

  /**
   * Gradients of q, k and v, as often as you like.
   *
   * @param dOutput gradient of the output, of its shape and dtype; consumed, also when the call fails
   * @throws {ExecutionError} `disposed`
   */
  async backward(dOutput: JaxArray): Promise<JaxGradients> {
    try {
      if (this.#free === undefined)
        throw new ExecutionError('disposed', 'this JaxTrainableAttention has been disposed');
      validateArray('dOutput', dOutput, { dtype: this.#like, device: dOutput?.device });
      return await this.#backward(dOutput);
    } finally {
      release([dOutput]);
    }
  }

  /** Gives up q, k, v and the mask; the output stays. Call it once gradients that were asked for are there. */
  dispose(): void {
    this.#free?.();
    this.#free = undefined;
  }

  [DISPOSE](): void {
    this.dispose();
  }
}

/** On one place: `held` are arrays that must live until the end. */
async function made<T extends TensorView>(
  trainable: TrainableAttention<T, TensorView>,
  { take, give, free }: Place<T>,
  held: Iterable<unknown>,
): Promise<JaxTrainableAttention> {
  const output = await give(trainable.output);
  const backward = async (dOutput: JaxArray): Promise<JaxGradients> => {
    const gradients = await trainable.backward(await take(dOutput));
    const [dq, dk, dv] = [gradients.dq, gradients.dk, gradients.dv] as T[] as [T, T, T];
    const arrays = { dq: await give(dq), dk: await give(dk), dv: await give(dv) };
    for (const gradient of [dq, dk, dv]) free(gradient);
    return arrays;
  };
  return new JaxTrainableAttention(output, backward, () => {
    trainable.dispose();
    free(trainable.output);
    free(trainable.lse as unknown as T);
    release(held);
  });
}

/**
 * Attention as `sageattn` of this module, with its backward pass. jax-js cannot differentiate through it, so a step chains them:
 * what comes before and after with `vjp` or `valueAndGrad` of jax-js, and this between them.
 *
 * Consumes q, k, v and the mask; on WebGPU their buffers are kept until `dispose`.
 *
 * @throws {SageAttentionError} as `sageattn`
 */
export async function sageattnTrainable(
  q: JaxArray,
  k: JaxArray,
  v: JaxArray,
  options: JaxAttentionOptions = {},
): Promise<JaxTrainableAttention> {
  const operands = operandsOf(q, k, v, options);
  const arrays = Object.values(operands);
  let isKept = false;
  try {
    validateBridgeOptions(options);
    validateOperands(operands);
    const { attnMask: _, ...rest } = options;
    if (q.device === 'webgpu') {
      const { q: ownQ, k: ownK, v: ownV, ...mask } = await convert(operands, onGpu);
      const backend = await backendOn(getWebGPUDevice());
      const trainable = await trainableOn(backend, ownQ, ownK, ownV, { ...rest, ...mask });
      const attention = await made(trainable, GPU, arrays);
      isKept = true;
      return attention;
    }
    const { device } = q;
    const { q: ownQ, k: ownK, v: ownV, ...mask } = await convert(operands, onCpu);
    const trainable = await attend(ownQ, ownK, ownV, { ...rest, ...mask, backend: 'wasm' });
    return await made<Tensor>(trainable as TrainableAttention<Tensor, TensorView>, cpuPlace(device), []);
  } finally {
    if (!isKept) release(arrays);
  }
}
