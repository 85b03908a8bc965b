/** Builds the package into dist/: WASM kernels, library, command line, playground. */
import { spawnSync } from 'node:child_process';
import { copyFile, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { build, type Plugin } from 'esbuild';
import { generatorDigest } from './generator-digest.ts';
import { licencesOf } from './licences.ts';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
const inRoot = (...parts: readonly string[]) => path.join(ROOT, ...parts);

function run(file: string, args: readonly string[], stdout: 'inherit' | 'ignore' = 'inherit'): void {
  const { status } = spawnSync(process.execPath, [file, ...args], { cwd: ROOT, stdio: ['ignore', stdout, 'inherit'] });
  if (status !== 0) process.exit(status ?? 1);
}

/**
 * Imports that leave src/cli/ become imports of the built library: the command line runs the code that programs import,
 * and the package carries it once.
 */
const libraryStaysOutside: Plugin = {
  name: 'library-stays-outside',
  setup({ onResolve }) {
    const cli = inRoot('src', 'cli') + path.sep;
    onResolve({ filter: /^\.\.?\// }, ({ path: specifier, resolveDir }) => {
      const file = path.resolve(resolveDir, specifier);
      if (!resolveDir.startsWith(inRoot('src')) || file.startsWith(cli)) return undefined;
      const built = path.relative(cli, file).replaceAll(path.sep, '/').replace(/\.ts$/, '.js');
      return { path: built, external: true };
    });
  },
};

async function bundleCommandLine(): Promise<void> {
  // What tsc made of the command line would need its libraries installed; the bundle does not.
  await rm(inRoot('dist', 'cli'), { recursive: true, force: true });
  const { metafile } = await build({
    absWorkingDir: ROOT,
    entryPoints: ['src/cli/main.ts'],
    outdir: 'dist/cli',
    bundle: true,
    // Commands, and above all charts, are loaded when they are used.
    splitting: true,
    chunkNames: '[name]-[hash]',
    format: 'esm',
    platform: 'node',
    target: 'node20',
    minify: true,
    keepNames: true,
    legalComments: 'none',
    metafile: true,
    logLevel: 'warning',
    plugins: [libraryStaysOutside],
    // linkedom draws on it where it is installed; charts need none.
    external: ['canvas'],
    // CommonJS packages inside call `require` for Node's own modules.
    banner: {
      js: "import { createRequire as createBundleRequire } from 'node:module';\nconst require = createBundleRequire(import.meta.url);",
    },
  });
  await writeFile(inRoot('dist', 'cli', 'THIRD-PARTY-LICENSES.txt'), await licencesOf(Object.keys(metafile.inputs)));
  await copyFile(inRoot('src', 'cli', 'alice-chapter-1.txt'), inRoot('dist', 'cli', 'alice-chapter-1.txt'));
}

/** The protobuf library goes into the one file that uses it: reading ONNX models needs no further package. */
async function bundleProtobuf(): Promise<void> {
  const folder = inRoot('dist', 'integrations', 'onnxruntime', 'onnx');
  const { metafile } = await build({
    absWorkingDir: ROOT,
    entryPoints: [path.join(folder, 'codec.js')],
    outfile: path.join(folder, 'codec.js'),
    allowOverwrite: true,
    bundle: true,
    format: 'esm',
    platform: 'neutral',
    target: 'es2022',
    legalComments: 'none',
    sourcemap: true,
    metafile: true,
    logLevel: 'warning',
    // The package's own number formats stay where they are.
    external: [inRoot('dist', 'tensor', 'formats', '*')],
  });
  for (const extension of ['js', 'js.map']) await rm(path.join(folder, `onnx_pb.${extension}`));
  await writeFile(path.join(folder, 'THIRD-PARTY-LICENSES.txt'), await licencesOf(Object.keys(metafile.inputs)));
}

/**
 * TypeScript wraps an import whose name is a variable into a call of a helper, and bundlers then find neither their
 * comment nor a name: webpack warns, Next.js does not build. The names there are of packages, never relative paths,
 * which the helper is for.
 */
async function unwrapOptionalImport(): Promise<void> {
  const file = inRoot('dist', 'optional-package.js');
  const emitted = await readFile(file, 'utf8');
  const unwrapped = emitted
    .replace(/^var __rewriteRelativeImportExtension = [\s\S]*?^\};\n/m, '')
    .replace(/import\(__rewriteRelativeImportExtension\((.*)\)\)/, 'import($1)');
  if (!/=> import\(\/\* webpackIgnore[^)]*\*\/ name\);/.test(unwrapped)) throw new Error(`${file} is not what it was`);
  await writeFile(file, unwrapped);
}

/** Compiled kernels on disk are found by their configuration only where the code that made them is the same. */
async function writeGeneratorDigest(): Promise<void> {
  const digest = await generatorDigest(inRoot('dist'), '.js');
  const file = inRoot('dist', 'backends', 'cuda', 'generator.js');
  const emitted = await readFile(file, 'utf8');
  const written = emitted.replace(/GENERATOR_DIGEST = undefined/, `GENERATOR_DIGEST = '${digest}'`);
  if (written === emitted) throw new Error(`${file} is not what it was`);
  await writeFile(file, written);
}

await rm(inRoot('dist'), { recursive: true, force: true });
run(inRoot('node_modules', 'tsx', 'dist', 'cli.mjs'), [inRoot('scripts', 'build-wasm.ts')]);
run(inRoot('node_modules', 'typescript-native', 'bin', 'tsc'), ['-p', inRoot('tsconfig.build.json')]);
await unwrapOptionalImport();
await writeGeneratorDigest();
// As a file of its own, for pages whose policy allows no `blob:`. It reads offsets that the build of the kernels makes.
const { WORKER_SOURCE } = await import('../src/backends/wasm/worker-source.ts');
await writeFile(inRoot('dist', 'backends', 'wasm', 'worker.js'), WORKER_SOURCE.trimStart());
// A worker's file exports nothing; without declarations TypeScript would refuse to hear of it.
await writeFile(inRoot('dist', 'backends', 'wasm', 'worker.d.ts'), 'export {};\n');
await bundleCommandLine();
await bundleProtobuf();
run(inRoot('node_modules', 'vite', 'bin', 'vite.js'), [
  'build',
  '-c',
  inRoot('playground', 'vite.config.ts'),
  '--logLevel',
  'warn',
]);

// The bundle works: a small measurement with its charts passes through most of it.
const scratch = await mkdtemp(path.join(tmpdir(), 'sageattention-build-'));
const small = ['--length', '16', '--head-dim', '16', '--heads', '1', '--repetitions', '1', '--backend', 'wasm'];
run(inRoot('dist', 'cli', 'main.js'), ['bench', ...small, '--html', path.join(scratch, 'bench.html')], 'ignore');
await rm(scratch, { recursive: true });
