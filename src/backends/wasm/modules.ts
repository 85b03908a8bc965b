/** The compiled kernels, and which of the two builds this engine runs correctly. */
import { BackendUnavailableError, messageOf } from '../../errors.ts';
import { loadCode } from '../load-code.ts';
import type { DotProduct, Simd } from './geometry.ts';

/** What a kernel module exports. `prepare`, `attend` and `exact` do one unit of a job and return 0 when none is left. */
export interface KernelExports {
  readonly prepare: (job: number, scratch: number) => number;
  readonly attend: (job: number, scratch: number) => number;
  readonly prepareBackward: (job: number, scratch: number) => number;
  readonly backward: (job: number, scratch: number) => number;
  readonly storeGradients: (job: number, scratch: number) => number;
  readonly exact: (job: number, scratch: number) => number;
  readonly pool: (job: number, scratch: number) => number;
  /** Whether the dot product takes two steps here, see `assembly/dot.ts`. */
  readonly twoSteps: () => number;
  /** For tests. */
  readonly setTwoSteps: (wanted: number) => void;
  /** Rows of `a` times packed columns, see {@link MatrixProduct}. */
  readonly multiply: (a: number, rows: number, b: number, inputs: number, columns: number, out: number) => void;
  readonly probe: (a: number, b: number, out: number) => void;
  readonly probeOthers: (input: number, out: number) => void;
}

/** Where the kernels come from, in hexadecimal. */
export type KernelSources = Readonly<Record<Simd, () => Promise<{ readonly HEX: string }>>>;

/** Each build is loaded when it is needed. */
const LAZY_SOURCES: KernelSources = {
  simd128: () => loadCode('wasm', () => import('./generated/simd128.ts')),
  relaxed: () => loadCode('wasm', () => import('./generated/relaxed.ts')),
};

/** Of a digit in lower case. */
const nibble = (code: number): number => (code < 0x61 ? code - 0x30 : code - 0x61 + 10);

function decodeHex(text: string): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(text.length / 2);
  for (let i = 0; i < bytes.length; i++) {
    bytes[i] = 16 * nibble(text.charCodeAt(2 * i)) + nibble(text.charCodeAt(2 * i + 1));
  }
  return bytes;
}

async function compile(simd: Simd, sources: KernelSources): Promise<WebAssembly.Module> {
  const { HEX } = await sources[simd]();
  return WebAssembly.compile(decodeHex(HEX));
}

/** How a module says that it imports a shared memory: "env", "memory", kind 2 (memory), limits with a maximum, shared. */
const SHARED_MEMORY_IMPORT = [3, 0x65, 0x6e, 0x76, 6, 0x6d, 0x65, 0x6d, 0x6f, 0x72, 0x79, 2, 3];
/** The last of these bytes where the memory has a maximum and is not shared. */
const UNSHARED = 1;

/** Bytes of a section that engines pass over. */
const CUSTOM_SECTION = 0;

/**
 * The same kernels over a memory that is not shared; their atomic instructions work on either.
 *
 * @param simd a build that {@link loadModule} found to run here
 * @param stamp a word of at most 60 letters that makes it another module: engines share the code of modules with the same bytes
 */
export async function compileUnshared(simd: Simd, sources = LAZY_SOURCES, stamp = ''): Promise<WebAssembly.Module> {
  const kernels = decodeHex((await sources[simd]()).HEX);
  const name = new TextEncoder().encode(stamp);
  const section = stamp === '' ? [] : [CUSTOM_SECTION, name.length + 1, name.length, ...name];
  const bytes = new Uint8Array(kernels.length + section.length);
  bytes.set(kernels);
  bytes.set(section, kernels.length);
  const at = bytes.findIndex((_, i) => SHARED_MEMORY_IMPORT.every((byte, j) => bytes[i + j] === byte));
  if (at < 0) throw new Error('the kernels import no shared memory');
  bytes[at + SHARED_MEMORY_IMPORT.length - 1] = UNSHARED;
  return WebAssembly.compile(bytes);
}

/** Instantiates a module over a memory. */
export async function instantiate(module: WebAssembly.Module, memory: WebAssembly.Memory): Promise<KernelExports> {
  const instance = await WebAssembly.instantiate(module, { env: { memory } });
  return instance.exports as unknown as KernelExports;
}

const PROBE_VECTORS = 256;
const probeMemory = () => new WebAssembly.Memory({ initial: 1, maximum: 1, shared: true });

/**
 * Whether the other relaxed instructions give what the kernels rely on: rounded products of Q15, 0 for byte indices of
 * 0x80, truncation that stays below all 16-bit integers where a float32 does, and a multiply-add that is exact where
 * both ways of rounding are.
 *
 * @param memory the one that `probeOthers` works on
 */
