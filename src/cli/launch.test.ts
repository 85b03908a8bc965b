import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { run } from './testing/run.ts';

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'sageattention-launch-'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

async function script(name: string, text: string): Promise<string> {
  const file = path.join(folder, name);
  await writeFile(file, text);
  return file;
}

describe('sageattention launch', () => {
  it('starts a process for each rank, with what torchrun sets and the arguments', async () => {
    const file = await script(
      'say.mjs',
      `import { writeFileSync } from 'node:fs';
       const { RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT } = process.env;
       writeFileSync(new URL(RANK + '.json', import.meta.url), JSON.stringify([WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, process.argv.slice(2)]));`,
    );
    expect(await run('launch', '-n', '3', file, '--depth', '4')).toMatchObject({ code: 0, err: '' });
    const said = await Promise.all(
      [0, 1, 2].map(async (rank) => JSON.parse(await readFile(path.join(folder, `${rank}.json`), 'utf8'))),
    );
    for (const [rank, [size, local, host, port, args]] of said.entries()) {
      expect([size, local, host, args]).toEqual(['3', `${rank}`, '127.0.0.1', ['--depth', '4']]);
      expect(port).toBe(said[0][3]);
    }
  });

  it('ends all where one fails, and says which', async () => {
    const file = await script(
      'fail.mjs',
      "const { RANK } = process.env; if (RANK === '1') process.exit(3); else setTimeout(() => undefined, 600_000);",
    );
    const { code, err } = await run('launch', '-n', '2', file);
    expect(code).toBe(1);
    expect(err).toMatch(/error: rank 1 of 2 ended with exit code 3/);
  });
});
