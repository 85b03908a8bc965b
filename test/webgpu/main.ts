/**
 * The conformance suite on the GPU of this machine, in plain Node: every family that the device offers, whole, and
 * every variant of its tables on a few tests.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/test-webgpu.mjs [FAMILY | int8 | fp4 | gradients | int8-gradients | blocks ...] [--shards 16]
 *
 * `int8`, `fp4` alone: that kernel on the families that have it. `blocks` alone: the choice of blocks. `gradients`, `int8-gradients` alone: the backward pass in 16 or in 8
 * bits, whole, and its tiles on a few tests.
 * A driver takes seconds to compile a kernel: with shards as many processes share the tests.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { parseArgs } from 'node:util';
import { setBackend } from '../../src/backends/registry.ts';
import { createWebgpuBackendOn } from '../../src/backends/webgpu/backend.ts';
import {
  GRADIENT_VARIANTS,
  INT8_GRADIENT_VARIANTS,
  MATRIX_GRADIENT_VARIANTS,
} from '../../src/backends/webgpu/families/backward.ts';
import { type Forced, familiesOf, variantsOf } from '../../src/backends/webgpu/families/choose.ts';
import {
  createWebgpuBackend,
  FAMILIES,
  type Family,
  type WebgpuBackendOptions,
} from '../../src/backends/webgpu/index.ts';
import { backwardTests } from '../conformance/backward-suite.ts';
import {
  WEBGPU_BACKWARD_KINDS,
  WEBGPU_BACKWARD_TARGET,
  WEBGPU_INT8_BACKWARD_TARGET,
} from '../conformance/backward-webgpu-target.ts';
import { blockMapChecks } from '../conformance/block-map.ts';
import { type ConformanceTest, conformanceTests } from '../conformance/suite.ts';
import { WEBGPU_FP4_TARGET, WEBGPU_INT8_TARGET, WEBGPU_TARGET } from '../conformance/webgpu-target.ts';
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
const PARTS = ['int8', 'fp4', 'gradients', 'int8-gradients', 'blocks'];
const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    shards: { type: 'string' },
    /** `i/n`: every n-th test from the i-th on. */
    shard: { type: 'string', default: '0/1' },
  },
});
const asked = positionals.filter((name) => !PARTS.includes(name)) as Family[];
const isAsked = (part: string) => positionals.includes(part) || positionals.length === 0;
/** Only parts that are no families. */
const onlyParts = positionals.length > 0 && asked.length === 0;
const seed = runSeed();
const [shard, shards] = flags.shard.split('/').map(Number) as [number, number];
let failures = 0;
let counted = 0;

