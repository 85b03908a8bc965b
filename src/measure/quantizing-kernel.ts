import type { KernelName } from '../attention/kernels.ts';
import type { AttentionProblem } from '../attention/problem.ts';
import type { Backend } from '../backends/backend.ts';

/**
 * The kernel to compare exact attention with: what a call gets, or the fastest that quantizes where that is exact itself,
 * as it is for few keys.
 */
export async function quantizingKernel(backend: Backend, problem: AttentionProblem): Promise<KernelName> {
  const { name } = await backend.defaultKernel(problem);
  return name === 'exact' ? (await backend.defaultKernel(problem, { quantized: true })).name : name;
}
