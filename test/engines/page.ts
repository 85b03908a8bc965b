/** What the tests call in an engine, bundled by engines.test.ts. */
import { createWasmBackend } from '../../src/backends/wasm/index.ts';
import { openDevice } from '../../src/backends/webgpu/device.ts';
import { disposeBackends, prepareKeyValue, sageattn, setBackend, tensor } from '../../src/index.ts';
import { Random } from '../../src/measure/random.ts';
import { compare, exactAttention } from '../../src/reference/index.ts';
import { conformanceTests } from '../conformance/suite.ts';
import { WASM_TARGETS } from '../conformance/wasm-targets.ts';

const page = {
  /** Runs tests of the conformance suite, in an order that the seed picks: so many at least, then until the time is over. */
  async suite(seed: number, least: number, milliseconds: number): Promise<{ passed: number; failures: string[] }> {
    await setBackend(createWasmBackend());
    const tests = WASM_TARGETS.flatMap((target) =>
      conformanceTests(target, seed).map(({ name, run }) => ({ name: `${target.name}: ${name}`, run })),
    );
    const random = new Random(seed);
    const order = tests.map((test) => ({ test, at: random.uniform() })).sort((a, b) => a.at - b.at);
    const failures: string[] = [];
    let passed = 0;
    const until = performance.now() + milliseconds;
    for (const [i, { test }] of order.entries()) {
      if (i >= least && performance.now() > until) break;
      try {
        await test.run();
        passed++;
      } catch (error) {
        failures.push(`${test.name}: ${error}`);
      }
    }
    return { passed, failures };
  },

  /** `using`, as compilers lower it for engines that lack it. */
  async using(): Promise<string> {
    const x = tensor(new Float32Array(8 * 16).fill(0.5), [1, 1, 8, 16]);
    let seen: Awaited<ReturnType<typeof prepareKeyValue>>;
    {
      using cache = await prepareKeyValue(x, x, { backend: 'wasm' });
      seen = cache;
    }
    if ('undefined' in seen) throw new Error('a method called "undefined"');
    await disposeBackends();
    return seen.attend(x).then(
      () => 'not disposed',
      (error: { code?: string }) => error.code ?? String(error),
    );
  },

  /** The relative L1 of attention on WebGPU, as this engine compiles its shaders. */
  async webgpuError(seed: number): Promise<number> {
    const random = new Random(seed);
    const [shape, count] = [[1, 2, 129, 64], 2 * 129 * 64];
    const operand = () =>
      tensor(
        Float32Array.from({ length: count }, () => random.normal()),
        shape,
      );
    const [q, k, v] = [operand(), operand(), operand()];
    const { data } = await sageattn(q, k, v, { backend: 'webgpu', isCausal: true });
    return compare(data, exactAttention(q, k, v, { isCausal: true }).output).relativeL1;
  },

  /** What a shader that is wrong is said to be. */
  async wgslError(): Promise<string> {
    const context = await openDevice({});
    return context.pipeline('wrong', '@compute @workgroup_size(1) fn main() {\n  let x = nothing;\n}').then(
      () => 'compiled',
      (error: unknown) => String(error),
    );
  },
};

export type EnginePage = typeof page;
Object.assign(globalThis, { page });
