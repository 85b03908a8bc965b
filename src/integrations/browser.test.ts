/** The engines in headless Chromium, with WebGPU on SwiftShader. */
import { readFile } from 'node:fs/promises';
import { createServer, type Server } from 'node:http';
import { createRequire } from 'node:module';
import type { AddressInfo } from 'node:net';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import type { Browser, Page as BrowserPage } from 'playwright-core';
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { launchChromium, missingChromium } from '../../test/support/chromium.ts';
import { runSeed } from '../../test/support/random.ts';
import { itNeeds } from '../../test/support/requirement.ts';
import type { Page } from './testing/browser-page.ts';

const seed = runSeed();
const missing = missingChromium();
let server: Server;
let browser: Browser;
let page: BrowserPage;

async function serve(): Promise<string> {
  const { outputFiles } = await build({
    entryPoints: [fileURLToPath(new URL('testing/browser-page.ts', import.meta.url))],
    bundle: true,
    format: 'esm',
    platform: 'browser',
    target: 'es2022',
    splitting: true,
    outdir: '/',
    write: false,
    logLevel: 'error',
  });
  const files = new Map(outputFiles.map((file) => [file.path, Buffer.from(file.contents)]));
  const runtime = path.dirname(createRequire(import.meta.url).resolve('onnxruntime-web'));
  const read = async (url: string): Promise<Buffer | undefined> => {
    if (url === '/') return Buffer.from('<!doctype html><script type="module" src="/browser-page.js"></script>');
    if (url.startsWith('/onnxruntime-web/')) return readFile(path.join(runtime, path.basename(url)));
    return files.get(url);
  };
  const types: Record<string, string> = {
    '.js': 'text/javascript',
    '.mjs': 'text/javascript',
    '.wasm': 'application/wasm',
  };
  server = createServer(async (request, response) => {
    const url = (request.url ?? '/').split('?')[0] as string;
    const body = await read(url).catch(() => undefined);
    response.writeHead(body === undefined ? 404 : 200, { 'content-type': types[path.extname(url)] ?? 'text/html' });
    response.end(body);
  });
  await new Promise<void>((resolve) => {
    server.listen(0, '127.0.0.1', resolve);
  });
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}/`;
}

beforeAll(async () => {
  if (missing !== undefined) return;
  console.info(`seed ${seed}`);
  browser = await launchChromium('software');
  page = await browser.newPage();
  page.on('pageerror', (error) => console.error(error));
  await page.goto(await serve());
  await page.waitForFunction(() => 'page' in globalThis);
});
afterAll(async () => {
  await browser?.close();
  server?.close();
});

/** Calls one of the page's functions with a name the browser knows. */
const call = <K extends keyof Page>(name: K, ...args: Parameters<Page[K]>): Promise<Awaited<ReturnType<Page[K]>>> =>
  page.evaluate(
    ([key, values]) => {
      const functions = (globalThis as unknown as { page: Record<string, (...values: unknown[]) => Promise<unknown>> })
        .page;
      return functions[key as string]?.(...(values as unknown[]));
    },
    [name, args] as const,
  ) as Promise<Awaited<ReturnType<Page[K]>>>;

describe('in Chromium', () => {
  itNeeds(missing)('onnxruntime-web on WebGPU', async () => {
    const { accuracy, taken } = await call('onnxruntime', 'webgpu', seed);
    expect(taken).toEqual([true, true]);
    expect(accuracy.cosineSimilarity).toBeGreaterThan(0.999);
  });

  itNeeds(missing)('onnxruntime-web on WASM', async () => {
    const { accuracy, taken } = await call('onnxruntime', 'wasm', seed);
    expect(taken).toEqual([true, true]);
    expect(accuracy.cosineSimilarity).toBeGreaterThan(0.999);
  });

  itNeeds(missing)('tfjs on WebGPU, leaving no tensor behind', async () => {
    const { accuracy, leaked } = await call('tfjs', seed);
    expect(accuracy.cosineSimilarity).toBeGreaterThan(0.999);
    expect(leaked).toBe(0);
  });

  itNeeds(missing)('jax-js on WebGPU', async () => {
    const { accuracy, device } = await call('jax', seed);
    expect(accuracy.cosineSimilarity).toBeGreaterThan(0.999);
    expect(device).toBe('webgpu');
  });
});
