/** A program of Node ends when its calls are done: workers that wait for the next one do not keep it. */
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';

const ROOT = fileURLToPath(new URL('../../..', import.meta.url));

// So long that workers take part.
const PROGRAM = `
import { sageattn, setBackend, tensor } from './src/index.ts';
import { createWasmBackend } from './src/backends/wasm/index.ts';

await setBackend(createWasmBackend({ threads: 3 }));
const make = () => tensor(Float32Array.from({ length: 2 * 512 * 64 }, Math.random), [1, 2, 512, 64]);
const call = () => sageattn(make(), make(), make());
await call();
await Promise.all([call(), call(), call()]);
console.log('done');
`;

test('idle workers do not keep a process', async () => {
  const run = promisify(execFile);
  const args = ['--import', 'tsx', '--input-type=module', '--eval', PROGRAM];
  const { stdout } = await run(process.execPath, args, { cwd: ROOT, timeout: 60_000 });
  expect(stdout).toBe('done\n');
});
