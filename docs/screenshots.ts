/**
 * Takes the pictures of the documentation site: `npm run docs:site`, then `tsx docs/screenshots.ts`. They go to docs/images/.
 */
import { existsSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { webpOf } from '../scripts/webp.ts';
import { launchChromium, missingChromium } from '../test/support/chromium.ts';

const IMAGES = new URL('images/', import.meta.url);
const INDEX = new URL('site/index.html', import.meta.url);

if (missingChromium() !== undefined) throw new Error(`Chromium is needed: ${missingChromium()}`);
if (!existsSync(INDEX)) throw new Error('there is no site yet: npm run docs:site');
const browser = await launchChromium('none');
try {
  for (const colorScheme of ['light', 'dark'] as const) {
    const page = await browser.newPage({ colorScheme, viewport: { width: 1180, height: 760 } });
    await page.goto(INDEX.href);
    await page.locator('#tsd-nav-container').getByText('Guides').first().click();
    await page.keyboard.press('/');
    await page.locator('dialog input').fill('KV cache');
    await page.locator('[role=option]').first().waitFor();
    const png = await page.screenshot({ animations: 'disabled' });
    await writeFile(new URL(`site-${colorScheme}.webp`, IMAGES), await webpOf(png));
    await page.close();
  }
} finally {
  await browser.close();
}
