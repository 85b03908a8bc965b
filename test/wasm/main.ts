/**
 * The conformance suite on the WASM backend in plain Node, for machines where the whole of it is wanted at once:
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/test-wasm.mjs [TARGET...]
 */
import { createWasmBackend } from '../../src/backends/wasm/index.ts';
import { setBackend } from '../../src/index.ts';
import { conformanceTests } from '../conformance/suite.ts';
import { WASM_TARGETS } from '../conformance/wasm-targets.ts';
import { runSeed } from '../support/random.ts';

const asked = process.argv.slice(2);
const seed = runSeed();
let failures = 0;
for (const simd of ['relaxed', 'simd128'] as const) {
  const backend = createWasmBackend({ simd });
  const { available, reason, details } = await backend.availability();
  console.log(simd, available ? details : reason);
  if (!available) continue;
  await setBackend(backend);
  for (const target of WASM_TARGETS) {
    if (asked.length > 0 && !asked.some((text) => target.name.includes(text))) continue;
    const started = performance.now();
    let passed = 0;
    for (const test of conformanceTests(target, seed)) {
      try {
        await test.run();
        passed++;
      } catch (error) {
        failures++;
        console.log(`  FAILED ${test.name}: ${error instanceof Error ? error.message.slice(0, 600) : error}`);
      }
    }
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    console.log(`${simd}, ${target.name}: ${passed} passed in ${seconds} s (SAGEATTENTION_SEED=${seed})`);
  }
  await backend.dispose();
}
console.log(`${failures} failed`);
process.exit(failures === 0 ? 0 : 1);
