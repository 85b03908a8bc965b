import { writeFile } from 'node:fs/promises';
import { UserError } from './errors.ts';
import { messageOf } from './library.ts';
import { print } from './terminal.ts';

/** Writes a file that the user named. */
export async function writeReport(file: string, content: string): Promise<void> {
  try {
    await writeFile(file, `${content}\n`);
  } catch (error) {
    throw new UserError(`cannot write ${file}: ${messageOf(error)}`);
  }
  print(`Wrote ${file}`);
}
