/**
 * Where records of tuning are kept: IndexedDB in pages and workers, a file in Node (`$XDG_CACHE_HOME/sageattention/`). Nothing depends
 * on them: where there is no such place, or it cannot be used, there is no record.
 */

import { cacheFolder } from '../../../cache-folder.ts';

/** Records by the name of what they were measured on. */
export interface TuningStore {
  read(name: string): Promise<string | undefined>;
  write(name: string, text: string): Promise<void>;
}

const DATABASE = 'sageattention';
const OBJECTS = 'webgpu-tuning';
const FILE = 'webgpu-tuning.json';

/** The browser or runtime, with its version. */
export function engineName(): string {
  const { navigator, process } = globalThis as {
    readonly navigator?: { readonly userAgent?: string };
    readonly process?: { readonly versions?: { readonly node?: string } };
  };
  return process?.versions?.node === undefined ? (navigator?.userAgent ?? 'unknown') : `Node ${process.versions.node}`;
}

const requested = <T>(request: IDBRequest<T>): Promise<T> =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

async function inDatabase<T>(mode: IDBTransactionMode, use: (objects: IDBObjectStore) => IDBRequest<T>): Promise<T> {
  const opening = indexedDB.open(DATABASE, 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore(OBJECTS);
  const database = await requested(opening);
  try {
    return await requested(use(database.transaction(OBJECTS, mode).objectStore(OBJECTS)));
  } finally {
    database.close();
  }
}

const DATABASE_STORE: TuningStore = {
  read: (name) => inDatabase<string | undefined>('readonly', (objects) => objects.get(name)),
  write: async (name, text) => {
    await inDatabase('readwrite', (objects) => objects.put(text, name));
  },
};

/** @param folder of the file */
export function fileStore(folder: string): TuningStore {
  // A free `process` makes bundlers for browsers look for a polyfill.
  const { process } = globalThis as { readonly process: NodeJS.Process };
  const fs = process.getBuiltinModule('node:fs/promises');
  const path = process.getBuiltinModule('node:path');
  const file = path.join(folder, FILE);
  const all = async (): Promise<Record<string, string>> => {
    try {
      return JSON.parse(await fs.readFile(file, 'utf8')) as Record<string, string>;
    } catch {
      return {};
    }
  };
  return {
    read: async (name) => {
      const text = (await all())[name];
      return typeof text === 'string' ? text : undefined;
    },
    async write(name, text) {
      await fs.mkdir(folder, { recursive: true });
      // Whole or not at all: another process may read or write at the same time.
      const own = `${file}.${process.pid}`;
      await fs.writeFile(own, JSON.stringify({ ...(await all()), [name]: text }));
      await fs.rename(own, file);
    },
  };
}

/** The place of this environment; undefined where it has none. */
function findStore(): TuningStore | undefined {
  const folder = cacheFolder();
  if (folder !== undefined) return fileStore(folder);
  const { indexedDB } = globalThis as { readonly indexedDB?: IDBFactory };
  return indexedDB === undefined ? undefined : DATABASE_STORE;
}

export async function readTuning(name: string, store = findStore()): Promise<string | undefined> {
  try {
    return await store?.read(name);
  } catch {
    return undefined;
  }
}

/** @returns whether it is kept */
export async function writeTuning(name: string, text: string, store = findStore()): Promise<boolean> {
  try {
    await store?.write(name, text);
    return store !== undefined;
  } catch {
    return false;
  }
}
