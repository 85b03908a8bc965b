/** The table of driver functions against `cuda.h`, and koffi's calls against a C library. */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import koffi from 'koffi';
import { afterAll, describe, expect } from 'vitest';
import { itNeeds } from '../../../../test/support/requirement.ts';
import * as api from './api.ts';
import { DRIVER_FUNCTIONS, type DriverFunctionName, STRUCTS } from './api.ts';
import { bindLibrary, type Koffi, type ParameterKind, type StructKind } from './bind.ts';
import { bindDriver } from './load.ts';
import { TENSOR_MAP_VALUES } from './tensor-map.ts';

function findHeader(): string | undefined {
  const versions = existsSync('/usr/local') ? readdirSync('/usr/local').filter((name) => name.startsWith('cuda')) : [];
  return [process.env.CUDA_HOME, process.env.CUDA_PATH, ...versions.map((name) => `/usr/local/${name}`)]
    .filter((root) => root !== undefined)
    .map((root) => join(root, 'include', 'cuda.h'))
    .find((path) => existsSync(path));
}

const header = findHeader();
const compiler = ['cc', 'gcc', 'clang'].find((name) => spawnSync(name, ['--version']).status === 0);
const noCompiler = compiler === undefined ? 'a C compiler (cc)' : undefined;
const noHeader = header === undefined ? 'cuda.h of the CUDA toolkit (set CUDA_HOME)' : noCompiler;

const scratch = mkdtempSync(join(tmpdir(), 'cuda-abi-'));
afterAll(() => rmSync(scratch, { recursive: true, force: true }));

function compile(name: string, source: string, options: readonly string[]): string {
  const file = join(scratch, `${name}.c`);
  const output = join(scratch, name);
  writeFileSync(file, source);
  const { status, stderr } = spawnSync(compiler as string, [...options, file, '-o', output], { encoding: 'utf8' });
  if (status !== 0) throw new Error(stderr);
  return output;
}

const NAMES = Object.keys(DRIVER_FUNCTIONS) as DriverFunctionName[];

/** The kind that a C parameter type has in the table. */
function kindOf(type: string): ParameterKind {
  if (type.includes('*')) return 'memory';
  if (/\b(size_t|cuuint64_t|CUdeviceptr|unsigned long long)\b/.test(type)) return 'u64';
  if (
    /\b(CUcontext|CUstream|CUevent|CUmodule|CUfunction|CUmemoryPool|CUgraph|CUgraphExec|CUgraphNode|CUlinkState)\b/.test(
      type,
    )
  )
    return 'u64';
  if (/\bCUipcMemHandle\b/.test(type)) return 'bytes64';
  if (/\bunsigned char\b/.test(type)) return 'u8';
  if (/\b(unsigned int|cuuint32_t|CUstreamCaptureMode)\b/.test(type)) return 'u32';
  // CUdevice is an int, and so is every enum.
  return 's32';
}

