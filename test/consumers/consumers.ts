/**
 * The kinds of project that a user may have, each from nothing: files, packages, commands, and how the result is run. They are what
 * `npm run test:consumers` goes through with the packed tarball.
 */

import { readFileSync } from 'node:fs';

export interface Consumer {
  readonly name: string;
  /** The answer that is right, in the page's first `output` or its title. Default: `DONE`. */
  readonly says?: string;
  /** Beside the tarball. */
  readonly packages?: readonly string[];
  readonly files: Readonly<Record<string, string>>;
  /** In turn; a warning in what they print fails. */
  readonly commands?: readonly (readonly string[])[];
  /** A program that prints the right answer, or a folder whose page shows it. */
  readonly run:
    | { readonly command: readonly string[] }
    | {
        /**
         * It is opened in Chromium, Firefox and WebKit: as it is, isolated from other origins (so that threads share memory), and
         * under {@link STRICT_POLICY}.
         */
        readonly page: string;
        /** Nothing of it needs what the policy forbids, so nothing may be reported. Default: a `blob:` worker is tried. */
        readonly withinPolicy?: boolean;
        /** A script inside the page; the policy allows it by its hash. */
        readonly inlineScript?: string;
      }
    /** A folder of an extension whose background sets `globalThis.result`. */
    | { readonly extension: string }
    /** A server, started by this command with its port as the last argument, each of whose pages has the right answer. */
    | { readonly server: readonly string[]; readonly pages: readonly string[] };
  /** Runtimes of scripts/runtimes.ts that commands name. */
  readonly runtimes?: readonly ('deno' | 'bun')[];
}

/** What a result says when it is right. */
export const DONE = 'sageattention: 1x2x16x32 float32 finite';

/** What the guides' projects show. */
const GUIDE_DONE = '[1,8,256,64]';

/** The files that a guide shows: blocks whose first line is a comment with their path. */
function filesOf(guide: string): Record<string, string> {
  const text = readFileSync(new URL(`../../docs/${guide}.md`, import.meta.url), 'utf8');
  const blocks = text.matchAll(/^```\w+\n(?:\/\/|<!--) ([\w./-]+\.\w+)(?: -->)?\n([\s\S]*?)^```$/gm);
  return Object.fromEntries([...blocks].map(([, path = '', code = '']) => [path, code]));
}

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
/** For workers that may not use `import()`. */
const EMBEDDED = `import { setBackend } from 'sageattention';
import { createWasmBackend } from 'sageattention/wasm/embedded';
${MODULE.replace('export async function attend() {', 'export async function attend() {\n  await setBackend(createWasmBackend());')}`;
/** A worker that answers each message. */
const ANSWER = `
addEventListener('message', ({ data, source }) => {
  attend().catch(String).then((text) => source.postMessage({ id: data, text }));
});
`;
/** The worker with everything in it computes; the other one reports what failed, and that is not CUDA. */
const SERVICE_WORKER_PAGE = `
const answerOf = async (file) => {
  const registration = await navigator.serviceWorker.register(file, { type: 'module', scope: \`./\${file}/\` });
  const answer = new Promise((resolve) => {
    navigator.serviceWorker.addEventListener('message', ({ data }) => {
      if (data.id === file) resolve(data.text);
    });
  });
  navigator.serviceWorker.startMessages();
  (registration.installing ?? registration.waiting ?? registration.active).postMessage(file);
  const text = await answer;
  await registration.unregister();
  return text;
};
(async () => {
  const lazy = await answerOf('lazy.js');
  if (!/'wasm'.*service worker.*embedded/.test(lazy) || /cuda/i.test(lazy)) throw new Error(\`of lazy.js: \${lazy}\`);
  return answerOf('embedded.js');
})().then((text) => { document.title = text; }, (error) => { document.title = String(error?.stack ?? error); });
`;
const html = (script: string, type = 'module') =>
  `<!doctype html><html lang="en"><head><meta charset="utf-8"><title>waiting</title></head><body><script type="${type}" src="${script}"></script></body></html>\n`;

