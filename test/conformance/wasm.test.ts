import { describe, expect, it } from 'vitest';
import { createWasmBackend, type WasmBackendOptions } from '../../src/backends/wasm/index.ts';
import type { Shares } from '../support/sample.ts';
import { describeConformance } from './vitest.ts';
import { WASM_TARGETS } from './wasm-targets.ts';

/** Node before 22 computes the relaxed dot product wrong, or lacks it; there `auto` is SIMD128. */
const simd = await (async () => {
  const probe = createWasmBackend({ threads: 1 });
  const { details } = await probe.availability();
  await probe.dispose();
  return details.simd;
})();

const relaxed = simd?.startsWith('relaxed') === true;

/** One thread and several, with each instruction set that there is. */
const VARIANTS: readonly [WasmBackendOptions, Shares][] = [
  // `npm test` runs these tests in two versions of Node, of which the older has SIMD128 alone.
  [
    { threads: 1, simd: 'simd128' },
    { byHand: 0.1, otherwise: relaxed ? 0.2 : 1 },
  ],
  [
    { threads: 3, simd: relaxed ? 'relaxed' : 'simd128' },
    { byHand: 0.1, otherwise: relaxed ? 1 : 0.25 },
  ],
];

describe('the SIMD chosen here', () => {
  it('is named', () => expect(simd).toMatch(/simd128|relaxed/i));
});

for (const [options, shares] of VARIANTS) {
  describe(`WASM, ${options.simd}, ${options.threads} threads`, () => {
    describeConformance(() => createWasmBackend(options), WASM_TARGETS, shares);
  });
}
