/** Opens the model package from disk. */
import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { loadSentenceModel, MissingPackageError, MODEL_PACKAGE, type SentenceModel } from './library.ts';

/** The folder of the model's files: beside this package, or in the user's project. None when it is not installed. */
export function findModelFolder(): string | undefined {
  const places = [import.meta.url, pathToFileURL(path.join(process.cwd(), 'package.json'))];
  for (const place of places) {
    try {
      const file = createRequire(place).resolve(`${MODEL_PACKAGE.name}/package.json`);
      return path.join(path.dirname(file), MODEL_PACKAGE.folder);
    } catch {
      // Not there; the next place may have it.
    }
  }
  return undefined;
}

/** @throws {MissingPackageError} when the model package is not installed */
export async function openSentenceModel(): Promise<SentenceModel> {
  const folder = findModelFolder();
  if (folder === undefined) throw new MissingPackageError(MODEL_PACKAGE.name, 'the demo');
  return loadSentenceModel((name) => readFile(path.join(folder, name)));
}
