/**
 * Runtimes besides the Node in use: a Node 24, for what an older one lacks (relaxed SIMD that computes rightly), Deno
 * and Bun. Each is the package of its binary for this platform, fetched once into `.tools/`. As a command it prints the
 * path of each one named: `tsx scripts/runtimes.ts node24 deno bun`.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';

export type Runtime = 'node24' | 'deno' | 'bun';

interface Download {
  readonly package: string;
  /** Of the package, as npm takes it. */
  readonly major: number;
  /** Inside the package. */
  readonly executable: string;
}

const { platform, arch } = process;
const windows = platform === 'win32';
const exe = windows ? '.exe' : '';

const DOWNLOADS: Readonly<Record<Runtime, Download>> = {
  node24: { package: `node-${windows ? 'win' : platform}-${arch}`, major: 24, executable: `bin/node${exe}` },
  deno: {
    package: `@deno/${platform}-${arch}${platform === 'linux' ? '-glibc' : ''}`,
    major: 2,
    executable: `deno${exe}`,
  },
  bun: {
    package: `@oven/bun-${windows ? 'windows' : platform}-${arch === 'arm64' ? 'aarch64' : arch}`,
    major: 1,
    executable: `bin/bun${exe}`,
  },
};

const answers = (file: string, major: number): boolean =>
  existsSync(file) && new RegExp(`^\\D*${major}\\.`).test(spawnSync(file, ['--version'], { encoding: 'utf8' }).stdout);

/** @returns the path of the runtime's executable, fetched if it is not there */
export function ensureRuntime(runtime: Runtime): string {
  const { package: name, major, executable } = DOWNLOADS[runtime];
  if (runtime === 'node24' && process.versions.node.startsWith(`${major}.`)) return process.execPath;
  const folder = fileURLToPath(new URL(`../.tools/${runtime}`, import.meta.url));
  const file = join(folder, 'node_modules', name, executable);
  if (answers(file, major)) return file;
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, 'package.json'), '{ "private": true }\n');
  const install = ['install', '--no-save', '--no-package-lock', '--no-audit', '--no-fund', `${name}@${major}`];
  const { npm_execpath: npm } = process.env;
  const { status, stderr } =
    npm?.endsWith('.js') === true
      ? spawnSync(process.execPath, [npm, ...install], { cwd: folder, encoding: 'utf8' })
      : spawnSync('npm', install, { cwd: folder, encoding: 'utf8', shell: windows });
  if (status !== 0 || !answers(file, major)) {
    throw new Error(`npm could not install ${name}@${major} into .tools/${runtime}: ${stderr}`);
  }
  return file;
}

if (process.argv[1] !== undefined && import.meta.url === pathToFileURL(process.argv[1]).href) {
  for (const runtime of process.argv.slice(2)) console.log(ensureRuntime(runtime as Runtime));
}
