/**
 * Calls of 1 to 1024 tokens in pages of headless Chromium against onnxruntime-web, cross-origin isolated (threads) and not.
 *
 *     npx tsx bench/wasm/chromium.ts [--threads 2] [--tokens 1,8,32] [--shapes 1x8x64] [--seconds 1] [--out FILE]
 */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { loadavg, tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { build } from 'esbuild';
import { ISOLATION_HEADERS, serveFile } from '../../src/cli/playground-server.ts';
import { thisMachine } from '../../src/measure/machine.ts';
import { median } from '../../src/measure/statistics.ts';
import { launchChromium, missingChromium } from '../../test/support/chromium.ts';
import type { BenchPage, PageRow } from './page.ts';

const { values: flags } = parseArgs({
  options: {
    /** In the isolated page; the other has one. */
    threads: { type: 'string', default: '2' },
    tokens: { type: 'string', default: '1,8,32,64,128,197,512,1024' },
    shapes: { type: 'string', default: '1x8x64,8x4x64,1x12x64,1x16x72' },
    seconds: { type: 'string', default: '1' },
    out: { type: 'string' },
  },
});
const MOST_WORK = 2 ** 32;
const missing = missingChromium();
if (missing !== undefined) throw new Error(missing);

const root = fileURLToPath(new URL('../..', import.meta.url));
const engine = path.join(root, 'node_modules/onnxruntime-web/dist');
const folder = mkdtempSync(path.join(tmpdir(), 'bench-page-'));
const rows: (PageRow & { isolated: boolean; threads: number })[] = [];
try {
  await build({
    absWorkingDir: root,
    entryPoints: ['bench/wasm/page.ts'],
    outdir: folder,
    bundle: true,
    splitting: true,
    format: 'esm',
    platform: 'browser',
    target: 'es2022',
    external: ['onnxruntime-node'],
    logLevel: 'error',
  });
  writeFileSync(path.join(folder, 'index.html'), '<!doctype html><script type="module" src="page.js"></script>');
  const browser = await launchChromium('none');
  for (const isolated of [true, false]) {
    const server = createServer((request, response) => {
      if (isolated) for (const [name, value] of Object.entries(ISOLATION_HEADERS)) response.setHeader(name, value);
      const [target = '/'] = (request.url ?? '/').split('?', 1);
      serveFile(request, response, folder, target, () =>
        serveFile(request, response, engine, target, () => response.writeHead(404).end()),
      );
    });
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const tab = await browser.newPage();
    tab.on('pageerror', (error) => console.error(error));
    await tab.goto(`http://127.0.0.1:${(server.address() as AddressInfo).port}/`);
    await tab.waitForFunction(() => document.title === 'ready');
    const threads = isolated ? Number(flags.threads) : 1;
    const who = await tab.evaluate(
      (count) => (globalThis as unknown as { page: BenchPage }).page.start(count),
      threads,
    );
    console.log(`${isolated ? 'isolated' : 'not isolated'}: ${who}`);
    const ratios: number[] = [];
    for (const shape of flags.shapes.split(',')) {
      const [batch, heads, headDim] = shape.split('x').map(Number) as [number, number, number];
      for (const tokens of flags.tokens.split(',').map(Number)) {
        if (2 * batch * heads * tokens * tokens * headDim > MOST_WORK) continue;
        const row = await tab.evaluate(
          ([wanted, count, ms]) => (globalThis as unknown as { page: BenchPage }).page.measure(wanted, count, ms),
          [{ batch, heads, headDim, tokens }, threads, Number(flags.seconds) * 1000] as const,
        );
        rows.push({ ...row, isolated, threads });
        ratios.push(row.ratio);
        console.log(
          `${shape.padEnd(9)} ${String(tokens).padStart(5)} ${(row.ours * 1000).toFixed(0).padStart(8)} us  ` +
            `onnxruntime-web ${row.ratio.toFixed(2)}x  L1 ${row.relativeL1.toExponential(1)}`,
        );
      }
    }
    const slower = ratios.filter((ratio) => ratio < 1).length;
    console.log(
      `least ${Math.min(...ratios).toFixed(2)}, median ${median(ratios).toFixed(2)}; slower in ${slower} of ${ratios.length}`,
    );
    await tab.close();
    server.close();
    server.closeAllConnections();
  }
  if (flags.out !== undefined) {
    const commit = execFileSync('git', ['rev-parse', 'HEAD'], { encoding: 'utf8' }).trim();
    const report = {
      ...thisMachine(),
      runtime: `Chromium ${browser.version()}`,
      loadAverage: loadavg()[0],
      commit,
      date: new Date().toISOString(),
      rows,
    };
    writeFileSync(flags.out, `${JSON.stringify(report, null, 2)}\n`);
  }
  await browser.close();
} finally {
  rmSync(folder, { recursive: true });
}
