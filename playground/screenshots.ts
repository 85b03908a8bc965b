/**
 * Takes the pictures of the page that the README and the documentation show: `npm run playground:build`, then
 * `tsx playground/screenshots.ts`. They go to docs/images/.
 */
import { mkdir, writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { createCanvas, loadImage } from '@napi-rs/canvas';
import type { Page } from 'playwright-core';
import { servePlayground } from '../src/cli/playground-server.ts';
import { launchChromium, missingChromium } from '../test/support/chromium.ts';

const IMAGES = new URL('../docs/images/', import.meta.url);
const QUALITY = 80;

/** A part of the page, from the top of one element to the bottom of another, as WebP. */
async function capture(page: Page, name: string, from: string, to: string): Promise<void> {
  const edge = (selector: string, side: 'top' | 'bottom') =>
    page.locator(selector).evaluate((element, which) => element.getBoundingClientRect()[which] + scrollY, side);
  const { width = 0 } = page.viewportSize() ?? {};
  const y = Math.max(0, (await edge(from, 'top')) - 8);
  const clip = { x: 0, y, width, height: (await edge(to, 'bottom')) + 16 - y };
  const png = await page.screenshot({ fullPage: true, clip });
  const image = await loadImage(png);
  const canvas = createCanvas(image.width, image.height);
  canvas.getContext('2d').drawImage(image, 0, 0);
  await writeFile(new URL(`${name}.webp`, IMAGES), await canvas.encode('webp', QUALITY));
}

async function drive(page: Page): Promise<void> {
  await page.waitForSelector('.card');
  await page.waitForSelector('#speed-controls select');
  await page.getByRole('button', { name: 'Load the model' }).click();
  await page.locator('#speed-controls').getByLabel('Tokens, up to').selectOption('2048');
  await page.click('#bench-start');
  await page.waitForFunction(() =>
    /measurements?\. Times/.test(document.querySelector('#bench-note')?.textContent ?? ''),
  );
  await page.waitForFunction(() => document.querySelectorAll('#model-body figure svg').length === 2);
}

if (missingChromium() !== undefined) throw new Error(`Chromium is needed: ${missingChromium()}`);
await mkdir(IMAGES, { recursive: true });
const server = await servePlayground(fileURLToPath(new URL('../dist/playground', import.meta.url)), 0, '127.0.0.1');
const browser = await launchChromium('software');
try {
  for (const colorScheme of ['light', 'dark'] as const) {
    const page = await browser.newPage({ colorScheme, viewport: { width: 1180, height: 900 } });
    page.setDefaultTimeout(180_000);
    await page.goto(server.url);
    await drive(page);
    // The bar sticks to the top of the view, which a picture of the whole page has in its middle.
    await page.addStyleTag({ content: '.top { position: static; }' });
    await capture(page, `playground-${colorScheme}`, '#why', '#why');
    await capture(page, `playground-speed-${colorScheme}`, '#speed', '#bench-table');
    await capture(page, `playground-model-${colorScheme}`, '#model', '#model-body .facts');
    await page.close();
  }
} finally {
  await browser.close();
  await server.close();
}
