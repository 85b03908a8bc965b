import { describe, expect, it } from 'vitest';
import { createWasmBackend, type WasmBackendOptions } from '../../src/backends/wasm/index.ts';
import { PORTABLE_ALGORITHM, type QuantizedAlgorithm } from '../../src/reference/quantized.ts';
import type { Target } from './suite.ts';
import { describeConformance } from './vitest.ts';

/** The integer kernel must be no less accurate than the official FP8 kernels. */
const FP8_ALGORITHM: QuantizedAlgorithm = { ...PORTABLE_ALGORITHM, pvFormat: 'fp8', pvAccumDtype: 'fp32+fp32' };

const TARGETS: readonly Target[] = [
  { name: 'integer PV', backend: 'wasm', kernel: 'qk-int8-pv-int8', relativeL1: 0.05, algorithm: FP8_ALGORITHM },
  { name: 'float32 PV', backend: 'wasm', kernel: 'qk-int8-pv-fp16', relativeL1: 0.02, algorithm: PORTABLE_ALGORITHM },
  {
    name: 'integer PV, V smoothed',
    backend: 'wasm',
    kernel: 'qk-int8-pv-int8',
    options: { smoothV: true },
    relativeL1: 0.05,
    algorithm: FP8_ALGORITHM,
    randomCases: 10,
  },
];

/** Node before 22 computes the relaxed dot product wrong, or lacks it; there `auto` is SIMD128. */
const simd = await (async () => {
  const probe = createWasmBackend({ threads: 1 });
  const { details } = await probe.availability();
  await probe.dispose();
  return details.simd;
})();

const VARIANTS: readonly WasmBackendOptions[] = [
  { threads: 1, simd: 'simd128' },
  { threads: 3, simd: 'simd128' },
  ...(simd?.startsWith('relaxed') ? [{ threads: 2, simd: 'relaxed' as const }] : []),
];

describe('the SIMD chosen here', () => {
  it('is named', () => expect(simd).toMatch(/simd128|relaxed/i));
});

for (const options of VARIANTS) {
  describe(`WASM, ${options.simd}, ${options.threads} threads`, () => {
    describeConformance(() => createWasmBackend(options), TARGETS);
  });
}
