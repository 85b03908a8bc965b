/**
 * Bundles the programs that are run on a GPU machine into `.gpu/programs/`: one file each that needs Node and
 * koffi (CUDA) or webgpu and, as a peer, onnxruntime-web (WebGPU) and nothing else, so that the machine needs no npm.
 */
import { execFileSync } from 'node:child_process';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { build, type Plugin } from 'esbuild';
import { generatorDigest } from './generator-digest.ts';
import { ensureWasmKernels } from './wasm-kernels.ts';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
/** For the results: where the programs run there is no git. */
const commit = execFileSync('git', ['describe', '--always', '--dirty'], { cwd: ROOT, encoding: 'utf8' }).trim();

/** As in the built package: a kernel that lies compiled on disk is found without being generated. */
const knowsItsGenerator: Plugin = {
  name: 'knows-its-generator',
  async setup({ onLoad }) {
    const digest = await generatorDigest(path.join(ROOT, 'src'), '.ts');
    onLoad({ filter: /backends.cuda.generator\.ts$/ }, () => ({
      contents: `export const GENERATOR_DIGEST = '${digest}';`,
    }));
  },
};

ensureWasmKernels();
await build({
  absWorkingDir: ROOT,
  entryPoints: {
    'test-cuda': 'test/cuda/main.ts',
    'bench-cuda': 'bench/cuda/kernels.ts',
    'bench-cuda-backward': 'bench/cuda/backward.ts',
    'bench-cuda-caches': 'bench/cuda/caches.ts',
    'bench-cuda-distributed': 'bench/cuda/distributed.ts',
    'bench-cuda-nccl': 'bench/cuda/nccl.ts',
    'bench-cuda-first-call': 'bench/cuda/first-call.ts',
    'bench-cuda-host': 'bench/cuda/host.ts',
    'bench-cuda-short': 'bench/cuda/short.ts',
    'bench-cuda-sparse': 'bench/cuda/sparse.ts',
    'bench-cuda-models': 'bench/cuda/models.ts',
    'bench-wgmma': 'bench/cuda/wgmma-variants.ts',
    'test-processes': 'test/cuda/processes.ts',
    'test-webgpu': 'test/webgpu/main.ts',
    'bench-webgpu': 'bench/webgpu/families.ts',
    'bench-webgpu-decoding': 'bench/webgpu/decoding.ts',
    'bench-webgpu-launches': 'bench/webgpu/launches.ts',
    'bench-webgpu-tune': 'bench/webgpu/tune.ts',
    'bench-webgpu-exact': 'bench/webgpu/exact.ts',
    'bench-webgpu-sparse': 'bench/webgpu/sparse.ts',
    'bench-webgpu-backward': 'bench/webgpu/backward.ts',
    'bench-webgpu-gradients': 'bench/webgpu/gradients.ts',
    'bench-onnxruntime': 'bench/onnxruntime/whole-model.ts',
    'test-wasm': 'test/wasm/main.ts',
    'bench-wasm': 'bench/wasm/short.ts',
    'bench-wasm-attention': 'bench/wasm/attention.ts',
    'bench-wasm-scaling': 'bench/wasm/scaling.ts',
    'bench-wasm-sparse': 'bench/wasm/sparse.ts',
  },
  outdir: path.join('.gpu', 'programs'),
  outExtension: { '.js': '.mjs' },
  bundle: true,
  plugins: [knowsItsGenerator],
  format: 'esm',
  platform: 'node',
  target: 'node20',
  // Loaded at run time where they are installed.
  external: ['koffi', 'webgpu', 'onnxruntime-*', 'assemblyscript'],
  // What the programs read by its place beside a source file is test/golden, which travels with the work tree.
  define: { 'import.meta.url': 'GOLDEN_URL', 'process.env.SAGEATTENTION_COMMIT': JSON.stringify(commit) },
  banner: {
    js: [
      "const GOLDEN_URL = new URL('../../test/golden/golden.js', import.meta.url).href;",
      // tfjs asks Node for its own modules with `require`, which a module does not have.
      "globalThis.require ??= (await import('node:module')).createRequire(import.meta.url);",
    ].join('\n'),
  },
  logLevel: 'warning',
});
