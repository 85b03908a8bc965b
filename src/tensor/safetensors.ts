/**
 * Reading safetensors files: 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes.
 * Format: the safetensors project's README.
 */
import { escaped, InvalidArgumentError, textOf, typedArrayName } from '../errors.ts';
import { decodeBfloat16 } from './formats/bfloat16.ts';
import { decodeE4m3, decodeE5m2 } from './formats/float8.ts';
import { decodeFloat16 } from './formats/float16.ts';

/** Bytes of one element of each dtype that is read. */
const ELEMENT_BYTES = {
  F64: 8,
  F32: 4,
  F16: 2,
  BF16: 2,
  I64: 8,
  I32: 4,
  I8: 1,
  U8: 1,
  BOOL: 1,
  F8_E4M3: 1,
  F8_E5M2: 1,
} as const;

export type SafetensorsDType = keyof typeof ELEMENT_BYTES;

export interface SafetensorsEntry {
  readonly dtype: SafetensorsDType;
  readonly shape: readonly number[];
  /** The tensor's own bytes, row-major; a copy that is aligned for any typed array. */
  readonly bytes: Uint8Array<ArrayBuffer>;
}

export interface Safetensors {
  readonly metadata: Readonly<Record<string, string>>;
  readonly tensors: ReadonlyMap<string, SafetensorsEntry>;
}

/** The format's own limit on headers. */
const MAX_HEADER_BYTES = 100_000_000;

const invalid = (where: string, expected: string, received: string) =>
  new InvalidArgumentError('invalid-file', where, expected, received);

/** Arrays inside arrays of a header: a tensor's entry has two. */
const MAX_DEPTH = 32;

const isIndex = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0;
const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

function parseHeader(file: Uint8Array): { header: Record<string, unknown>; dataStart: number } {
  if (file.length < 8) throw invalid('safetensors', 'at least 8 bytes', `${file.length} bytes`);
  const length = new DataView(file.buffer, file.byteOffset, 8).getBigUint64(0, true);
  if (length > BigInt(Math.min(MAX_HEADER_BYTES, file.length - 8))) {
    throw invalid('safetensors', `a header inside the file's ${file.length} bytes`, `a header of ${length} bytes`);
  }
  const dataStart = 8 + Number(length);
  let text: string;
  let header: unknown;
  try {
    text = new TextDecoder('utf-8', { fatal: true }).decode(file.subarray(8, dataStart));
  } catch (error) {
    throw invalid('safetensors header', 'UTF-8', textOf(error));
  }
  const names = outlineOf(text);
  try {
    header = JSON.parse(text);
  } catch (error) {
    throw invalid('safetensors header', 'JSON', escaped(error instanceof Error ? error.message : ''));
  }
  if (!isRecord(header)) throw invalid('safetensors header', 'a JSON object', textOf(header));
  const duplicate = names.find((name, i) => i > 0 && name === names[i - 1]);
  if (duplicate !== undefined) {
    throw invalid('safetensors header', 'each name once', `'${escaped(duplicate)}' more than once`);
  }
  return { header, dataStart };
}

/**
 * Names of the header's outermost object, sorted: `JSON.parse` keeps the last of equal ones without a word. The text
 * need not be JSON yet; brackets that nest deeper than `JSON.parse` can follow are refused here.
 */