/** Without a bundler: the page says where the modules are. */
const IMPORT_MAP = JSON.stringify({
  imports: {
    sageattention: './node_modules/sageattention/dist/index.js',
    'sageattention/onnxruntime': './node_modules/sageattention/dist/integrations/onnxruntime/index.js',
  },
});
/** A worker of the user's own, which must answer once. */
const WORKER_PAGE = `
const worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
const answers = [];
worker.onerror = ({ message }) => { document.title = message; };
worker.onmessage = ({ data }) => {
  answers.push(data);
  setTimeout(() => { document.title = answers.length === 1 ? data : \`\${answers.length} answers to one message\`; }, 500);
};
worker.postMessage('go');
`;
/** The setting of docs/deploying.md that keeps a worker's entry from being imported. */
const WORKER_SETTING = `export default {
  worker: {
    format: 'es',
    plugins: () => [{ name: 'entries-stay-apart', options: (options) => ({ ...options, preserveEntrySignatures: 'strict' }) }],
  },
};
`;

/** No inline code, no eval, no blob: what a careful site sends. WebAssembly alone is allowed. */
export const STRICT_POLICY =
  "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; img-src 'self'; style-src 'self'";

/** The compiler with a JavaScript API, and the native one. */
const TYPESCRIPTS = ['typescript@5.9', 'typescript-native@npm:typescript@7'];

const typescript = (moduleResolution: 'bundler' | 'node16' | 'nodenext'): Consumer => ({
  name: `typescript-${moduleResolution}`,
  packages: [...TYPESCRIPTS, '@types/node@20'],
  files: {
    'package.json': '{ "type": "module", "private": true }\n',
    'tsconfig.json': `${JSON.stringify({
      compilerOptions: {
        strict: true,
        skipLibCheck: false,
        target: 'es2022',
        // With the types of Node alone, and with those of a browser.
        lib: moduleResolution === 'bundler' ? ['es2022', 'dom'] : ['es2022'],
        module: moduleResolution === 'bundler' ? 'esnext' : moduleResolution,
        moduleResolution,
        types: moduleResolution === 'bundler' ? [] : ['node'],
        rootDir: '.',
        outDir: 'out',
      },
      files: ['main.ts'],
    })}\n`,
    'main.ts': `import { sageattn, tensor, type Tensor } from 'sageattention';
import 'sageattention/reference';
import type { SageAttentionOptions } from 'sageattention/onnxruntime';
import type { attentionReportOf } from 'sageattention/transformers';
import 'sageattention/wasm';
import 'sageattention/wasm/embedded';
import 'sageattention/cuda';
const operand = (): Tensor<'float32'> => tensor(new Float32Array(2 * 16 * 32).map(Math.random), [1, 2, 16, 32]);
const options: SageAttentionOptions = {};
const reports: ReturnType<typeof attentionReportOf> = [];
const output = await sageattn(operand(), operand(), operand(), { isCausal: true });
const values: Float32Array = output.data;
if (Object.keys(options).length > 0 || reports.length > 0) throw new Error('options');
console.log(\`sageattention: \${output.shape.join('x')} \${output.dtype} \${values.every(Number.isFinite) ? 'finite' : ''}\`);
`,
  },
  commands: ['typescript-native', 'typescript'].map((compiler) => ['node', `node_modules/${compiler}/bin/tsc`]),
  run: { command: ['node', 'out/main.js'] },
});

