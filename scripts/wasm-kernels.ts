/**
 * The WASM kernels are built from AssemblyScript and not kept in git. What imports them, the tests and the type
 * checker, first asks here: they are built when missing or older than their sources. As a command: `tsx
 * scripts/wasm-kernels.ts`.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
const WASM = join(ROOT, 'src', 'backends', 'wasm');

/** When the youngest file in a folder or at a path was written; -Infinity where there is none. */
export function youngest(path: string, counts: (name: string) => boolean = () => true): number {
  if (!existsSync(path)) return Number.NEGATIVE_INFINITY;
  const entry = statSync(path);
  if (!entry.isDirectory()) return entry.mtimeMs;
  const inside = readdirSync(path, { recursive: true, encoding: 'utf8' }).filter(counts);
  return Math.max(Number.NEGATIVE_INFINITY, ...inside.map((name) => statSync(join(path, name)).mtimeMs));
}

export function ensureWasmKernels(): void {
  const sources = Math.max(
    ...[join(WASM, 'assembly'), join(WASM, 'fields.ts'), join(ROOT, 'scripts', 'build-wasm.ts')].map((at) =>
      youngest(at),
    ),
  );
  const built = ['simd128.ts', 'relaxed.ts', 'fields.ts'].map((name) => youngest(join(WASM, 'generated', name)));
  if (built.every((time) => time >= sources)) return;
  const tsx = join(ROOT, 'node_modules', 'tsx', 'dist', 'cli.mjs');
  const { status } = spawnSync(process.execPath, [tsx, join(ROOT, 'scripts', 'build-wasm.ts')], {
    cwd: ROOT,
    stdio: ['ignore', 'inherit', 'inherit'],
  });
  if (status !== 0) throw new Error('the WASM kernels could not be built: npm run build:wasm says why');
}

if (process.argv[1] !== undefined && import.meta.url === pathToFileURL(process.argv[1]).href) ensureWasmKernels();
