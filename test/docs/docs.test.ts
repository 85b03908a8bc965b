/**
 * The documentation: its samples compile and run, its tables are what the results say, its pages link to what exists.
 */
import { execFile, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { promisify } from 'node:util';
import { parseHTML } from 'linkedom';
import { afterAll, describe, expect, it } from 'vitest';
import { drawFigures } from '../../docs/figures.ts';
import { locateSoftwareGpu, REMEDY, softwareGpuEnvironment } from '../../scripts/software-gpu.ts';
import * as api from '../../src/index.ts';
import { CONSUMERS } from '../consumers/consumers.ts';
import { launchChromium, missingChromium } from '../support/chromium.ts';
import { itNeeds } from '../support/requirement.ts';

const ROOT = path.resolve(import.meta.dirname, '../..');
const DOCS = path.join(ROOT, 'docs');
const scratch = mkdtempSync(path.join(tmpdir(), 'docs-test-'));
afterAll(() => rmSync(scratch, { recursive: true, force: true }));

interface Sample {
  readonly name: string;
  readonly code: string;
  readonly runs: boolean;
  /** Why it is only compiled, with what else a machine has. */
  readonly needs: string;
}

/**
 * Every TypeScript block of a page. One behind `<!-- sample: compile only ... -->` is not run; further lines of that
 * comment stand before it, for what the text around it declares.
 */
function samplesOf(file: string): Sample[] {
  const text = readFileSync(path.join(ROOT, file), 'utf8');
  const blocks = [
    ...text.matchAll(
      /(?:<!-- sample: (compile only(?:(?!-->)[^\n])*)(?:\n((?:(?!-->)[\s\S])*))?-->\s*)?^```ts\n([\s\S]*?)^```$/gm,
    ),
  ];
  return blocks.map(([, marker, before = '', code = ''], i) => ({
    name: `${path.basename(file, '.md')}-${i + 1}`,
    code: `${before}${code}`,
    runs: marker === undefined,
    needs: marker ?? '',
  }));
}

const pages = readdirSync(DOCS).filter((name) => name.endsWith('.md'));
const samples = [...pages.map((name) => `docs/${name}`), 'README.md'].flatMap(samplesOf);

/** Each entry of package.json's exports by the source that it is built from. */
const ENTRIES = {
  sageattention: 'src/index.ts',
  'sageattention/wasm': 'src/backends/wasm/index.ts',
  'sageattention/wasm/embedded': 'src/backends/wasm/embedded.ts',
  'sageattention/webgpu': 'src/backends/webgpu/index.ts',
  'sageattention/cuda': 'src/backends/cuda/index.ts',
  'sageattention/reference': 'src/reference/index.ts',
  'sageattention/onnxruntime': 'src/integrations/onnxruntime/index.ts',
  'sageattention/transformers': 'src/integrations/transformers/web.ts',
  'sageattention/tfjs': 'src/integrations/tfjs/index.ts',
  'sageattention/distributed': 'src/distributed/index.ts',
  'sageattention/jax': 'src/integrations/jax/index.ts',
};

const compilerOptions = {
  target: 'ES2022',
  lib: ['ES2023', 'ESNext.Disposable', 'DOM', 'DOM.Iterable'],
  module: 'ESNext',
  moduleResolution: 'Bundler',
  strict: true,
  noUncheckedIndexedAccess: true,
  exactOptionalPropertyTypes: true,
  allowImportingTsExtensions: true,
  skipLibCheck: true,
  noEmit: true,
  types: ['node', '@webgpu/types'],
  typeRoots: [path.join(ROOT, 'node_modules', '@types'), path.join(ROOT, 'node_modules')],
  paths: Object.fromEntries(Object.entries(ENTRIES).map(([name, source]) => [name, [path.join(ROOT, source)]])),
};

/** Each sample is a module of its own in a folder that is no part of the project. */
function writeSamples(): void {
  // What the samples import besides: onnxruntime-web and other engines.
  symlinkSync(path.join(ROOT, 'node_modules'), path.join(scratch, 'node_modules'));
  writeFileSync(path.join(scratch, 'package.json'), JSON.stringify({ type: 'module' }));
  writeFileSync(path.join(scratch, 'tsconfig.json'), JSON.stringify({ compilerOptions, include: ['*.ts'] }));
  for (const { name, code } of samples) writeFileSync(path.join(scratch, `${name}.ts`), code);
}

describe('samples of the documentation', () => {
  writeSamples();

  it('there are some on every page that shows code', () => {
    for (const page of ['index', 'getting-started', 'choosing-a-kernel', 'porting-from-python', 'troubleshooting']) {
      expect(samples.filter(({ name, runs }) => name.startsWith(page) && runs).length, page).toBeGreaterThan(0);
    }
  });

  it('compile', () => {
    const tsc = path.join(ROOT, 'node_modules/typescript-native/bin/tsc');
    const { stdout, stderr, status } = spawnSync(process.execPath, [tsc, '-p', '.', '--pretty', 'false'], {
      cwd: scratch,
      encoding: 'utf8',
    });
    expect(stderr).toBe('');
    // Errors in the sources are reported by the type check.
    const found = stdout.split('\n').filter((line) => /^[^\s./]|^error/.test(line));
    expect(found).toEqual([]);
    expect(status === 0 || stdout.startsWith('../'), stdout.slice(0, 1000)).toBe(true);
    expect(found).toEqual([]);
  });

  it('are pasted into Node 20 and 22 too, which do not know `using`', () => {
    const newer = samples.filter(({ runs, code }) => runs && /^\s*(await )?using \w/m.test(code));
    expect(newer.map(({ name }) => name)).toEqual([]);
  });

  it.concurrent.each(samples.filter(({ runs }) => runs))('$name runs', async ({ name }) => {
    // Dawn warns on stderr where there is no GPU driver; a sample that fails says so by its exit code.
    await promisify(execFile)(
      process.execPath,
      [path.join(ROOT, 'node_modules/tsx/dist/cli.mjs'), '--tsconfig', 'tsconfig.json', `${name}.ts`],
      { cwd: scratch, encoding: 'utf8' },
    );
  });
});

/** What the pages declare for samples that need a GPU, made on a software one. */
const GPU_SAMPLES = `
import { enableNodeWebgpu } from 'sageattention/onnxruntime';
import { emptyGpuTensor } from '${path.join(ROOT, 'src/backends/webgpu/tensor.ts')}';

const gpu = await enableNodeWebgpu();
const device = await (await gpu.requestAdapter()).requestDevice({ requiredFeatures: ['shader-f16', 'subgroups'] });
const shape = [1, 2, 64, 64];
const [q, k, v, output] = [0, 1, 2, 3].map(() => emptyGpuTensor(device, 'float16', shape));
const large = () => emptyGpuTensor(device, 'float16', [1, 16, 64, 64]).buffer;
Object.assign(globalThis, {
  device, shape, q, k, v, output, encoder: device.createCommandEncoder(),
  qBuffer: large(), kBuffer: large(), vBuffer: large(),
  buffers: { q: q.buffer, k: k.buffer, v: v.buffer, output: output.buffer },
});
device.addEventListener('uncapturederror', ({ error }) => {
  console.error(error.message);
  process.exit(1);
});
for (const name of process.argv.slice(2)) {
  await import(name);
  await device.queue.onSubmittedWorkDone();
  console.log('ran ' + name);
}
process.exit(0);
`;

describe('samples of the documentation that need a GPU', () => {
  const manifest = locateSoftwareGpu('lavapipe');
  const missing = manifest === undefined ? REMEDY.lavapipe : undefined;

  itNeeds(missing)('run on a software one, with 64 tokens in the place of thousands', async () => {
    const needing = samples.filter(({ needs }) => /it needs a GPU$/.test(needs.trim()));
    expect(needing.length).toBeGreaterThan(4);
    const names = needing.map(({ name, code }) => {
      writeFileSync(path.join(scratch, `${name}.gpu.ts`), code.replaceAll(/\b(4096|8192)\b/g, '64'));
      return `./${name}.gpu.ts`;
    });
    writeFileSync(path.join(scratch, 'gpu-samples.ts'), GPU_SAMPLES);
    const { stdout } = await promisify(execFile)(
      process.execPath,
      [path.join(ROOT, 'node_modules/tsx/dist/cli.mjs'), '--tsconfig', 'tsconfig.json', 'gpu-samples.ts', ...names],
      { cwd: scratch, encoding: 'utf8', env: { ...process.env, ...softwareGpuEnvironment(manifest as string) } },
    );
    for (const name of names) expect(stdout).toContain(`ran ${name}`);
  });
});

describe('tables and figures of the documentation', () => {
  it('are what the results say', () => {
    const { status, stderr } = spawnSync(
      process.execPath,
      [path.join(ROOT, 'node_modules/tsx/dist/cli.mjs'), path.join(ROOT, 'scripts/readme-tables.ts'), '--check'],
      { cwd: ROOT, encoding: 'utf8' },
    );
    expect(stderr).toBe('');
    expect(status).toBe(0);
  });

  it.each(['docs/porting-from-python.md', 'README.md'])(
    '%s names every function of the API, and none that is not there',
    (page) => {
      const text = readFileSync(path.join(ROOT, page), 'utf8');
      const rows = [...text.matchAll(/^\| [^|]*\| `(\w+)\b/gm)].map(([, name]) => name as string);
      const isFunction = (name: string) => /^(sageattn|createAttention|prepare)/.test(name);
      expect(rows.filter(isFunction).sort()).toEqual(Object.keys(api).filter(isFunction).sort());
    },
  );

  it('are drawn by the code', async () => {
    const drawn = await drawFigures();
    expect(Object.keys(drawn).sort()).toEqual(
      readdirSync(path.join(DOCS, 'figures')).map((name) => path.basename(name, '.svg')),
    );
    for (const [name, svg] of Object.entries(drawn)) {
      // Digits may differ in the last place between engines; the shapes may not.
      const shapes = (text: string) =>
        text
          .replaceAll(/-?\d+(\.\d+)?/g, '#')
          .replaceAll(/plot-\w+/g, 'plot')
          .trim();
      expect(shapes(svg), name).toBe(shapes(readFileSync(path.join(DOCS, 'figures', `${name}.svg`), 'utf8')));
    }
  });
});

/** What GitHub makes of a page's headings. */
const anchorsOf = (file: string) =>
  [...readFileSync(file, 'utf8').matchAll(/^#+ (.+)$/gm)].map(([, heading = '']) =>
    heading
      .toLowerCase()
      .replaceAll(/[^\p{L}\p{N}\s_-]/gu, '')
      .trim()
      .replaceAll(/\s/g, '-'),
  );

/** What somebody types, and the guide that must be among the results (the page shows ten). */
const SEARCHES: Readonly<Record<string, string>> = {
  COOP: 'Deploying',
  COEP: 'Deploying',
  CSP: 'Deploying',
  react: 'React',
  'next.js': 'Next.js',
  worker: 'A Web Worker of your own',
  video: 'Image and video diffusion',
  'KV cache': 'Decoding with a KV cache',
  webpack: 'Deploying',
  'invalid-shape': 'Errors',
  'out-of-memory': 'Errors',
  Firefox: 'What it runs on',
  safetensors: 'The command line',
};

describe('tables of what there is', () => {
  it('docs/errors.md explains every code once', () => {
    const [, union = ''] =
      /export type ErrorCode =([^;]+);/.exec(readFileSync(path.join(ROOT, 'src/errors.ts'), 'utf8')) ?? [];
    const codes = [...union.matchAll(/'([\w-]+)'/g)].map(([, code]) => code);
    expect(codes.length).toBeGreaterThan(15);
    const explained = [...readFileSync(path.join(DOCS, 'errors.md'), 'utf8').matchAll(/^\| `([\w-]+)` \|/gm)];
    expect(explained.map(([, code]) => code).sort()).toEqual(codes.sort());
  });

  it('docs/support.md names every kind of project that is tried, in the version that is tried', () => {
    const [, text = ''] = readFileSync(path.join(DOCS, 'support.md'), 'utf8').split('## Bundlers and projects');
    for (const { name, packages = [] } of CONSUMERS) {
      const word = name.replace(/^(node|typescript|vite|next)-.*/, '$1').replaceAll('-', ' ');
      const row = text.split('\n').find((line) => line.startsWith('|') && line.toLowerCase().includes(word));
      expect(row, name).toBeDefined();
      const [, version] = /^[^@]+@([\d.]+)$/.exec(packages[0] ?? '') ?? [];
      if (version !== undefined) expect(row, name).toMatch(new RegExp(`[| ]${version}\\b`));
    }
  });
});

describe('the documentation site', () => {
  const site = path.join(scratch, 'site');

  it('builds without warnings', () => {
    const { status, stdout, stderr } = spawnSync(
      process.execPath,
      [path.join(ROOT, 'node_modules/tsx/dist/cli.mjs'), 'scripts/docs-site.ts', '--out', site],
      { cwd: ROOT, encoding: 'utf8' },
    );
    expect(`${stdout}${stderr}`).not.toMatch(/\[warning\]|\[error\]/);
    expect(status).toBe(0);
  });

  it('has the modules under the names that one imports', () => {
    const { exports } = JSON.parse(readFileSync(path.join(ROOT, 'package.json'), 'utf8')) as { exports: object };
    const entries = Object.keys(exports).map((name) => path.posix.join('sageattention', name));
    // A worker's file and package.json export nothing.
    const documented = entries.filter((name) => !/worker$|json$/.test(name));
    const { document } = parseHTML(readFileSync(path.join(site, 'modules.html'), 'utf8'));
    const shown = [...document.querySelectorAll('.tsd-member-summary-name')]
      .filter((row) => row.querySelector('[aria-label="Module"]') !== null)
      .map((row) => row.textContent.replaceAll(/[\s\u200b]/g, ''));
    expect(shown.sort()).toEqual(documented.sort());
  });

  it('says with each `Throws` which class', () => {
    const files = (readdirSync(site, { recursive: true }) as string[]).filter((name) => name.endsWith('.html'));
    const unnamed: string[] = [];
    let named = 0;
    for (const file of files) {
      const { document } = parseHTML(readFileSync(path.join(site, file), 'utf8'));
      for (const tag of document.querySelectorAll('.tsd-tag-throws')) {
        if (/^Throws\s*(\w*Error\b( or )?)+/.test(tag.textContent.trim())) named++;
        else unnamed.push(`${file}: ${tag.textContent.trim().slice(0, 80)}`);
      }
    }
    expect(unnamed).toEqual([]);
    expect(named).toBeGreaterThan(50);
  });

  it('lists every guide on its first page and in llms.txt, whose links lead to files', () => {
    const [first, llms] = [path.join(DOCS, 'index.md'), path.join(site, 'llms.txt')].map((file) =>
      readFileSync(file, 'utf8'),
    ) as [string, string];
    for (const page of pages.filter((name) => name !== 'index.md')) {
      expect(first).toContain(`](${page})`);
      expect(llms).toContain(`](markdown/${page})`);
    }
    for (const [, target = ''] of llms.matchAll(/\]\(([^)#]+)/g)) {
      expect(existsSync(path.join(site, target)), target).toBe(true);
    }
  });

  itNeeds(missingChromium())('finds guides by what people look for', async () => {
    const browser = await launchChromium('none');
    try {
      const page = await browser.newPage();
      for (const [words, guide] of Object.entries(SEARCHES)) {
        await page.goto(pathToFileURL(path.join(site, 'index.html')).href);
        await page.keyboard.press('/');
        await page.locator('dialog input').fill(words);
        await page.locator('[role=option]').first().waitFor();
        expect(await page.locator('[role=option]').allInnerTexts(), words).toContain(guide);
      }
    } finally {
      await browser.close();
    }
  });

  it('has no dead links', () => {
    const files = (readdirSync(site, { recursive: true }) as string[]).filter((name) => name.endsWith('.html'));
    expect(files.length).toBeGreaterThan(20);
    const documents = new Map(
      files.map((name) => [path.join(site, name), parseHTML(readFileSync(path.join(site, name), 'utf8')).document]),
    );
    const dead: string[] = [];
    let links = 0;
    for (const [file, document] of documents) {
      for (const element of document.querySelectorAll('a[href], img[src], link[href], script[src]')) {
        const target = element.getAttribute('href') ?? element.getAttribute('src') ?? '';
        if (/^[a-z]+:/i.test(target)) continue;
        links++;
        const [relative = '', fragment] = target.split('#');
        const place = relative === '' ? file : path.join(path.dirname(file), decodeURIComponent(relative));
        const there = documents.get(place);
        const missing =
          !existsSync(place) ||
          (fragment && there !== undefined && there.getElementById(decodeURIComponent(fragment)) === null);
        if (missing) dead.push(`${path.relative(site, file)}: ${target}`);
      }
    }
    expect(links).toBeGreaterThan(200);
    expect(dead).toEqual([]);
  });

  it('links on GitHub too: relative links and pictures of the sources lead to files', () => {
    const sources = [...pages.map((page) => `docs/${page}`), 'README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'];
    const dead = sources.flatMap((source) =>
      [
        // What samples link to lies in the project that they show.
        ...readFileSync(path.join(ROOT, source), 'utf8')
          .replaceAll(/^```[\s\S]*?^```$/gm, '')
          .matchAll(/(?:\]\(|\b(?:src|srcset|href)=")(?!https?:)([^)#\s"]*)(?:#([^)"]*))?[)"]/g),
      ]
        .filter(([, target = '', heading]) => {
          const file = target === '' ? path.join(ROOT, source) : path.join(ROOT, path.dirname(source), target);
          if (!existsSync(file)) return true;
          return heading !== undefined && file.endsWith('.md') && !anchorsOf(file).includes(heading);
        })
        .map(([, target, heading]) => `${source}: ${target}${heading === undefined ? '' : `#${heading}`}`),
    );
    expect(dead).toEqual([]);
  });

  it('shows the pictures of the playground in the README', () => {
    const readme = readFileSync(path.join(ROOT, 'README.md'), 'utf8');
    for (const theme of ['light', 'dark']) expect(readme).toContain(`docs/images/playground-${theme}.webp`);
  });
});
