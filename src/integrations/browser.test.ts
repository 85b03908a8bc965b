/** The engines in headless Chromium, with WebGPU on SwiftShader. */
import { createRequire } from 'node:module';
import path from 'node:path';
import type { Browser, Page as BrowserPage } from 'playwright-core';
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { launchChromium, missingChromium } from '../../test/support/chromium.ts';
import { runSeed } from '../../test/support/random.ts';
import { itNeeds } from '../../test/support/requirement.ts';
import type { Page } from './testing/browser-page.ts';
import { EXPECTED_COMMANDS } from './testing/count-commands.ts';
import { callPage, type ServedPage, servePage } from './testing/serve-page.ts';

const seed = runSeed();
const missing = missingChromium();
let served: ServedPage;
let browser: Browser;
let page: BrowserPage;

beforeAll(async () => {
  if (missing !== undefined) return;
  console.info(`seed ${seed}`);
  const runtime = path.dirname(createRequire(import.meta.url).resolve('onnxruntime-web'));
  served = await servePage('browser-page.ts', { 'onnxruntime-web': runtime });
  browser = await launchChromium('software');
  page = await browser.newPage();
  page.on('pageerror', (error) => console.error(error));
  await page.goto(served.url);
}, 120_000);
afterAll(async () => {
  await browser?.close();
  served?.close();
});

const call = <K extends keyof Page>(name: K, ...args: Parameters<Page[K]>) =>
  callPage<Page, K>(page, name, ...(args as never));

describe('in Chromium', () => {
  itNeeds(missing)('onnxruntime-web on WebGPU', async () => {
    const { accuracy, taken } = await call('onnxruntime', 'webgpu', seed);
    expect(taken).toEqual([true, true]);
    expect(accuracy.cosineSimilarity).toBeGreaterThan(0.999);
  });

  itNeeds(missing)('onnxruntime-web records what it records in Node, with markers and without', async () => {
    const { whole, marker, cut, paths, isSame, accuracy } = await call('commands', seed);
    console.info(JSON.stringify({ whole, marker, cut }));
    expect(paths).toEqual(['marker', 'marker']);
    expect({ whole, marker }).toEqual(EXPECTED_COMMANDS);
    expect([cut.dispatches, isSame]).toEqual([marker.dispatches, true]);
    expect(accuracy.cosineSimilarity).toBeGreaterThan(0.999);
  });

  itNeeds(missing)('onnxruntime-web on WASM', async () => {
    const { accuracy, taken } = await call('onnxruntime', 'wasm', seed);
    expect(taken).toEqual([true, true]);
    expect(accuracy.cosineSimilarity).toBeGreaterThan(0.999);
  });

  for (const backend of ['webgpu', 'webgl'] as const) {
    itNeeds(missing)(`tfjs on ${backend}, leaving nothing behind that can be counted`, async () => {
      const { accuracy, leaked, leakedBytes, refused, unseeing } = await call('tfjs', backend, seed);
      expect(accuracy.cosineSimilarity).toBeGreaterThan(0.999);
      expect(leaked).toBe(0);
      expect(leakedBytes).toBe(backend === 'webgpu' ? 0 : undefined);
      expect(refused).toBe('options.isCasual');
      expect(unseeing).toEqual([0]);
    });

    itNeeds(missing)(`a GraphModel of tfjs on ${backend}`, async () => {
      const { accuracy, taken, leaked } = await call('tfjsModel', backend, seed);
      expect([taken, leaked]).toEqual([1, 0]);
      expect(accuracy.cosineSimilarity).toBeGreaterThan(0.999);
    });
  }

  itNeeds(missing)('jax-js on WebGPU', async () => {
    const { accuracy, device, leakedBytes, refused, kept, gradients } = await call('jax', seed);
    expect(accuracy.cosineSimilarity).toBeGreaterThan(0.999);
    expect(device).toBe('webgpu');
    expect(leakedBytes).toBe(0);
    expect([refused, kept]).toEqual(['options.isCasual', 0]);
    for (const error of gradients) expect(error).toBeLessThan(0.02);
  });
});
