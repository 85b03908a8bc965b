/** Dispatch, plan cache and key-value cache, against a backend that records what it is asked. */
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import type { KernelName } from '../attention/kernels.ts';
import { type AttentionProblem, outputShapeOf } from '../attention/problem.ts';
import type { Availability, Backend, BackendName, KernelChoice, KernelDescriptor, Plan } from '../backends/backend.ts';
import { getBackend, setBackend } from '../backends/registry.ts';
import { BackendUnavailableError, ExecutionError, UnsupportedOptionError } from '../errors.ts';
import { emptyTensor, type TensorView } from '../tensor/tensor.ts';
import { prepareKeyValue } from './key-value-cache.ts';
import { createAttention, kernelFunction, sageattn, sageattnVarlen } from './sageattn.ts';

const PORTABLE: KernelDescriptor = {
  name: 'qk-int8-pv-fp16',
  summary: 'portable',
  qkQuantGran: ['per-block', 'per-warp'],
  pvAccumDtype: ['fp32'],
  smoothV: false,
  smoothQ: false,
  maxHeadDim: 64,
};
const CUDA: KernelDescriptor = {
  ...PORTABLE,
  name: 'qk-int4-pv-fp8-cuda',
  qkQuantGran: ['per-thread'],
  pvAccumDtype: ['fp32+fp32', 'fp32+fp16'],
  smoothV: true,
  smoothQ: 'always',
  maxHeadDim: 256,
};

interface Call {
  problem: AttentionProblem;
  choice: KernelChoice;
  disposed: boolean;
  ended?: boolean;
}

