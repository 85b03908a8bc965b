/**
 * `npm test`: builds what the tests need, runs its parts, and closes with what passed, failed and did not run.
 * Nothing is skipped in silence: a part that cannot run is named, and in CI it is a failure.
 *
 * By hand it is to end within ten minutes on two processors: it leaves out what other engines and browsers run, and of
 * the tests on simulated and software GPUs it runs the few that a printed seed picks. With `CI` set every part runs,
 * more of those tests do, and the coverage of src/ is held to its bound. SAGEATTENTION_TESTS=all runs every test.
 *
 * Two parts run at a time, since most leave a processor idle for long; each line begins with its part's name then.
 *
 * `npm test -- unit Chromium` runs the parts whose names have one of these words.
 */

import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { availableParallelism, setPriority, tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout } from 'node:timers/promises';
import { messageOf } from '../src/errors.ts';
import { ensureRuntime } from './runtimes.ts';
import { ensureSoftwareGpu, SOFTWARE_GPUS } from './software-gpu.ts';
import { ensureWasmKernels, youngest } from './wasm-kernels.ts';

interface Part {
  readonly name: string;
  /** vitest's arguments. */
  readonly arguments: readonly string[];
  /** It alone must cover src/ up to the bound of vitest.config.ts. Counting lines costs a third of its time. */
  readonly covers?: boolean;
  /** It waits for what a page or another engine does, within limits of time: only one such part runs at a time, and the others yield to it. */
  readonly waits?: boolean;
  /** It runs without being asked for by name outside CI too. */
  readonly byHand?: boolean;
  /** The Node that runs it; default the one running this. */
  readonly node?: () => string;
  readonly env?: () => Record<string, string>;
}

/** Vitest leaves one processor to itself, which waits; of two that is half. */
const ALL_PROCESSORS = `--maxWorkers=${availableParallelism()}`;

/** In the order in which they start, but for those that wait. */
const PARTS: readonly Part[] = [
  // One worker each, beside the parts that wait.
  ...SOFTWARE_GPUS.map((gpu) => ({
    name: `WebGPU on ${gpu}`,
    arguments: ['--project', `webgpu-${gpu}`],
    // The faster of the two, and the one with more features.
    byHand: gpu === 'lavapipe',
    // The project names the driver to Dawn; here it is only made sure that there is one.
    env: () => {
      ensureSoftwareGpu(gpu);
      return {};
    },
  })),
  { name: 'unit', arguments: ['--project', 'unit', ALL_PROCESSORS], covers: true, byHand: true },
  {
    name: 'Relaxed SIMD and Float16Array (Node 24)',
    arguments: ['--project', 'unit', 'src/backends/wasm', 'test/conformance/wasm', 'src/tensor', ALL_PROCESSORS],
    node: () => ensureRuntime('node24'),
  },
  { name: 'Integrations in Chromium', arguments: ['--project', 'browsers', '--no-file-parallelism'], waits: true },
  { name: 'Playground and documentation', arguments: ['--project', 'site', '--no-file-parallelism'], waits: true },
  {
    name: 'WebGPU in headless Chromium',
    arguments: ['--project', 'webgpu-chromium'],
    waits: true,
    env: () => {
      // Debian's Chromium is where SwiftShader comes from.
      ensureSoftwareGpu('swiftshader');
      return {};
    },
  },
  {
    name: 'Firefox and WebKit',
    arguments: ['--project', 'engines'],
    waits: true,
    env: () => {
      // Firefox has WebGPU on it.
      ensureSoftwareGpu('lavapipe');
      return {};
    },
  },
  { name: 'Deno and Bun', arguments: ['--project', 'runtimes'], waits: true },
];

/** Niceness of the parts that yield: they get a quarter of a processor that both want. Far less would run into their own limits of time. */
const YIELDING = 5;

/** Milliseconds in which the last lines of a part that has ended must come. */
const LAST_LINES = 5000;

