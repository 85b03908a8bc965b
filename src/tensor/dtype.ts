/** Element types of attention's inputs and outputs. */
export type DType = 'float16' | 'bfloat16' | 'float32';

/** Element types of an attention mask: `bool` is one byte an element, nonzero = attend. */
export type MaskDType = DType | 'bool';

/** Bytes of one element. */
export const BYTES_PER_ELEMENT: Readonly<Record<MaskDType, number>> = {
  float16: 2,
  bfloat16: 2,
  float32: 4,
  bool: 1,
};

/** The largest finite float32. */
export const FLOAT32_MAX = (2 - 2 ** -23) * 2 ** 127;
