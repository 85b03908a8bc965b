/** A model as it is when `create` is called: read once, so that what opens later does not depend on files, URLs or memory of the caller. */
import { EXTERNAL, type GraphProto } from '../onnx/codec.ts';
import { type CreateArguments, isWeb, type OrtModule, type OrtSessionOptions } from '../ort.ts';

export interface ExternalFile {
  readonly path: string;
  /** A `Blob` does not change. */
  readonly data: Uint8Array | Blob;
}

export interface ModelSource {
  readonly bytes: Uint8Array;
  /** True for memory of the caller's, who may write into it later. */
  readonly isBorrowed: boolean;
  /** Where onnxruntime looks for external data that `externalData` does not have; undefined where it reads no files. */
  readonly folder: string | undefined;
  readonly options: OrtSessionOptions;
}

/** @throws what is wrong with the arguments, or with reading */
export async function loadModel(ort: OrtModule, args: CreateArguments): Promise<ModelSource> {
  const options = { ...sessionOptionsOf(args) };
  const [model, offset, length] = args;
  if (typeof model === 'string') {
    const folder = isWeb(ort) ? undefined : folderOf(model);
    return { bytes: await loadBytes(model), isBorrowed: false, folder, options };
  }
  const borrowed = { isBorrowed: true, folder: undefined, options };
  if (model instanceof Uint8Array) return { ...borrowed, bytes: model };
  const start = typeof offset === 'number' ? offset : 0;
  const size = typeof length === 'number' ? length : (model as ArrayBufferLike).byteLength - start;
  return { ...borrowed, bytes: new Uint8Array(model as ArrayBuffer, start, size) };
}

/** The same with memory of its own. */
export async function ownSource(ort: OrtModule, source: ModelSource): Promise<ModelSource> {
  const { bytes, isBorrowed, options } = source;
  const externalData =
    options.externalData && (await Promise.all(options.externalData.map((file) => ownFile(ort, file))));
  return {
    ...source,
    bytes: isBorrowed ? bytes.slice() : bytes,
    isBorrowed: false,
    options: { ...options, ...(externalData === undefined ? {} : { externalData }) },
  };
}

/** onnxruntime-node takes no names. */
async function ownFile(ort: OrtModule, file: NonNullable<OrtSessionOptions['externalData']>[number]) {
  const [path, data] = typeof file === 'string' ? [file, file] : [file.path, file.data];
  if (typeof data === 'string') return isWeb(ort) ? { path, data: await loadBytes(data) } : file;
  if (data instanceof ArrayBuffer) return { path, data: new Uint8Array(data.slice(0)) };
  return data instanceof Uint8Array ? { path, data: data.slice() } : file;
}

/** Behind the model; behind its place in a buffer too. */
function sessionOptionsOf([model, ...rest]: CreateArguments): OrtSessionOptions {
  const isBuffer = typeof model !== 'string' && !ArrayBuffer.isView(model);
  const at = isBuffer ? rest.findIndex((arg) => typeof arg !== 'number') : 0;
  const options = rest[at] ?? {};
  if (rest[at] === null || !isPlainObject(options)) throw new TypeError('the session options are no object');
  return options as OrtSessionOptions;
}

function isPlainObject(value: unknown): boolean {
  if (typeof value !== 'object' || value === null || ArrayBuffer.isView(value)) return false;
  return !(value instanceof ArrayBuffer) && Object.prototype.toString.call(value) !== '[object SharedArrayBuffer]';
}

async function loadBytes(location: string): Promise<Uint8Array> {
  const fs = fileSystem();
  if (fs !== undefined && !/^(https?|data|blob):/.test(location)) return await fs.readFile(location);
  const response = await fetch(location);
  if (!response.ok) throw new Error(`${location}: ${response.status} ${response.statusText}`);
  return new Uint8Array(await response.arrayBuffer());
}

/** A module of Node where there is one; bundles for browsers stay free of it. */
const fileSystem = () =>
  globalThis.process?.getBuiltinModule?.('node:fs/promises') as typeof import('node:fs/promises') | undefined;

function folderOf(path: string): string {
  const end = Math.max(path.lastIndexOf('/'), path.lastIndexOf('\\'));
  return end < 0 ? '.' : path.slice(0, Math.max(end, 1));
}

/**
 * onnxruntime takes external data from the folder of a model's name and, where the name is a link, from the folder of its target; but
 * of a model in memory from the one folder that it is told. Where all files are in the target's, as in Hugging Face's cache, that is
 * the folder, and their names there are the names in the graph.
 */
export async function followLinks(source: ModelSource, path: string, graph: GraphProto): Promise<ModelSource> {
  const fs = fileSystem();
  const entries = graph.initializer
    .filter(({ dataLocation }) => dataLocation === EXTERNAL)
    .flatMap(({ externalData }) => externalData.filter(({ key }) => key === 'location'));
  if (fs === undefined || source.folder === undefined || entries.length === 0) return source;
  const target = await fs.realpath(path);
  const folder = folderOf(target);
  if (target === (await fs.realpath(source.folder)) + target.slice(folder.length)) return source;
  const names = new Map<string, string>();
  for (const name of new Set(entries.map(({ value }) => value))) {
    const file = /(^|[/\\])\.\.([/\\]|$)/.test(name)
      ? undefined
      : await fs.realpath(`${source.folder}/${name}`).catch(() => undefined);
    if (file === undefined || folderOf(file) !== folder) return source;
    names.set(name, file.slice(folder.length + 1));
  }
  for (const entry of entries) entry.value = names.get(entry.value) as string;
  return { ...source, folder };
}

/** Tells whether files have changed since: a file that was written again has a new time. */
export async function stateOf(folder: string, files: Iterable<string>): Promise<string> {
  const states = [...files].map(async (file) => {
    const { dev, ino, size, mtimeNs } = (await fileSystem()?.stat(`${folder}/${file}`, { bigint: true })) ?? {};
    return [file, dev, ino, size, mtimeNs].join(' ');
  });
  return (await Promise.all(states)).join('\n');
}

/** onnxruntime looks for external data here when a model comes from memory. */
export function withFolder(options: OrtSessionOptions, folder: string): OrtSessionOptions {
  const session = (options.extra?.session ?? {}) as Record<string, unknown>;
  const named = { ...session, model_external_initializers_file_folder_path: folder };
  return { ...options, extra: { ...options.extra, session: named } };
}
