/** What `src/backends/cuda/generator.ts` holds where the code is built or bundled. */
import { createHash } from 'node:crypto';
import { readdir, readFile } from 'node:fs/promises';
import path from 'node:path';

/** SHA-256 of every file of a folder with this extension: two builds that could make different kernels differ in it. */
export async function generatorDigest(folder: string, extension: string): Promise<string> {
  const hash = createHash('sha256');
  const files = (await readdir(folder, { recursive: true })).filter((name) => name.endsWith(extension)).sort();
  for (const name of files) hash.update(name).update(await readFile(path.join(folder, name)));
  return hash.digest('hex');
}
