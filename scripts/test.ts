/**
 * `npm test`: builds what the tests need, runs its parts, and closes with what passed, failed and did not run.
 * Nothing is skipped in silence: a part that cannot run is named, and in CI it is a failure.
 *
 * By hand it takes some 13 minutes on two processors: it leaves out what other engines and browsers run, and of
 * the tests on simulated and software GPUs it runs the few that a printed seed picks. With `CI` set every part runs,
 * more of those tests do, and the coverage of src/ is held to its bound. SAGEATTENTION_TESTS=all runs every test.
 *
 * `npm test -- unit Chromium` runs the parts whose names have one of these words.
 */

import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { messageOf } from '../src/errors.ts';
import { ensureRuntime } from './runtimes.ts';
import { ensureSoftwareGpu, SOFTWARE_GPUS } from './software-gpu.ts';
import { youngest } from './wasm-kernels.ts';

interface Part {
  readonly name: string;
  /** vitest's arguments. */
  readonly arguments: readonly string[];
  /** It alone must cover src/ up to the bound of vitest.config.ts. Counting lines costs a third of its time. */
  readonly covers?: boolean;
  /** It runs without being asked for by name outside CI too. */
  readonly byHand?: boolean;
  /** The Node that runs it; default the one running this. */
  readonly node?: () => string;
  readonly env?: () => Record<string, string>;
}

/** Vitest leaves one processor to itself, which waits; of two that is half. */
const ALL_PROCESSORS = `--maxWorkers=${availableParallelism()}`;

const PARTS: readonly Part[] = [
  { name: 'unit', arguments: ['--project', 'unit', ALL_PROCESSORS], covers: true, byHand: true },
  {
    name: 'Relaxed SIMD and Float16Array (Node 24)',
    arguments: ['--project', 'unit', 'src/backends/wasm', 'test/conformance/wasm', 'src/tensor', ALL_PROCESSORS],
    node: () => ensureRuntime('node24'),
  },
  { name: 'Deno and Bun', arguments: ['--project', 'runtimes'] },
  // A browser beside other tests would be short of processors.
  { name: 'Integrations in Chromium', arguments: ['--project', 'browsers', '--no-file-parallelism'] },
  { name: 'Playground and documentation', arguments: ['--project', 'site', '--no-file-parallelism'] },
  {
    name: 'Firefox and WebKit',
    arguments: ['--project', 'engines'],
    env: () => {
      // Firefox has WebGPU on it.
      ensureSoftwareGpu('lavapipe');
      return {};
    },
  },
  ...SOFTWARE_GPUS.map((gpu) => ({
    name: `WebGPU on ${gpu}`,
    arguments: ['--project', `webgpu-${gpu}`, ALL_PROCESSORS],
    // The faster of the two, and the one with more features.
    byHand: gpu === 'lavapipe',
    // The project names the driver to Dawn; here it is only made sure that there is one.
    env: () => {
      ensureSoftwareGpu(gpu);
      return {};
    },
  })),
  {
    name: 'WebGPU in headless Chromium',
    arguments: ['--project', 'webgpu-chromium'],
    env: () => {
      // Debian's Chromium is where SwiftShader comes from.
      ensureSoftwareGpu('swiftshader');
      return {};
    },
  },
];

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

function run(part: Part, folder: string): Counts {
  console.log(`\n=== ${part.name} ===`);
  const name = part.name.replaceAll(/\W+/g, '-');
  const report = join(folder, `${name}.json`);
  try {
    const node = part.node?.() ?? process.execPath;
    const vitest = join('node_modules', 'vitest', 'vitest.mjs');
    const { status } = spawnSync(
      node,
      [
        ...[vitest, 'run', ...part.arguments, '--reporter=default', '--reporter=json', `--outputFile.json=${report}`],
        ...(IN_CI && part.covers === true ? ['--coverage', '--coverage.reportOnFailure'] : []),
      ],
      { stdio: ['ignore', 'inherit', 'inherit'], env: { ...CHOICE, ...part.env?.() } },
    );
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

const firstLine = (text = ''): string => text.split('\n', 1)[0] as string;

// What several parts need is installed before the first; a part that then lacks it says so itself.
for (const gpu of SOFTWARE_GPUS) {
  try {
    ensureSoftwareGpu(gpu);
  } catch (error) {
    console.error(`${gpu}: ${messageOf(error)}`);
  }
}

ensureBuilt();
const only = process.argv.slice(2);
const folder = mkdtempSync(join(tmpdir(), 'sageattention-test-'));
try {
  const isAsked = ({ name, byHand }: Part) =>
    only.length === 0 ? IN_CI || byHand === true : only.some((text) => name.toLowerCase().includes(text.toLowerCase()));
  const parts = PARTS.filter(isAsked);
  const results = parts.map((part) => ({ part, counts: run(part, folder) }));
  console.log('');
  for (const { part, counts } of results) {
    const { passed, failed, skipped } = counts;
    console.log(`${part.name}: ${passed} passed, ${failed.length} failed, ${skipped.length} not run`);
    for (const name of skipped) console.log(`  not run: ${name}`);
    for (const name of failed) console.log(`  failed: ${name}`);
  }
  const total = (count: (counts: Counts) => number) => results.reduce((sum, { counts }) => sum + count(counts), 0);
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
