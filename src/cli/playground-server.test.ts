import { existsSync, mkdirSync, mkdtempSync, readdirSync, readlinkSync, rmSync, writeFileSync } from 'node:fs';
import { request } from 'node:http';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import fc from 'fast-check';
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

/** Where an open file of this process leads; nothing if it has been closed meanwhile. */
function linkOf(descriptor: string): string {
  try {
    return readlinkSync(`/proc/self/fd/${descriptor}`);
  } catch {
    return '';
  }
}

/** A request whose path is sent as it is, dots and all. */
function get(
  target: string,
  headers: Record<string, string> = {},
): Promise<{ status: number; body: string; headers: Record<string, unknown> }> {
  const { hostname, port } = new URL(server.url);
  return new Promise((resolve, reject) => {
    request({ hostname, port, path: target, headers }, (response) => {
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

  it('answers every kind of range, and outlives them', async () => {
    const whole = '<!doctype html><title>page</title>';
    for (const [range, status, body] of [
      ['bytes=0-8', 206, whole.slice(0, 9)],
      ['bytes=-5', 206, whole.slice(-5)],
      ['bytes=20-', 206, whole.slice(20)],
      ['bytes=5-2', 416, ''],
      ['bytes=900-', 416, ''],
      ['bytes=-0', 416, ''],
      // No range at all by its grammar: ignored (RFC 9110, 14.2).
      ['bytes=x-y', 200, whole],
      ['lines=1-2', 200, whole],
      ['bytes=0-1,4-5', 200, whole],
    ] as const) {
      const answer = await get('/index.html', { Range: range });
      expect([answer.status, answer.body], range).toEqual([status, body]);
    }
    await fc.assert(
      fc.asyncProperty(fc.string({ unit: 'grapheme-ascii' }), async (text) => {
        const { status } = await get('/index.html', { Range: `bytes=${text.replaceAll(/[^ -~]/g, '')}` });
        expect([200, 206, 416]).toContain(status);
      }),
      { numRuns: 50 },
    );
    expect((await get('/')).status).toBe(200);
  });

  it.runIf(existsSync('/proc/self/fd'))('closes the file of a download that is broken off', async () => {
    const big = path.join(root, 'page', 'big.bin');
    writeFileSync(big, Buffer.alloc(20_000_000));
    const open = () => readdirSync('/proc/self/fd').filter((name) => linkOf(name).endsWith('big.bin')).length;
    const { hostname, port } = new URL(server.url);
    for (let i = 0; i < 20; i++) {
      await new Promise<void>((resolve) => {
        const socket = connect(Number(port), hostname, () => socket.write('GET /big.bin HTTP/1.1\r\nHost: x\r\n\r\n'));
        socket.once('data', () => socket.destroy());
        socket.once('close', () => resolve());
      });
    }
    await expect.poll(open, { timeout: 10_000 }).toBe(0);
    rmSync(big);
  });

  it('refuses a port that is taken', async () => {
    const { port } = new URL(server.url);
    await expect(servePlayground(path.join(root, 'page'), Number(port), '127.0.0.1')).rejects.toThrow(/EADDRINUSE/);
  });
});
