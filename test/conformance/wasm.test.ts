import { describe, expect, it } from 'vitest';
import { createWasmBackend, type WasmBackendOptions } from '../../src/backends/wasm/index.ts';
import { describeConformance } from './vitest.ts';
import { WASM_TARGETS } from './wasm-targets.ts';

/** Node before 22 computes the relaxed dot product wrong, or lacks it; there `auto` is SIMD128. */
const simd = await (async () => {
  const probe = createWasmBackend({ threads: 1 });
  const { details } = await probe.availability();
  await probe.dispose();
  return details.simd;
})();

/** One thread and several, with each instruction set that there is. */
const VARIANTS: readonly WasmBackendOptions[] = [
  { threads: 1, simd: 'simd128' },
  { threads: 3, simd: simd?.startsWith('relaxed') ? 'relaxed' : 'simd128' },
];

describe('the SIMD chosen here', () => {
  it('is named', () => expect(simd).toMatch(/simd128|relaxed/i));
});

for (const options of VARIANTS) {
  describe(`WASM, ${options.simd}, ${options.threads} threads`, () => {
    describeConformance(() => createWasmBackend(options), WASM_TARGETS, { byHand: 0.3 });
  });
}
