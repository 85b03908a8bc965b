/** transformers.js in headless Chromium, with WebGPU on SwiftShader and without WebGPU, by each way in. */
import { mkdtemp, rm } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import path from 'node:path';
import type { Browser } from 'playwright-core';
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { writeSentenceEncoder } from '../../../scripts/sentence-encoder-onnx.ts';
import { launchChromium, missingChromium } from '../../../test/support/chromium.ts';
import { itNeeds } from '../../../test/support/requirement.ts';
import { DEFAULT_MIN_TOKENS } from '../onnxruntime/options.ts';
import { callPage, type ServedPage, servePage } from '../testing/serve-page.ts';
import type { Embedded, Page, Way } from '../testing/transformers-page.ts';

const SHORT = ['A cat sat on the mat.', 'A kitten was resting on a rug, as it did on every other day.'];
// Above the least tokens from which attention is replaced on a CPU by default.
const LONG = [Array.from({ length: 150 }, (_, i) => `Sentence ${i} of a long text.`).join(' ')];

const missing = missingChromium();
let models: string;
let served: ServedPage;
const browsers = new Map<'software' | 'none', Promise<Browser>>();

beforeAll(async () => {
  if (missing !== undefined) return;
  models = await mkdtemp(path.join(tmpdir(), 'models-'));
  await writeSentenceEncoder(path.join(models, 'sentence-encoder'));
  // The copy that transformers.js resolves to, so that program and transformers.js share a class.
  const require = createRequire(createRequire(import.meta.url).resolve('@huggingface/transformers'));
  const runtime = path.dirname(require.resolve('onnxruntime-web'));
  served = await servePage(
    'transformers-page.ts',
    { models, 'onnxruntime-web': runtime },
    { 'onnxruntime-web/webgpu': path.join(runtime, 'ort.webgpu.bundle.min.mjs') },
  );
}, 120_000);
afterAll(async () => {
  for (const browser of browsers.values()) await (await browser).close();
  served?.close();
  if (models !== undefined) await rm(models, { recursive: true });
});

async function embed(
  webgpu: 'software' | 'none',
  way: Way,
  sentences: readonly string[],
  options: object,
  minTokens?: number,
): Promise<Embedded> {
  const browser = browsers.get(webgpu) ?? launchChromium(webgpu);
  browsers.set(webgpu, browser);
  const page = await (await browser).newPage();
  page.on('pageerror', (error) => console.error(error));
  await page.goto(served.url);
  try {
    return await callPage<Page, 'embed'>(page, 'embed', way, [...sentences], options, minTokens as never);
  } finally {
    await page.close();
  }
}

const plain = new Map<readonly string[], Promise<Embedded>>();

/** Without SageAttention, on WASM. */
function reference(sentences: readonly string[]): Promise<Embedded> {
  const known = plain.get(sentences) ?? embed('none', 'plain', sentences, { device: 'wasm' });
  plain.set(sentences, known);
  return known;
}

async function expectSameEmbeddings(actual: Embedded, sentences: readonly string[], tolerance: number): Promise<void> {
  const { embeddings, report } = await reference(sentences);
  expect(report).toBeUndefined();
  expect(actual.embeddings).toHaveLength(embeddings.length);
  const differences = embeddings.map((value, i) => Math.abs(value - (actual.embeddings[i] as number)));
  expect(Math.max(...differences)).toBeLessThan(tolerance);
}

const takenIn = ({ report }: Embedded) => report?.map(({ taken }) => taken);

// Components of embeddings of length 1 and 512 numbers; the same bound as in Node.
const TOLERANCE = 5e-3;

describe('transformers.js in Chromium', () => {
  itNeeds(missing)('the module, without WebGPU: long texts are taken on WASM by default', async () => {
    const long = await embed('none', 'module', LONG, { device: 'wasm' });
    expect(takenIn(long)).toEqual([true, true]);
    await expectSameEmbeddings(long, LONG, TOLERANCE);
  });

  itNeeds(missing)('the module, with WebGPU: short texts are taken too, by markers', async () => {
    const short = await embed('software', 'module', SHORT, { device: 'webgpu' });
    expect(short.report?.map(({ path }) => path)).toEqual(['marker', 'marker']);
    await expectSameEmbeddings(short, SHORT, TOLERANCE);
  });

  itNeeds(missing)('the module, with no device named', async () => {
    const short = await embed('none', 'module', SHORT, {});
    expect(short.report?.[0]?.reason).toContain(`minTokens, ${DEFAULT_MIN_TOKENS['onnxruntime-web']}`);
    await expectSameEmbeddings(short, SHORT, TOLERANCE);
  });

  for (const provider of ['webgpu', 'wasm']) {
    itNeeds(missing)(`the symbol, on ${provider}`, async () => {
      const options = { device: 'auto', session_options: { executionProviders: [provider] } };
      const sage = await embed('software', 'symbol', SHORT, options, 0);
      expect(takenIn(sage)).toEqual([true, true]);
      await expectSameEmbeddings(sage, SHORT, TOLERANCE);
    });

    itNeeds(missing)(`the shared class, device '${provider}'`, async () => {
      const sage = await embed('software', 'class', SHORT, { device: provider }, 0);
      expect(takenIn(sage)).toEqual([true, true]);
      await expectSameEmbeddings(sage, SHORT, TOLERANCE);
    });
  }
});
