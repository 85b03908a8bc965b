/**
 * Functions of a C library as data: a table of symbols and parameters, which koffi binds and fakes of tests implement.
 * Each library has a table of its own; see api.ts for the driver's.
 */
import { BackendUnavailableError, MissingPackageError } from '../../../errors.ts';
import { importOptional, loadFailure, REINSTALL } from '../../../optional-package.ts';

/**
 * `u8`, `u32`, `s32`: an integer of that width (enums are `u32` or `s32`). `u64`: `size_t`, device addresses and opaque
 * handles. `memory`: a pointer to host memory, as a view (read or written during the call only), as the address of
 * memory that stays (see {@link LibraryFacts.addressOf}), or null. `bytes64`, `bytes128`: a struct of so many bytes by
 * value (`CUipcMemHandle`, `ncclUniqueId`).
 */
export interface ParameterTypes {
  readonly u8: number;
  readonly u32: number;
  readonly s32: number;
  readonly u64: bigint | number;
  readonly memory: ArrayBufferView | bigint | null;
  readonly bytes64: Uint8Array;
  readonly bytes128: Uint8Array;
}

export type ParameterKind = keyof ParameterTypes;
/** Structs by value, with their bytes. */
const STRUCT_BYTES = { bytes64: 64, bytes128: 128 } as const;
export type StructKind = keyof typeof STRUCT_BYTES;
const isStruct = (kind: ParameterKind): kind is StructKind => kind in STRUCT_BYTES;

/** Every function under the name of the library's header. All return a status, a 32-bit integer. */
export type FunctionTable = Readonly<
  Record<
    string,
    {
      /** The exported symbol: a version suffix is part of the ABI. */
      readonly symbol: string;
      readonly parameters: readonly ParameterKind[];
      /** Absent from older libraries, and not needed for what the library is mainly for. */
      readonly optional?: true;
    }
  >
>;

type Values<Kinds extends readonly ParameterKind[]> = { -readonly [I in keyof Kinds]: ParameterTypes[Kinds[I]] };

/** The functions of a table; each returns its status. */
export type Functions<Table extends FunctionTable> = {
  readonly [Name in keyof Table]: (...values: Values<Table[Name]['parameters']>) => number;
};

/** What there is of a loaded library besides its functions. */
interface LibraryFacts<Table extends FunctionTable> {
  /** What was loaded, for `doctor`. */
  readonly library: string;
  /** False for an optional function that this library does not export; calling it then throws. */
  has(name: keyof Table): boolean;
  /**
   * Address of a buffer's first byte. It holds as long as the buffer lives: storage of an `ArrayBuffer` never moves.
   * Whoever hands it to the library keeps the buffer referenced.
   */
  addressOf(buffer: ArrayBuffer): bigint;
  /** A copy of the bytes at an address that the library gave. */
  bytesAt(address: bigint, byteLength: number): Uint8Array<ArrayBuffer>;
  /** The NUL-terminated text at an address that the library gave. */
  textAt(address: bigint): string;
}

/** A loaded library. */
export type BoundLibrary<Table extends FunctionTable> = Functions<Table> & LibraryFacts<Table>;

/** What this file uses of koffi; the package is an optional peer, so its own types are not imported. */
export interface Koffi {
  load(path: string): {
    func(symbol: string, result: string, parameters: readonly unknown[]): (...values: unknown[]) => number;
    unload(): void;
  };
  address(value: ArrayBuffer | ArrayBufferView): bigint;
  array(type: string, length: number): unknown;
  struct(members: Readonly<Record<string, unknown>>): unknown;
  readonly decode: { (address: bigint, type: unknown): unknown; string(address: bigint): string };
}

const KOFFI_TYPES: Readonly<Record<Exclude<ParameterKind, StructKind>, string>> = {
  u8: 'uint8_t',
  u32: 'uint32_t',
  s32: 'int32_t',
  u64: 'uint64_t',
  memory: 'void *',
};

/**
 * Binds every function of a table to a library.
 *
 * @param missing the error of calling an optional function that the library does not export
 * @throws {Error} koffi's, when the library cannot be loaded or lacks a function that is not optional
 */
export function bindLibrary<const Table extends FunctionTable>(
  koffi: Koffi,
  path: string,
  table: Table,
  missing: (symbol: string) => Error,
): BoundLibrary<Table> {
  const library = koffi.load(path);
  const made: Partial<Record<StructKind, unknown>> = {};
  const typeOf = (kind: ParameterKind): unknown => {
    if (!isStruct(kind)) return KOFFI_TYPES[kind];
    made[kind] ??= koffi.struct({ bytes: koffi.array('uint8_t', STRUCT_BYTES[kind]) });
    return made[kind];
  };
  const bound: Record<string, (...values: never[]) => number> = {};
  const absent = new Set<keyof Table>();
  for (const [name, { symbol, parameters, optional }] of Object.entries(table)) {
    try {
      const call = library.func(symbol, 'int32_t', parameters.map(typeOf));
      const structs = parameters.flatMap((kind, i) => (isStruct(kind) ? [i] : []));
      bound[name] =
        structs.length === 0
          ? call
          : (...values) => call(...values.map((value, i) => (structs.includes(i) ? { bytes: value } : value)));
    } catch (error) {
      if (optional !== true) throw error;
      absent.add(name);
      bound[name] = () => {
        throw missing(symbol);
      };
    }
  }
  const facts: LibraryFacts<Table> = {
    library: path,
    has: (name) => !absent.has(name),
    addressOf: (buffer) => koffi.address(buffer),
    bytesAt: (address, byteLength) =>
      (koffi.decode(address, koffi.array('uint8_t', byteLength)) as Uint8Array<ArrayBuffer>).slice(),
    textAt: (address) => koffi.decode.string(address),
  };
  return { ...(bound as unknown as Functions<Table>), ...facts };
}

/** @throws {MissingPackageError | BackendUnavailableError} it is not installed, or does not load */
export async function importKoffi(): Promise<Koffi> {
  try {
    const module = (await importOptional('koffi')) as Koffi & { readonly default?: Koffi };
    return module.default ?? module;
  } catch (error) {
    const failure = loadFailure('koffi', error);
    throw failure === undefined
      ? new MissingPackageError('koffi', "backend 'cuda'", error)
      : new BackendUnavailableError('cuda', failure, REINSTALL, error);
  }
}
