/** Calls that end before they return, on the calling thread: for callers whose own interface is synchronous. */
import type { BackwardProblem } from '../../attention/backward.ts';
import type { AttentionProblem } from '../../attention/problem.ts';
import { ExecutionError } from '../../errors.ts';
import type { AttentionInputs, AttentionOutputs, BackwardInputs, BackwardOutputs } from '../backend.ts';
import { backwardCall } from './backward.ts';
import { type Arithmetic, WholeCalls } from './calls.ts';
import { CallerExecutor } from './executor.ts';
import type { Simd } from './geometry.ts';
import { compileUnshared, loadModule } from './modules.ts';
import { type CallParts, Lease, Runtime } from './runtime.ts';

/** Scores of 14 by 8 bits and the rest in float32: what gradients are computed from. */
const ARITHMETIC: Arithmetic = { precision: 'accurate', smoothK: true, smoothV: false, smoothQ: false };

/** Attention and its gradients without waiting. It has memory of its own, which stays until it is let go of. */
export class SynchronousWasm {
  readonly #executor: CallerExecutor;
  readonly #runtime: Runtime;

  private constructor(executor: CallerExecutor, runtime: Runtime) {
    this.#executor = executor;
    this.#runtime = runtime;
  }

  /** Compiles the kernels. */
  static async create(): Promise<SynchronousWasm> {
    const { simd } = await loadModule('auto');
    return SynchronousWasm.on(await CallerExecutor.create(await compileUnshared(simd), 'synchronous calls'), simd);
  }

  /** With kernels that have been compiled. */
  static on(executor: CallerExecutor, simd: Simd): SynchronousWasm {
    return new SynchronousWasm(executor, new Runtime(executor, simd, ''));
  }

  #run<Result>({ prepare }: CallParts<Result>): Result {
    const lease = new Lease(this.#executor);
    try {
      const { stages, units, extraScratch, collect } = prepare(lease);
      if (collect === undefined) throw new ExecutionError('execution-failed', 'this call cannot end before it returns');
      if (units > 0) this.#executor.runNow({ stages, extraScratch });
      return collect((address, length) => this.#executor.readNow(address, length));
    } finally {
      lease.release();
    }
  }

  /** @throws {ExecutionError} `out-of-memory` */
  attend(problem: AttentionProblem, inputs: AttentionInputs, arithmetic = ARITHMETIC): AttentionOutputs {
    const calls = new WholeCalls(problem, arithmetic, this.#runtime.simd);
    return this.#run(calls.parts(this.#runtime, inputs));
  }

  /** Gradients of q, k and v; a mask's is not computed. */
  backward(problem: BackwardProblem, inputs: BackwardInputs): BackwardOutputs {
    return this.#run(backwardCall(this.#runtime, { ...problem, maskGradient: undefined }, ARITHMETIC, inputs));
  }
}