const IN_CI = process.env.CI !== undefined;
const SEED = process.env.SAGEATTENTION_SEED ?? String(Math.floor(Math.random() * 2 ** 32));
/** What test/support/sample.ts reads. */
const CHOICE: NodeJS.ProcessEnv = {
  ...(IN_CI ? {} : { SAGEATTENTION_TESTS: 'sample' }),
  ...process.env,
  SAGEATTENTION_SEED: SEED,
};

/** Examples, command line, playground and runtimes are tested as the package has them. */
function ensureBuilt(): void {
  const counts = (name: string) => !/\.test\.ts$|\btesting\b|\bgenerated\b/.test(name);
  const sources = Math.max(
    ...['src', 'playground', 'scripts/build.ts', 'package.json'].map((at) => youngest(at, counts)),
  );
  if (youngest(join('dist', 'index.js')) >= sources) return;
  console.log('dist/ is missing or older than its sources: npm run build');
  const { status } = spawnSync(process.execPath, [join('node_modules', 'tsx', 'dist', 'cli.mjs'), 'scripts/build.ts'], {
    stdio: ['ignore', 'inherit', 'inherit'],
  });
  if (status !== 0) process.exit(status ?? 1);
}

interface Counts {
  readonly passed: number;
  /** A line for each failed test: its name and the first line of its message. */
  readonly failed: readonly string[];
  readonly skipped: readonly string[];
}

interface VitestReport {
  readonly numPassedTests: number;
  readonly numFailedTests: number;
  readonly testResults: readonly {
    readonly name: string;
    readonly status: string;
    /** Why the file did not load. */
    readonly message: string;
    readonly assertionResults: readonly {
      readonly status: string;
      readonly fullName: string;
      readonly failureMessages: readonly string[];
    }[];
  }[];
}

/** Runs vitest; what it prints begins with `prefix` if that is given. Its exit status. */
async function vitest(part: Part, report: string, prefix: string | undefined, yields: boolean): Promise<number | null> {
  const args = [...part.arguments, '--reporter=default', '--reporter=json', `--outputFile.json=${report}`];
  if (IN_CI && part.covers === true) args.push('--coverage', '--coverage.reportOnFailure');
  const program = [join('node_modules', 'vitest', 'vitest.mjs'), 'run', ...args];
  const env = { ...CHOICE, ...(process.stdout.isTTY && { FORCE_COLOR: '1' }), ...part.env?.() };
  const stdio = prefix === undefined ? 'inherit' : 'pipe';
  const running: ChildProcess = spawn(part.node?.() ?? process.execPath, program, {
    stdio: ['ignore', stdio, stdio],
    env,
  });
  // Its workers are started later, and inherit it.
  if (yields && running.pid !== undefined) setPriority(running.pid, YIELDING);
  for (const input of [running.stdout, running.stderr]) {
    if (input === null) continue;
    createInterface({ input }).on('line', (line) => {
      if (line !== '') console.log(`${prefix}${line}`);
    });
  }
  const closed = new Promise((resolve) => running.on('close', resolve));
  const status = await new Promise<number | null>((resolve, reject) => running.on('exit', resolve).on('error', reject));
  // A program that a test left behind may hold its output open.
  await Promise.race([closed, setTimeout(LAST_LINES, undefined, { ref: false })]);
  for (const output of [running.stdout, running.stderr]) output?.destroy();
  return status;
}

