/** Exact attention under the name of a backend, so that any remaining error is the integration's. */

import type { BackendName } from '../../src/attention/options.ts';
import { attentionOutputs } from '../../src/attention/outputs.ts';
import { outputShapeOf } from '../../src/attention/problem.ts';
import type { AttentionOutputs, Backend, KernelDescriptor, PreparedKeyValue } from '../../src/backends/backend.ts';
import { attentionExact } from '../../src/reference/exact.ts';
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
};

/** `calls` grows by one with each attention. */
export function exactBackend(name: BackendName = 'wasm'): Backend & { calls: number } {
  const backend: Backend & { calls: number } = {
    calls: 0,
    name,
    kernels: [KERNEL],
    availability: async () => ({ available: true, accelerated: true, details: {} }),
    defaultKernel: async () => KERNEL,
    plan: async (problem, kernel) => ({
      kernel,
      outputs: attentionOutputs(problem),
      run: async (inputs): Promise<AttentionOutputs> => {
        backend.calls++;
        const { q, k, v, attnMask } = inputs as Record<'q' | 'k' | 'v' | 'attnMask', Tensor>;
        const output = emptyTensor(outputShapeOf(problem), problem.dtype);
        writeValues(attentionExact(problem, { q, k, v, attnMask }).output, output);
        return { output };
      },
      dispose: () => undefined,
    }),
    prepareKeyValue: async (): Promise<PreparedKeyValue> => {
      throw new Error('integrations hold no caches');
    },
    dispose: async () => undefined,
  };
  return backend;
}
