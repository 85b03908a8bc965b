/**
 * Bundles the programs that are run on a GPU machine into `.gpu/programs/`: one file each that needs Node and koffi (CUDA) or webgpu (WebGPU) and nothing
 * else, so that the machine needs no npm. What they read lies beside them.
 */
import { copyFile, mkdir, readdir } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
const OUTPUT = path.join(ROOT, '.gpu', 'programs');
const GOLDEN = path.join(ROOT, 'test', 'golden');

await build({
  absWorkingDir: ROOT,
  entryPoints: {
    'test-cuda': 'test/cuda/main.ts',
    'bench-cuda': 'bench/cuda/h200.ts',
    'test-webgpu': 'test/webgpu/main.ts',
    'bench-webgpu': 'bench/webgpu/h200.ts',
  },
  outdir: OUTPUT,
  outExtension: { '.js': '.mjs' },
  bundle: true,
  format: 'esm',
  platform: 'node',
  target: 'node20',
  // Loaded at run time where they are installed.
  packages: 'bundle',
  external: ['koffi', 'webgpu', 'onnxruntime-*', 'assemblyscript'],
  logLevel: 'warning',
});
await mkdir(OUTPUT, { recursive: true });
const files = (await readdir(GOLDEN)).filter((name) => name.endsWith('.safetensors'));
for (const name of files) await copyFile(path.join(GOLDEN, name), path.join(OUTPUT, name));
