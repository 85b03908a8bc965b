/**
 * What npm would publish, checked by content: `tsx scripts/check-package.ts [TARBALL]`. Without an argument it packs
 * the built package as it lies. Whatever package.json promises must be in it, tests and tools must not, and publint and
 * arethetypeswrong must find nothing.
 */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, posix, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { relativeTargets } from './readme-for-npm.ts';

interface Manifest {
  /** Only a release has it. */
  readonly repository?: object;
  readonly exports: Record<string, unknown>;
  readonly bin: Record<string, string>;
}

/** Every file that a value of `exports` or `bin` names. */
const filesOf = (value: unknown): string[] =>
  typeof value === 'string'
    ? [value]
    : typeof value === 'object' && value !== null
      ? Object.values(value).flatMap(filesOf)
      : [];

/** Beside what package.json names. */
const REQUIRED = [
  'LICENSE',
  'README.md',
  'CHANGELOG.md',
  'dist/cli/THIRD-PARTY-LICENSES.txt',
  'dist/playground/index.html',
  'dist/playground/THIRD-PARTY-LICENSES.txt',
  'dist/integrations/onnxruntime/onnx/THIRD-PARTY-LICENSES.txt',
];

const UNWANTED = [
  /\.test\.(ts|js)$/,
  /\/testing\//,
  /^(test|scripts|bench|docs|examples)\//,
  /\.tsbuildinfo$/,
  /^\.(?!npmrc)/,
];

function run(command: string, args: readonly string[], cwd: string): string {
  const { status, stdout, stderr } = spawnSync(command, args, {
    cwd,
    encoding: 'utf8',
    // The package is built already; `prepack` would build it again.
    env: { ...process.env, npm_config_ignore_scripts: 'true' },
    maxBuffer: 2 ** 28,
  });
  if (status !== 0) throw new Error(`${command} ${args.join(' ')} ended with ${status}\n${stdout}\n${stderr}`);
  return stdout;
}

/** Packs the package as it is built. @returns the tarball's path */
export function pack(folder: string): string {
  const [packed] = JSON.parse(run('npm', ['pack', '--json', '--pack-destination', folder], '.')) as {
    filename: string;
  }[];
  return join(folder, packed?.filename ?? '');
}

/** Faults of a tarball, one a line; empty when it may be published. */
export function problemsOf(tarball: string): string[] {
  const files = run('tar', ['-tzf', tarball], '.')
    .split('\n')
    .filter((name) => name !== '')
    .map((name) => name.replace(/^package\//, ''));
  const manifest = JSON.parse(run('tar', ['-xzOf', tarball, 'package/package.json'], '.')) as Manifest;
  const promised = [...filesOf(manifest.exports), ...filesOf(manifest.bin)].map((name) => posix.normalize(name));
  const problems = [...new Set([...promised, ...REQUIRED])]
    .filter((name) => name !== 'package.json' && !files.includes(name))
    .map((name) => `missing: ${name}`);
  for (const name of files) if (UNWANTED.some((pattern) => pattern.test(name))) problems.push(`not for users: ${name}`);
  if (manifest.repository !== undefined) {
    const readme = run('tar', ['-xzOf', tarball, 'package/README.md'], '.');
    for (const target of relativeTargets(readme))
      problems.push(`a link of the README that npm cannot follow: ${target}`);
  }
  // A page that imports a file it does not bring is blank.
  const page = run('tar', ['-xzOf', tarball, 'package/dist/playground/index.html'], '.');
  for (const [, name] of page.matchAll(/(?:src|href)="\.\/([^"#?]+)"/g)) {
    if (!files.includes(`dist/playground/${name}`))
      problems.push(`missing: dist/playground/${name}, which the page loads`);
  }
  return problems;
}

if (process.argv[1] !== undefined && import.meta.url === pathToFileURL(process.argv[1]).href) {
  const folder = mkdtempSync(join(tmpdir(), 'sageattention-package-'));
  try {
    const tarball = process.argv[2] === undefined ? pack(folder) : resolve(process.argv[2]);
    const problems = problemsOf(tarball);
    for (const problem of problems) console.error(problem);
    if (problems.length > 0) process.exit(1);
    const { version } = JSON.parse(readFileSync('package.json', 'utf8')) as { version: string };
    console.log(run('npx', ['publint', '--strict', tarball], '.').trim());
    console.log(run('npx', ['attw', tarball, '--profile', 'esm-only', '--no-emoji'], '.').trim());
    console.log(`sageattention ${version}: what package.json promises is there`);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}