function outlineOf(text: string): string[] {
  const names: string[] = [];
  let depth = 0;
  for (const [token, string] of text.matchAll(/("(?:[^"\\]|\\.)*")\s*:|"(?:[^"\\]|\\.)*"|[[{\]}]/g)) {
    if (token === '[' || token === '{') depth++;
    else if (token === ']' || token === '}') depth--;
    else if (string !== undefined && depth === 1) names.push(nameOf(string));
    if (depth > MAX_DEPTH) throw invalid('safetensors header', `at most ${MAX_DEPTH} levels of brackets`, 'more');
  }
  return names.sort();
}

/** A JSON string's value; the text itself where it is none, which is refused later. */
function nameOf(string: string): string {
  try {
    return JSON.parse(string);
  } catch {
    return string;
  }
}

/**
 * Tensors lie end to end over the whole data, as the format demands: none overlaps another, nothing is between or
 * behind.
 */
function requireTiling(spans: { name: string; begin: number; end: number }[], length: number): void {
  spans.sort((a, b) => a.begin - b.begin || a.end - b.end);
  let next = 0;
  for (const { name, begin, end } of spans) {
    if (begin !== next) {
      throw invalid(
        `safetensors tensor '${escaped(name)}'`,
        `data that begins where the tensor before it ends, at ${next}`,
        `data_offsets [${begin},${end}]`,
      );
    }
    next = end;
  }
  if (next !== length) {
    throw invalid('safetensors', `data that ends with the last tensor, at ${next} bytes`, `${length} bytes of data`);
  }
}

interface Described {
  readonly dtype: SafetensorsDType;
  readonly shape: readonly number[];
  readonly begin: number;
  readonly end: number;
}

function describeEntry(name: string, entry: unknown, dataBytes: number): Described {
  const where = `safetensors tensor '${escaped(name)}'`;
  if (!isRecord(entry)) throw invalid(where, 'an object', textOf(entry));
  const { dtype, shape, data_offsets: offsets } = entry;
  if (typeof dtype !== 'string' || !Object.hasOwn(ELEMENT_BYTES, dtype)) {
    throw invalid(where, `a dtype among ${Object.keys(ELEMENT_BYTES).join(', ')}`, textOf(dtype));
  }
  if (!Array.isArray(shape) || !shape.every(isIndex)) {
    throw invalid(where, 'a shape of integers >= 0', textOf(shape));
  }
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isIndex)) {
    throw invalid(where, 'data_offsets [begin, end]', textOf(offsets));
  }
  const [begin, end] = offsets as [number, number];
  const bytes = shape.reduce((product, size) => product * size, ELEMENT_BYTES[dtype as SafetensorsDType]);
  if (end < begin || end > dataBytes || end - begin !== bytes) {
    throw invalid(
      where,
      `${bytes} bytes inside the file's ${dataBytes} bytes of data`,
      `data_offsets [${begin},${end}]`,
    );
  }
  return { dtype: dtype as SafetensorsDType, shape, begin, end };
}

/**
 * Parses the bytes of a safetensors file.
 *
 * @throws {InvalidArgumentError} `invalid-file` when the header is malformed or deep, a name occurs twice, a dtype is
 *     unknown, or the tensors do not lie end to end over the whole data
 */
export function parseSafetensors(file: Uint8Array): Safetensors {
  if (typedArrayName.call(file) !== 'Uint8Array') {
    throw new InvalidArgumentError('invalid-file', 'file', "a Uint8Array of the file's bytes", textOf(file));
  }
  const { header, dataStart } = parseHeader(file);
  const data = file.subarray(dataStart);
  const described = new Map<string, Described>();
  let metadata: Record<string, string> = {};
  for (const [name, entry] of Object.entries(header)) {
    if (name === '__metadata__') {
      if (!isRecord(entry) || !Object.values(entry).every((value) => typeof value === 'string')) {
        throw invalid('safetensors __metadata__', 'strings', textOf(entry));
      }
      metadata = entry as Record<string, string>;
    } else described.set(name, describeEntry(name, entry, data.length));
  }
  requireTiling(
    [...described].map(([name, { begin, end }]) => ({ name, begin, end })),
    data.length,
  );
  const tensors = new Map<string, SafetensorsEntry>();
  for (const [name, { dtype, shape, begin, end }] of described) {
    // `Buffer.slice` would not copy.
    tensors.set(name, { dtype, shape, bytes: new Uint8Array(data.subarray(begin, end)) });
  }
  return { metadata, tensors };
}

/**
 * The elements of a tensor as float32 (F64 and integers rounded to nearest, BOOL as 0 or 1, FP8 and halves exactly).
 */
export function safetensorsToFloat32({ dtype, bytes }: SafetensorsEntry): Float32Array {
  const { buffer } = bytes;
  const target = new Float32Array(bytes.length / ELEMENT_BYTES[dtype]);
  switch (dtype) {
    case 'F64':
      target.set(new Float64Array(buffer));
      break;
    case 'F32':
      target.set(new Float32Array(buffer));
      break;
    case 'F16':
      decodeFloat16(new Uint16Array(buffer), target);
      break;
    case 'BF16':
      decodeBfloat16(new Uint16Array(buffer), target);
      break;
    case 'I64':
      target.set(Array.from(new BigInt64Array(buffer), Number));
      break;
    case 'I32':
      target.set(new Int32Array(buffer));
      break;
    case 'I8':
      target.set(new Int8Array(buffer));
      break;
    case 'U8':
    case 'BOOL':
      target.set(bytes);
      break;
    case 'F8_E4M3':
      decodeE4m3(bytes, target);
      break;
    case 'F8_E5M2':
      decodeE5m2(bytes, target);
      break;
  }
  return target;
}
