/**
 * Compiled kernels on disk: one file for each kernel, compute capability and driver. The command `compile` makes such a folder ahead of
 * time, and a process adds what it compiles. Nothing depends on the files: what is missing, damaged or refused by the
 * driver is compiled anew.
 */
import { cacheFolder } from '../../../cache-folder.ts';
import type { KernelModule } from '../launches/launch.ts';

/** Bytes of a folder beyond which the files used longest ago go. */
const KEPT_BYTES = 2 ** 28;
const DIGEST_BYTES = 32;
const FILE = /^[0-9a-f]{40}\.sm_\d+(\.cuda\d+)?\.(cubin|ptx)$/;

/** What the file of a kernel is named by. */
export interface KernelPlace {
  /** major * 10 + minor of the device. */
  readonly computeCapability: number;
  /** 1000 * major + 10 * minor of the CUDA version of the driver that compiled it; undefined for any driver. */
  readonly driverVersion?: number | undefined;
}

/** The same device with any driver. */
export const anyDriver = ({ computeCapability }: KernelPlace): KernelPlace => ({ computeCapability });

const node = () => ({
  fs: process.getBuiltinModule('node:fs'),
  path: process.getBuiltinModule('node:path'),
  crypto: process.getBuiltinModule('node:crypto'),
});

const sha256 = (data: string | Uint8Array) => node().crypto.createHash('sha256').update(data).digest();

/**
 * The name that the files of a kernel begin with.
 *
 * @param generator digest of the code that makes kernels; without it the PTX is made and names the kernel
 */
export const digestOf = ({ id, ptx }: KernelModule, generator: string | undefined): string =>
  sha256(generator === undefined ? ptx() : `${generator}\n${id}`)
    .toString('hex')
    .slice(0, 40);

const nameOf = (digest: string, { computeCapability, driverVersion }: KernelPlace, kind: 'cubin' | 'ptx') =>
  `${digest}.sm_${computeCapability}${driverVersion === undefined ? '' : `.cuda${driverVersion}`}.${kind}`;

/** A kernel as it was found. */
export type FoundKernel =
  | { readonly kind: 'cubin'; readonly bytes: Uint8Array<ArrayBuffer> }
  | { readonly kind: 'ptx'; readonly text: string };

/** A folder of compiled kernels. */
export class KernelFiles {
  readonly folder: string;
  /** Bytes of the folder, once it has been counted. */
  #bytes: number | undefined;

  constructor(folder: string) {
    this.folder = folder;
  }

  /** The contents of a file that are as they were written; it counts as used now. */
  #read(name: string): Uint8Array<ArrayBuffer> | undefined {
    const { fs, path } = node();
    const file = path.join(this.folder, name);
    try {
      const whole = fs.readFileSync(file);
      // Machine code of which a bit has changed would run.
      const bytes = whole.subarray(0, -DIGEST_BYTES);
      if (whole.length <= DIGEST_BYTES || !sha256(bytes).equals(whole.subarray(-DIGEST_BYTES))) return undefined;
      try {
        fs.utimesSync(file, new Date(), new Date());
      } catch {
        // A folder that an application brings may be read-only.
      }
      return Uint8Array.from(bytes);
    } catch {
      return undefined;
    }
  }

  /** The best that there is of a kernel: machine code of this driver, of any driver, PTX. */
  find(digest: string, place: KernelPlace): FoundKernel | undefined {
    const portable = anyDriver(place);
    const bytes = this.#read(nameOf(digest, place, 'cubin')) ?? this.#read(nameOf(digest, portable, 'cubin'));
    if (bytes !== undefined) return { kind: 'cubin', bytes };
    const ptx = this.#read(nameOf(digest, portable, 'ptx'));
    return ptx === undefined ? undefined : { kind: 'ptx', text: new TextDecoder().decode(ptx) };
  }

  /**
   * Keeps a kernel. The file appears whole or not at all: other processes read and write there too.
   *
   * @throws {Error} of Node, where the folder cannot be written
   */
  write(digest: string, place: KernelPlace, kind: 'cubin' | 'ptx', bytes: Uint8Array): string {
    const { fs, path } = node();
    fs.mkdirSync(this.folder, { recursive: true });
    const name = nameOf(digest, place, kind);
    const own = path.join(this.folder, `${name}.${process.pid}`);
    try {
      fs.writeFileSync(own, Buffer.concat([bytes, sha256(bytes)]));
      fs.renameSync(own, path.join(this.folder, name));
    } catch (error) {
      fs.rmSync(own, { force: true });
      throw error;
    }
    return name;
  }

  /** {@link write} of what this process has compiled; a folder that cannot be written is left as it is. */
  keep(digest: string, place: KernelPlace, kind: 'cubin' | 'ptx', bytes: Uint8Array): void {
    try {
      this.write(digest, place, kind, bytes);
      this.#bytes = (this.#bytes ?? this.#count()) + bytes.length;
      if (this.#bytes > KEPT_BYTES) this.#prune();
    } catch {
      // The driver's own cache is left.
    }
  }

  #files(): { readonly file: string; readonly bytes: number; readonly used: number }[] {
    const { fs, path } = node();
    return fs
      .readdirSync(this.folder)
      .filter((name) => FILE.test(name))
      .map((name) => {
        const file = path.join(this.folder, name);
        const { size, mtimeMs } = fs.statSync(file);
        return { file, bytes: size, used: mtimeMs };
      });
  }

  #count(): number {
    return this.#files().reduce((sum, { bytes }) => sum + bytes, 0);
  }

  /** Deletes files to half of the bound, so that it is seldom done. */
  #prune(): void {
    const { fs } = node();
    const files = this.#files().sort((a, b) => b.used - a.used);
    let kept = 0;
    for (const { file, bytes } of files) {
      kept += bytes;
      if (kept > KEPT_BYTES / 2) fs.rmSync(file, { force: true });
    }
    this.#bytes = undefined;
  }
}

/** The folder of this process: `SAGEATTENTION_KERNELS`, which may be empty for none, else one in the user's cache. */
export function defaultKernelFolder(): string | undefined {
  const cache = cacheFolder();
  if (cache === undefined) return undefined;
  const named = process.env.SAGEATTENTION_KERNELS;
  return named === undefined ? `${cache}/cuda` : named === '' ? undefined : named;
}
