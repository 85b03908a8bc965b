/**
 * `npx tsx scripts/onnxruntime-releases.ts [VERSION...]`: what each supported release of onnxruntime-web does with a model
 * whose attention is replaced, on WASM and on WebGPU (a software driver) in Node. Without versions the last one of each minor, as npm lists them.
 * Ends with 1 where a release fails, leaves or cuts what should have a marker, or gives wrong numbers. Takes the npm registry, and about 15 s for a release.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import { locateSoftwareGpu, REMEDY, softwareGpuEnvironment } from './software-gpu.ts';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
const PACKAGE = 'onnxruntime-web';
/**
 * What docs/integrations.md promises. The peer range of the package is `*`: transformers.js asks for builds between releases (`1.31.0-dev...`), which
 * no range of npm but that one contains.
 */
const SUPPORTED = '>=1.25.0';

/** The last release of each minor version in the range, oldest first. */
function releases(): string[] {
  const listed = execFileSync('npm', ['view', `${PACKAGE}@${SUPPORTED}`, 'version', '--json'], { encoding: 'utf8' });
  const versions = ([JSON.parse(listed)] as (string | string[])[])
    .flat(2)
    .filter((version) => /^[\d.]+$/.test(version));
  const byMinor = new Map(versions.map((version) => [version.split('.').slice(0, 2).join('.'), version]));
  return [...byMinor.values()];
}

const manifest = locateSoftwareGpu('lavapipe');
if (manifest === undefined) throw new Error(REMEDY.lavapipe);
const folder = mkdtempSync(path.join(tmpdir(), 'onnxruntime-releases-'));
const { outputFiles } = await build({
  absWorkingDir: ROOT,
  entryPoints: ['test/consumers/onnxruntime-release.ts'],
  bundle: true,
  write: false,
  format: 'esm',
  platform: 'node',
  target: 'node20',
  external: ['koffi', 'webgpu', 'onnxruntime-*', 'assemblyscript'],
  logLevel: 'error',
});
let failures = 0;
try {
  for (const version of process.argv.length > 2 ? process.argv.slice(2) : releases()) {
    const place = path.join(folder, version);
    mkdirSync(place);
    writeFileSync(path.join(place, 'package.json'), '{ "private": true, "type": "module" }');
    writeFileSync(path.join(place, 'program.js'), outputFiles[0]?.contents ?? '');
    const quiet = ['--no-audit', '--no-fund', '--loglevel=error', '--ignore-scripts'];
    execFileSync('npm', ['install', ...quiet, `${PACKAGE}@${version}`], { cwd: place, stdio: 'inherit' });
    symlinkSync(path.join(ROOT, 'node_modules/webgpu'), path.join(place, 'node_modules/webgpu'));
    const { stdout, stderr, status } = spawnSync(process.execPath, ['program.js'], {
      cwd: place,
      env: { ...process.env, ...softwareGpuEnvironment(manifest) },
      encoding: 'utf8',
      timeout: 180_000,
    });
    const line = stdout.split('\n').find((text) => text.startsWith('RESULT '));
    const result = line?.slice(7) ?? `ended with ${status}: ${stderr.trim().split('\n').at(-1)?.slice(0, 200)}`;
    if (line === undefined || !/"wasm":"2 x cut","webgpu":"2 x marker"/.test(result)) failures++;
    console.log(`${version} ${result}`);
    rmSync(place, { recursive: true, force: true });
  }
} finally {
  rmSync(folder, { recursive: true, force: true });
}
process.exitCode = failures > 0 ? 1 : 0;
