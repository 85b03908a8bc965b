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

const u8 = (begin: number, end: number) => ({ dtype: 'U8', shape: [end - begin], data_offsets: [begin, end] });

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
    ['tensors that overlap', file({ x: u8(0, 2), y: u8(1, 3) }, [1, 2, 3])],
    ['two tensors of the same bytes', file({ x: u8(0, 2), y: u8(0, 2) }, [1, 2])],
    ['a hole between tensors', file({ x: u8(0, 1), y: u8(2, 3) }, [1, 2, 3])],
    ['data before the first tensor', file({ x: u8(1, 2) }, [1, 2])],
    ['data behind the last tensor', file({ x: u8(0, 1) }, [1, 2])],
    ['a name that occurs twice', file(`{"x":${JSON.stringify(u8(0, 1))},"x":${JSON.stringify(u8(0, 1))}}`, [1])],
    [
      'the same name written differently',
      file(`{"x":${JSON.stringify(u8(0, 0))},"\\u0078":${JSON.stringify(u8(0, 0))}}`),
    ],
    ['a header of deep brackets', file('['.repeat(200_000) + ']'.repeat(200_000))],
    ['an entry of deep brackets', file(`{"x":${'{"a":'.repeat(5000)}1${'}'.repeat(5000)}}`)],
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

  it('takes brackets and names inside strings for what they are', () => {
    const text = `{"__metadata__":{"a":"[[[{{{\\"x\\":"},"x":${JSON.stringify(u8(0, 1))}}`;
    expect(parseSafetensors(file(text, [7])).metadata).toEqual({ a: '[[[{{{"x":' });
  });

  it('escapes names in errors, which may be printed to a terminal', () => {
    const name = `\u001b]0;title\u0007\u202e${'long'.repeat(1000)}`;
    const error = (() => {
      try {
        parseSafetensors(file({ [name]: 3 }));
        return undefined;
      } catch (thrown) {
        return thrown as InvalidArgumentError;
      }
    })();
    expect(error?.message).toContain('\\u{1b}]0;title\\u{7}\\u{202e}');
    expect(error?.message.length).toBeLessThan(400);
  });
});
