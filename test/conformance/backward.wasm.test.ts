import { afterAll, beforeAll, describe, it } from 'vitest';
import { setBackend } from '../../src/backends/registry.ts';
import { createWasmBackend, type WasmBackend, type WasmBackendOptions } from '../../src/backends/wasm/index.ts';
import { runSeed } from '../support/random.ts';
import { type Shares, sampled } from '../support/sample.ts';
import { backwardTests } from './backward-suite.ts';
import { WASM_BACKWARD_TARGET } from './wasm-targets.ts';

const seed = runSeed();
const VARIANTS: readonly (readonly [WasmBackendOptions, Shares])[] = [
  [{ threads: 2, simd: 'simd128' }, { byHand: 0.5 }],
  [{ threads: 1 }, { byHand: 0.25 }],
];

for (const [options, shares] of VARIANTS) {
  describe(`WASM gradients, ${options.simd ?? 'auto'}, ${options.threads} threads (SAGEATTENTION_SEED=${seed})`, () => {
    let backend: WasmBackend | undefined;
    beforeAll(async () => {
      backend = createWasmBackend(options);
      await setBackend(backend);
    });
    afterAll(() => backend?.dispose());
    for (const { name, run } of sampled(backwardTests(WASM_BACKWARD_TARGET, seed), seed, shares, `${options.threads}`))
      it(name, run);
  });
}