describe('the table of driver functions', () => {
  itNeeds(noHeader)('has the parameters that cuda.h declares, in its order', () => {
    const text = readFileSync(header as string, 'utf8').replaceAll(/\/\*[\s\S]*?\*\//g, '');
    for (const name of NAMES) {
      const declaration = text.match(new RegExp(`CUresult\\s+CUDAAPI\\s+${name}\\s*\\(([^)]*)\\)`));
      const kinds = (declaration?.[1] ?? 'not declared').split(',').map((parameter) => kindOf(parameter.trim()));
      const table = [...DRIVER_FUNCTIONS[name].parameters];
      // A device address travels as `void *` there and as the number it is here.
      if (name === 'cuTensorMapEncodeTiled') kinds[3] = 'u64';
      expect(table, name).toEqual(kinds);
    }
  });

  itNeeds(noHeader)('has the symbols, structs and values of cuda.h', () => {
    const mapped = NAMES.map((name) => `check_symbol(${name}, "${DRIVER_FUNCTIONS[name].symbol}");`);
    const constants = Object.entries(api)
      .filter(([name, value]) => /^CU(DA)?_/.test(name) && typeof value === 'number')
      .map(([name, value]) => `check((long long)${name} == ${value}LL, "${name}");`);
    const structs = Object.entries(STRUCTS).flatMap(([name, { size, ...fields }]) => [
      `check(sizeof(${name}) == ${size}, "sizeof ${name}");`,
      ...Object.entries(fields).map(
        ([field, offset]) => `check(offsetof(${name}, ${field}) == ${offset}, "${name}.${field}");`,
      ),
    ]);
    const { elementType, interleave, swizzle, l2Promotion, outOfBounds } = TENSOR_MAP_VALUES;
    const enums = Object.entries({
      CU_TENSOR_MAP_DATA_TYPE_UINT8: elementType.u8,
      CU_TENSOR_MAP_DATA_TYPE_INT32: elementType.s32,
      CU_TENSOR_MAP_DATA_TYPE_FLOAT16: elementType.f16,
      CU_TENSOR_MAP_DATA_TYPE_FLOAT32: elementType.f32,
      CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: elementType.bf16,
      CU_TENSOR_MAP_INTERLEAVE_NONE: interleave.none,
      CU_TENSOR_MAP_INTERLEAVE_16B: interleave['16B'],
      CU_TENSOR_MAP_INTERLEAVE_32B: interleave['32B'],
      CU_TENSOR_MAP_SWIZZLE_NONE: swizzle.none,
      CU_TENSOR_MAP_SWIZZLE_32B: swizzle['32B'],
      CU_TENSOR_MAP_SWIZZLE_64B: swizzle['64B'],
      CU_TENSOR_MAP_SWIZZLE_128B: swizzle['128B'],
      CU_TENSOR_MAP_L2_PROMOTION_NONE: l2Promotion.none,
      CU_TENSOR_MAP_L2_PROMOTION_L2_64B: l2Promotion['64B'],
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B: l2Promotion['128B'],
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B: l2Promotion['256B'],
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE: outOfBounds.zero,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA: outOfBounds.nan,
    }).map(([name, value]) => `check((long long)${name} == ${value}LL, "${name}");`);
    const program = compile(
      'facts',
      `#include <cuda.h>
       #include <stddef.h>
       #include <stdio.h>
       #include <string.h>
       static int wrong = 0;
       static void check(int right, const char *what) { if (!right) { wrong = 1; puts(what); } }
       static void symbol(const char *real, const char *ours) {
         /* CUDA 12.8 added a second version of this one; the first is the same for what is asked here. */
         if (strcmp(real, "cuEventElapsedTime_v2") == 0) real = "cuEventElapsedTime";
         if (strcmp(real, ours) != 0) { wrong = 1; printf("%s is %s\\n", ours, real); }
       }
       #define TEXT(x) #x
       #define check_symbol(name, ours) symbol(TEXT(name), ours)
       int main(void) { ${[...mapped, ...constants, ...structs, ...enums].join('\n')} return wrong; }`,
      ['-std=c11', `-I${join(header as string, '..')}`],
    );
    const { status, stdout } = spawnSync(program, { encoding: 'utf8' });
    expect(stdout).toBe('');
    expect(status).toBe(0);
    expect(constants.length).toBeGreaterThan(20);
  });
});

const C_TYPES: Readonly<Record<Exclude<ParameterKind, StructKind>, string>> = {
  u8: 'uint8_t',
  u32: 'uint32_t',
  s32: 'int32_t',
  u64: 'uint64_t',
  memory: 'void *',
};
const STRUCT_TYPES: Readonly<Record<StructKind, string>> = { bytes64: 'Bytes64', bytes128: 'Bytes128' };
const isStruct = (kind: ParameterKind): kind is StructKind => kind in STRUCT_TYPES;

/**
 * A library with every symbol of the table: each function notes its arguments as 64-bit words (the first of a struct) and returns their
 * number.
 */
function echoLibrary(): string {
  const functions = Object.values(DRIVER_FUNCTIONS).map(({ symbol, ...entry }) => {
    const parameters: readonly ParameterKind[] = entry.parameters;
    const declared = parameters
      .map((kind, i) => `${isStruct(kind) ? STRUCT_TYPES[kind] : C_TYPES[kind]} a${i}`)
      .join(', ');
    const wordOf = (kind: ParameterKind, i: number) => (isStruct(kind) ? `a${i}.words[0]` : `(uint64_t)a${i}`);
    const notes = parameters.map((kind, i) => `seen[${i}] = ${wordOf(kind, i)};`).join(' ');
    return `int32_t ${symbol}(${declared}) { ${notes} name = "${symbol}"; return ${parameters.length}; }`;
  });
  const source = `#include <stdint.h>
    typedef struct { uint64_t words[8]; } Bytes64;
    uint64_t seen[16]; const char *name = "";
    ${functions.join('\n')}
    int32_t read_seen(uint64_t *out, const char **called) { for (int i = 0; i < 16; i++) out[i] = seen[i]; *called = name; return 0; }
    int32_t write_byte(void *to, uint64_t at, uint8_t value) { ((uint8_t *)to)[at] = value; return 0; }`;
  return compile('echo.so', source, ['-shared', '-fPIC', '-O1']);
}

describe('calls through koffi', () => {
  itNeeds(noCompiler)('pass every argument unchanged, pointers, 64-bit and signed values alike', () => {
    const path = echoLibrary();
    const bound = bindDriver(koffi as unknown as Koffi, path);
    const readSeen = koffi.load(path).func('read_seen', 'int32_t', ['void *', 'void *']);
    const seen = new BigUint64Array(16);
    const called = new BigUint64Array(1);
    for (const name of NAMES) {
      expect(bound.has(name)).toBe(true);
      const { parameters, symbol } = DRIVER_FUNCTIONS[name];
      const buffer = new ArrayBuffer(8192);
      const values = (parameters as readonly ParameterKind[]).map((kind, i) => {
        if (kind === 'u8') return 200 + i;
        if (kind === 'u32') return 0xf000_0000 + i;
        if (kind === 's32') return -1_000_000 - i;
        if (kind === 'bytes64') return Uint8Array.from({ length: 64 }, (_, byte) => 17 * i + byte);
        if (kind === 'u64') return i % 2 === 0 ? 0xfedc_ba98_7654_3210n + BigInt(i) : 2 ** 52 + i;
        // The three ways of giving memory: a view, an address, nothing.
        return [new Uint8Array(buffer, 16 * i), bound.addressOf(buffer) + BigInt(100 + i), null][i % 3];
      });
      const expected = values.map((value) => {
        if (value === null) return 0n;
        if (value instanceof Uint8Array && value.buffer !== buffer) {
          return new DataView(value.buffer).getBigUint64(0, true);
        }
        if (value instanceof Uint8Array) return bound.addressOf(buffer) + BigInt(value.byteOffset);
        return BigInt.asUintN(64, BigInt(value as number | bigint));
      });
      const invoke = bound[name] as (...values: unknown[]) => number;
      expect(invoke(...values), name).toBe(parameters.length);
      readSeen(seen, called);
      expect([...seen.slice(0, values.length)], name).toEqual(expected);
      expect(bound.textAt(called[0] as bigint)).toBe(symbol);
      expect(bound.bytesAt(called[0] as bigint, symbol.length)).toEqual(new TextEncoder().encode(symbol));
    }
  });

  itNeeds(noCompiler)('write through views and addresses into memory that does not move', () => {
    const library = koffi.load(echoLibrary());
    const writeByte = library.func('write_byte', 'int32_t', ['void *', 'uint64_t', 'uint8_t']);
    const buffer = new ArrayBuffer(1 << 20);
    const address = koffi.address(buffer);
    const bytes = new Uint8Array(buffer);
    // Garbage collections in between: storage of an ArrayBuffer must stay where it is.
    const rubbish: Uint8Array[] = [];
    for (let i = 0; i < 64; i++) {
      rubbish.push(new Uint8Array(1 << 18));
      writeByte(address, 1000 * i, 100 + i);
      expect(bytes[1000 * i]).toBe(100 + i);
      expect(koffi.address(buffer)).toBe(address);
    }
    writeByte(bytes.subarray(5), 1, 7);
    expect(bytes[6]).toBe(7);
    const shared = new Uint8Array(new SharedArrayBuffer(256));
    writeByte(shared, 3, 9);
    expect(shared[3]).toBe(9);
    expect(rubbish).toHaveLength(64);
  });

  itNeeds(noCompiler)(
    'bind any table of functions: one with a struct by value, another with a function that is missing',
    () => {
      const path = compile(
        'other.so',
        `#include <stdint.h>
       #include <string.h>
       typedef struct { char internal[128]; } Id;
       static Id last;
       int32_t make_id(Id *id) { for (int i = 0; i < 128; i++) id->internal[i] = (char)(200 + i); return 0; }
       int32_t join_group(void **group, int32_t size, Id id, int32_t rank) { last = id; *group = &last; return 1000 * size + rank; }
       int32_t read_id(void *group, uint8_t *bytes) { memcpy(bytes, group, 128); return 0; }`,
        ['-shared', '-fPIC'],
      );
      const table = {
        makeId: { symbol: 'make_id', parameters: ['memory'] },
        joinGroup: { symbol: 'join_group', parameters: ['memory', 's32', 'bytes128', 's32'] },
        readId: { symbol: 'read_id', parameters: ['u64', 'memory'] },
        leaveGroup: { symbol: 'leave_group', parameters: ['u64'], optional: true },
      } as const;
      const missing = (symbol: string) => new TypeError(`no ${symbol}`);
      const library = bindLibrary(koffi as unknown as Koffi, path, table, missing);
      const id = new Uint8Array(128);
      expect(library.makeId(id)).toBe(0);
      expect([...id]).toEqual(Array.from(id, (_, i) => (200 + i) & 255));
      const group = new BigUint64Array(1);
      expect(library.joinGroup(group, 8, id, 3)).toBe(8003);
      const read = new Uint8Array(128);
      expect(library.readId(group[0] as bigint, read)).toBe(0);
      expect(read).toEqual(id);
      expect([library.has('joinGroup'), library.has('leaveGroup'), library.library]).toEqual([true, false, path]);
      expect(() => library.leaveGroup(1n)).toThrow('no leave_group');
      const needed = { leaveGroup: { symbol: 'leave_group', parameters: ['u64'] } } as const;
      expect(() => bindLibrary(koffi as unknown as Koffi, path, needed, missing)).toThrow(/leave_group/);
    },
  );

  itNeeds(noCompiler)('name a missing library, and mark what an older driver lacks', () => {
    expect(() => bindDriver(koffi as unknown as Koffi, 'no-such-driver.so.1')).toThrow(/shared library/);
    const optional = Object.entries(DRIVER_FUNCTIONS).filter(([, entry]) => 'optional' in entry);
    const required = Object.values(DRIVER_FUNCTIONS).filter((entry) => !('optional' in entry));
    const source = required.map(({ symbol }) => `int ${symbol}(void) { return 0; }`).join('\n');
    const old = bindDriver(koffi as unknown as Koffi, compile('old.so', source, ['-shared', '-fPIC']));
    for (const [name] of optional) expect(old.has(name as DriverFunctionName), name).toBe(false);
    expect(old.has('cuInit')).toBe(true);
    expect(() => old.cuMemFreeAsync(1n, 2n)).toThrow(/does not export cuMemFreeAsync/);
  });
});
