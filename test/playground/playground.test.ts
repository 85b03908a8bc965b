/**
 * The playground, driven in a real browser: every section, in light and dark, with WebGPU on a software driver and
 * without WebGPU. Pictures are checked for their content, not for their pixels.
 */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import axe, { type AxeResults } from 'axe-core';
import type { Browser, BrowserContextOptions, Page } from 'playwright-core';
import { build } from 'vite';
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { type PlaygroundServer, serveFile, servePlayground } from '../../src/cli/playground-server.ts';
import { launchChromium, missingChromium } from '../support/chromium.ts';
import { itNeeds } from '../support/requirement.ts';

const missing = missingChromium();
const it = itNeeds(missing);
/** Of one wait; software GPUs and busy machines are slow. */
const PATIENCE = 200_000;

const built = mkdtempSync(path.join(tmpdir(), 'playground-test-'));
let server: PlaygroundServer;
let browser: Browser;
let withoutWebgpu: Browser;

beforeAll(async () => {
  if (missing !== undefined) return;
  const outDir = path.join(built, 'page');
  await build({
    configFile: path.join(import.meta.dirname, '../../playground/vite.config.ts'),
    mode: 'test',
    logLevel: 'warn',
    build: { outDir, emptyOutDir: true },
  });
  [server, browser, withoutWebgpu] = await Promise.all([
    servePlayground(outDir, 0, '127.0.0.1'),
    launchChromium('software'),
    launchChromium('none'),
  ]);
}, PATIENCE);

afterAll(async () => {
  await Promise.all([browser?.close(), withoutWebgpu?.close(), server?.close()]);
  rmSync(built, { recursive: true, force: true });
}, PATIENCE);

interface OpenOptions extends BrowserContextOptions {
  readonly in?: Browser;
  readonly url?: string;
  /** The page gets this bound of the error instead of its own, which right kernels do not keep. */
  readonly bound?: number;
}

/** Opens the page, waits until it has found its device, runs `drive`, and expects that nothing complained. */
async function withPage(options: OpenOptions, drive: (page: Page) => Promise<void>): Promise<void> {
  const { in: where = browser, url = server.url, bound, ...context } = options;
  const page = await where.newPage(context);
  page.setDefaultTimeout(PATIENCE);
  const complaints: string[] = [];
  page.on('console', (message) => {
    if (message.type() === 'error' || message.type() === 'warning') complaints.push(message.text());
  });
  page.on('pageerror', (error) => complaints.push(error.stack ?? error.message));
  if (bound !== undefined) {
    await page.route(/self-check-[\w-]+\.js$/, async (route) => {
      const response = await route.fetch();
      const body = (await response.text()).replaceAll(/relativeL1:\.\d+,algorithm/g, `relativeL1:${bound},algorithm`);
      await route.fulfill({ response, body });
    });
  }
  try {
    await page.goto(url);
    await page.waitForSelector('.card');
    await page.waitForSelector('#speed-controls select');
    await drive(page);
    expect(complaints).toEqual([]);
  } finally {
    await page.close();
  }
}

/** What browsers report of an element that moved; the DOM library has no type for it. */
interface LayoutShift {
  readonly value: number;
  readonly hadRecentInput: boolean;
}

const textOf = async (page: Page, selector: string) => (await page.textContent(selector)) ?? '';

async function waitForText(page: Page, selector: string, pattern: RegExp): Promise<string> {
  await page.waitForFunction(
    ([element, source]) =>
      new RegExp(source as string).test(document.querySelector(element as string)?.textContent ?? ''),
    [selector, pattern.source],
  );
  return textOf(page, selector);
}

const figureOf = (page: Page, title: string) =>
  page.locator('figure', { has: page.getByRole('heading', { name: title, exact: true }) });
const figureNote = (page: Page, title: string) => figureOf(page, title).locator('.note');

/** Text of a figure's note once it matches. */
async function waitForNote(page: Page, title: string, pattern: RegExp): Promise<RegExpMatchArray> {
  const note = figureNote(page, title);
  await expect.poll(() => note.textContent(), { timeout: PATIENCE }).toMatch(pattern);
  return ((await note.textContent()) ?? '').match(pattern) as RegExpMatchArray;
}

/** Colours in the picture of a figure, and how alike its columns are: 1 when each has one colour. */
async function rasterOf(
  page: Page,
  title: string,
): Promise<{ colors: number; columnSpread: number; rowSpread: number }> {
  return figureOf(page, title)
    .locator('svg image')
    .evaluate(async (image) => {
      const picture = new Image();
      picture.src = image.getAttribute('href') ?? image.getAttribute('xlink:href') ?? '';
      await picture.decode();
      const canvas = new OffscreenCanvas(picture.width, picture.height);
      const context = canvas.getContext('2d');
      if (context === null) throw new Error('no canvas');
      context.drawImage(picture, 0, 0);
      const { data, width, height } = context.getImageData(0, 0, picture.width, picture.height);
      const at = (x: number, y: number) =>
        (data[4 * (y * width + x)] as number) - (data[4 * (y * width + x) + 2] as number);
      const colors = new Set<number>();
      for (let i = 0; i < data.length; i += 4)
        colors.add(((data[i] as number) << 16) | ((data[i + 1] as number) << 8) | (data[i + 2] as number));
      const spread = (outer: number, inner: number, value: (o: number, i: number) => number) => {
        let sum = 0;
        for (let o = 0; o < outer; o++) {
          const values = Array.from({ length: inner }, (_, i) => value(o, i));
          const mean = values.reduce((a, b) => a + b, 0) / inner;
          sum += Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / inner);
        }
        return sum / outer;
      };
      return {
        colors: colors.size,
        columnSpread: spread(width, height, (x, y) => at(x, y)),
        rowSpread: spread(height, width, (y, x) => at(x, y)),
      };
    });
}

