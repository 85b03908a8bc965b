/**
 * A Node 24 for what the Node in use may lack (relaxed SIMD that computes rightly): the `node-<platform>-<arch>` package,
 * fetched once into `.tools/`. As a command it prints the path.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';

const MAJOR = 24;
const FOLDER = fileURLToPath(new URL('../.tools/node24', import.meta.url));

function answers(node: string): boolean {
  return existsSync(node) && spawnSync(node, ['--version'], { encoding: 'utf8' }).stdout.startsWith(`v${MAJOR}.`);
}

/** @returns the path of a Node 24: this one if it is, else the one in `.tools/`, fetched if it is not there */
export function ensureNode24(): string {
  if (process.versions.node.startsWith(`${MAJOR}.`)) return process.execPath;
  const platform = process.platform === 'win32' ? 'win' : process.platform;
  const name = `node-${platform}-${process.arch}`;
  const node = join(FOLDER, 'node_modules', name, 'bin', process.platform === 'win32' ? 'node.exe' : 'node');
  if (answers(node)) return node;
  mkdirSync(FOLDER, { recursive: true });
  writeFileSync(join(FOLDER, 'package.json'), '{ "private": true }\n');
  const install = ['install', '--no-save', '--no-package-lock', '--no-audit', '--no-fund', `${name}@${MAJOR}`];
  const { npm_execpath: npm } = process.env;
  const { status, stderr } =
    npm?.endsWith('.js') === true
      ? spawnSync(process.execPath, [npm, ...install], { cwd: FOLDER, encoding: 'utf8' })
      : spawnSync('npm', install, { cwd: FOLDER, encoding: 'utf8', shell: process.platform === 'win32' });
  if (status !== 0 || !answers(node)) {
    throw new Error(`npm could not install ${name}@${MAJOR} into .tools/node24: ${stderr}`);
  }
  return node;
}

if (process.argv[1] !== undefined && import.meta.url === pathToFileURL(process.argv[1]).href) {
  console.log(ensureNode24());
}
