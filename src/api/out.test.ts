/** The option `out`: the output in a tensor of the caller's. */
import { afterAll, expect, it } from 'vitest';
import { Random, runSeed } from '../../test/support/random.ts';
import { createWasmBackendOn } from '../backends/wasm/backend.ts';
import { createAttention, prepareKeyValue, sageattn, sageattnVarlen, setBackend, tensor } from '../index.ts';
import { fromFloat32 } from '../tensor/access.ts';
import { elementCount, type Tensor } from '../tensor/tensor.ts';

const seed = runSeed();
const random = new Random(seed);
const draw = (...shape: number[]) => tensor(random.normals(elementCount(shape)), shape);
/** Poisoned, inside a larger array. */
const poisoned = (...shape: number[]) => {
  const count = elementCount(shape);
  const whole = new Float32Array(count + 10).fill(Number.NaN);
  return { whole, out: tensor(whole.subarray(5, 5 + count), shape) };
};
afterAll(() => setBackend(createWasmBackendOn({})));

// Short calls, several threads, one worker with a memory of its own, this thread for all.
it.each([
  ['this thread', {}],
  ['threads', { shortWork: 0 }],
  ['one worker', { shortWork: 0, kind: 'worker' as const }],
  ['no workers', { shortWork: 0, kind: 'inline' as const }],
])(`is written and returned: %s (seed ${seed})`, async (_, parts) => {
  const backend = createWasmBackendOn({ threads: 2 }, parts);
  await setBackend(backend);
  const [q, k, v] = [draw(2, 3, 5, 16), draw(2, 3, 70, 16), draw(2, 3, 70, 24)];
  const expected = await sageattn(q, k, v, { backend: 'wasm', returnLse: true });
  const check = ({ whole, out }: ReturnType<typeof poisoned>, made: { output: Tensor; lse?: Tensor }) => {
    expect(made.output).toBe(out);
    expect(whole.subarray(5, -5)).toEqual(expected.output.data);
    expect(whole.subarray(0, 5)).toEqual(new Float32Array(5).fill(Number.NaN));
    expect(whole.subarray(-5)).toEqual(new Float32Array(5).fill(Number.NaN));
  };
  const first = poisoned(2, 3, 5, 24);
  const made = await sageattn(q, k, v, { backend: 'wasm', returnLse: true, out: first.out });
  check(first, made);
  expect(made.lse.data).toEqual(expected.lse.data);

  const second = poisoned(2, 3, 5, 24);
  using attention = await createAttention({ q, k, v }, { backend: 'wasm' });
  check(second, await attention.run({ q, k, v }, { out: second.out }));

  using cache = await prepareKeyValue(k, v, { backend: 'wasm' });
  const held = await cache.attend(q);
  const third = poisoned(2, 3, 5, 24);
  expect(await cache.attend(q, { out: third.out })).toBe(third.out);
  expect(third.whole.subarray(5, -5)).toEqual(held.data);

  const packed = [draw(7, 3, 16), draw(60, 3, 16), draw(60, 3, 16)] as const;
  const starts = [
    [0, 3, 7],
    [0, 50, 60],
  ] as const;
  const varlen = await sageattnVarlen(...packed, ...starts, { backend: 'wasm' });
  const fourth = poisoned(7, 3, 16);
  await sageattnVarlen(...packed, ...starts, { backend: 'wasm', out: fourth.out });
  expect(fourth.whole.subarray(5, -5)).toEqual(varlen.data);

  // Into an input: it was read before.
  const same = draw(1, 2, 4, 8);
  const apart = await sageattn(same, same, same, { backend: 'wasm' });
  await sageattn(same, same, same, { backend: 'wasm', out: same });
  expect(same.data).toEqual(apart.data);
  await backend.dispose();
});

it('half precision, in arrays of either kind', async () => {
  await setBackend(createWasmBackendOn({}));
  const of = (shape: number[]) => fromFloat32(random.normals(elementCount(shape)), shape, 'float16');
  const [q, k, v] = [of([1, 2, 3, 8]), of([1, 2, 9, 8]), of([1, 2, 9, 8])];
  const expected = await sageattn(q, k, v, { backend: 'wasm' });
  const bits = (data: ArrayBufferView) => new Uint16Array(data.buffer, data.byteOffset, data.byteLength / 2);
  const out = tensor(new Uint16Array(48), [1, 2, 3, 8], { dtype: 'float16' });
  await sageattn(q, k, v, { backend: 'wasm', out });
  expect(out.data).toEqual(bits(expected.data as ArrayBufferView));
});

it('what is unlike the output is refused by name', async () => {
  const q = draw(1, 2, 4, 8);
  const call = (out: unknown) => sageattn(q, q, q, { backend: 'wasm', out: out as Tensor });
  const refused = (out: unknown, code: string) =>
    expect(call(out)).rejects.toMatchObject({ code, argument: expect.stringContaining('options.out') });
  await refused(5, 'invalid-option');
  await refused(draw(1, 2, 4, 9), 'invalid-shape');
  await refused(tensor(new Uint16Array(64), [1, 2, 4, 8], { dtype: 'bfloat16' }), 'invalid-dtype');
  await refused(tensor(new Float32Array(128), [1, 2, 4, 8], { strides: [128, 64, 16, 1] }), 'invalid-shape');
  await refused({ ...draw(1, 2, 4, 8), location: 'webgpu' }, 'invalid-option');
  const gone = draw(1, 2, 4, 8);
  structuredClone(gone.data.buffer, { transfer: [gone.data.buffer as ArrayBuffer] });
  await refused(gone, 'buffer-too-small');
  const going = draw(1, 2, 4, 8);
  const late = call(going);
  structuredClone(going.data.buffer, { transfer: [going.data.buffer as ArrayBuffer] });
  await expect(late).rejects.toMatchObject({ code: 'buffer-too-small', argument: 'options.out' });
});
