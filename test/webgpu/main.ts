/**
 * The conformance suite on the GPU of this machine, in plain Node: every family that the device offers, whole, and
 * every variant of its tables on a few tests.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/test-webgpu.mjs [FAMILY | fp4 ...]
 *
 * `fp4` alone: the FP4 kernel on the families that have it.
 */
import { setBackend } from '../../src/backends/registry.ts';
import { createWebgpuBackendOn } from '../../src/backends/webgpu/backend.ts';
import { type Forced, familiesOf, variantsOf } from '../../src/backends/webgpu/families/choose.ts';
import {
  createWebgpuBackend,
  FAMILIES,
  type Family,
  type WebgpuBackendOptions,
} from '../../src/backends/webgpu/index.ts';
import { conformanceTests } from '../conformance/suite.ts';
import { WEBGPU_FP4_TARGET, WEBGPU_TARGET } from '../conformance/webgpu-target.ts';
import { runSeed } from '../support/random.ts';

/** Tests that each variant runs: tiles, edges, masks, poison. */
const VARIANT_TESTS = [
  'float16 HND',
  'length: 1000',
  'head dim: 128',
  'top-left 130',
  'bool [Lq',
  'additive float16',
  'not a number: in a value',
];

const asked = process.argv.slice(2).filter((name) => name !== 'fp4') as Family[];
const onlyFp4 = process.argv.includes('fp4') && asked.length === 0;
const seed = runSeed();
let failures = 0;

async function run(
  options: WebgpuBackendOptions & Forced,
  name: string,
  only?: readonly string[],
  target = WEBGPU_TARGET,
): Promise<void> {
  const backend = createWebgpuBackendOn(options);
  await setBackend(backend);
  const started = performance.now();
  let passed = 0;
  let unsupported = 0;
  const partial = options.variant !== undefined || options.family === 'matrix';
  for (const test of conformanceTests({ ...target, partial }, seed)) {
    if (only !== undefined && !only.some((text) => test.name.includes(text))) continue;
    try {
      await test.run();
      passed++;
    } catch (error) {
      const code = (error as { code?: string }).code;
      if (partial && code === 'unsupported-option') {
        unsupported++;
        continue;
      }
      failures++;
      console.log(`  FAILED ${name}, ${test.name}: ${error instanceof Error ? error.message.slice(0, 600) : error}`);
    }
  }
  const seconds = ((performance.now() - started) / 1000).toFixed(1);
  const rest = unsupported === 0 ? '' : `, ${unsupported} not for this variant or family`;
  console.log(`${name}: ${passed} passed${rest} in ${seconds} s (SAGEATTENTION_SEED=${seed})`);
  await backend.dispose();
}

const probe = createWebgpuBackend();
console.log((await probe.availability()).details);
const { capabilities } = await probe.context();
console.log(`subgroup matrices are written as ${JSON.stringify(capabilities.matrixDialect)}`);
const { offered, missing } = familiesOf(capabilities);
for (const text of missing) console.log(`not offered: ${text}`);
await probe.dispose();

const families = onlyFp4
  ? []
  : FAMILIES.filter((name) => offered.includes(name) && (asked.length === 0 || asked.includes(name)));
for (const family of families) {
  await run({ family }, family);
  for (const { name } of variantsOf(family)) await run({ family, variant: name }, `${family} ${name}`, VARIANT_TESTS);
  const smoothed = { ...WEBGPU_TARGET, options: { smoothV: true } };
  await run({ family }, `${family}, smoothV`, VARIANT_TESTS, smoothed);
}
if (!onlyFp4 && offered.includes('matrix') && (asked.length === 0 || asked.includes('matrix'))) {
  const halves = { ...WEBGPU_TARGET, options: { pvAccumDtype: 'fp16' as const }, relativeL1: 0.03 };
  await run({ family: 'matrix' }, 'matrix, float16 sums', VARIANT_TESTS, halves);
  // Where a thread's place is its index, all offsets and strides are constants and drivers read matrices 16 bytes at a
  // time.
  const constant = { family: 'matrix', capabilities: { subgroupId: false } } as const;
  await run(constant, 'matrix, constant offsets', VARIANT_TESTS);
}
if (asked.length === 0 || process.argv.includes('fp4')) {
  for (const family of ['subgroup', 'base'] as const) {
    if (offered.includes(family)) await run({ family }, `FP4 ${family}`, undefined, WEBGPU_FP4_TARGET);
  }
  for (const family of ['subgroup', 'base'] as const) {
    for (const { name } of offered.includes(family) ? variantsOf(family) : []) {
      await run({ family, variant: name }, `FP4 ${family} ${name}`, VARIANT_TESTS, WEBGPU_FP4_TARGET);
    }
  }
}
process.exit(failures === 0 ? 0 : 1);
