/** Blocks that the kernels choose, against the reference: layouts, dtypes, varlen, and calls that end early. */
import { afterAll, expect, it } from 'vitest';
import { blockMapChecks } from '../../../test/conformance/block-map.ts';
import { Random, runSeed } from '../../../test/support/random.ts';
import { place } from '../../../test/support/tensors.ts';
import { sageattnSparse, sageattnVarlen } from '../../api/sageattn.ts';
import { createVarlenProblem } from '../../attention/problem.ts';
import { type Sparsity, settleSparsity } from '../../attention/sparsity.ts';
import { buildBlockMap } from '../../reference/block-map.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { type Tensor, tensor } from '../../tensor/tensor.ts';
import { getBackend, setBackend } from '../registry.ts';
import { createWasmBackendOn } from './backend.ts';

const random = new Random(runSeed());
const before = await getBackend('wasm');
const backend = createWasmBackendOn({ threads: 2 }, { shortWork: 0 });
await setBackend(backend);
afterAll(async () => {
  await backend.dispose();
  await setBackend(before);
});

const packed = (tokens: number, heads: number, dtype: 'float32' | 'bfloat16') =>
  place(random.normals(tokens * heads * 24, 2), [tokens, heads, 24], dtype);

it.each([
  ['float32', { topK: 0.4, rows: 16, keys: 16 }],
  ['bfloat16', { threshold: 0.1, mass: 0.6, rows: 32, keys: 16 }],
] as const)(`packed sequences of %s (seed ${random.seed})`, async (dtype, sparsity: Sparsity) => {
  const [starts, startsK] = [
    [0, 40, 40, 131],
    [0, 70, 75, 220],
  ];
  const [q, k, v] = [packed(131, 4, dtype), packed(220, 2, dtype), packed(220, 2, dtype)];
  const options = { backend: 'wasm', sparsity, isCausal: true, causalAlignment: 'bottom-right' } as const;
  const { output, sparsity: chosen } = await sageattnSparse(q, k, v, {
    ...options,
    cuSeqlensQ: starts,
    cuSeqlensK: startsK,
  });
  const { sparsity: _, ...others } = options;
  const problem = createVarlenProblem(q, k, v, starts, startsK, others);
  const expected = buildBlockMap(problem, settleSparsity(sparsity), { q, k });
  expect(chosen.blockMask.map.shape).toEqual(expected.map.shape);
  const differing = expected.map.data.filter((flag, i) => flag !== (chosen.blockMask.map as Tensor<'bool'>).data[i]);
  expect(differing.length).toBeLessThan(expected.map.data.length / 50);
  expect(chosen.lostMass).toBeCloseTo(expected.lostMass, 2);
  const masked = await sageattnVarlen(q, k, v, starts, startsK, { ...others, blockMask: chosen.blockMask });
  expect(output).toEqual(masked);
});

for (const { name, run } of blockMapChecks(async () => backend, random.seed, 40))
  it(`blocks ${name} (seed ${random.seed})`, run);

it('leaves each row something that a mask of padding and documents lets it see', async () => {
  const [q, k, v] = [64, 96, 96].map((tokens) =>
    place(random.normals(tokens * 24, 2), [1, 1, tokens, 24], 'float32'),
  ) as [Tensor, Tensor, Tensor];
  // Rows of two documents in each block of rows, and padding behind the second.
  const flags = Uint8Array.from({ length: 64 * 96 }, (_, i) => {
    const key = i % 96;
    return Number(Math.floor(i / 96) < 24 ? key < 40 : key >= 40 && key < 80);
  });
  const attnMask = tensor(flags, [64, 96], { dtype: 'bool' });
  const options = { backend: 'wasm', attnMask, returnLse: true, sparsity: { topK: 0, rows: 64, keys: 16 } } as const;
  const { lse, sparsity } = await sageattnSparse(q, k, v, options);
  expect([...toFloat32(lse as Tensor)].every(Number.isFinite)).toBe(true);
  expect([...(sparsity.blockMask.map as Tensor<'bool'>).data]).toEqual([0, 0, 1, 0, 1, 0]);
  expect(sparsity.keptFraction).toBe(2 / 5);
});

it('reads its inputs at the call, and stops with its signal', async () => {
  const make = (): Tensor => place(random.normals(64 * 2 * 24, 2), [1, 64, 2, 24], 'float32');
  const [q, k, v] = [make(), make(), make()];
  const options = { backend: 'wasm', tensorLayout: 'NHD', sparsity: { topK: 0.5, rows: 16, keys: 16 } } as const;
  const expected = await sageattnSparse(q, k, v, options);
  const own = structuredClone({ q, k, v });
  const call = sageattnSparse(own.q, own.k, own.v, options);
  for (const { data } of Object.values(own)) (data as Float32Array).fill(Number.NaN);
  expect(await call).toEqual(expected);
  const reason = new Error('enough');
  await expect(sageattnSparse(q, k, v, { ...options, signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
});
