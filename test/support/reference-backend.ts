/** The quantized algorithm in plain TypeScript as a backend: what the conformance suite is itself tested with. */
import { attentionOutputs } from '../../src/attention/outputs.ts';
import { type AttentionProblem, lseShapeOf, outputShapeOf } from '../../src/attention/problem.ts';
import type {
  AttentionInputs,
  AttentionOutputs,
  Backend,
  KernelChoice,
  KernelDescriptor,
} from '../../src/backends/backend.ts';
import { attentionQuantized, type QuantizedAlgorithm } from '../../src/reference/quantized.ts';
import { toFloat32, writeValues } from '../../src/tensor/access.ts';
import { contiguousStrides, emptyTensor, type Tensor, transpose } from '../../src/tensor/tensor.ts';

function compute(
  algorithm: QuantizedAlgorithm,
  problem: AttentionProblem,
  choice: KernelChoice,
  inputs: AttentionInputs,
): AttentionOutputs {
  const { smoothK } = choice;
  const { output, lse } = attentionQuantized(problem, inputs as Parameters<typeof attentionQuantized>[1], {
    ...algorithm,
    smoothK,
  });
  const target = emptyTensor(outputShapeOf(problem), problem.dtype);
  writeValues(output, target);
  if (!problem.returnLse) return { output: target };
  const lseTarget = emptyTensor(lseShapeOf(problem), 'float32');
  writeValues(lse, lseTarget);
  return { output: target, lse: lseTarget };
}

/** Tokens of `a`, then tokens of `b`, as `[B,H,L,D]` float32; `order` brings either into that order. */
function concatenate(a: Tensor, b: Tensor, order: readonly number[]): Tensor {
  const [left, right] = [transpose(a, order), transpose(b, order)];
  const [batch, heads, tokens, dim] = left.shape as [number, number, number, number];
  const added = right.shape[2] as number;
  const [x, y] = [toFloat32(left), toFloat32(right)];
  const data = new Float32Array(batch * heads * (tokens + added) * dim);
  for (let i = 0; i < batch * heads; i++) {
    data.set(x.subarray(i * tokens * dim, (i + 1) * tokens * dim), i * (tokens + added) * dim);
    data.set(y.subarray(i * added * dim, (i + 1) * added * dim), (i * (tokens + added) + tokens) * dim);
  }
  const shape = [batch, heads, tokens + added, dim];
  return transpose(
    { location: 'cpu', dtype: 'float32', data, shape, strides: contiguousStrides(shape), offset: 0 },
    order,
  );
}

/** A backend that carries out one algorithm under the names of `wasm` and a kernel. */
export function referenceBackend(descriptor: KernelDescriptor, algorithm: QuantizedAlgorithm): Backend {
  return {
    name: 'wasm',
    kernels: [descriptor],
    availability: async () => ({ available: true, accelerated: false, details: {} }),
    defaultKernel: async () => descriptor,
    plan: async (problem, kernel) => ({
      kernel,
      outputs: attentionOutputs(problem),
      run: async (inputs) => compute(algorithm, problem, kernel, inputs),
      dispose() {},
    }),
    async prepareKeyValue(prepared, kernel, k, v) {
      const order = prepared.tensorLayout === 'HND' ? [0, 1, 2, 3] : [0, 2, 1, 3];
      // The caller may write over its tensors as soon as the call is made.
      let held = structuredClone({ k: k as Tensor, v: v as Tensor });
      return {
        get length() {
          return held.k.shape[prepared.tensorLayout === 'HND' ? 2 : 1] as number;
        },
        async append(moreK, moreV) {
          held = { k: concatenate(held.k, moreK as Tensor, order), v: concatenate(held.v, moreV as Tensor, order) };
        },
        async attend(q, problem, side) {
          const operand = ({ strides, offset }: Tensor) => {
            const [batchStride, headStride, tokenStride] = transpose({ ...k, strides, offset, shape: strides }, order)
              .strides as [number, number, number];
            return { offset, batchStride, headStride, tokenStride };
          };
          const located = { ...problem, k: operand(held.k), v: operand(held.v) };
          return compute(algorithm, located, kernel, { q, ...held, ...side });
        },
        dispose() {},
      };
    },
    dispose: async () => undefined,
  };
}
