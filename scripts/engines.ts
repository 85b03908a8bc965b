/**
 * Browser engines for the tests besides Chromium's, from Debian's packages: Firefox, and WebKit (Safari's engine) as WebKitGTK
 * with its small browser. `tsx scripts/engines.ts` installs what is missing and prints where it is.
 */
import { existsSync, readdirSync } from 'node:fs';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { aptInstall, isRoot } from './software-gpu.ts';

export const ENGINES = ['firefox', 'webkit'] as const;

export type Engine = (typeof ENGINES)[number];

const PACKAGES: Readonly<Record<Engine, readonly string[]>> = {
  firefox: ['firefox-esr'],
  // WebKitGTK draws on a display, of which the virtual one is enough.
  webkit: ['webkit2gtk-driver', 'xvfb'],
};

export const WEBKIT_DRIVER = '/usr/bin/WebKitWebDriver';
export const VIRTUAL_DISPLAY = '/usr/bin/Xvfb';

/** WebKitGTK's MiniBrowser, in the folder of its newest version. */
function miniBrowser(): string | undefined {
  const libraries = '/usr/lib';
  const architectures = existsSync(libraries)
    ? readdirSync(libraries).filter((name) => name.endsWith('-linux-gnu'))
    : [];
  return architectures
    .flatMap((name) => readdirSync(path.join(libraries, name)).map((file) => path.join(libraries, name, file)))
    .filter((folder) => /\/webkit2?gtk-[\d.]+$/.test(folder))
    .map((folder) => path.join(folder, 'MiniBrowser'))
    .filter(existsSync)
    .sort()
    .at(-1);
}

/** The browser's executable, if all that it needs is there. */
function locateEngine(engine: Engine): string | undefined {
  if (engine === 'firefox') {
    return ['/usr/bin/firefox-esr', '/usr/bin/firefox'].find(existsSync);
  }
  return existsSync(WEBKIT_DRIVER) && existsSync(VIRTUAL_DISPLAY) ? miniBrowser() : undefined;
}

/**
 * The browser's executable; it is installed where it is missing and this process may.
 *
 * @throws when it cannot be installed, naming what to install
 */
export function ensureEngine(engine: Engine): string {
  const there = locateEngine(engine);
  if (there !== undefined) return there;
  const remedy = `install the Debian packages ${PACKAGES[engine].join(' and ')} (as root: npx tsx scripts/engines.ts)`;
  if (process.platform !== 'linux' || !isRoot()) throw new Error(`${engine} is not installed; ${remedy}`);
  try {
    aptInstall(PACKAGES[engine]);
  } catch (cause) {
    throw new Error(`${engine} was not installed (${cause instanceof Error ? cause.message : cause}); ${remedy}`, {
      cause,
    });
  }
  const executable = locateEngine(engine);
  if (executable === undefined) throw new Error(`${engine} is not where it is expected after its installation`);
  return executable;
}

if (process.argv[1] !== undefined && import.meta.url === pathToFileURL(process.argv[1]).href) {
  for (const engine of ENGINES) console.log(`${engine}: ${ensureEngine(engine)}`);
}
