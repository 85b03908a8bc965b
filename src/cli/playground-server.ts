/** The static server of `sageattention playground`. */
import { createServer, type Server } from 'node:http';
import { type AddressInfo, isIPv6 } from 'node:net';
import sirv from 'sirv';
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
 * Serves the built page; what it lacks of {@link PLAYGROUND_ASSETS} comes from the installed packages.
 *
 * @param folder the built page
 * @param port 0: any free one
 */
export async function servePlayground(folder: string, port: number, host: string): Promise<PlaygroundServer> {
  const setHeaders = (response: { setHeader(name: string, value: string): unknown }) => {
    for (const [name, value] of Object.entries(ISOLATION_HEADERS)) response.setHeader(name, value);
    response.setHeader('X-Content-Type-Options', 'nosniff');
  };
  // `dev`: files are looked up at each request, so that one that goes while this runs is a 404 and not the end of it.
  const options = { dev: true, etag: true, setHeaders };
  const page = sirv(folder, options);
  const packages = PLAYGROUND_ASSETS.flatMap((asset) => {
    const installed = findAssetFolder(asset);
    return installed === undefined ? [] : [{ asset, serve: sirv(installed, options) }];
  });
  const server = createServer((request, response) => {
    const missing = () => {
      response.statusCode = 404;
      response.end('Not found');
    };
    page(request, response, () => {
      const { url = '/' } = request;
      const found = packages.find(({ asset }) => url.startsWith(`/${asset.folder}/`));
      const name = found === undefined ? '' : url.slice(found.asset.folder.length + 2);
      if (found === undefined || !found.asset.files.test(name)) return missing();
      // `files` allows no slash, so that nothing else of the package can be asked for.
      request.url = `/${name}`;
      found.serve(request, response, missing);
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
