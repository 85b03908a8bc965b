/** A page of this folder, bundled and served with the files that it fetches, for Chromium in the tests. */
import { readFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import type { Page as BrowserPage } from 'playwright-core';

export interface ServedPage {
  readonly url: string;
  close(): void;
}

const TYPES: Readonly<Record<string, string>> = {
  '.js': 'text/javascript',
  '.mjs': 'text/javascript',
  '.wasm': 'application/wasm',
  '.json': 'application/json',
  '.onnx': 'application/octet-stream',
};

/**
 * @param name of a module beside this one
 * @param folders the folder that is served under each `/<key>/`
 * @param alias other modules for some imports
 */
export async function servePage(
  name: string,
  folders: Readonly<Record<string, string>>,
  alias: Readonly<Record<string, string>> = {},
): Promise<ServedPage> {
  const { outputFiles } = await build({
    entryPoints: [fileURLToPath(new URL(name, import.meta.url))],
    bundle: true,
    format: 'esm',
    platform: 'browser',
    target: 'es2022',
    splitting: true,
    outdir: '/',
    write: false,
    alias: { ...alias },
    logLevel: 'error',
  });
  const files = new Map(outputFiles.map((file) => [file.path, Buffer.from(file.contents)]));
  const script = `/${path.basename(name, '.ts')}.js`;
  const read = async (url: string): Promise<Buffer | undefined> => {
    if (url === '/') return Buffer.from(`<!doctype html><script type="module" src="${script}"></script>`);
    const [, folder, ...rest] = url.split('/');
    const root = folders[folder as string];
    return root === undefined ? files.get(url) : readFile(path.join(root, ...rest));
  };
  const server = createServer(async (request, response) => {
    const url = (request.url ?? '/').split('?')[0] as string;
    const body = await read(url).catch(() => undefined);
    response.writeHead(body === undefined ? 404 : 200, { 'content-type': TYPES[path.extname(url)] ?? 'text/html' });
    response.end(body);
  });
  await new Promise<void>((resolve) => {
    server.listen(0, '127.0.0.1', resolve);
  });
  const { port } = server.address() as AddressInfo;
  return { url: `http://127.0.0.1:${port}/`, close: () => server.close() };
}

/** Calls one of the functions that a page puts on `globalThis.page`, once it has. */
export async function callPage<P, K extends keyof P>(
  page: BrowserPage,
  name: K,
  ...args: P[K] extends (...args: infer A) => unknown ? A : never
): Promise<P[K] extends (...args: never[]) => infer R ? Awaited<R> : never> {
  await page.waitForFunction(() => 'page' in globalThis);
  return page.evaluate(
    ([key, values]) => {
      const functions = (globalThis as unknown as { page: Record<string, (...values: unknown[]) => Promise<unknown>> })
        .page;
      return functions[key as string]?.(...(values as unknown[]));
    },
    [name, args] as const,
  ) as never;
}
