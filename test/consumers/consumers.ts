/**
 * The kinds of project that a user may have, each from nothing: files, packages, commands, and how the result is run. They are what
 * `npm run test:consumers` goes through with the packed tarball.
 */

export interface Consumer {
  readonly name: string;
  /** Beside the tarball. */
  readonly packages?: readonly string[];
  readonly files: Readonly<Record<string, string>>;
  /** In turn; a warning in what they print fails. */
  readonly commands?: readonly (readonly string[])[];
  /** A program that prints `DONE`, or a folder whose page sets its title to it. */
  readonly run:
    | { readonly command: readonly string[] }
    | {
        readonly page: string;
        /** Content-Security-Policy of every answer. */
        readonly policy?: string;
      }
    /** A server, started by this command with its port as the last argument, each of whose pages says `DONE`. */
    | { readonly server: readonly string[]; readonly pages: readonly string[] };
  /** Runtimes of scripts/runtimes.ts that commands name. */
  readonly runtimes?: readonly ('deno' | 'bun')[];
}

/** What a result says when it is right. */
export const DONE = 'sageattention: 1x2x16x32 float32 finite';

/** A call as the README has it, on the default backend; its answer is `DONE`. */
const CALL = `
export async function attend() {
  const shape = [1, 2, 16, 32];
  const random = () => tensor(Float32Array.from({ length: 2 * 16 * 32 }, Math.random), shape);
  const output = await sageattn(random(), random(), random(), { isCausal: true });
  const finite = output.data.every(Number.isFinite) ? 'finite' : 'not finite';
  return \`sageattention: \${output.shape.join('x')} \${output.dtype} \${finite}\`;
}
`;
const MODULE = `import { sageattn, tensor } from 'sageattention';\n${CALL}`;
const COMMONJS = `const { sageattn, tensor } = require('sageattention');\n${CALL.replace('export async', 'async')}`;
const PRINT = `${MODULE}\nconsole.log(await attend());\n`;
/** Engines come with it, as in a real page: their plug-ins must build too. */
const PAGE = `${MODULE}
import { withSageAttention } from 'sageattention/onnxruntime';
attend().then((text) => {
  if (typeof withSageAttention !== 'function') throw new Error('no withSageAttention');
  document.title = text;
}, (error) => {
  document.title = String(error?.stack ?? error);
});
`;
const html = (script: string, type = 'module') =>
  `<!doctype html><html lang="en"><head><meta charset="utf-8"><title>waiting</title></head><body><script type="${type}" src="${script}"></script></body></html>\n`;

/** No inline code, no eval, no blob: what a careful site sends. WebAssembly alone is allowed. */
export const STRICT_POLICY =
  "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; img-src 'self'; style-src 'self'";

const typescript = (moduleResolution: 'bundler' | 'node16' | 'nodenext'): Consumer => ({
  name: `typescript-${moduleResolution}`,
  packages: ['typescript@5.9', '@types/node@20'],
  files: {
    'package.json': '{ "type": "module", "private": true }\n',
    'tsconfig.json': `${JSON.stringify({
      compilerOptions: {
        strict: true,
        skipLibCheck: false,
        target: 'es2022',
        lib: ['es2022', 'esnext.disposable', 'dom'],
        module: moduleResolution === 'bundler' ? 'esnext' : moduleResolution,
        moduleResolution,
        types: ['node'],
        outDir: 'out',
      },
      files: ['main.ts'],
    })}\n`,
    'main.ts': `import { sageattn, tensor, type Tensor } from 'sageattention';
import 'sageattention/reference';
import type { SageAttentionOptions } from 'sageattention/onnxruntime';
import 'sageattention/wasm';
const operand = (): Tensor => tensor(new Float32Array(2 * 16 * 32).map(Math.random), [1, 2, 16, 32]);
const options: SageAttentionOptions = {};
const output: Tensor = await sageattn(operand(), operand(), operand(), { isCausal: true });
const values = Array.from(output.data as Float32Array);
if (Object.keys(options).length > 0) throw new Error('options');
console.log(\`sageattention: \${output.shape.join('x')} \${output.dtype} \${values.every(Number.isFinite) ? 'finite' : ''}\`);
`,
  },
  commands: [['npx', 'tsc']],
  run: { command: ['node', 'out/main.js'] },
});

