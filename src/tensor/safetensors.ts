/**
 * Reading safetensors files: 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes.
 * Format: the safetensors project's README.
 */
import { InvalidArgumentError } from '../errors.ts';
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
  let header: unknown;
  try {
    header = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(file.subarray(8, dataStart)));
  } catch (error) {
    throw invalid('safetensors header', 'JSON', error instanceof Error ? error.message : String(error));
  }
  if (!isRecord(header)) throw invalid('safetensors header', 'a JSON object', JSON.stringify(header));
  return { header, dataStart };
}

function parseEntry(name: string, entry: unknown, data: Uint8Array): SafetensorsEntry {
  const where = `safetensors tensor '${name}'`;
  if (!isRecord(entry)) throw invalid(where, 'an object', JSON.stringify(entry));
  const { dtype, shape, data_offsets: offsets } = entry;
  if (typeof dtype !== 'string' || !Object.hasOwn(ELEMENT_BYTES, dtype)) {
    throw invalid(where, `a dtype among ${Object.keys(ELEMENT_BYTES).join(', ')}`, JSON.stringify(dtype) ?? 'none');
  }
  if (!Array.isArray(shape) || !shape.every(isIndex)) {
    throw invalid(where, 'a shape of integers >= 0', JSON.stringify(shape) ?? 'none');
  }
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isIndex)) {
    throw invalid(where, 'data_offsets [begin, end]', JSON.stringify(offsets) ?? 'none');
  }
  const [begin, end] = offsets as [number, number];
  const bytes = shape.reduce((product, size) => product * size, ELEMENT_BYTES[dtype as SafetensorsDType]);
  if (end < begin || end > data.length || end - begin !== bytes) {
    throw invalid(
      where,
      `${bytes} bytes inside the file's ${data.length} bytes of data`,
      `data_offsets [${begin},${end}]`,
    );
  }
  // `Buffer.slice` would not copy.
  return { dtype: dtype as SafetensorsDType, shape, bytes: new Uint8Array(data.subarray(begin, end)) };
}

/**
 * Parses the bytes of a safetensors file.
 *
 * @throws {InvalidArgumentError} `invalid-file` when the header is malformed, a dtype is unknown or a tensor lies outside the file
 */
export function parseSafetensors(file: Uint8Array): Safetensors {
  const { header, dataStart } = parseHeader(file);
  const data = file.subarray(dataStart);
  const tensors = new Map<string, SafetensorsEntry>();
  let metadata: Record<string, string> = {};
  for (const [name, entry] of Object.entries(header)) {
    if (name === '__metadata__') {
      if (!isRecord(entry) || !Object.values(entry).every((value) => typeof value === 'string')) {
        throw invalid('safetensors __metadata__', 'strings', JSON.stringify(entry));
      }
      metadata = entry as Record<string, string>;
    } else tensors.set(name, parseEntry(name, entry, data));
  }
  return { metadata, tensors };
}

/** The elements of a tensor as float32 (F64 and integers rounded to nearest, BOOL as 0 or 1, FP8 and halves exactly). */
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