async function setSlider(page: Page, label: string, value: number): Promise<void> {
  await page.getByLabel(label).evaluate((input, next) => {
    (input as HTMLInputElement).value = String(next);
    input.dispatchEvent(new Event('input', { bubbles: true }));
  }, value);
}

/** On a page that was opened with `?debug`. */
const loseDevice = (page: Page) =>
  page.evaluate(() =>
    (globalThis as unknown as { playground: { loseDevice(): Promise<void> } }).playground.loseDevice(),
  );

const speedField = (page: Page, label: string) => page.locator('#speed-controls').getByLabel(label, { exact: true });

/** Chooses what to measure, and measures it. */
async function startBench(page: Page, kernels: readonly string[], tokens: string): Promise<void> {
  for (const box of await page.locator('#speed-controls input[type=checkbox]').all()) await box.uncheck();
  for (const kernel of kernels) await speedField(page, kernel).check();
  await speedField(page, 'Tokens, up to').selectOption(tokens);
  await speedField(page, 'Heads').selectOption('1');
  await page.click('#bench-start');
}

const benchRows = async (page: Page) =>
  (await page.locator('#bench-table tbody tr').all()).length === 0
    ? []
    : page
        .locator('#bench-table tbody tr')
        .evaluateAll((rows) =>
          rows.map((row) => [...row.querySelectorAll('td')].map((cell) => cell.textContent ?? '')),
        );

const numberIn = (text: string | undefined) => Number.parseFloat(text ?? '');

async function checkKernels(page: Page): Promise<number> {
  await page.click('#check-start');
  await waitForText(page, '#check-note', /^(All \d+ checks passed|\d+ of \d+ checks failed)\.$/);
  expect(await page.locator('#checks .fail').allTextContents()).toEqual([]);
  const lines = await page.locator('#checks .pass').count();
  expect(await textOf(page, '#check-note')).toBe(`All ${lines} checks passed.`);
  return lines;
}

