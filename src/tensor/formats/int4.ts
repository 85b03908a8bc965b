/**
 * Signed 4-bit integers, two a byte in two's complement: element 2i in the low nibble, 2i + 1 in the high one (the
 * order of `mma`'s .s4 fragments). The range is -8 to 7; quantization uses -7 to 7.
 */

/** Packs integers, saturating to -8..7. An odd last element leaves the high nibble 0. */
export function packInt4(source: Int8Array, bytes: Uint8Array): void {
  const clamp = (value: number) => Math.max(-8, Math.min(7, value)) & 15;
  for (let i = 0; i < source.length; i += 2) {
    const high = i + 1 < source.length ? clamp(source[i + 1] as number) : 0;
    bytes[i >>> 1] = clamp(source[i] as number) | (high << 4);
  }
}

/** The inverse of {@link packInt4}: unpacks `target.length` elements. */
export function unpackInt4(bytes: Uint8Array, target: Int8Array): void {
  for (let i = 0; i < target.length; i++) {
    // The nibble's sign bit moves to bit 31 and back, which extends it.
    target[i] = ((bytes[i >>> 1] as number) << (28 - ((i & 1) << 2))) >> 28;
  }
}