async function run(part: Part, folder: string, together: boolean, yields: boolean): Promise<Counts> {
  console.log(`\n=== ${part.name} ===`);
  const report = join(folder, `${part.name.replaceAll(/\W+/g, '-')}.json`);
  const start = performance.now();
  try {
    const status = await vitest(part, report, together ? `[${part.name}] ` : undefined, yields);
    console.log(`=== ${part.name} ended after ${((performance.now() - start) / 1000).toFixed(0)} s ===\n`);
    const { numPassedTests, testResults } = JSON.parse(readFileSync(report, 'utf8')) as VitestReport;
    const tests = testResults.flatMap(({ assertionResults }) => assertionResults);
    const failed = [
      ...tests
        .filter((test) => test.status === 'failed')
        .map((test) => `${test.fullName}: ${firstLine(test.failureMessages[0])}`),
      ...testResults
        .filter((file) => file.status === 'failed' && file.assertionResults.every((test) => test.status !== 'failed'))
        .map((file) => `${file.name}: ${firstLine(file.message)}`),
    ];
    if (failed.length === 0 && status !== 0) {
      failed.push(`vitest ended with ${status}${part.covers === true ? ': coverage below its bound?' : ''}`);
    }
    const skipped = tests.filter((test) => test.status !== 'passed' && test.status !== 'failed');
    return { passed: numPassedTests, failed, skipped: skipped.map((test) => test.fullName) };
  } catch (error) {
    const reason = `${part.name}: ${messageOf(error)}`;
    console.error(reason);
    return !IN_CI ? { passed: 0, failed: [], skipped: [reason] } : { passed: 0, failed: [reason], skipped: [] };
  }
}

/** Runs the parts in two lanes; the first one takes those that wait, one after another, and then helps the other. */
async function runAll(parts: readonly Part[], folder: string): Promise<Map<Part, Counts>> {
  const waiting = parts.filter(({ waits }) => waits === true);
  const others = parts.filter(({ waits }) => waits !== true);
  const results = new Map<Part, Counts>();
  const lane = async (next: () => Part | undefined) => {
    for (let part = next(); part !== undefined; part = next()) {
      const yields = part.waits !== true && parts.some(({ waits }) => waits);
      results.set(part, await run(part, folder, parts.length > 1, yields));
    }
  };
  await Promise.all([lane(() => waiting.shift() ?? others.shift()), lane(() => others.shift())]);
  return results;
}

const firstLine = (text = ''): string => text.split('\n', 1)[0] as string;

// What several parts need is installed before the first; a part that then lacks it says so itself.
for (const gpu of SOFTWARE_GPUS) {
  try {
    ensureSoftwareGpu(gpu);
  } catch (error) {
    console.error(`${gpu}: ${messageOf(error)}`);
  }
}

// Before parts that run at once find them missing.
ensureWasmKernels();
ensureBuilt();
const only = process.argv.slice(2);
const folder = mkdtempSync(join(tmpdir(), 'sageattention-test-'));
try {
  const isAsked = ({ name, byHand }: Part) =>
    only.length === 0 ? IN_CI || byHand === true : only.some((text) => name.toLowerCase().includes(text.toLowerCase()));
  const parts = PARTS.filter(isAsked);
  const results = await runAll(parts, folder);
  console.log('');
  for (const part of parts) {
    const { passed, failed, skipped } = results.get(part) as Counts;
    console.log(`${part.name}: ${passed} passed, ${failed.length} failed, ${skipped.length} not run`);
    for (const name of skipped) console.log(`  not run: ${name}`);
    for (const name of failed) console.log(`  failed: ${name}`);
  }
  const total = (count: (counts: Counts) => number) =>
    [...results.values()].reduce((sum, counts) => sum + count(counts), 0);
  const [passed, failed, skipped] = [
    total((counts) => counts.passed),
    total((counts) => counts.failed.length),
    total((counts) => counts.skipped.length),
  ];
  if (only.length === 0) {
    for (const { name } of PARTS.filter((part) => !parts.includes(part))) {
      console.log(`not run by hand: npm test -- '${name}'`);
    }
  }
  if (CHOICE.SAGEATTENTION_TESTS !== 'all') {
    const rest = IN_CI ? '' : ' CI=true runs every part, and more of them.';
    console.log(
      `\nSimulated and software GPUs ran the sample of SAGEATTENTION_SEED=${SEED};${rest} SAGEATTENTION_TESTS=all runs all.`,
    );
  }
  console.log(`\n${passed} passed, ${failed} failed, ${skipped} skipped`);
  process.exitCode = failed > 0 || passed === 0 ? 1 : 0;
} finally {
  rmSync(folder, { recursive: true, force: true });
}
