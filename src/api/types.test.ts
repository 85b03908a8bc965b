/** What the types of calls promise; `tsc` checks this file. */
import { describe, expect, expectTypeOf, it } from 'vitest';
import {
  type AttentionResult,
  emptyTensor,
  type Float16ArrayLike,
  fromFloat32,
  type KeyValueCache,
  prepareKeyValue,
  sageattn,
  sageattnQkInt8PvFp16,
  sageattnVarlen,
  type Tensor,
  type TensorData,
  tensor,
  transpose,
} from '../index.ts';

const SHAPE = [1, 1, 4, 8];
const floats = () => tensor(Float32Array.from({ length: 32 }, Math.random), SHAPE);
const words = () => tensor(new Uint16Array(32), SHAPE, { dtype: 'bfloat16' });

describe('types of tensors', () => {
  it('name the dtype that the array, or the option, says', () => {
    expectTypeOf(floats()).toEqualTypeOf<Tensor<'float32'>>();
    expectTypeOf(floats().data).toEqualTypeOf<Float32Array>();
    expectTypeOf(words()).toEqualTypeOf<Tensor<'bfloat16'>>();
    expectTypeOf(words().data).toEqualTypeOf<Uint16Array>();
    expectTypeOf(tensor(new Uint8Array(4), [4])).toEqualTypeOf<Tensor<'bool'>>();
    expectTypeOf(emptyTensor(SHAPE, 'float16').data).toEqualTypeOf<Uint16Array | Float16ArrayLike>();
    expectTypeOf(fromFloat32(new Float32Array(32), SHAPE, 'bfloat16')).toEqualTypeOf<Tensor<'bfloat16'>>();
    expectTypeOf(transpose(floats(), [0, 2, 1, 3])).toEqualTypeOf<Tensor<'float32'>>();
  });

  it('are the general ones where the compiler cannot know', () => {
    const some = (data: TensorData) => tensor(data, SHAPE);
    expectTypeOf(some).returns.toEqualTypeOf<Tensor>();
    expectTypeOf<Tensor['data']>().toEqualTypeOf<TensorData>();
    expectTypeOf<Tensor<'float32'>>().toExtend<Tensor>();
    expectTypeOf<Tensor>().not.toExtend<Tensor<'float32'>>();
  });
});

describe('types of calls', () => {
  it('carry the array of the output', async () => {
    const output = await sageattn(floats(), floats(), floats(), { backend: 'wasm' });
    expectTypeOf(output.data).toEqualTypeOf<Float32Array>();
    expect(output.data).toBeInstanceOf(Float32Array);
    const half = await sageattnQkInt8PvFp16(words(), words(), words(), { backend: 'wasm' });
    expectTypeOf(half.data).toEqualTypeOf<Uint16Array>();
    expect(half.data).toBeInstanceOf(Uint16Array);
  });

  it('the logsumexp is float32 whatever the dtype of the output', async () => {
    const result = await sageattn(words(), words(), words(), { backend: 'wasm', returnLse: true });
    expectTypeOf(result).toEqualTypeOf<AttentionResult<Tensor<'bfloat16'>>>();
    expectTypeOf(result.lse.data).toEqualTypeOf<Float32Array>();
    expect(result.lse.data).toBeInstanceOf(Float32Array);
    const packed = () => tensor(new Float32Array(32), [4, 1, 8]);
    const varlen = await sageattnVarlen(packed(), packed(), packed(), [0, 4], [0, 4], { backend: 'wasm' });
    expectTypeOf(varlen.data).toEqualTypeOf<Float32Array>();
  });

  it('carry it through prepared keys', async () => {
    const cache = await prepareKeyValue(floats(), floats(), { backend: 'wasm' });
    expectTypeOf(cache).toEqualTypeOf<KeyValueCache<Tensor<'float32'>>>();
    const output = await cache.attend(floats());
    expect(output).toHaveProperty('data');
    cache.dispose();
  });
});
