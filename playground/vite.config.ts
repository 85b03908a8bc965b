import { readFileSync } from 'node:fs';
import { cp, mkdir, readdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { defineConfig, type Plugin } from 'vite';
import { licencesOf } from '../scripts/licences.ts';
import { findAssetFolder, PLAYGROUND_ASSETS } from '../src/cli/playground-assets.ts';
import { ISOLATION_HEADERS, serveFile } from '../src/cli/playground-server.ts';

/** Weights and peers: copied beside the built page, served from their packages in development. */
function assets(): Plugin {
  let outDir = '';
  return {
    name: 'playground-assets',
    configResolved(config) {
      outDir = path.resolve(config.root, config.build.outDir);
    },
    configureServer({ middlewares }) {
      for (const asset of PLAYGROUND_ASSETS) {
        const folder = findAssetFolder(asset);
        if (folder === undefined) continue;
        middlewares.use(`/${asset.folder}`, (request, response, next) =>
          serveFile(request, response, folder, request.url ?? '/', next),
        );
      }
    },
    async writeBundle() {
      for (const asset of PLAYGROUND_ASSETS) {
        const from = findAssetFolder(asset);
        if (from === undefined) throw new Error(`${asset.package} is not installed: ${asset.purpose}`);
        const to = path.join(outDir, asset.folder);
        await mkdir(to, { recursive: true });
        const names = (await readdir(from)).filter((name) => asset.files.test(name));
        await Promise.all(names.map((name) => cp(path.join(from, name), path.join(to, name))));
      }
    },
  };
}

/**
 * What needs to know where the page will lie. Programs that draw a link's picture want its whole address, which `PLAYGROUND_URL` gives;
 * `PLAYGROUND_DOCS` is that of the documentation.
 */
function addresses(): Plugin {
  const { PLAYGROUND_URL: page, PLAYGROUND_DOCS: docs } = process.env;
  return {
    name: 'playground-addresses',
    transformIndexHtml(html) {
      const whole =
        page === undefined
          ? html
          : html
              .replace('content="./share.png"', `content="${new URL('share.png', page).href}"`)
              .replace(
                '<meta property="og:type"',
                `<meta property="og:url" content="${page}">\n    <meta property="og:type"`,
              );
      return docs === undefined ? whole : whole.replace(/(id="docs-link" href=")[^"]*/, `$1${docs}`);
    },
  };
}

/** Rows of the README's table of gains that the page shows, by their first cell: the best of each backend. */
const MEASURED = ['CUDA, one H200', 'WebGPU, the same card, its matrix units', 'WebAssembly, two CPU cores, Node 24'];
const PLACES = ['NVIDIA, in Node', 'WebGPU, on one H200', 'WebAssembly, two CPU cores'];

/** What was measured elsewhere, from the README's table, which is made from the raw results. */
function measured(): Plugin {
  return {
    name: 'playground-measured',
    transformIndexHtml(html) {
      const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8');
      const items = MEASURED.map((where, i) => {
        const cells = readme
          .split('\n')
          .find((line) => line.startsWith(`| ${where} |`))
          ?.split('|')
          .map((cell) => cell.trim());
        if (cells === undefined) throw new Error(`README.md has no row '${where}'`);
        const [, , tokens = '', peer = '', ratio = ''] = cells;
        const [length = '', dim] = tokens.split(', D=');
        return `<div><dt>${PLACES[i]}</dt><dd>${Number.parseFloat(ratio)}×</dd><dd class="note">${peer}, at ${Number(length).toLocaleString('en')} tokens of ${dim} channels</dd></div>`;
      });
      return html.replace(
        '<!-- measured -->',
        `<dl class="measured" aria-label="Speed that was measured elsewhere">${items.join('')}</dl>`,
      );
    },
  };
}

/** Files of the page's chunks and of its workers', which are bundled apart. */
const bundled = new Set<string>();

function collectBundled(): Plugin {
  return {
    name: 'collect-bundled',
    generateBundle(_, bundle) {
      for (const chunk of Object.values(bundle)) {
        if (chunk.type === 'chunk') for (const id of chunk.moduleIds) bundled.add(id.replace(/^\0|\?.*$/g, ''));
      }
    },
  };
}

/**
 * WebKit evaluates a worker's entry again when a chunk that it loads imports it, and Vite puts code that an entry shares with
 * its chunks into the entry: every message would be answered twice. Shared code goes into chunks instead, and a check makes sure of it.
 */
function entriesStayApart(): Plugin {
  return {
    name: 'entries-stay-apart',
    // Vite's own configuration cannot say so of workers.
    options: (options) => ({ ...options, preserveEntrySignatures: 'strict' }),
    generateBundle(_, bundle) {
      const chunks = Object.values(bundle).filter((output) => output.type === 'chunk');
      const entries = new Set(chunks.filter(({ isEntry }) => isEntry).map(({ fileName }) => fileName));
      for (const { fileName, imports, dynamicImports } of chunks) {
        const entry = [...imports, ...dynamicImports].find((name) => entries.has(name));
        if (entry !== undefined) this.error(`${fileName} imports ${entry}, the entry of a worker`);
      }
    },
  };
}

/** Workers are bundled before the page is written. */
function licences(): Plugin {
  let outDir = '';
  return {
    name: 'licences',
    configResolved(config) {
      outDir = path.resolve(config.root, config.build.outDir);
    },
    async writeBundle() {
      const root = path.resolve(import.meta.dirname, '..');
      const files = [...bundled].map((id) => path.relative(root, id).replaceAll(path.sep, '/'));
      await writeFile(path.join(outDir, 'THIRD-PARTY-LICENSES.txt'), await licencesOf(files));
    },
  };
}

export default defineConfig(({ mode }) => ({
  root: import.meta.dirname,
  // Relative, so that the folder may lie anywhere on a host.
  base: './',
  // The tests take them from the packages, as `sageattention playground` does where they are not beside the page.
  plugins:
    mode === 'test' ? [addresses(), measured()] : [addresses(), measured(), assets(), collectBundled(), licences()],
  worker: { format: 'es', plugins: () => [collectBundled(), entriesStayApart()] },
  server: { headers: ISOLATION_HEADERS },
  build: {
    outDir: '../dist/playground',
    emptyOutDir: true,
    target: 'es2022',
    // Plot and the conformance suite are the two large chunks, the latter loaded when it is asked for.
    chunkSizeWarningLimit: 700,
    rolldownOptions: { checks: { pluginTimings: false } },
  },
}));
