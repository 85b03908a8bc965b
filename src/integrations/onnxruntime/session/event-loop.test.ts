import { execFile } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { buildSync } from 'esbuild';
import { expect, it } from 'vitest';

/** What a program in a process of its own prints: here the test runner keeps the event loop alive. */
async function printed(work: string): Promise<string> {
  const folder = mkdtempSync(join(tmpdir(), 'event-loop-'));
  try {
    const module = new URL('./event-loop.ts', import.meta.url).pathname;
    buildSync({ entryPoints: [module], outfile: join(folder, 'event-loop.mjs'), format: 'esm' });
    const program = join(folder, 'program.mjs');
    writeFileSync(program, `import { holdingEventLoop } from './event-loop.mjs';\n${work}`);
    return (await promisify(execFile)(process.execPath, [program])).stdout.trim();
  } finally {
    rmSync(folder, { recursive: true });
  }
}

it('has a handle while the work goes on, and none behind it', async () => {
  const text = await printed(`
    const handles = () => process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length;
    const seen = [handles()];
    const result = await holdingEventLoop(async () => { seen.push(handles()); return 'done'; });
    const failure = await holdingEventLoop(async () => { throw new Error('no'); }).catch((error) => error.message);
    console.log([...seen, handles(), result, failure].join());`);
  expect(text).toBe('0,1,0,done,no');
});