const next = (bundler: 'turbopack' | 'webpack'): Consumer => ({
  name: `next-${bundler}`,
  packages: ['next@16', 'react@19', 'react-dom@19'],
  says: GUIDE_DONE,
  files: {
    ...filesOf('nextjs'),
    'package.json': '{ "private": true }\n',
    // Reports of use go to a host that a test must not ask.
    '.env': 'NEXT_TELEMETRY_DISABLED=1\n',
    // Stricter than the guide's: no `blob:`. Next.js writes scripts into the page itself.
    'next.config.mjs': `export default {
  poweredByHeader: false,
  headers: async () => [
    {
      source: '/:path*',
      headers: [{ key: 'Content-Security-Policy', value: ${JSON.stringify(STRICT_POLICY.replace("script-src 'self'", "script-src 'self' 'unsafe-inline'"))} }],
    },
  ],
};
`,
  },
  commands: [['npx', 'next', 'build', `--${bundler}`]],
  run: { server: ['npx', 'next', 'start', '-p'], pages: ['/', '/api/attention'] },
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
    run: { command: ['deno', 'run', '--no-prompt', 'main.js'] },
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
    name: 'vite-worker-file',
    packages: ['vite@8'],
    files: {
      'package.json': '{ "type": "module", "private": true }\n',
      'index.html': html('/main.js'),
      'main.js': `import { listBackends, setBackend } from 'sageattention';
import { createWasmBackend } from 'sageattention/wasm';
import workerUrl from 'sageattention/wasm/worker?url&no-inline';
${PAGE.replace(
  'attend().then(',
  `setBackend(createWasmBackend({ workerUrl }))
  .then(attend)
  .then(async (text) => {
    const [wasm] = await listBackends(['wasm']);
    const { threads } = wasm.availability.details;
    return /worker/.test(threads) && !/forbid/.test(threads) ? text : threads;
  })
  .then(`,
)}`,
    },
    commands: [['npx', 'vite', 'build', '--logLevel', 'warn']],
    run: { page: 'dist', withinPolicy: true },
  },
  {
    name: 'vite-own-worker',
    packages: ['vite@8'],
    files: {
      'package.json': '{ "type": "module", "private": true }\n',
      'index.html': html('/main.js'),
      'main.js': WORKER_PAGE,
      'worker.js': `${MODULE}
addEventListener('message', () => { attend().catch(String).then((text) => postMessage(text)); });
`,
      'vite.config.js': WORKER_SETTING,
    },
    commands: [['npx', 'vite', 'build', '--logLevel', 'warn']],
    run: { page: 'dist' },
  },
  {
    name: 'web-worker',
    packages: ['vite@8'],
    says: GUIDE_DONE,
    files: { ...filesOf('web-worker'), 'package.json': '{ "type": "module", "private": true }\n' },
    commands: [['npx', 'vite', 'build', '--logLevel', 'warn']],
    run: { page: 'dist' },
  },
  {
    name: 'react',
    packages: ['vite@8', '@vitejs/plugin-react', 'react@19', 'react-dom@19'],
    says: GUIDE_DONE,
    files: { ...filesOf('react'), 'package.json': '{ "type": "module", "private": true }\n' },
    commands: [['npx', 'vite', 'build', '--logLevel', 'warn']],
    run: { page: 'dist' },
  },
  {
    name: 'import-map',
    files: {
      'main.js': PAGE,
      'index.html': html('./main.js').replace('<title>', `<script type="importmap">${IMPORT_MAP}</script><title>`),
    },
    run: { page: '.', inlineScript: IMPORT_MAP },
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
      // Parcel reads `exports` of packages, and so their subpaths, only where it is told to; and where every browser has import maps
      // it writes one into the page, which the policy forbids.
      'package.json': `${JSON.stringify({
        private: true,
        '@parcel/resolver-default': { packageExports: true },
        browserslist: 'defaults, safari 16.3',
      })}\n`,
      'src/index.html': html('./main.js'),
      'src/main.js': PAGE,
    },
    commands: [['npx', 'parcel', 'build', 'src/index.html', '--dist-dir', 'dist', '--no-cache', '--log-level', 'warn']],
    run: { page: 'dist' },
  },
  {
    name: 'service-worker',
    packages: ['esbuild@0.28'],
    files: {
      'page.js': SERVICE_WORKER_PAGE,
      'embedded.js': `${EMBEDDED}${ANSWER}`,
      'lazy.js': `${MODULE}${ANSWER}`,
      'dist/index.html': html('page.js'),
    },
    commands: [
      [
        ...['npx', 'esbuild', 'page.js', 'embedded.js', 'lazy.js', '--bundle', '--format=esm', '--splitting'],
        ...['--outdir=dist', '--log-level=warning'],
      ],
    ],
    run: { page: 'dist', withinPolicy: true },
  },
  {
    name: 'extension',
    packages: ['esbuild@0.28'],
    files: {
      'background.js': `${EMBEDDED}\nattend().catch(String).then((text) => { globalThis.result = text; });\n`,
      'dist/manifest.json': `${JSON.stringify({
        manifest_version: 3,
        name: 'sageattention',
        version: '1.0',
        background: { service_worker: 'background.js', type: 'module' },
        content_security_policy: { extension_pages: "script-src 'self' 'wasm-unsafe-eval'; object-src 'self'" },
      })}\n`,
    },
    commands: [
      [
        ...['npx', 'esbuild', 'background.js', '--bundle', '--format=esm', '--splitting'],
        ...['--outdir=dist', '--log-level=warning'],
      ],
    ],
    run: { extension: 'dist' },
  },
  next('turbopack'),
  next('webpack'),
];
