/** Every environment variable that the project reads stands in the table of CONTRIBUTING.md, and no other does. */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';

const FOLDERS = ['src', 'test', 'scripts', 'bench', 'playground', 'docs'];

/** A variable of `process.env`, and a name of ours in quotes. */
const READ = /\benv\??\.([A-Z][A-Z0-9_]+)\b|'(SAGEATTENTION_[A-Z_]+)'/g;

test('the table of CONTRIBUTING.md names the environment variables', () => {
  const read = new Set<string>();
  for (const folder of FOLDERS) {
    for (const entry of readdirSync(folder, { recursive: true, withFileTypes: true })) {
      if (!entry.isFile() || !entry.name.endsWith('.ts')) continue;
      const text = readFileSync(join(entry.parentPath, entry.name), 'utf8');
      for (const [, ofEnvironment, quoted] of text.matchAll(READ)) read.add((ofEnvironment ?? quoted) as string);
    }
  }
  // PATH is the system's own, and SAGEATTENTION_SOURCES a variable of a page.
  for (const other of ['PATH', 'SAGEATTENTION_SOURCES']) read.delete(other);
  const [, table = ''] = readFileSync('CONTRIBUTING.md', 'utf8').split('## Environment variables');
  const rows = (table.split('\n## ')[0] as string).split('\n').filter((line) => line.startsWith('| `'));
  const named = rows.flatMap((row) =>
    [...(row.split('|')[1] as string).matchAll(/`([A-Z_]+)`/g)].map(([, name]) => name),
  );
  expect(named.sort()).toEqual([...read].sort());
});
