/**
 * The conformance suite on the GPU of this machine, in plain Node: every family that the device offers, whole, and
 * every variant of its tables on a few tests.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/test-webgpu.mjs [FAMILY | fp4 | gradients ...]
 *
 * `fp4` alone: the FP4 kernel on the families that have it. `gradients` alone: the backward pass, whole, and its tiles on a few tests.
 */
import { setBackend } from '../../src/backends/registry.ts';
import { createWebgpuBackendOn } from '../../src/backends/webgpu/backend.ts';
import { GRADIENT_VARIANTS } from '../../src/backends/webgpu/families/backward.ts';
import { type Forced, familiesOf, variantsOf } from '../../src/backends/webgpu/families/choose.ts';
import {
  createWebgpuBackend,
  FAMILIES,
  type Family,
  type WebgpuBackendOptions,
} from '../../src/backends/webgpu/index.ts';
import { backwardTests } from '../conformance/backward-suite.ts';
import { WEBGPU_BACKWARD_TARGET } from '../conformance/backward-webgpu-target.ts';
import { type ConformanceTest, conformanceTests } from '../conformance/suite.ts';
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

/** Not families. */
const PARTS = ['fp4', 'gradients'];
const asked = process.argv.slice(2).filter((name) => !PARTS.includes(name)) as Family[];
const isAsked = (part: string) => process.argv.includes(part) || process.argv.length === 2;
/** Only parts that are no families. */
const onlyParts = process.argv.length > 2 && asked.length === 0;
const seed = runSeed();
let failures = 0;

async function run(
  options: WebgpuBackendOptions & Forced,
  name: string,
  only?: readonly string[],
  target = WEBGPU_TARGET,
  testsOf: (partial: boolean) => ConformanceTest[] = (partial) => conformanceTests({ ...target, partial }, seed),
): Promise<void> {
  const backend = createWebgpuBackendOn(options);
  await setBackend(backend);
  const started = performance.now();
  let passed = 0;
  let unsupported = 0;
  const partial = options.variant !== undefined || options.family === 'matrix';
  for (const test of testsOf(partial)) {
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

const families = onlyParts
  ? []
  : FAMILIES.filter((name) => offered.includes(name) && (asked.length === 0 || asked.includes(name)));
for (const family of families) {
  await run({ family }, family);
  for (const { name } of variantsOf(family)) await run({ family, variant: name }, `${family} ${name}`, VARIANT_TESTS);
  const smoothed = { ...WEBGPU_TARGET, options: { smoothV: true } };
  await run({ family }, `${family}, smoothV`, VARIANT_TESTS, smoothed);
}
if (!onlyParts && offered.includes('matrix') && (asked.length === 0 || asked.includes('matrix'))) {
  const halves = { ...WEBGPU_TARGET, options: { pvAccumDtype: 'fp16' as const }, relativeL1: 0.03 };
  await run({ family: 'matrix' }, 'matrix, float16 sums', VARIANT_TESTS, halves);
}
if (isAsked('fp4')) {
  for (const family of ['subgroup', 'base'] as const) {
    if (offered.includes(family)) await run({ family }, `FP4 ${family}`, undefined, WEBGPU_FP4_TARGET);
  }
  for (const family of ['subgroup', 'base'] as const) {
    for (const { name } of offered.includes(family) ? variantsOf(family) : []) {
      await run({ family, variant: name }, `FP4 ${family} ${name}`, VARIANT_TESTS, WEBGPU_FP4_TARGET);
    }
  }
}
if (isAsked('gradients')) {
  const gradients = () => backwardTests(WEBGPU_BACKWARD_TARGET, seed);
  for (const family of FAMILIES.filter((name) => offered.includes(name))) {
    await run({ family }, `gradients after ${family}`, undefined, undefined, gradients);
  }
  for (const { name } of GRADIENT_VARIANTS) {
    await run({ gradientVariant: name }, `gradients, tiles of ${name}`, VARIANT_TESTS, undefined, gradients);
  }
}
process.exit(failures === 0 ? 0 : 1);