function fakeBackend(
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

const t = (...shape: number[]) => emptyTensor(shape, 'float32');
const call = (length: number, options = {}) =>
  sageattn(t(1, 2, length, 8), t(1, 2, length, 8), t(1, 2, length, 8), { backend: 'wasm', ...options });

let wasm: ReturnType<typeof fakeBackend>;
let cuda: ReturnType<typeof fakeBackend>;
let previous: (Backend | undefined)[] = [];
const install = async (...fakes: ReturnType<typeof fakeBackend>[]) => {
  for (const { backend } of fakes) previous.push(await setBackend(backend));
};

beforeEach(async () => {
  wasm = fakeBackend('wasm', [PORTABLE]);
  cuda = fakeBackend('cuda', [CUDA, PORTABLE]);
  await install(
    wasm,
    cuda,
    fakeBackend('webgpu', [PORTABLE], { available: false, reason: 'no adapter', remedy: 'Get one' }),
  );
});
afterEach(async () => {
  for (const backend of previous) if (backend !== undefined) await setBackend(backend);
  previous = [];
});

describe('choice of backend', () => {
  it('sends CPU tensors to the accelerated backend that is preferred', async () => {
    await call(3, { backend: 'auto' });
    expect([cuda.plans.length, wasm.plans.length]).toEqual([1, 0]);
  });

  it('sends them to WASM when nothing is accelerated', async () => {
    await install(fakeBackend('cuda', [CUDA], { accelerated: false }));
    await call(3, { backend: 'auto' });
    expect(wasm.plans).toHaveLength(1);
  });

  it('says so when no backend has the kernel', async () => {
    const error = await call(3, { backend: 'auto', kernel: 'qk-int8-pv-fp8-cuda' }).catch((e) => e);
    expect(error).toBeInstanceOf(BackendUnavailableError);
  });

  it('takes only backends', async () => {
    await expect(setBackend({} as Backend)).rejects.toMatchObject({ code: 'invalid-option', argument: 'backend' });
    await expect(getBackend('toString' as BackendName)).rejects.toMatchObject({ code: 'backend-unavailable' });
  });

  it('looks for a backend that has the kernel asked for', async () => {
    await install(fakeBackend('wasm', [{ ...PORTABLE, name: 'qk-int8-pv-int8' }]));
    await expect(call(3, { backend: 'auto', kernel: 'qk-int8-pv-int8' })).resolves.toBeDefined();
    expect(cuda.plans).toHaveLength(0);
  });

  it('says which backend is missing when none can run', async () => {
    const no = { available: false, reason: 'no driver', remedy: 'Install it' };
    await install(fakeBackend('cuda', [CUDA], no), fakeBackend('wasm', [PORTABLE], no));
    const error = await call(3, { backend: 'auto' }).catch((e) => e);
    expect(error).toBeInstanceOf(BackendUnavailableError);
    expect(error).toMatchObject({ code: 'backend-unavailable', backend: 'cuda' });
    expect(error.message).toBe("backend 'cuda' is not available: no driver. Install it");
  });

  it('refuses a backend that cannot run here, with the remedy', async () => {
    const error = await call(3, { backend: 'webgpu' }).catch((e) => e);
    expect(error).toMatchObject({ code: 'backend-unavailable', received: 'no adapter', expected: 'Get one' });
  });

  it('runs where the tensors are, and refuses another backend for them', async () => {
    const on = (view: TensorView): TensorView => ({ ...view, location: 'cuda' });
    const [q, k, v] = [on(t(1, 1, 2, 8)), on(t(1, 1, 2, 8)), on(t(1, 1, 2, 8))];
    await sageattn(q, k, v);
    expect(cuda.plans).toHaveLength(1);
    await expect(sageattn(q, k, v, { backend: 'wasm' })).rejects.toMatchObject({ code: 'mixed-locations' });
  });

  it('refuses a stream where there are none', async () => {
    const stream = { handle: 1n, device: 0 };
    await expect(call(3, { stream })).rejects.toMatchObject({ code: 'invalid-option', argument: 'options.stream' });
    await expect(call(3, { stream, backend: 'cuda' })).resolves.toBeDefined();
  });
});

describe('options against the kernel', () => {
  const refused = async (options: object, argument: string) => {
    const error = await call(3, options).catch((e) => e);
    expect(error).toBeInstanceOf(UnsupportedOptionError);
    expect(error).toMatchObject({ code: 'unsupported-option', argument });
  };

  it('refuses what the kernel does not honour', async () => {
    await refused({ qkQuantGran: 'per-thread' }, 'options.qkQuantGran');
    await refused({ pvAccumDtype: 'fp16' }, 'options.pvAccumDtype');
    await refused({ smoothV: true }, 'options.smoothV');
    await refused({ smoothQ: true }, 'options.smoothQ');
    await refused({ backend: 'cuda', smoothQ: false }, 'options.smoothQ');
    await expect(call(3, { kernel: 'qk-int8-pv-int8' })).rejects.toMatchObject({
      code: 'unsupported-option',
      argument: 'options.kernel',
      expected: "one of backend 'wasm': 'qk-int8-pv-fp16'",
    });
    const wide = t(1, 1, 2, 65);
    const error = await sageattn(wide, wide, wide, { backend: 'wasm' }).catch((e) => e);
    expect(error).toMatchObject({ code: 'unsupported-option', argument: 'q', received: '65' });
  });

  it('settles what the caller left open', async () => {
    await call(3);
    await call(3, { backend: 'cuda', pvAccumDtype: 'fp32+fp16', smoothV: true });
    expect(wasm.plans[0]?.choice).toEqual({
      descriptor: PORTABLE,
      qkQuantGran: 'per-block',
      pvAccumDtype: 'fp32',
      smoothK: true,
      smoothV: false,
      smoothQ: false,
    });
    expect(cuda.plans[0]?.choice).toMatchObject({ pvAccumDtype: 'fp32+fp16', smoothV: true, smoothQ: true });
  });

  it('fixes the kernel in its own function', async () => {
    const kernel: KernelName = 'qk-int8-pv-fp16';
    const [q, k, v] = [t(1, 1, 2, 8), t(1, 1, 2, 8), t(1, 1, 2, 8)];
    await kernelFunction(kernel)(q, k, v, { backend: 'cuda' });
    expect(cuda.plans[0]?.choice.descriptor.name).toBe(kernel);
  });
});

describe('the plan cache', () => {
  it('plans once for a shape, and again for another option', async () => {
    await Promise.all([call(3), call(3), call(3)]);
    await call(3, { windowSize: [5, -1] });
    await call(3, { windowSize: [-1, -1] });
    expect(wasm.plans).toHaveLength(2);
  });

  it('tells varlen calls apart by their sequences', async () => {
    const [q, k, v] = [t(6, 1, 8), t(6, 1, 8), t(6, 1, 8)];
    for (const cu of [
      [0, 6],
      [0, 2, 6],
      [0, 3, 6],
      [0, 2, 6],
    ])
      await sageattnVarlen(q, k, v, cu, cu, { backend: 'wasm' });
    expect(wasm.plans).toHaveLength(3);
  });

  it('keeps the plans used last, and disposes the others when no run holds them', async () => {
    let open = () => {};
    wasm.gates.push(
      new Promise<void>((resolve) => {
        open = resolve;
      }),
    );
    const running = call(1);
    // The first run must have taken the gate.
    await vi.waitFor(() => expect(wasm.gates).toHaveLength(0));
    for (let length = 2; length <= 66; length++) await call(length);
    expect(wasm.plans.filter(({ disposed }) => disposed).map(({ problem }) => problem.queryLength)).toEqual([2]);
    open();
    await running;
    await vi.waitFor(() => expect(wasm.plans[0]?.disposed).toBe(true));
    await call(66);
    expect(wasm.plans).toHaveLength(66);
  });

  it('drops a plan that failed', async () => {
    wasm.failures.push(new Error('lost'));
    await expect(call(3)).rejects.toThrow('lost');
    expect(wasm.plans[0]?.disposed).toBe(true);
    await expect(call(3)).resolves.toBeDefined();
    expect(wasm.plans).toHaveLength(2);
  });

  it('plans again when the kept plan has ended with its backend, but not what was running then', async () => {
    await call(3);
    (wasm.plans[0] as Call).ended = true;
    await expect(call(3)).resolves.toBeDefined();
    expect([wasm.plans.length, wasm.plans[0]?.disposed]).toEqual([2, true]);
    wasm.failures.push(new ExecutionError('disposed', 'gone while it ran'));
    await expect(call(3)).rejects.toThrow('gone while it ran');
    expect(wasm.plans).toHaveLength(2);
  });
});

describe('createAttention', () => {
  it('runs only what it was planned for, until disposed', async () => {
    const inputs = { q: t(1, 1, 3, 8), k: t(1, 1, 3, 8), v: t(1, 1, 3, 8) };
    const attention = await createAttention(inputs, { backend: 'wasm', returnLse: true });
    expect(attention.kernel.descriptor).toBe(PORTABLE);
    expect((await attention.run(inputs)).lse).toBeDefined();
    await expect(attention.run({ ...inputs, k: t(1, 1, 4, 8) })).rejects.toMatchObject({ argument: 'k' });
    await expect(attention.run({ ...inputs, attnMask: t(3, 3) })).rejects.toMatchObject({ argument: 'attnMask' });
    await expect(attention.run({ ...inputs, q: { ...inputs.q, offset: 1 } })).rejects.toMatchObject({ argument: 'q' });
    await expect(attention.run(inputs, { tag: 1 } as object)).rejects.toMatchObject({ code: 'unknown-option' });
    await expect(attention.run(undefined as unknown as typeof inputs)).rejects.toMatchObject({ argument: 'inputs' });
    attention[Symbol.dispose]();
    attention.dispose();
    expect(wasm.plans[0]?.disposed).toBe(true);
    await expect(attention.run(inputs)).rejects.toMatchObject({ code: 'disposed' });
  });
});

describe('prepareKeyValue', () => {
  const kv = (length: number) => [t(1, 2, length, 8), t(1, 2, length, 8)] as const;

  it('appends and attends in the order of the calls', async () => {
    const cache = await prepareKeyValue(...kv(3), { backend: 'wasm' });
    let open = () => {};
    wasm.gates.push(
      new Promise<void>((resolve) => {
        open = resolve;
      }),
    );
    const appended = cache.append(...kv(2));
    const attended = cache.attend(t(1, 4, 1, 8), { isCausal: true, causalAlignment: 'bottom-right' });
    expect(cache.length).toBe(3);
    open();
    await Promise.all([appended, attended]);
    expect(cache.length).toBe(5);
    expect(wasm.plans[0]?.problem).toMatchObject({ queryHeads: 4, keyLength: 5, band: { upper: 0, align: 1 } });
    cache[Symbol.dispose]();
    await expect(cache.attend(t(1, 4, 1, 8))).rejects.toMatchObject({ code: 'disposed' });
    await expect(cache.append(...kv(1))).rejects.toMatchObject({ code: 'disposed' });
  });

  it('refuses what does not continue the tensors held', async () => {
    const cache = await prepareKeyValue(...kv(3), { backend: 'wasm' });
    const wrong = { code: 'invalid-shape', argument: 'k' };
    await expect(cache.append(t(1, 4, 2, 8), t(1, 4, 2, 8))).rejects.toMatchObject(wrong);
    await expect(cache.append(t(1, 2, 2, 16), t(1, 2, 2, 8))).rejects.toMatchObject(wrong);
    await expect(cache.append(...kv(1), { tag: 1 } as object)).rejects.toMatchObject({ code: 'unknown-option' });
    await expect(cache.attend(t(1, 3, 1, 8))).rejects.toMatchObject({ argument: 'q' });
    await expect(cache.attend(t(1, 4, 1, 8), { smoothK: false } as object)).rejects.toMatchObject({
      code: 'unknown-option',
    });
    expect(cache.length).toBe(3);
  });
});