export function othersAreExact(probeOthers: KernelExports['probeOthers'], { buffer }: WebAssembly.Memory): boolean {
  const [input, out] = [256, 512];
  const q15 = [
    [32760, 1268],
    [4096, 11311],
    [32510, 64],
    [16255, -32768],
    [8, 2048],
    [8, 2047],
    [-3, 16384],
    [0, 77],
  ] as const;
  new Int16Array(buffer, input, 8).set(q15.map(([a]) => a));
  new Int16Array(buffer, input + 16, 8).set(q15.map(([, b]) => b));
  const bytes = Array.from({ length: 16 }, (_, i) => 7 * i + 1);
  const indices = [15, 0x80, 0, 0x80, 8, 0x80, 9, 0x80, 7, 0x80, 1, 0x80, 14, 0x80, 3, 0x80];
  new Uint8Array(buffer, input + 32, 16).set(bytes);
  new Uint8Array(buffer, input + 48, 16).set(indices);
  new Float32Array(buffer, input + 64, 4).set([-1.5, -4096.75, -1e20, Number.NEGATIVE_INFINITY]);
  new Float32Array(buffer, input + 80, 12).set([3, -1.5, 0.25, 4096, 5, 8, -0.5, -4096, 7, 1, 0.125, 1]);
  probeOthers(input, out);
  const matches = (actual: ArrayLike<number>, expected: readonly number[]) =>
    expected.every((value, i) => actual[i] === value);
  return (
    matches(
      new Int16Array(buffer, out, 8),
      q15.map(([a, b]) => (a * b + 0x4000) >> 15),
    ) &&
    matches(
      new Uint8Array(buffer, out + 16, 16),
      indices.map((index) => bytes[index] ?? 0),
    ) &&
    matches(new Int32Array(buffer, out + 32, 4), [-1, -4096, -(2 ** 31), -(2 ** 31)]) &&
    matches(new Float32Array(buffer, out + 48, 4), [22, -11, 0, 1 - 4096 * 4096])
  );
}

/**
 * Whether the relaxed instructions compute what the kernels rely on: the dot product the exact sums for a in -128..127
 * and b in 0..127. Node 20 with `--experimental-wasm-relaxed-simd` accepts the instruction and computes it wrongly, so
 * validation alone says nothing.
 */
export async function computesExactly(module: WebAssembly.Module): Promise<boolean> {
  const memory = probeMemory();
  return kernelsComputeExactly(await instantiate(module, memory), memory);
}

/** @param memory the one that the kernels work on */
export function kernelsComputeExactly({ probe, probeOthers }: KernelExports, memory: WebAssembly.Memory): boolean {
  if (!othersAreExact(probeOthers, memory)) return false;
  const a = new Int8Array(memory.buffer, 64, 16);
  const b = new Int8Array(memory.buffer, 128, 16);
  const out = new Int32Array(memory.buffer, 192, 4);
  // A linear congruential generator: the same vectors everywhere.
  let state = 1;
  const next = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state >>> 8;
  };
  const extremesA = [-128, 127, -127, 127];
  for (let round = 0; round < PROBE_VECTORS; round++) {
    const extreme = round < extremesA.length ? extremesA[round] : undefined;
    for (let i = 0; i < 16; i++) {
      a[i] = extreme ?? (next() % 256) - 128;
      b[i] = extreme === undefined ? next() % 128 : 127;
    }
    const start = (next() % 2001) - 1000;
    const expected = [0, 1, 2, 3].map((lane) => {
      let sum = start;
      for (let i = 0; i < 4; i++) sum += (a[4 * lane + i] as number) * (b[4 * lane + i] as number);
      return sum;
    });
    out.fill(start);
    probe(a.byteOffset, b.byteOffset, out.byteOffset);
    if (expected.some((value, lane) => out[lane] !== value)) return false;
  }
  return true;
}

/** The kernels to run. */
export interface LoadedModule {
  readonly module: WebAssembly.Module;
  readonly simd: Simd;
  /** Why the relaxed build was taken or not. */
  readonly relaxed: string;
  readonly dotProduct: DotProduct;
}

/**
 * Compiles the kernels.
 *
 * @throws {BackendUnavailableError} when the engine does not run the build that was asked for, or no build at all
 */
export async function loadModule(simd: 'auto' | Simd, sources = LAZY_SOURCES): Promise<LoadedModule> {
  let relaxed = 'not asked for';
  if (simd !== 'simd128') {
    try {
      const module = await compile('relaxed', sources);
      const memory = probeMemory();
      const kernels = await instantiate(module, memory);
      if (kernelsComputeExactly(kernels, memory)) {
        const dotProduct = kernels.twoSteps() === 0 ? 'one-step' : 'two-steps';
        return { module, simd: 'relaxed', relaxed: 'exact', dotProduct };
      }
      relaxed = 'the engine accepts the instructions and computes them wrongly';
    } catch (error) {
      relaxed =
        error instanceof BackendUnavailableError
          ? (error.received ?? error.message)
          : `the engine does not accept the instructions (${messageOf(error)})`;
    }
    if (simd === 'relaxed') {
      throw new BackendUnavailableError('wasm', `relaxed SIMD: ${relaxed}`, "Use simd: 'auto' or Node 24");
    }
  }
  try {
    const module = await compile('simd128', sources);
    // WebKit's policies let modules compile and forbid instances of them.
    await instantiate(module, probeMemory());
    return { module, simd: 'simd128', relaxed, dotProduct: '16-bit' };
  } catch (error) {
    if (error instanceof BackendUnavailableError) throw error;
    // Chromium and WebKit name the keyword, Firefox the policy.
    if (/unsafe-eval|content.security.policy|\bcsp\b/i.test(String(error))) {
      throw new BackendUnavailableError(
        'wasm',
        "the page's Content-Security-Policy forbids WebAssembly",
        "Add 'wasm-unsafe-eval' to its script-src",
        error,
      );
    }
    throw new BackendUnavailableError(
      'wasm',
      'the engine does not run WebAssembly with SIMD and threads',
      'Use Node 20 or later or a current browser',
      error,
    );
  }
}