async function expectAccessible(page: Page): Promise<void> {
  await page.evaluate(axe.source);
  const { violations } = (await page.evaluate('axe.run()')) as AxeResults;
  expect(violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join(' ')}`)).toEqual([]);
}

/** Milliseconds. Two tests check every kernel: SwiftShader compiles each shape for seconds, a minute and a half in all on two processors. */
const TIMEOUT = 360_000;

describe('playground', { timeout: TIMEOUT }, () => {
  it('opens with K losing its stripes and the error falling, and keeps what is chosen in its address', async () => {
    await withPage({ reducedMotion: 'reduce' }, async (page) => {
      const error = async () => numberIn((await page.locator('.readout strong').textContent()) ?? '');
      await expect.poll(error, { timeout: PATIENCE }).toBeGreaterThan(0);
      // Who wants no motion sees its end.
      expect(await page.getByLabel('Smoothing of K').inputValue()).toBe('100');
      const smoothed = await error();
      expect(smoothed).toBeLessThan(2);
      const stripes = () =>
        page.locator('canvas.keys').evaluate((canvas) => {
          const { width, height } = canvas as HTMLCanvasElement;
          // A copy: reading the canvas itself again and again would make the browser complain of it.
          const copy = new OffscreenCanvas(width, height).getContext('2d');
          if (copy === null) throw new Error('no canvas');
          copy.drawImage(canvas as HTMLCanvasElement, 0, 0);
          const { data } = copy.getImageData(0, 0, width, height);
          const at = (x: number, y: number) =>
            (data[4 * (y * width + x)] as number) - (data[4 * (y * width + x) + 2] as number);
          const means = Array.from({ length: width }, (_, x) => {
            let sum = 0;
            for (let y = 0; y < height; y++) sum += at(x, y);
            return sum / height;
          });
          return Math.sqrt(means.reduce((sum, mean) => sum + mean * mean, 0) / width);
        });
      const none = await stripes();
      await setSlider(page, 'Smoothing of K', 0);
      await expect.poll(error).toBeGreaterThan(2 * smoothed);
      expect(await stripes()).toBeGreaterThan(5 * none);
      await page.locator('#hero-picture').getByLabel('INT4').check();
      await expect.poll(error, { timeout: PATIENCE }).toBeGreaterThan(20);
      await page.getByLabel('a small encoder').check();
      // Its stripes are mild, and the page says so.
      await expect.poll(() => page.locator('#hero-picture .note').textContent()).toMatch(/Real: .*mild/);
      await expect.poll(error, { timeout: PATIENCE }).toBeLessThan(30);
      await page.locator('#why-controls').getByLabel('Distribution of K').selectOption('few');
      const address = () => new URL(page.url()).searchParams.toString();
      await expect.poll(address, { timeout: PATIENCE }).toBe('bits=int4&keys=encoder&distribution=few');
      await setSlider(page, 'Smoothing of K', 35);
      await expect.poll(address, { timeout: PATIENCE }).toContain('smoothing=35');

      await page.goto(page.url());
      await page.waitForSelector('#speed-controls select');
      expect(await page.getByLabel('Smoothing of K').inputValue()).toBe('35');
      expect(await page.getByLabel('a small encoder').isChecked()).toBe(true);
      expect(await page.locator('#why-controls').getByLabel('Distribution of K').inputValue()).toBe('few');
      // What is no choice of the page's is not taken.
      await page.goto(`${server.url}?smoothing=33&bits=int2&upto=7&offset=x`);
      await page.waitForSelector('#speed-controls select');
      expect(await page.locator('#hero-picture').getByLabel('INT8').isChecked()).toBe(true);
      expect(await page.getByLabel('Offset of K, in σ').inputValue()).toBe('6');
    });
  });

  it('runs on the device in front of it, with a card to copy and to save', async () => {
    await withPage({ in: withoutWebgpu, permissions: ['clipboard-read', 'clipboard-write'] }, async (page) => {
      await page.getByRole('button', { name: 'Run it on my device' }).click();
      await waitForText(page, '#quick-note', /^Done/);
      const card = await textOf(page, '.result-card');
      expect(card).toMatch(/^[\d.]+× as fast as the fastest exact attention here, .* f32/);
      expect(card).toMatch(/Kernelqk-int8-pv-int8 on WebAssembly.*FLOP\/s.*% relative L1/);
      await page.getByRole('button', { name: 'Copy the result' }).click();
      const copied = await page.evaluate(() => navigator.clipboard.readText());
      expect(copied).toMatch(/^SageAttention: [\d.]+× as fast[\s\S]*Device: [\s\S]*Error: [\d.]+ %[\s\S]*http/);
      const [download] = await Promise.all([
        page.waitForEvent('download'),
        page.getByRole('button', { name: 'Save as a picture' }).click(),
      ]);
      expect([...readFileSync(await download.path()).subarray(16, 24)]).toEqual([0, 0, 4, 176, 0, 0, 2, 118]);
      await page.getByText('The call that was measured').click();
      expect(await page.locator('#result pre').textContent()).toContain("kernel: 'qk-int8-pv-int8'");
      await expectAccessible(page);
    });
  });

  it('says what the device has and checks every kernel on it', async () => {
    await withPage({}, async (page) => {
      const webgpu = (await page.locator('[data-backend=webgpu]').textContent()) ?? '';
      expect(webgpu).toContain('swiftshader');
      expect(webgpu).toMatch(/Family (subgroup|base)/);
      expect(webgpu).toContain('software driver');
      const wasm = (await page.locator('[data-backend=wasm]').textContent()) ?? '';
      expect(wasm).toContain('in use');
      expect(wasm).toContain('cross-origin isolated');
      expect(wasm).toMatch(/worker threads? over one shared memory/);
      expect(await textOf(page, '#status')).toContain('runs on WebAssembly');
      // One kernel on WebGPU and two on WASM.
      expect(await checkKernels(page)).toBeGreaterThanOrEqual(3 * 15);
      const titles = await page.locator('#checks h3').allTextContents();
      expect(titles.some((title) => title.startsWith('WebGPU'))).toBe(true);
      expect(titles.filter((title) => title.startsWith('WebAssembly')).length).toBeGreaterThanOrEqual(3);
      // What is green is folded, and opens again.
      expect(await page.locator('#checks details[open]').count()).toBe(0);
      await page.locator('#checks summary').first().click();
      expect(await page.locator('#checks .pass').first().isVisible()).toBe(true);
      await expectAccessible(page);
    });
  });

  it('shows a kernel that is wrong in red, with what was wrong', async () => {
    await withPage({ in: withoutWebgpu, bound: 1e-9 }, async (page) => {
      await page.click('#check-start');
      const note = await waitForText(page, '#check-note', /^\d+ of \d+ checks failed\.$/);
      const failed = await page.locator('#checks .fail').count();
      expect(note.startsWith(`${failed} of `)).toBe(true);
      expect(failed).toBeGreaterThan(10);
      expect(await page.locator('#checks .fail').first().isVisible()).toBe(true);
      expect(await page.locator('#checks .fail').first().textContent()).toMatch(/^✗.*: wrong.*relative L1 .* limit/);
      const color = (selector: string) =>
        page
          .locator(selector)
          .first()
          .evaluate((e) => getComputedStyle(e).color);
      expect(await color('#checks .fail > span')).not.toBe(await color('#checks .pass > span'));
      expect(await color('#check-note')).toBe(await color('#checks .fail > span'));
      await expectAccessible(page);
    });
  });

  it('shows what smoothing does, and redraws when a control moves', async () => {
    await withPage({}, async (page) => {
      const codes = 'Codes, channel by channel';
      const spans = /Of (\d+) codes a channel of K spans (\d+) on average as it is, (\d+) smoothed/;
      const [, total, raw, smoothed] = (await waitForNote(page, codes, spans)).map(Number);
      expect(total).toBe(255);
      expect(smoothed).toBeGreaterThan(2 * (raw as number));

      // An offset by channel is stripes: columns of one colour, rows of many. Smoothing takes it away.
      const stripes = await rasterOf(page, 'K as it is');
      expect(stripes.colors).toBeGreaterThan(50);
      expect(stripes.rowSpread).toBeGreaterThan(3 * stripes.columnSpread);
      const flat = await rasterOf(page, 'K smoothed');
      expect(flat.colors).toBeGreaterThan(10);
      expect(flat.rowSpread).toBeLessThan(1.5 * flat.columnSpread);
      expect((await rasterOf(page, 'Scores, exact')).colors).toBeGreaterThan(50);

      // The attention map, exact and from codes on top of each other.
      const map = figureOf(page, 'Attention map, exact and quantized');
      const largest = numberIn(
        (await map.locator('.note').textContent())?.match(/difference of a weight: ([\d.e-]+)/)?.[1],
      );
      expect(largest).toBeGreaterThan(0);
      expect(largest).toBeLessThan(0.05);
      await setSlider(page, 'From exact to quantized', 0);
      expect(
        await map
          .locator('canvas')
          .last()
          .evaluate((canvas) => (canvas as HTMLElement).style.clipPath),
      ).toMatch(/ 0%\)$/);

      // Blocks that are left out: fewer, faster and with a larger error the less of the softmax is wanted.
      const blocks = 'Blocks of scores that matter';
      const ofBlocks = async (mass: number) => {
        await setSlider(page, 'Share of the softmax to keep', mass);
        const pattern =
          /Kept: (\d+) of 36, .*Error of the output ([\d.e-]+) %, of all blocks ([\d.e-]+) %\. ([\d.e-]+) times as fast/;
        const wanted = mass === 100 ? /Kept: 36 of 36/ : /Kept: ([0-9]|[12][0-9]|3[0-5]) of 36/;
        await waitForNote(page, blocks, wanted);
        const [, count, error, all, speed] = (await waitForNote(page, blocks, pattern)).map(Number);
        return { count, error, all, speed } as Record<'count' | 'error' | 'all' | 'speed', number>;
      };
      const [whole, half] = [await ofBlocks(100), await ofBlocks(50)];
      expect(whole).toMatchObject({ count: 36, error: whole.all });
      expect(half.count).toBeLessThan(whole.count);
      expect(half.error).toBeGreaterThan(2 * half.all);
      expect(half.speed).toBeGreaterThan(0);
      expect(await figureOf(page, blocks).locator('.wipe').getAttribute('aria-label')).toMatch(
        /covered\. Blocks of 16 /,
      );

      const errors = figureOf(page, 'Error of the output, by kernel and granularity').locator('svg');
      await errors.waitFor();
      const said = (await errors.getAttribute('aria-label')) ?? '';
      const errorOf = (smoothing: string) =>
        numberIn(new RegExp(`INT8 QK, FP16 PV per-block, ${smoothing}: ([\\d.]+) %`).exec(said)?.[1]);
      expect(errorOf('smoothed')).toBeLessThan(3);
      expect(errorOf('not smoothed')).toBeGreaterThan(2 * errorOf('smoothed'));
      expect(said.match(/per-(block|warp|thread)/g)).toHaveLength(16);
      // The kernels that run here, beside the families that are computed step by step.
      for (const kernel of ['int8', 'fp16']) {
        const [, error] = said.match(new RegExp(`WASM qk-int8-pv-${kernel} per token, smoothed: ([\\d.]+) %`)) ?? [];
        expect(numberIn(error)).toBeGreaterThan(0);
        expect(numberIn(error)).toBeLessThan(5);
      }

      const rms = /Root mean square ([\d.]+)/;
      const before = numberIn((await waitForNote(page, 'Difference', rms))[1]);
      await page.locator('#why-controls').getByRole('checkbox', { name: 'K' }).uncheck();
      await expect
        .poll(async () => numberIn((await figureNote(page, 'Difference').textContent())?.match(rms)?.[1]), {
          timeout: PATIENCE,
        })
        .toBeGreaterThan(2 * before);
      await page.locator('#why-controls').getByLabel('INT4').check();
      await waitForNote(page, codes, /Of 15 codes/);
      await setSlider(page, 'Offset of K, in σ', 0);
      // Nothing has an offset in this distribution, and the slider says that it does nothing.
      const distribution = page.locator('#why-controls').getByLabel('Distribution of K');
      await distribution.selectOption('normal');
      await expect.poll(() => page.getByLabel('Offset of K, in σ').isEnabled(), { timeout: PATIENCE }).toBe(false);
      await distribution.selectOption('channels');
      await expect.poll(() => page.getByLabel('Offset of K, in σ').isEnabled(), { timeout: PATIENCE }).toBe(true);
      // Q of this distribution has no offset either; its own histogram and codes are shown when asked for.
      const values = figureOf(page, 'Values').locator('svg');
      expect(await values.getAttribute('aria-label')).toMatch(/K reaches from -[\d.]+ to [\d.]+ as it is/);
      await page.locator('#why-controls').getByRole('radio', { name: 'Q', exact: true }).check();
      await waitForNote(page, codes, /Of 15 codes a channel of Q spans \d+/);
      expect(await values.getAttribute('aria-label')).toMatch(/Q reaches from -[\d.]+ to [\d.]+ as it is/);
      await page.locator('#why-controls').getByRole('radio', { name: 'K', exact: true }).check();
      // Without an offset there is nothing to smooth away.
      const [, , rawAfter, smoothedAfter] = (
        await waitForNote(page, codes, /Of (15) codes a channel of K spans (\d+) on average as it is, (\2) smoothed/)
      ).map(Number);
      expect(rawAfter).toBeGreaterThan(5);
      expect(smoothedAfter).toBe(rawAfter);
    });
  });

  it('takes Q and K from the trained encoder, on a text of the user', async () => {
    await withPage({}, async (page) => {
      await page.getByLabel('a real layer, on your text').check();
      await waitForText(page, '#why-message', /^\d+ tokens, layer 1 of 2, head 1 of 4\.$/);
      await waitForNote(page, 'Q as it is', /64 channels/);
      const spans = /a channel of K spans (\d+) on average as it is, (\d+) smoothed/;
      const [, raw, smoothed] = (await waitForNote(page, 'Codes, channel by channel', spans)).map(Number);
      // Keys of a trained model do share something.
      expect(smoothed).toBeGreaterThan(raw as number);
      await page.fill('#why-text', 'A short text of one sentence.');
      await waitForText(page, '#why-message', /^[5-9] tokens, layer 1/);
      await page.locator('#why-controls').getByLabel('Layer', { exact: true }).selectOption('1');
      await waitForNote(page, 'Q as it is', /128 channels/);
      // The chart belongs to the text that is shown, or nothing is drawn.
      await page.fill('#why-text', ' ');
      await waitForText(page, '#why-message', /Type a few words/);
      expect(await page.locator('#why-figures svg').count()).toBe(0);
      await page.locator('#why-controls').getByLabel('INT4').check();
      await page.fill('#why-text', '😀 and a word');
      await waitForNote(page, 'Scores from codes', /^INT4 codes of Q as it is and K smoothed/);
      expect(await page.locator('#why-figures svg').count()).toBeGreaterThanOrEqual(9);
    });
  });

  it('measures kernels and peers, stays responsive, and can be stopped and saved', async () => {
    await withPage({}, async (page) => {
      const peers = ['WASM exact f32', 'onnxruntime-web f32, WASM'];
      const kernels = ['WASM qk-int8-pv-int8', 'WASM qk-int8-pv-fp16', ...peers];
      await startBench(page, kernels, '512');
      const medianFrame = await page.evaluate(
        () =>
          new Promise<number>((resolve) => {
            const gaps: number[] = [];
            let last = performance.now();
            const tick = () => {
              const now = performance.now();
              gaps.push(now - last);
              last = now;
              if (gaps.length < 40) requestAnimationFrame(tick);
              else resolve(gaps.sort((a, b) => a - b)[20] as number);
            };
            requestAnimationFrame(tick);
          }),
      );
      // Nothing else that takes the whole device can be started meanwhile, and the focus stays where the reader put it.
      expect(await page.locator('#check-start').isEnabled()).toBe(false);
      await page.locator('#why-controls').getByLabel('Head dim').focus();
      // The work is in workers: frames go on as long as the machine has anything left for the page.
      expect(medianFrame).toBeLessThan(200);
      await waitForText(page, '#bench-note', /^8 measurements/);
      expect(await page.locator('#bench-progress').evaluate((bar) => (bar as HTMLProgressElement).value)).toBe(1);
      expect(await page.locator('#check-start').isEnabled()).toBe(true);
      expect(await page.evaluate(() => document.activeElement?.closest('form')?.id)).toBe('why-controls');
      const rows = await benchRows(page);
      expect(rows.map(([label, tokens]) => `${label} ${tokens}`)).toEqual(
        ['256', '512'].flatMap((tokens) => kernels.map((label) => `${label} ${tokens}`)),
      );
      for (const [label = '', , call, speed, against, error] of rows) {
        expect(call).toMatch(/^[\d.]+ m?s$/);
        expect(numberIn(speed)).toBeGreaterThan(0);
        if (peers.includes(label)) {
          expect(against).toBe('');
          expect(numberIn(error)).toBeLessThan(0.01);
        } else {
          expect(against).toMatch(/^[\d.]+×$/);
          expect(numberIn(error)).toBeLessThan(5);
          expect(numberIn(error)).toBeGreaterThan(0.05);
        }
      }
      expect(await page.locator('#bench-figures svg circle').count()).toBe(8);
      expect(await page.locator('#bench-figures svg').getAttribute('aria-label')).toMatch(/FLOP\/s/);

      const [download] = await Promise.all([page.waitForEvent('download'), page.click('#bench-download')]);
      const saved = JSON.parse(readFileSync((await download.path()) as string, 'utf8'));
      expect(saved.schema).toBe('sageattention-playground/1');
      expect(saved.results).toHaveLength(8);
      expect(saved.results.map(({ label, dtype }: { label: string; dtype: string }) => [label, dtype])).toContainEqual([
        'WASM exact f32',
        'float32',
      ]);
      expect(saved.results.every((result: { medianMs: number }) => result.medianMs > 0)).toBe(true);
      await expectAccessible(page);

      await startBench(page, kernels, '16384');
      await waitForText(page, '#bench-note', /^[1-9]\d* of \d+/);
      await page.click('#bench-stop');
      await waitForText(page, '#bench-note', /^Stopped\./);
      expect(await page.locator('#bench-start').isEnabled()).toBe(true);
      expect((await benchRows(page)).length).toBeLessThan(28);
      // Nothing goes on behind the message.
      const note = await textOf(page, '#bench-note');
      await page.waitForTimeout(300);
      expect(await textOf(page, '#bench-note')).toBe(note);
    });
  });

  it('reports a lost GPU and goes on with a new one', async () => {
    await withPage({ url: `${server.url}?debug` }, async (page) => {
      await page.waitForFunction(() => 'playground' in globalThis);
      const kernels = ['WebGPU qk-int8-pv-fp16', 'WebGPU exact f32'];
      await startBench(page, kernels, '512');
      await waitForText(page, '#bench-note', /^[2-9] of 24 steps/);
      await loseDevice(page);
      await waitForText(page, '#bench-note', /^4 measurements/);
      expect(await page.locator('#alert').textContent()).toContain('was lost');
      const rows = await benchRows(page);
      expect(rows.map(([label]) => label)).toEqual([...kernels, ...kernels]);
      for (const [label, , failure, , , error] of rows) {
        expect(error, failure).toBeDefined();
        if (label === 'WebGPU exact f32') {
          expect(numberIn(error)).toBeLessThan(0.001);
        } else {
          expect(numberIn(error)).toBeGreaterThan(0.05);
          expect(numberIn(error)).toBeLessThan(3);
        }
      }
      await page.getByRole('button', { name: 'Dismiss' }).click();
      expect(await page.locator('#alert').isVisible()).toBe(false);

      // The self-check, too, goes on: what was lost is checked again, not reported as wrong.
      await page.click('#check-start');
      await waitForText(page, '#check-note', /^[3-9] of \d+ checks/);
      await loseDevice(page);
      await waitForText(page, '#check-note', /^(1[5-9]|[2-9]\d) of \d+ checks(?! failed)/);
      expect(await page.locator('#checks .fail').allTextContents()).toEqual([]);
      expect(await page.locator('#alert').textContent()).toContain('was lost');
    });
  });

  it('reports each loss of a GPU that nothing runs on', async () => {
    await withPage({ url: `${server.url}?debug` }, async (page) => {
      await page.waitForFunction(() => 'playground' in globalThis);
      for (let loss = 0; loss < 2; loss++) {
        await loseDevice(page);
        await page.locator('#alert', { hasText: 'was lost' }).waitFor();
        await page.getByRole('button', { name: 'Dismiss' }).click();
        expect(await page.locator('#alert').isVisible()).toBe(false);
      }
    });
  });

  it('compares sentences with exact and quantized attention, and times a long text', async () => {
    await withPage({ colorScheme: 'dark' }, async (page) => {
      await page.getByRole('button', { name: 'Load the model' }).click();
      await page.waitForFunction(() => document.querySelectorAll('#model-body figure svg').length === 2);
      const similarities = async (title: string) => {
        const said =
          (await page.locator('#model-body figure', { hasText: title }).locator('svg').getAttribute('aria-label')) ??
          '';
        return [...said.matchAll(/\d and \d: (-?[\d.]+)/g)].map(([, value]) => Number(value));
      };
      const exact = await similarities('Exact attention');
      const quantized = await similarities('SageAttention');
      expect(exact).toHaveLength(15);
      // Sentences 1 and 2 mean about the same, 1 and 3 do not.
      expect(exact[0]).toBeGreaterThan((exact[1] as number) + 0.1);
      quantized.forEach((value, i) => {
        expect(Math.abs(value - (exact[i] as number))).toBeLessThan(0.02);
      });
      const facts = await page.locator('#model-body .facts dd').allTextContents();
      // Roundings of float32 are a thousandth of this: it is not exact attention twice.
      expect(numberIn(facts[0])).toBeGreaterThan(1e-4);
      expect(numberIn(facts[1])).toBeGreaterThan(0.999);
      expect(facts[3]).toMatch(/^qk-int8-pv-/);

      await page.getByRole('textbox', { name: 'Sentence 3' }).fill('My account is locked and I forgot the password.');
      await expect
        .poll(async () => (await similarities('Exact attention'))[1], { timeout: PATIENCE })
        .toBeGreaterThan(0.4);
      await page.getByRole('button', { name: 'Add a sentence' }).click();
      await page.getByRole('textbox', { name: 'Sentence 7' }).fill('One more.');
      await expect.poll(async () => (await similarities('Exact attention')).length, { timeout: PATIENCE }).toBe(21);
      await page.getByRole('button', { name: 'Remove sentence 7' }).click();
      await expect.poll(async () => (await similarities('Exact attention')).length, { timeout: PATIENCE }).toBe(15);

      // A sentence without words is in no matrix, and the others keep their numbers.
      for (const nothing of ['', '\u200b']) {
        await page.getByRole('textbox', { name: 'Sentence 3' }).fill(nothing);
        await expect.poll(async () => (await similarities('Exact attention')).length, { timeout: PATIENCE }).toBe(10);
        const said = await figureOf(page, 'SageAttention').locator('svg').getAttribute('aria-label');
        expect(said).toContain('2 and 4: ');
        expect(said).not.toMatch(/\b3\b(?!\.)/);
      }
      for (const i of [1, 2, 4, 5]) await page.getByRole('textbox', { name: `Sentence ${i}` }).fill('');
      await waitForText(page, '#model-body .message', /Two sentences are needed/);
      expect(await page.locator('#model-body figure svg').count()).toBe(0);

      await page.fill('#long-text', '\u200b');
      await page.getByRole('button', { name: 'Run', exact: true }).click();
      await expect
        .poll(() => page.locator('#model-body .message').nth(1).textContent(), { timeout: PATIENCE })
        .toBe('There are no words in this text.');
      await page.getByRole('button', { name: 'Take a chapter' }).click();
      await expect.poll(() => page.locator('#long-text').inputValue()).toContain('Alice');
      await page.locator('#model-body').getByLabel('Tokens, up to').selectOption('512');
      await page.getByRole('button', { name: 'Run', exact: true }).click();
      await page.waitForFunction(() => document.querySelectorAll('#long-results tbody tr').length === 2);
      const rows = await page
        .locator('#long-results tbody tr')
        .evaluateAll((all) => all.map((row) => [...row.querySelectorAll('td')].map((cell) => cell.textContent ?? '')));
      for (const [, , sage, peer, speedUp, error, similarity] of rows) {
        expect(sage).toMatch(/^[\d.]+ m?s$/);
        expect(peer).toMatch(/^[\d.]+ m?s$/);
        expect(speedUp).toMatch(/^[\d.]+×$/);
        expect(numberIn(error)).toBeLessThan(5);
        expect(numberIn(similarity)).toBeGreaterThan(0.998);
      }
      await expectAccessible(page);

      const said = page.locator('#model-body .message').nth(1);
      const stop = page.locator('#model-body').getByRole('button', { name: 'Stop' });
      await page.locator('#model-body').getByLabel('Tokens, up to').selectOption('2048');
      await page.getByRole('button', { name: 'Run', exact: true }).click();
      await expect.poll(() => said.textContent(), { timeout: PATIENCE }).toContain('Timing attention of layer 1');
      await stop.click();
      await expect
        .poll(() => said.textContent(), { timeout: PATIENCE })
        .toBe('Stopped. What was timed so far is below.');
      expect(await page.locator('#long-results tbody tr').count()).toBeLessThan(2);
      expect(await stop.isDisabled()).toBe(true);
      await expect.poll(() => page.getByRole('button', { name: 'Run', exact: true }).isDisabled()).toBe(false);
    });
  });

  /** Labels of charts that lie on one another, or reach out of the figure. */
  function labelsBeyond(): string[] {
    return [...document.querySelectorAll('figure svg')].flatMap((svg) => {
      const box = (svg.closest('figure') as Element).getBoundingClientRect();
      const texts = [...svg.querySelectorAll('text')]
        .map((text) => ({ name: text.textContent, at: text.getBoundingClientRect() }))
        .filter(({ name, at }) => name.trim() !== '' && at.width > 0);
      const out = texts
        .filter(({ at }) => at.left < box.left || at.right > box.right)
        .map(({ name }) => `${name} is out`);
      const over = texts.flatMap((a, i) =>
        texts.slice(i + 1).flatMap((b) => {
          const width = Math.min(a.at.right, b.at.right) - Math.max(a.at.left, b.at.left);
          const height = Math.min(a.at.bottom, b.at.bottom) - Math.max(a.at.top, b.at.top);
          return width > 1 && height > 2 ? [`${a.name} lies on ${b.name}`] : [];
        }),
      );
      return [...out, ...over];
    });
  }

  const windows = [
    ['a small phone, or a desk at 400 %', { width: 320, height: 600 }],
    ['a phone', { width: 390, height: 740 }],
    ['a tablet', { width: 768, height: 1024 }],
    ['a wide desk', { width: 1920, height: 1080 }],
  ] as const;
  for (const [name, viewport] of windows) {
    it(`fits ${name} in light and dark, is accessible, and nothing moves while it fills and measures`, async () => {
      await withPage({ colorScheme: 'light', viewport }, async (page) => {
        await figureOf(page, 'Error of the output, by kernel and granularity').locator('svg').waitFor();
        await startBench(page, ['WASM qk-int8-pv-int8', 'WASM exact f32'], '512');
        await waitForText(page, '#bench-note', /^4 measurements/);
        for (const colorScheme of ['light', 'dark'] as const) {
          await page.emulateMedia({ colorScheme });
          await expectAccessible(page);
          expect(await page.evaluate(labelsBeyond)).toEqual([]);
          const { overflow, shift } = await page.evaluate(
            () =>
              new Promise<{ overflow: number; shift: number }>((resolve) => {
                let sum = 0;
                new PerformanceObserver((list) => {
                  // What moves in answer to an input, within half a second, is meant to.
                  for (const entry of list.getEntries() as (PerformanceEntry & LayoutShift)[]) {
                    if (!entry.hadRecentInput) sum += entry.value;
                  }
                }).observe({ type: 'layout-shift', buffered: true });
                const root = document.documentElement;
                setTimeout(() => resolve({ overflow: root.scrollWidth - innerWidth, shift: sum }), 200);
              }),
          );
          expect(overflow).toBe(0);
          // Below 0.1 counts as good; the table below the chart does grow, line by line.
          expect(shift).toBeLessThan(0.02);
        }
      });
    });
  }

  it('can be used with the keyboard alone', async () => {
    await withPage({}, async (page) => {
      await page.keyboard.press('Tab');
      expect(await page.evaluate(() => document.activeElement?.textContent)).toBe('Skip to the content');
      const reached: string[] = [];
      for (let i = 0; i < 60; i++) {
        await page.keyboard.press('Tab');
        reached.push(
          await page.evaluate(() => document.activeElement?.id || document.activeElement?.textContent || ''),
        );
      }
      expect(reached).toContain('check-start');
      expect(reached).toContain('bench-start');
      expect(reached).toContain('Load the model');
      // Start hands the focus to Stop, and Stop back to Start.
      await speedField(page, 'Tokens, up to').selectOption('16384');
      await page.locator('#bench-start').focus();
      await page.keyboard.press('Enter');
      await waitForText(page, '#bench-note', /^[1-9]\d* of \d+ steps/);
      expect(await page.evaluate(() => document.activeElement?.id)).toBe('bench-stop');
      await page.keyboard.press('Enter');
      await waitForText(page, '#bench-note', /^Stopped\./);
      expect(await page.evaluate(() => document.activeElement?.id)).toBe('bench-start');
      await page.locator('#why-controls').getByLabel('Offset of K, in σ').focus();
      const note = await figureNote(page, 'K as it is').textContent();
      for (let i = 0; i < 4; i++) await page.keyboard.press('ArrowRight');
      await expect.poll(() => figureNote(page, 'K as it is').textContent(), { timeout: PATIENCE }).not.toBe(note);
    });
  });

  it('runs on WebAssembly where there is no WebGPU, and says so', async () => {
    await withPage({ in: withoutWebgpu }, async (page) => {
      expect(await textOf(page, '#status')).toMatch(/offers no WebGPU, so everything below runs on WebAssembly/);
      expect(await page.locator('[data-backend=webgpu]').textContent()).toContain('not available');
      expect(await page.locator('#speed-controls').textContent()).not.toContain('WebGPU');
      expect(await checkKernels(page)).toBeGreaterThanOrEqual(2 * 15);
      await startBench(page, ['WASM qk-int8-pv-int8'], '256');
      await waitForText(page, '#bench-note', /^1 measurements?/);
      expect(numberIn((await benchRows(page))[0]?.[5])).toBeLessThan(5);
    });
  });

  it('says so where it cannot start: opened as a file, or without one of its workers', async () => {
    const page = await withoutWebgpu.newPage();
    try {
      page.setDefaultTimeout(PATIENCE);
      await page.goto(pathToFileURL(path.join(built, 'page', 'index.html')).href);
      expect(await textOf(page, '#status')).toContain('npx sageattention playground');
      await page.route(/\/device-[\w-]+\.js$/, (route) => route.abort());
      await page.goto(server.url);
      await waitForText(page, '#alert', /script could not be loaded/);
    } finally {
      await page.close();
    }
  });

  it('carries no code of the CUDA backend, which no browser can use', () => {
    const assets = path.join(built, 'page', 'assets');
    const scripts = readdirSync(assets).filter((name) => name.endsWith('.js'));
    expect(scripts.length).toBeGreaterThan(5);
    expect(scripts.filter((name) => readFileSync(path.join(assets, name), 'utf8').includes('cuLaunchKernel'))).toEqual(
      [],
    );
  });

  it('runs from a folder of any static host, which sends no headers and has no model', async () => {
    const host: Server = createServer((request, response) => {
      const [target = '/'] = (request.url ?? '/').replace(/^\/some\/folder/, '').split('?', 1);
      serveFile(request, response, path.join(built, 'page'), target, () => {
        response.statusCode = 404;
        response.end();
      });
    });
    await new Promise<void>((resolve) => host.listen(0, '127.0.0.1', resolve));
    const { port } = host.address() as AddressInfo;
    const page = await withoutWebgpu.newPage();
    try {
      page.setDefaultTimeout(PATIENCE);
      await page.goto(`http://127.0.0.1:${port}/some/folder/`);
      await page.waitForSelector('.card');
      expect(await page.locator('[data-backend=wasm]').textContent()).toContain('Cross-Origin-Embedder-Policy');
      await waitForText(page, '#bench-note', /onnxruntime-web is not on this host/);
      await startBench(page, ['WASM qk-int8-pv-int8', 'WASM exact f32'], '256');
      await waitForText(page, '#bench-note', /^2 measurements/);
      const [quantized, exact] = await benchRows(page);
      expect(quantized?.[4]).toMatch(/^[\d.]+×$/);
      expect(numberIn(quantized?.[5])).toBeLessThan(5);
      expect(numberIn(exact?.[5])).toBeLessThan(0.01);
      await page.getByRole('button', { name: 'Load the model' }).click();
      await waitForText(page, '#model-load', /could not be loaded.*@energetic-ai\/model-embeddings-en/);
      await page.getByLabel('a real layer, on your text').check();
      await waitForText(page, '#why-message', /could not be loaded.*@energetic-ai\/model-embeddings-en/);
    } finally {
      await page.close();
      await new Promise((resolve) => host.close(resolve));
    }
  });
});
