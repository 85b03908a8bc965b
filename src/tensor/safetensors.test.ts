import { describe, expect, it } from 'vitest';
import { InvalidArgumentError } from '../errors.ts';
import { parseSafetensors, safetensorsToFloat32 } from './safetensors.ts';

function file(header: unknown, data: readonly number[] = []): Uint8Array {
  const text = new TextEncoder().encode(typeof header === 'string' ? header : JSON.stringify(header));
  const bytes = new Uint8Array(8 + text.length + data.length);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(text.length), true);
  bytes.set(text, 8);
  bytes.set(data, 8 + text.length);
  return bytes;
}

const one = (dtype: string, bytes: readonly number[], shape: readonly number[] = [1]) =>
  file({ x: { dtype, shape, data_offsets: [0, bytes.length] } }, bytes);

describe('parseSafetensors', () => {
  it.each([
    ['F64', [0, 0, 0, 0, 0, 0, 0xf8, 0x3f], 1.5],
    ['F32', [0, 0, 0x20, 0xc0], -2.5],
    ['F16', [0x00, 0x3e], 1.5],
    ['BF16', [0x20, 0xc0], -2.5],
    ['I64', [0xfe, 255, 255, 255, 255, 255, 255, 255], -2],
    ['I32', [0xfe, 255, 255, 255], -2],
    ['I8', [0xfe], -2],
    ['U8', [0xfe], 254],
    ['BOOL', [1], 1],
    ['F8_E4M3', [0x7e], 448],
    ['F8_E5M2', [0x7b], 57344],
  ] as const)('reads %s', (dtype, bytes, expected) => {
    const entry = parseSafetensors(one(dtype, bytes)).tensors.get('x');
    expect(entry?.shape).toEqual([1]);
    expect(entry && [...safetensorsToFloat32(entry)]).toEqual([expected]);
  });

  it('reads metadata, empty tensors, and files at odd addresses', () => {
    const bytes = file(
      {
        __metadata__: { kind: 'test' },
        a: { dtype: 'U8', shape: [1], data_offsets: [0, 1] },
        b: { dtype: 'F32', shape: [0, 3], data_offsets: [1, 1] },
        c: { dtype: 'F32', shape: [], data_offsets: [1, 5] },
      },
      [9, 0, 0, 0x80, 0x3f],
    );
    const shifted = new Uint8Array(bytes.length + 1);
    shifted.set(bytes, 1);
    const { metadata, tensors } = parseSafetensors(shifted.subarray(1));
    expect(metadata).toEqual({ kind: 'test' });
    const values = [...tensors].map(([name, entry]) => [name, ...safetensorsToFloat32(entry)]);
    expect(values).toEqual([['a', 9], ['b'], ['c', 1]]);
  });

  it.each([
    ['too short', Uint8Array.of(1, 2, 3)],
    ['a header longer than the file', new Uint8Array(8).fill(255)],
    ['a header that is not JSON', file('{"x":')],
    ['a header that is not UTF-8', Uint8Array.of(1, 0, 0, 0, 0, 0, 0, 0, 0xff)],
    ['a header that is no object', file([1])],
    ['metadata of other than strings', file({ __metadata__: { a: 1 } })],
    ['an entry that is no object', file({ x: 3 })],
    ['an unknown dtype', one('Q4', [0])],
    ['a prototype property as dtype', one('constructor', [0])],
    ['no dtype', file({ x: { shape: [], data_offsets: [0, 0] } })],
    ['a negative size', one('U8', [0], [-1])],
    ['no offsets', file({ x: { dtype: 'U8', shape: [] } })],
    ['a tensor beyond the end', file({ x: { dtype: 'U8', shape: [4], data_offsets: [0, 4] } }, [1])],
    ['offsets that do not fit the shape', one('F32', [0, 0], [1])],
    ['offsets in the wrong order', file({ x: { dtype: 'U8', shape: [0], data_offsets: [1, 0] } }, [1])],
  ] as const)('refuses %s', (_, bytes) => {
    let thrown: unknown;
    try {
      parseSafetensors(bytes);
    } catch (error) {
      thrown = error;
    }
    expect(thrown).toBeInstanceOf(InvalidArgumentError);
    expect((thrown as InvalidArgumentError).code).toBe('invalid-file');
  });
});
