/**
 * The conformance suite as a program for any runtime (Deno, Bun), which `runtimes.test.ts` bundles and runs there: the
 * first argument names the backend, further ones are texts that names of tests must contain. Prints a JSON line for
 * each test.
 */
import { setBackend } from '../../src/backends/registry.ts';
import { createWasmBackend } from '../../src/backends/wasm/index.ts';
import { createWebgpuBackend } from '../../src/backends/webgpu/index.ts';
import { conformanceTests, type Target } from '../conformance/suite.ts';
import { WASM_TARGETS } from '../conformance/wasm-targets.ts';
import { WEBGPU_TARGET } from '../conformance/webgpu-target.ts';
import { runSeed } from '../support/random.ts';
import { sampled } from '../support/sample.ts';

/** One line of output. */
export interface Line {
  readonly name: string;
  readonly error?: string;
}

/** The kernels are those of Node, which runs all of them: here it is the runtime that is tried. */
const SHARES = { byHand: 0.2, otherwise: 0.4 };

const print = (line: Line) => console.log(JSON.stringify(line));

const [name, ...only] = process.argv.slice(2);
const backend = name === 'webgpu' ? createWebgpuBackend() : createWasmBackend({ threads: 2 });
const targets: readonly Target[] = name === 'webgpu' ? [WEBGPU_TARGET] : WASM_TARGETS;
const seed = runSeed();
const availability = await backend.availability();
print({
  name: `${backend.name} is available`,
  ...(availability.available ? {} : { error: availability.reason }),
});
await setBackend(backend);
for (const target of targets) {
  const all = conformanceTests(target, seed);
  const chosen =
    only.length > 0
      ? all.filter((test) => only.some((text) => test.name.includes(text)))
      : sampled(all, seed, SHARES, `${navigator.userAgent}, ${target.name}`);
  for (const test of chosen) {
    const line = { name: `${target.name} (SAGEATTENTION_SEED=${seed}): ${test.name}` };
    try {
      await test.run();
      print(line);
    } catch (error) {
      print({ ...line, error: error instanceof Error ? (error.stack ?? error.message) : String(error) });
    }
  }
}
// Ends the workers: a runtime that waits for them would not exit.
await backend.dispose();
