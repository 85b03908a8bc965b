import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { request } from 'node:http';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type PlaygroundServer, servePlayground } from './playground-server.ts';

const root = mkdtempSync(path.join(tmpdir(), 'playground-server-'));
let server: PlaygroundServer;

beforeAll(async () => {
  mkdirSync(path.join(root, 'page', 'assets'), { recursive: true });
  writeFileSync(path.join(root, 'secret.txt'), 'secret');
  writeFileSync(path.join(root, 'page', 'index.html'), '<!doctype html><title>page</title>');
  writeFileSync(path.join(root, 'page', 'assets', 'code.js'), 'export {};');
  server = await servePlayground(path.join(root, 'page'), 0, '127.0.0.1');
});

afterAll(async () => {
  await server.close();
  rmSync(root, { recursive: true });
});

/** A request whose path is sent as it is, dots and all. */
function get(target: string): Promise<{ status: number; body: string; headers: Record<string, unknown> }> {
  const { hostname, port } = new URL(server.url);
  return new Promise((resolve, reject) => {
    request({ hostname, port, path: target }, (response) => {
      let body = '';
      response.on('data', (chunk) => {
        body += chunk;
      });
      response.on('end', () => resolve({ status: response.statusCode ?? 0, body, headers: response.headers }));
    })
      .on('error', reject)
      .end();
  });
}

describe('the playground server', () => {
  it('serves the page with the headers that threads need', async () => {
    for (const target of ['/', '/assets/code.js', '/model/vocab.json']) {
      const { status, headers } = await get(target);
      expect(status, target).toBe(200);
      expect(headers['cross-origin-opener-policy']).toBe('same-origin');
      expect(headers['cross-origin-embedder-policy']).toBe('require-corp');
    }
  });

  it('takes the model and the peer from the packages that are installed', async () => {
    const { body } = await get('/model/vocab.json');
    expect(JSON.parse(body)).toHaveLength(8000);
    const peer = await get('/onnxruntime-web/ort.wasm.bundle.min.mjs');
    expect(peer.headers['content-type']).toContain('javascript');
  });

  it('gives nothing else away', async () => {
    for (const target of [
      '/../secret.txt',
      '/%2e%2e/secret.txt',
      '/assets/../../secret.txt',
      '/..%2fsecret.txt',
      '/..%5csecret.txt',
      '/model/../package.json',
      '/model/index.js',
      '/model/..%2fpackage.json',
      '/onnxruntime-web/ort.js',
      '/onnxruntime-web/ort.js%00.mjs',
      '/model/',
      '/nothing',
    ]) {
      const { status, body } = await get(target);
      expect(status, target).toBe(404);
      expect(body, target).not.toContain('secret');
    }
  });

  it('outlives files that go away', async () => {
    const file = path.join(root, 'page', 'assets', 'gone.js');
    writeFileSync(file, 'export {};');
    expect((await get('/assets/gone.js')).status).toBe(200);
    rmSync(file);
    expect((await get('/assets/gone.js')).status).toBe(404);
    expect((await get('/')).status).toBe(200);
  });

  it('refuses a port that is taken', async () => {
    const { port } = new URL(server.url);
    await expect(servePlayground(path.join(root, 'page'), Number(port), '127.0.0.1')).rejects.toThrow(/EADDRINUSE/);
  });
});