/** Runs the tests in so many processes, prints what they say, and the sum of each line of theirs. */
async function inShards(count: number): Promise<number> {
  const sums = new Map<string, { passed: number; failed: number; skipped: number }>();
  const children: ChildProcess[] = [];
  const codes = Array.from({ length: count }, async (_, i) => {
    const child = spawn(process.execPath, [process.argv[1] as string, ...positionals, '--shard', `${i}/${count}`], {
      env: { ...process.env, SAGEATTENTION_SEED: String(seed) },
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    children.push(child);
    for await (const line of createInterface(child.stdout)) {
      const [, name, passed, failed, skipped] = /^(.*): (\d+) passed, (\d+) failed, (\d+) not for/.exec(line) ?? [];
      if (name === undefined) {
        if (i === 0 || line.includes('FAILED')) console.log(line);
        continue;
      }
      const sum = sums.get(name) ?? { passed: 0, failed: 0, skipped: 0 };
      sum.passed += Number(passed);
      sum.failed += Number(failed);
      sum.skipped += Number(skipped);
      sums.set(name, sum);
      if (i === 0) console.log(`shard 0 of ${count}, ${line}`);
    }
    return child.exitCode ?? (await new Promise<number>((resolve) => child.once('exit', (code) => resolve(code ?? 1))));
  });
  const tell = () => {
    for (const [name, { passed, failed, skipped }] of sums) {
      console.log(
        `${name}: ${passed} passed, ${failed} failed, ${skipped} not for this variant or family in all shards`,
      );
    }
  };
  // A run that is cut short tells what ended.
  process.once('SIGTERM', () => {
    tell();
    for (const child of children) child.kill();
    process.exit(1);
  });
  const ended = await Promise.all(codes);
  tell();
  return ended.filter((code) => code !== 0).length;
}
if (flags.shards !== undefined) {
  const failed = await inShards(Number(flags.shards));
  console.log(failed === 0 ? 'all shards passed' : `${failed} shards failed`);
  process.exit(failed === 0 ? 0 : 1);
}

/** Milliseconds after which the test under way is named. */
const TELL_EVERY = 10_000;
let told = performance.now();

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
  const before = failures;
  const partial = options.variant !== undefined || options.family === 'matrix';
  for (const test of testsOf(partial)) {
    if (only !== undefined && !only.some((text) => test.name.includes(text))) continue;
    if (counted++ % shards !== shard) continue;
    if (performance.now() - told > TELL_EVERY) {
      told = performance.now();
      console.log(`  ${name}: ${passed} passed so far, now ${test.name}`);
    }
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
  console.log(
    `${name}: ${passed} passed, ${failures - before} failed, ${unsupported} not for this variant or family in ${seconds} s (SAGEATTENTION_SEED=${seed})`,
  );
  await backend.dispose();
}

const probe = createWebgpuBackend();
console.log((await probe.availability()).details);
const { capabilities } = await probe.context();
console.log(`subgroup matrices are written as ${JSON.stringify(capabilities.matrixDialect)}`);
const { offered, missing } = familiesOf(capabilities);
for (const text of missing) console.log(`not offered: ${text}`);
await probe.dispose();

if (isAsked('blocks')) {
  const backend = createWebgpuBackend();
  const checks = blockMapChecks(async () => backend, seed, 6);
  await run({}, 'blocks that are chosen', undefined, WEBGPU_TARGET, () => checks);
  await backend.dispose();
}
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
if (isAsked('int8')) {
  const smoothed = { ...WEBGPU_INT8_TARGET, options: { smoothV: true } };
  for (const family of (['subgroup', 'base'] as const).filter((name) => offered.includes(name))) {
    await run({ family }, `INT8 PV ${family}`, undefined, WEBGPU_INT8_TARGET);
    await run({ family }, `INT8 PV ${family}, smoothV`, VARIANT_TESTS, smoothed);
    for (const { name } of variantsOf(family)) {
      await run({ family, variant: name }, `INT8 PV ${family} ${name}`, VARIANT_TESTS, WEBGPU_INT8_TARGET);
    }
  }
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
  // Each kind of test once comes first, for runs that are cut short.
  await run({}, 'gradients, each kind', WEBGPU_BACKWARD_KINDS, undefined, gradients);
  for (const family of FAMILIES.filter((name) => offered.includes(name))) {
    await run({ family }, `gradients after ${family}`, undefined, undefined, gradients);
  }
  for (const { name } of GRADIENT_VARIANTS) {
    await run({ gradientVariant: name }, `gradients, tiles of ${name}`, VARIANT_TESTS, undefined, gradients);
  }
  for (const { name } of offered.includes('matrix') ? MATRIX_GRADIENT_VARIANTS : []) {
    await run({ gradientVariant: name }, `gradients, matrices of ${name}`, VARIANT_TESTS, undefined, gradients);
  }
}
if (isAsked('int8-gradients')) {
  const gradients = () => backwardTests(WEBGPU_INT8_BACKWARD_TARGET, seed);
  await run({}, '8-bit gradients, each kind', WEBGPU_BACKWARD_KINDS, undefined, gradients);
  await run({}, '8-bit gradients', undefined, undefined, gradients);
  for (const { name } of INT8_GRADIENT_VARIANTS) {
    await run({ gradientVariant: name }, `8-bit gradients, tiles of ${name}`, VARIANT_TESTS, undefined, gradients);
  }
}
process.exit(failures === 0 ? 0 : 1);
