/**
 * Takes the pictures of the page that the README and the documentation show: `npm run playground:build`, then
 * `tsx playground/screenshots.ts`. They go to docs/images/; the one that links to the page show goes to playground/public/.
 * With `first`, only those of the first screen.
 */
import { mkdir, writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import type { Page } from 'playwright-core';
import { webpOf } from '../scripts/webp.ts';
import { servePlayground } from '../src/cli/playground-server.ts';
import { launchChromium, missingChromium } from '../test/support/chromium.ts';

const IMAGES = new URL('../docs/images/', import.meta.url);

/** A part of the page, from the top of one element to the bottom of another, as WebP. */
async function capture(page: Page, name: string, from: string, to: string): Promise<void> {
  const edge = (selector: string, side: 'top' | 'bottom') =>
    page.locator(selector).evaluate((element, which) => element.getBoundingClientRect()[which] + scrollY, side);
  const { width = 0 } = page.viewportSize() ?? {};
  const y = Math.max(0, (await edge(from, 'top')) - 8);
  const clip = { x: 0, y, width, height: (await edge(to, 'bottom')) + 16 - y };
  const png = await page.screenshot({ fullPage: true, clip });
  await writeFile(new URL(`${name}.webp`, IMAGES), await webpOf(png));
}

/** A view of the page as it is on a screen, as WebP or, for programs that know no other, as PNG. */
async function captureView(page: Page, file: URL): Promise<void> {
  const png = await page.screenshot();
  await writeFile(file, file.pathname.endsWith('.png') ? png : await webpOf(png));
}

const FIRST_SCREENS = [
  { file: new URL('playground-first-light.webp', IMAGES), width: 1280, height: 760, colorScheme: 'light' },
  { file: new URL('playground-first-dark.webp', IMAGES), width: 1280, height: 760, colorScheme: 'dark' },
  { file: new URL('playground-phone-light.webp', IMAGES), width: 390, height: 1380, colorScheme: 'light' },
  { file: new URL('public/share.png', import.meta.url), width: 1200, height: 630, colorScheme: 'light' },
] as const;

/** With a part of the mean taken away: stripes are still to be seen, and the error is on its way. */
async function firstScreens(): Promise<void> {
  for (const { file, width, height, colorScheme } of FIRST_SCREENS) {
    const page = await browser.newPage({ colorScheme, viewport: { width, height } });
    page.setDefaultTimeout(180_000);
    await page.goto(`${server.url}?smoothing=30`);
    await page.waitForSelector('#quick-run:not([hidden])');
    await page.waitForFunction(() => /%/.test(document.querySelector('.readout strong')?.textContent ?? ''));
    await captureView(page, file);
    await page.close();
  }
}

async function drive(page: Page): Promise<void> {
  await page.waitForSelector('.card');
  await page.waitForSelector('#speed-controls select');
  await page.locator('#speed-controls').getByLabel('Tokens, up to').selectOption('2048');
  await page.click('#bench-start');
  await page.waitForFunction(() =>
    /measurements?\. Times/.test(document.querySelector('#bench-note')?.textContent ?? ''),
  );
}

if (missingChromium() !== undefined) throw new Error(`Chromium is needed: ${missingChromium()}`);
await mkdir(IMAGES, { recursive: true });
const server = await servePlayground(fileURLToPath(new URL('../dist/playground', import.meta.url)), 0, '127.0.0.1');
const browser = await launchChromium('software');
try {
  await firstScreens();
  for (const colorScheme of process.argv.includes('first') ? [] : (['light', 'dark'] as const)) {
    const page = await browser.newPage({ colorScheme, viewport: { width: 1180, height: 900 } });
    page.setDefaultTimeout(180_000);
    await page.goto(server.url);
    await drive(page);
    // The bar sticks to the top of the view, which a picture of the whole page has in its middle.
    await page.addStyleTag({ content: '.top { position: static; }' });
    await capture(page, `playground-${colorScheme}`, '#why', '#why');
    await capture(page, `playground-speed-${colorScheme}`, '#speed', '#bench-table');
    await page.close();
  }
} finally {
  await browser.close();
  await server.close();
}