const next = (bundler: 'turbopack' | 'webpack'): Consumer => ({
  name: `next-${bundler}`,
  packages: ['next@16', 'react@19', 'react-dom@19'],
  files: {
    'package.json': '{ "private": true }\n',
    // Reports of use go to a host that a test must not ask.
    '.env': 'NEXT_TELEMETRY_DISABLED=1\n',
    'next.config.mjs': 'export default { poweredByHeader: false };\n',
    'app/layout.jsx':
      'export const metadata = { title: "waiting" };\nexport default function Layout({ children }) {\n  return <html lang="en"><body>{children}</body></html>;\n}\n',
    'app/page.jsx': `'use client';
import { useEffect } from 'react';
import { attend } from '../attend.js';
export default function Page() {
  useEffect(() => {
    attend().then((text) => { document.title = text; }, (error) => { document.title = String(error?.stack ?? error); });
  }, []);
  return <p>client</p>;
}
`,
    'app/server/page.jsx': `import { attend } from '../../attend.js';
export const dynamic = 'force-dynamic';
export default async function Page() {
  return <p>{await attend()}</p>;
}
`,
    'attend.js': MODULE,
  },
  commands: [['npx', 'next', 'build', `--${bundler}`]],
  run: { server: ['npx', 'next', 'start', '-p'], pages: ['/', '/server'] },
});

export const CONSUMERS: readonly Consumer[] = [
  {
    name: 'node-esm',
    files: { 'package.json': '{ "type": "module", "private": true }\n', 'main.js': PRINT },
    run: { command: ['node', 'main.js'] },
  },
  {
    name: 'node-require',
    files: { 'main.cjs': `${COMMONJS}\nattend().then(console.log);\n` },
    run: { command: ['node', 'main.cjs'] },
  },
  {
    name: 'deno',
    runtimes: ['deno'],
    files: { 'package.json': '{ "type": "module", "private": true }\n', 'main.js': PRINT },
    run: { command: ['deno', 'run', '--allow-read', '--allow-env', '--allow-sys', '--allow-ffi', 'main.js'] },
  },
  {
    name: 'bun',
    runtimes: ['bun'],
    files: { 'package.json': '{ "type": "module", "private": true }\n', 'main.js': PRINT },
    run: { command: ['bun', 'main.js'] },
  },
  typescript('bundler'),
  typescript('node16'),
  typescript('nodenext'),
  {
    name: 'vite',
    packages: ['vite@8'],
    files: {
      'package.json': '{ "type": "module", "private": true }\n',
      'index.html': html('/main.js'),
      'main.js': PAGE,
    },
    commands: [['npx', 'vite', 'build', '--logLevel', 'warn']],
    run: { page: 'dist' },
  },
  {
    name: 'vite-strict-policy',
    packages: ['vite@8'],
    files: {
      'package.json': '{ "type": "module", "private": true }\n',
      'index.html': html('/main.js'),
      'main.js': PAGE,
    },
    commands: [['npx', 'vite', 'build', '--logLevel', 'warn']],
    run: { page: 'dist', policy: STRICT_POLICY },
  },
  {
    name: 'webpack',
    packages: ['webpack@5', 'webpack-cli@6'],
    files: {
      'package.json': '{ "private": true }\n',
      'src/index.js': PAGE,
      'dist/index.html': html('main.js'),
      'webpack.config.cjs': "module.exports = { mode: 'production', performance: { hints: false } };\n",
    },
    commands: [['npx', 'webpack']],
    run: { page: 'dist' },
  },
  {
    name: 'rollup',
    packages: ['rollup@4', '@rollup/plugin-node-resolve@16'],
    files: {
      'package.json': '{ "type": "module", "private": true }\n',
      'main.js': PAGE,
      'dist/index.html': html('main.js'),
      'rollup.config.js':
        "import resolve from '@rollup/plugin-node-resolve';\nexport default { input: 'main.js', output: { dir: 'dist' }, plugins: [resolve({ browser: true })] };\n",
    },
    commands: [['npx', 'rollup', '-c', '--failAfterWarnings']],
    run: { page: 'dist' },
  },
  {
    name: 'esbuild',
    packages: ['esbuild@0.28'],
    files: { 'main.js': PAGE, 'dist/index.html': html('main.js') },
    commands: [
      ['npx', 'esbuild', 'main.js', '--bundle', '--format=esm', '--splitting', '--outdir=dist', '--log-level=warning'],
    ],
    run: { page: 'dist' },
  },
  {
    name: 'parcel',
    packages: ['parcel@2'],
    files: {
      // Parcel reads `exports` of packages, and so their subpaths, only where it is told to.
      'package.json': '{ "private": true, "@parcel/resolver-default": { "packageExports": true } }\n',
      'src/index.html': html('./main.js'),
      'src/main.js': PAGE,
    },
    commands: [['npx', 'parcel', 'build', 'src/index.html', '--dist-dir', 'dist', '--no-cache', '--log-level', 'warn']],
    run: { page: 'dist' },
  },
  next('turbopack'),
  next('webpack'),
];
