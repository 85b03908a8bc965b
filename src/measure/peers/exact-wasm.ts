/**
 * Exact attention in float32 SIMD on worker threads: what benches compare the quantized kernels with. It is those
 * kernels' code with nothing quantized. No part of the package's interface.
 */
import { type AttentionOptions, EXACT_OPTIONS, validateOptions } from '../../attention/options.ts';
import { createProblem } from '../../attention/problem.ts';
import type { AttentionInputs, AttentionOutputs, RunContext } from '../../backends/backend.ts';
import { EXACT, wholeCall } from '../../backends/wasm/calls.ts';
import { createExecutor } from '../../backends/wasm/executor.ts';
import type { Simd } from '../../backends/wasm/geometry.ts';
import { loadModule } from '../../backends/wasm/modules.ts';
import { Runtime } from '../../backends/wasm/runtime.ts';
import { defaultThreads } from '../../backends/wasm/workers.ts';
import type { Tensor } from '../../tensor/tensor.ts';

export interface ExactAttentionOptions extends Pick<AttentionOptions, (typeof EXACT_OPTIONS)[number]> {
  /** Worker threads; default: as many as the backend starts. */
  readonly threads?: number;
  /** Default `'auto'`, as the backend's. */
  readonly simd?: 'auto' | Simd;
}

export interface ExactAttention {
  run(context?: RunContext): Promise<AttentionOutputs>;
  /** Ends its threads. */
  dispose(): Promise<void>;
}

/**
 * Exact attention over tensors of this process, with every option of `sageattn` that changes its meaning.
 *
 * @param inputs q `[B,Hq,Lq,D]` (HND) or `[B,Lq,Hq,D]` (NHD), k `[B,Hkv,Lk,D]`, v `[B,Hkv,Lk,Dv]`
 * @throws {InvalidArgumentError} naming the argument at fault
 */
export async function createExactAttention(
  inputs: AttentionInputs<Tensor>,
  { threads = defaultThreads(), simd: wanted = 'auto', ...options }: ExactAttentionOptions = {},
): Promise<ExactAttention> {
  validateOptions(options, EXACT_OPTIONS);
  const problem = createProblem(inputs.q, inputs.k, inputs.v, options);
  const { module, simd, relaxed } = await loadModule(wanted);
  const runtime = new Runtime(await createExecutor(module, { threads }), simd, relaxed);
  const { attnMask } = options;
  const operands = attnMask === undefined ? inputs : { ...inputs, attnMask };
  return {
    run: (context = {}) => runtime.run(context, wholeCall(runtime, problem, EXACT, operands)),
    dispose: () => runtime.executor.dispose(),
  };
}
