/** Backends that record what they are asked for, in place of the real ones. */
import type { BackendName } from '../../attention/options.ts';
import { attentionOutputs } from '../../attention/outputs.ts';
import { type AttentionProblem, outputShapeOf } from '../../attention/problem.ts';
import type { Availability, Backend, KernelChoice, KernelDescriptor, Plan } from '../../backends/backend.ts';
import { setBackend } from '../../backends/registry.ts';
import { emptyTensor, type TensorView } from '../../tensor/tensor.ts';

export const PORTABLE: KernelDescriptor = {
  name: 'qk-int8-pv-fp16',
  summary: 'portable',
  qkQuantGran: ['per-block', 'per-warp'],
  pvAccumDtype: ['fp32'],
  smoothV: false,
  smoothQ: [false],
  maxHeadDim: 64,
};
export const CUDA: KernelDescriptor = {
  ...PORTABLE,
  name: 'qk-int4-pv-fp8-cuda',
  qkQuantGran: ['per-thread'],
  pvAccumDtype: ['fp32+fp32', 'fp32+fp16'],
  smoothV: true,
  smoothQ: ['block'],
  maxHeadDim: 256,
};

export interface Call {
  problem: AttentionProblem;
  choice: KernelChoice;
  disposed: boolean;
  ended?: boolean;
}

export type FakeBackend = ReturnType<typeof fakeBackend>;

/** A backend that records what it is asked for, and gives zeros. */
export function fakeBackend(
  name: BackendName,
  kernels: readonly KernelDescriptor[],
  availability: Partial<Availability> = {},
) {
  const plans: Call[] = [];
  const gates: Promise<void>[] = [];
  /** Errors of the next runs, in order. */
  const failures: Error[] = [];
  const backend: Backend = {
    name,
    kernels,
    availability: async () => ({ available: true, accelerated: name !== 'wasm', details: {}, ...availability }),
    defaultKernel: async () => kernels[0] as KernelDescriptor,
    async plan(problem, choice): Promise<Plan> {
      const call: Call = { problem, choice, disposed: false };
      plans.push(call);
      return {
        kernel: choice,
        outputs: attentionOutputs(problem),
        get ended() {
          return call.ended === true;
        },
        async run({ q }) {
          await gates.shift();
          if (call.disposed) throw new Error('ran after dispose');
          const failure = failures.shift();
          if (failure !== undefined) throw failure;
          const output: TensorView = { ...emptyTensor(outputShapeOf(problem), problem.dtype), location: q.location };
          return problem.returnLse ? { output, lse: output } : { output };
        },
        dispose() {
          call.disposed = true;
        },
      };
    },
    async prepareKeyValue(problem) {
      let length = problem.keyLength;
      let disposed = false;
      return {
        get length() {
          return length;
        },
        async append(_k, _v, added) {
          await gates.shift();
          length += added.keyLength;
        },
        async attend(_q, attended) {
          if (disposed) throw new Error('attended after dispose');
          plans.push({ problem: attended, choice: {} as KernelChoice, disposed: false });
          return { output: emptyTensor(outputShapeOf(attended), attended.dtype) };
        },
        dispose() {
          disposed = true;
        },
      };
    },
    dispose: async () => undefined,
  };
  return {
    backend,
    plans,
    gates,
    failures,
  };
}

/** Zeros of a shape. */
export const t = (...shape: number[]) => emptyTensor(shape, 'float32');

/** Fakes that stand in for the real backends until {@link restoreBackends}. */
export interface FakeBackends {
  readonly wasm: FakeBackend;
  readonly cuda: FakeBackend;
}

let previous: (Backend | undefined)[] = [];

export async function install(...fakes: FakeBackend[]): Promise<void> {
  for (const { backend } of fakes) previous.push(await setBackend(backend));
}

/** A `wasm` and an accelerated `cuda` that are there, and a `webgpu` that is not. */
export async function installFakes(): Promise<FakeBackends> {
  const fakes = { wasm: fakeBackend('wasm', [PORTABLE]), cuda: fakeBackend('cuda', [CUDA, PORTABLE]) };
  const absent = { available: false, reason: 'no adapter', remedy: 'Get one' };
  await install(fakes.wasm, fakes.cuda, fakeBackend('webgpu', [PORTABLE], absent));
  return fakes;
}

export async function restoreBackends(): Promise<void> {
  for (const backend of previous) if (backend !== undefined) await setBackend(backend);
  previous = [];
}
