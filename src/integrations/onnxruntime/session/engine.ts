/** Runs one attention on onnxruntime's tensors, where they are. */

import { sageattn, sageattnSparse } from '../../../api/sageattn.ts';
import type { KernelName } from '../../../attention/kernels.ts';
import type { AttentionOptions } from '../../../attention/options.ts';
import { type AttentionProblem, createProblem, MAX_HEAD_DIM } from '../../../attention/problem.ts';
import type { Sparsity } from '../../../attention/sparsity.ts';
import { getBackend } from '../../../backends/registry.ts';
import { ExecutionError, messageOf } from '../../../errors.ts';
import { type Tensor, type TensorView, transpose } from '../../../tensor/tensor.ts';
import type { OrtTensor, OrtTensorConstructor } from '../ort.ts';
import type { AttentionCall, OperandCall } from './call.ts';
import { simplifyMask } from './mask.ts';

export interface AttentionEngine {
  readonly backend: 'wasm' | 'webgpu';
  /** Largest head dim that its kernels take. */
  readonly maxHeadDim: number;
  /** Kernels of the backend, for calibration. */
  kernels(): Promise<readonly KernelName[]>;
  /** @param sparsity how to choose the blocks that are computed; undefined: all are */
  attend(call: AttentionCall, kernel: KernelName | 'auto', sparsity: Sparsity | undefined): Promise<Attended>;
  /** Ends when all that was recorded so far has run, where that is later than the call. */
  done?(): Promise<unknown>;
  /** Releases everything that is kept between runs. */
  release(): void;
}

export interface Attended {
  /** Where the operands are. */
  readonly output: OrtTensor;
  /** The one that ran. */
  readonly kernel: KernelName;
  /** Undefined where it has not ended by now. */
  readonly milliseconds: number | undefined;
  /** The blocks that were computed, of those that causality and window leave; undefined without a sparsity. A GPU knows it later. */
  readonly keptFraction: Promise<number> | undefined;
  /** Undefined, or what went wrong on the GPU behind the call's back: known a little later, and waited for once a run. */
  readonly failure: Promise<Error | undefined>;
}

const FINE = Promise.resolve(undefined);

/** Everything of a call but the tensors. */
export function optionsOf(call: AttentionCall, kernel: KernelName | 'auto'): Omit<AttentionOptions, 'returnLse'> {
  return {
    kernel,
    tensorLayout: call.layout,
    isCausal: call.isCausal,
    causalAlignment: call.causalAlignment,
    softcap: call.softcap,
    ...(call.windowLength === undefined ? {} : { windowSize: [call.windowLength - 1, -1] as const }),
    ...(call.smScale === undefined ? {} : { smScale: call.smScale }),
  };
}

/** A view `[B,H,L,D]` in the order of the call's layout. */
export function inLayout<T extends TensorView>(call: AttentionCall, view: T): T {
  return call.layout === 'HND' ? view : transpose(view, [0, 2, 1, 3]);
}

const DTYPES = { float16: 'float16', float32: 'float32', bool: 'bool' } as const;

/** dtype of an operand or a mask, whose type was checked before. */
export const dtypeOf = ({ type }: OrtTensor) => DTYPES[type as keyof typeof DTYPES];

function cpuTensor({ tensor, view }: OperandCall): Tensor {
  return {
    location: 'cpu',
    dtype: dtypeOf(tensor),
    data: tensor.data as Tensor['data'],
    shape: view.shape,
    strides: view.strides,
    offset: view.offset,
  };
}

const defaultKernel = async (problem: AttentionProblem): Promise<KernelName> =>
  (await (await getBackend('wasm')).defaultKernel(problem)).name;

async function attend(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, sparsity: Sparsity | undefined) {
  if (sparsity === undefined) {
    return { output: await sageattn(q, k, v, { ...options, returnLse: false }), kept: undefined };
  }
  const { output, sparsity: chosen } = await sageattnSparse(q, k, v, { ...options, sparsity });
  return { output, kept: chosen.keptFraction };
}

/** The WASM backend on tensors in the memory of this process. */
export function cpuEngine(OrtTensorClass: OrtTensorConstructor): AttentionEngine {
  return {
    backend: 'wasm',
    maxHeadDim: MAX_HEAD_DIM,
    async kernels() {
      return (await getBackend('wasm')).kernels.map(({ name }) => name);
    },
    async attend(call, kernel, sparsity) {
      const start = performance.now();
      const [q, k, v] = [call.q, call.k, call.v].map((operand) => inLayout(call, cpuTensor(operand))) as [
        Tensor,
        Tensor,
        Tensor,
      ];
      const length = call.q.view.shape[2];
      const keys = call.k.view.shape[2];
      const mask = call.mask && simplifyMask(cpuTensor(call.mask), length, keys);
      const options = {
        ...optionsOf(call, kernel),
        ...(mask?.causal === undefined ? {} : { isCausal: true, causalAlignment: mask.causal }),
        ...(mask?.attnMask === undefined ? {} : { attnMask: mask.attnMask }),
      };
      const { output, kept } = await attend(q, k, v, { ...options, backend: 'wasm' }, sparsity);
      const milliseconds = performance.now() - start;
      const ran = kernel === 'auto' ? await defaultKernel(createProblem(q, k, v, options)) : kernel;
      return {
        output: new OrtTensorClass(call.type, output.data, call.dims),
        kernel: ran,
        milliseconds,
        keptFraction: kept === undefined ? undefined : Promise.resolve(kept),
        failure: FINE,
      };
    },
    release() {},
  };
}

/** An error of a kernel with the name of the attention in front. */
export function namedError(node: string, error: unknown): ExecutionError {
  return new ExecutionError('execution-failed', `attention '${node}': ${messageOf(error)}`, error);
}
