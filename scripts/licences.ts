/** The licences of what a bundle contains, as they ask to be kept beside it. */
import { readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
const inRoot = (...parts: readonly string[]) => path.join(ROOT, ...parts);

/** The package folders, `node_modules/name`, that files are from. */
function packagesOf(files: readonly string[]): string[] {
  const folders = files.flatMap((file) => {
    const match = /^(.*node_modules\/(?:@[^/]+\/)?[^/]+)\//.exec(file);
    return match === null ? [] : [match[1] as string];
  });
  return [...new Set(folders)].sort();
}

/** The notices at the heads of a package's files: where its licences are when it comes without files for them. */
async function noticesOf(folder: string, files: readonly string[]): Promise<string[]> {
  const heads = await Promise.all(
    files
      .filter((file) => file.startsWith(`${folder}/`))
      .map(async (file) => /^(?:\/\/.*\n)+/.exec(await readFile(inRoot(file), 'utf8'))?.[0] ?? ''),
  );
  const notices = heads.filter((head) => /copyright/i.test(head)).map((head) => head.replaceAll(/^\/\/ ?/gm, ''));
  return [...new Set(notices)];
}

/**
 * Name, version and licence text of every package that a bundle has files of.
 *
 * @param files paths from the root of this repository
 */
export async function licencesOf(files: readonly string[]): Promise<string> {
  const sections = await Promise.all(
    packagesOf(files).map(async (folder) => {
      const { name, version, license } = JSON.parse(await readFile(inRoot(folder, 'package.json'), 'utf8')) as {
        name: string;
        version: string;
        license?: string;
      };
      const own = (await readdir(inRoot(folder))).filter((file) => /^(licen[cs]e|notice|copying)/i.test(file));
      const texts = await Promise.all(own.map((file) => readFile(inRoot(folder, file), 'utf8')));
      if (texts.length === 0) {
        texts.push(...(await noticesOf(folder, files)));
        // This package is under the same one.
        if (license?.includes('Apache-2.0')) texts.push(await readFile(inRoot('LICENSE'), 'utf8'));
      }
      if (license === undefined && texts.length === 0) throw new Error(`${name} is bundled but states no licence`);
      return [`${name} ${version} (${license ?? 'see below'})`, ...texts.map((text) => text.trim())].join('\n\n');
    }),
  );
  const rule = `\n\n${'-'.repeat(80)}\n\n`;
  return `This folder contains the following packages, bundled.${rule}${sections.join(rule)}\n`;
}
