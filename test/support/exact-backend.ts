/** Exact attention under the name of a backend, so that any remaining error is the integration's. */

import type { BackendName } from '../../src/attention/options.ts';
import { attentionOutputs } from '../../src/attention/outputs.ts';
import { type AttentionProblem, lseShapeOf, outputShapeOf } from '../../src/attention/problem.ts';
import type { AttentionOutputs, Backend, KernelDescriptor, PreparedKeyValue } from '../../src/backends/backend.ts';
import { buildBlockMap } from '../../src/reference/block-map.ts';
import { attentionExact, type ReferenceInputs } from '../../src/reference/exact.ts';
import { writeValues } from '../../src/tensor/access.ts';
import { emptyTensor, type Tensor } from '../../src/tensor/tensor.ts';

const KERNEL: KernelDescriptor = {
  name: 'qk-int8-pv-fp16',
  summary: 'exact attention in float64',
  qkQuantGran: ['per-block'],
  pvAccumDtype: ['fp32'],
  smoothV: true,
  smoothQ: [false, 'block', 'sequence'],
  maxHeadDim: 256,
  sinks: true,
  blockMask: true,
};

function attend(problem: AttentionProblem, inputs: ReferenceInputs): AttentionOutputs {
  const exact = attentionExact(problem, inputs);
  const output = emptyTensor(outputShapeOf(problem), problem.dtype);
  writeValues(exact.output, output);
  if (!problem.returnLse) return { output };
  const lse = emptyTensor(lseShapeOf(problem), 'float32');
  writeValues(exact.lse, lse);
  return { output, lse };
}

/** `calls` grows by one with each attention, `disposed` with each disposed cache. */
export function exactBackend(name: BackendName = 'wasm'): Backend & { calls: number; disposed: number } {
  const backend: Backend & { calls: number; disposed: number } = {
    calls: 0,
    disposed: 0,
    name,
    kernels: [KERNEL],
    availability: async () => ({ available: true, accelerated: true, details: {} }),
    defaultKernel: async () => KERNEL,
    plan: async (problem, kernel) => ({
      kernel,
      outputs: attentionOutputs(problem),
      run: async (inputs): Promise<AttentionOutputs> => {
        backend.calls++;
        return attend(problem, inputs as ReferenceInputs);
      },
      dispose: () => undefined,
    }),
    planBlockMap: async (problem, sparsity) => ({
      run: async ({ q, k }) => {
        const { map, ...fractions } = buildBlockMap(problem, sparsity, { q, k } as ReferenceInputs);
        return { map, fractions: async () => fractions, dispose: () => undefined };
      },
      dispose: () => undefined,
    }),
    prepareKeyValue: async (prepared, _kernel, k, v): Promise<PreparedKeyValue> => {
      const held = structuredClone({ k: k as Tensor, v: v as Tensor });
      return {
        length: prepared.keyLength,
        append: async () => {
          throw new Error('nobody appends to these');
        },
        attend: async (q, problem, side) => {
          backend.calls++;
          const located = { ...problem, k: prepared.k, v: prepared.v };
          return attend(located, { q, ...held, ...side } as ReferenceInputs);
        },
        dispose: () => {
          backend.disposed++;
        },
      };
    },
    dispose: async () => undefined,
  };
  return backend;
}
