/**
 * The package in Deno and Bun: the whole conformance suite on WebAssembly with worker threads, and a slice on WebGPU in
 * Deno, whose WGSL compiler is naga (Firefox's), where Dawn's is Tint (Chrome's).
 */
import { spawn } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import { describe, expect, it } from 'vitest';
import { ensureRuntime, type Runtime } from '../../scripts/runtimes.ts';
import { locateSoftwareGpu, REMEDY, softwareGpuEnvironment } from '../../scripts/software-gpu.ts';
import { itNeeds } from '../support/requirement.ts';
import type { Line } from './program.ts';

const RUN = { deno: ['run', '--allow-all', '--no-config'], bun: ['run'] } as const satisfies Partial<
  Record<Runtime, readonly string[]>
>;

/** Layouts, dtypes, an odd length, a band. Each further kind of kernel costs the software driver half a minute. */
const WEBGPU_TESTS = ['dtype and layout', 'length: 65', 'causal: top-left 130'];

interface Outcome {
  readonly lines: readonly Line[];
  /** What the runtime said besides. */
  readonly noise: string;
  readonly code: number | null;
}

function runProgram(
  runtime: keyof typeof RUN,
  program: string,
  args: readonly string[],
  env: Record<string, string> = {},
): Promise<Outcome> {
  const child = spawn(ensureRuntime(runtime), [...RUN[runtime], program, ...args], {
    cwd: path.dirname(program),
    stdio: ['ignore', 'pipe', 'pipe'],
    // Where a machine has EGL, Deno's GPU library asks it too, and it complains of a process without a session.
    env: { ...process.env, DENO_NO_UPDATE_CHECK: '1', XDG_RUNTIME_DIR: folder, ...env },
  });
  const chunks: string[] = [];
  const noise: string[] = [];
  child.stdout.setEncoding('utf8').on('data', (text) => chunks.push(text));
  child.stderr.setEncoding('utf8').on('data', (text) => noise.push(text));
  return new Promise((resolve, reject) => {
    child.on('error', reject);
    child.on('close', (code) => {
      const lines = chunks.join('').split('\n').filter(Boolean);
      resolve({ lines: lines.map((line) => JSON.parse(line) as Line), noise: noise.join(''), code });
    });
  });
}

const folder = await mkdtemp(path.join(tmpdir(), 'sageattention-runtimes-'));
const program = path.join(folder, 'program.mjs');
await build({
  entryPoints: [fileURLToPath(new URL('program.ts', import.meta.url))],
  outfile: program,
  bundle: true,
  format: 'esm',
  platform: 'node',
  target: 'es2022',
  external: ['koffi', 'webgpu'],
  logLevel: 'error',
});

/** Vitest names tests before it runs them, so the runtimes report here. */
function describeOutcome(name: string, outcome: Outcome, test: ReturnType<typeof itNeeds> = it): void {
  describe(name, () => {
    for (const line of outcome.lines) {
      test(line.name, () => {
        if (line.error !== undefined) throw new Error(line.error);
      });
    }
    test('ends by itself, without a complaint', () => {
      expect(outcome).toMatchObject({ code: 0, noise: '' });
      expect(outcome.lines.length).toBeGreaterThan(1);
    });
  });
}

const lavapipe = locateSoftwareGpu('lavapipe');
try {
  const runtimes = ['deno', 'bun'] as const;
  // At the same time: both wait for their threads now and then.
  const outcomes = await Promise.all(runtimes.map((runtime) => runProgram(runtime, program, ['wasm'])));
  for (const [i, outcome] of outcomes.entries()) describeOutcome(`${runtimes[i]}, WebAssembly`, outcome);
  describeOutcome(
    'deno, WebGPU on lavapipe',
    lavapipe === undefined
      ? { lines: [], noise: '', code: null }
      : await runProgram('deno', program, ['webgpu', ...WEBGPU_TESTS], softwareGpuEnvironment(lavapipe)),
    itNeeds(lavapipe === undefined ? REMEDY.lavapipe : undefined),
  );
} finally {
  await rm(folder, { recursive: true });
}
