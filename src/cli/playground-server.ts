/** The static server of `sageattention playground`. */
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import { type AddressInfo, isIPv6 } from 'node:net';
import send from 'send';
import { findAssetFolder, PLAYGROUND_ASSETS } from './playground-assets.ts';

/** With these a page is cross-origin isolated, which browsers ask for before they share memory between threads. */
export const ISOLATION_HEADERS = {
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Embedder-Policy': 'require-corp',
} as const;

export interface PlaygroundServer {
  readonly url: string;
  close(): Promise<void>;
}

/**
 * Answers with a file of a folder, with ranges and validators; a broken download closes its file. A path that is
 * no file of the folder, or hidden, is `missing`.
 *
 * @param target path below the folder as the request gives it, percent-encoded
 */
export function serveFile(
  request: IncomingMessage,
  response: ServerResponse,
  folder: string,
  target: string,
  missing: () => void,
): void {
  send(request, target, { root: folder, dotfiles: 'ignore' })
    .on('error', (error: { status?: number }) => {
      // 416 has headers of its own and no body; everything else is no file that is given away.
      if (error.status !== 416) return missing();
      response.statusCode = 416;
      response.end();
    })
    .on('directory', missing)
    .pipe(response);
}

/**
 * Serves the built page; those {@link PLAYGROUND_ASSETS} that it lacks come from the installed packages.
 *
 * @param folder the built page
 * @param port 0: any free one
 */
export async function servePlayground(folder: string, port: number, host: string): Promise<PlaygroundServer> {
  const packages = PLAYGROUND_ASSETS.flatMap((asset) => {
    const installed = findAssetFolder(asset);
    return installed === undefined ? [] : [{ asset, installed }];
  });
  const server = createServer((request, response) => {
    for (const [name, value] of Object.entries(ISOLATION_HEADERS)) response.setHeader(name, value);
    response.setHeader('X-Content-Type-Options', 'nosniff');
    const missing = () => {
      response.statusCode = 404;
      response.end('Not found');
    };
    const [target = '/'] = (request.url ?? '/').split('?', 1);
    serveFile(request, response, folder, target, () => {
      const found = packages.find(({ asset }) => target.startsWith(`/${asset.folder}/`));
      const name = found === undefined ? '' : target.slice(found.asset.folder.length + 2);
      // `files` allows no slash, so that nothing else of the package can be asked for.
      if (found === undefined || !found.asset.files.test(name)) return missing();
      serveFile(request, response, found.installed, `/${name}`, missing);
    });
  });
  await listen(server, port, host);
  const { port: taken } = server.address() as AddressInfo;
  // Every address is one of this machine's; a v6 address stands in brackets.
  const name = host === '0.0.0.0' || host === '::' ? 'localhost' : isIPv6(host) ? `[${host}]` : host;
  return {
    url: `http://${name}:${taken}/`,
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      }),
  };
}

function listen(server: Server, port: number, host: string): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once('error', reject);
    server.listen(port, host, () => {
      server.off('error', reject);
      resolve();
    });
  });
}
