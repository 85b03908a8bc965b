/**
 * `npm test`: builds what the tests need, runs every part, and closes with what passed, failed and could not run. Nothing
 * is skipped in silence: a part that cannot run is named, and in CI it is a failure.
 */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ensureNode24 } from './node24.ts';
import { ensureSoftwareGpu, SOFTWARE_GPUS } from './software-gpu.ts';

interface Part {
  readonly name: string;
  /** vitest's arguments. */
  readonly arguments: readonly string[];
  /** Its lines count towards the coverage of src/. */
  readonly covers?: boolean;
  /** The Node that runs it; default the one running this. */
  readonly node?: () => string;
  readonly env?: () => Record<string, string>;
}

const PARTS: readonly Part[] = [
  { name: 'unit', arguments: ['--project', 'unit'], covers: true },
  {
    name: 'Relaxed SIMD and Float16Array (Node 24)',
    arguments: ['--project', 'unit', 'src/backends/wasm', 'test/conformance/wasm', 'src/tensor'],
    node: ensureNode24,
    covers: true,
  },
  // A browser beside other tests would be short of processors.
  { name: 'Playground and documentation', arguments: ['--project', 'site', '--no-file-parallelism'] },
  ...SOFTWARE_GPUS.map((gpu) => ({
    name: `WebGPU on ${gpu}`,
    arguments: ['--project', `webgpu-${gpu}`],
    covers: true,
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

interface Counts {
  passed: number;
  failed: number;
  skipped: string[];
}

interface VitestReport {
  readonly numPassedTests: number;
  readonly numFailedTests: number;
  readonly testResults: readonly {
    readonly name: string;
    readonly status: string;
    readonly assertionResults: readonly { readonly status: string; readonly fullName: string }[];
  }[];
}

function run(part: Part, folder: string): Counts {
  console.log(`\n=== ${part.name} ===`);
  const name = part.name.replaceAll(/\W+/g, '-');
  const report = join(folder, `${name}.json`);
  // A part covers some of src/; the bound is that of all parts together, see `mergeCoverage`.
  const coverage = [
    ...['--coverage', '--coverage.thresholds.lines=0', '--coverage.reporter=json-summary'],
    ...[`--coverage.reportsDirectory=${join(folder, `${name}-coverage`)}`, '--coverage.reportOnFailure'],
    ...['--reporter=blob', `--outputFile.blob=${join(folder, 'blobs', `${name}.json`)}`],
  ];
  try {
    const node = part.node?.() ?? process.execPath;
    const vitest = join('node_modules', 'vitest', 'vitest.mjs');
    const { status } = spawnSync(
      node,
      [
        ...[vitest, 'run', ...part.arguments, '--reporter=default', '--reporter=json', `--outputFile.json=${report}`],
        ...(part.covers === true ? coverage : []),
      ],
      { stdio: ['ignore', 'inherit', 'inherit'], env: { ...process.env, ...part.env?.() } },
    );
    const { numPassedTests, numFailedTests, testResults } = JSON.parse(readFileSync(report, 'utf8')) as VitestReport;
    const skipped = testResults.flatMap(({ assertionResults }) =>
      assertionResults
        .filter((test) => test.status !== 'passed' && test.status !== 'failed')
        .map((test) => test.fullName),
    );
    // A coverage threshold or a file that does not load fails the run without failing a test.
    const failed = numFailedTests === 0 && status !== 0 ? 1 : numFailedTests;
    return { passed: numPassedTests, failed, skipped };
  } catch (error) {
    console.error(`${part.name}: ${error instanceof Error ? error.message : error}`);
    return process.env.CI === undefined
      ? { passed: 0, failed: 0, skipped: [`${part.name}: ${error instanceof Error ? error.message : error}`] }
      : { passed: 0, failed: 1, skipped: [] };
  }
}

// What several parts need is installed before the first; a part that then lacks it says so itself.
for (const gpu of SOFTWARE_GPUS) {
  try {
    ensureSoftwareGpu(gpu);
  } catch (error) {
    console.error(`${gpu}: ${error instanceof Error ? error.message : error}`);
  }
}

/** Reports the coverage of all parts together; false when it is below the bound of vitest.config.ts. */
function mergeCoverage(folder: string): boolean {
  console.log('\n=== Coverage of src/ by all parts ===');
  const { status } = spawnSync(
    process.execPath,
    [
      ...[join('node_modules', 'vitest', 'vitest.mjs'), 'run', `--merge-reports=${join(folder, 'blobs')}`],
      ...[
        '--coverage',
        '--coverage.reportOnFailure',
        '--reporter=json',
        `--outputFile.json=${join(folder, 'merged.json')}`,
      ],
    ],
    { stdio: ['ignore', 'inherit', 'inherit'] },
  );
  return status === 0;
}

const only = process.argv.slice(2);
const folder = mkdtempSync(join(tmpdir(), 'sageattention-test-'));
try {
  const parts = PARTS.filter(({ name }) => only.length === 0 || only.some((text) => name.includes(text)));
  const results = parts.map((part) => ({ part, counts: run(part, folder) }));
  console.log('');
  for (const { part, counts } of results) {
    console.log(`${part.name}: ${counts.passed} passed, ${counts.failed} failed, ${counts.skipped.length} not run`);
    for (const name of counts.skipped) console.log(`  not run: ${name}`);
  }
  const total = (count: (counts: Counts) => number) => results.reduce((sum, { counts }) => sum + count(counts), 0);
  const [passed, failed, skipped] = [
    total((counts) => counts.passed),
    total((counts) => counts.failed),
    total((counts) => counts.skipped.length),
  ];
  // A run of some parts covers only what they do, and failed tests are reported already.
  const covered = only.length > 0 || failed > 0 || mergeCoverage(folder);
  console.log(`\n${passed} passed, ${failed + (covered ? 0 : 1)} failed, ${skipped} skipped`);
  process.exitCode = failed > 0 || passed === 0 || !covered ? 1 : 0;
} finally {
  rmSync(folder, { recursive: true, force: true });
}
