import { afterAll, beforeAll, describe, it } from 'vitest';
import { setBackend } from '../../src/backends/registry.ts';
import type { Simd } from '../../src/backends/wasm/geometry.ts';
import { createWasmBackend, type WasmBackend, type WasmBackendOptions } from '../../src/backends/wasm/index.ts';
import { runSeed } from '../support/random.ts';
import { type Shares, sampled } from '../support/sample.ts';
import { backwardTests } from './backward-suite.ts';
import { WASM_BACKWARD_TARGETS } from './wasm-targets.ts';

const seed = runSeed();
const byItself: Simd = Number(process.versions.node.split('.')[0]) >= 24 ? 'relaxed' : 'simd128';
/** The precisions, `fp16` first, differ in the last three products only. */
const VARIANTS: readonly (readonly [WasmBackendOptions & { readonly simd: Simd }, readonly Shares[]])[] = [
  [{ threads: 2, simd: 'simd128' }, [{ byHand: 0.5 }, { byHand: 0.25, otherwise: 0.34 }]],
  [{ threads: 1, simd: byItself }, [{ byHand: 0.25 }, { byHand: 0.25, otherwise: 0.34 }]],
];

for (const [options, shares] of VARIANTS) {
  describe(`WASM gradients, ${options.simd}, ${options.threads} threads (SAGEATTENTION_SEED=${seed})`, () => {
    let backend: WasmBackend | undefined;
    beforeAll(async () => {
      backend = createWasmBackend(options);
      await setBackend(backend);
    });
    afterAll(() => backend?.dispose());
    for (const [i, target] of WASM_BACKWARD_TARGETS[options.simd].entries()) {
      const tests = sampled(
        backwardTests(target, seed),
        seed,
        shares[i] as Shares,
        `${options.threads} ${target.name}`,
      );
      describe(target.name, () => {
        for (const { name, run } of tests) it(name, run);
      });
    }
  });
}
