import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { playground } from './playground.ts';

const page = mkdtempSync(path.join(tmpdir(), 'playground-command-'));
writeFileSync(path.join(page, 'index.html'), '<!doctype html><title>page</title>');

afterEach(() => {
  vi.restoreAllMocks();
  rmSync(page, { recursive: true, force: true });
});

describe('sageattention playground', () => {
  it('serves the page, says where, and ends when it is interrupted', async () => {
    let printed = '';
    vi.spyOn(process.stdout, 'write').mockImplementation((text) => {
      printed += text;
      return true;
    });
    const ended = playground({ port: 0, host: '127.0.0.1' }, page);
    await expect.poll(() => printed).toMatch(/http:\/\/127\.0\.0\.1:\d+\//);
    const [url = ''] = /http:\S+/.exec(printed) ?? [];
    const response = await fetch(url);
    expect(await response.text()).toContain('<title>page</title>');
    expect(response.headers.get('cross-origin-embedder-policy')).toBe('require-corp');

    const second = playground({ port: Number(new URL(url).port), host: '127.0.0.1' }, page);
    await expect(second).rejects.toThrow(/cannot serve on 127\.0\.0\.1, port \d+: .*EADDRINUSE/);

    process.emit('SIGINT');
    await ended;
    await expect(fetch(url)).rejects.toThrow();
  });
});
