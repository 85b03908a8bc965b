/** Blocks that the kernels choose. */
import { afterAll, describe, expect, it } from 'vitest';
import { blockMapChecks, inBlocks } from '../../../test/conformance/block-map.ts';
import { Random, runSeed } from '../../../test/support/random.ts';
import { sampled } from '../../../test/support/sample.ts';
import { sageattn, sageattnSparse } from '../../api/sageattn.ts';
import { setBackend } from '../registry.ts';
import { createWebgpuBackend, downloadTensor, type GpuTensor, uploadTensor } from './index.ts';

const seed = runSeed();
/** Every random shape compiles kernels of its own, which takes lavapipe ten seconds. */
const RUNS = process.env.CI === 'true' && process.env.SAGEATTENTION_SOFTWARE_GPU !== 'lavapipe' ? 2 : 1;
/** SwiftShader runs all checks, in a sixth of lavapipe's time. */
const SHARES = process.env.SAGEATTENTION_SOFTWARE_GPU === 'lavapipe' ? { byHand: 0.2, otherwise: 0.4 } : { byHand: 1 };
const backend = createWebgpuBackend();
afterAll(() => backend.dispose());

describe(`chosen blocks (seed ${seed})`, () => {
  const checks = blockMapChecks(async () => backend, seed, RUNS);
  for (const { name, run } of sampled(checks, seed, SHARES, 'chosen blocks')) it(name, run);

  it('of tensors on the device stay there', async () => {
    const random = new Random(seed);
    const shape = { heads: [2, 1], lengths: [48, 96], dim: 16, dtype: 'float16', layout: 'HND' } as const;
    const here = [inBlocks(random, [2, 48], shape), inBlocks(random, [1, 96], shape)] as const;
    await setBackend(backend);
    const { device } = await backend.context();
    const [q, k] = here.map((tensor) => uploadTensor(device, tensor)) as [GpuTensor, GpuTensor];
    const options = { backend: 'webgpu', sparsity: { topP: 0.6, rows: 16, keys: 16 } } as const;
    const { output, sparsity } = await sageattnSparse(q, k, k, options);
    expect(sparsity.blockMask.map).toMatchObject({ location: 'webgpu', dtype: 'bool', shape: [1, 2, 3, 6] });
    const expected = await sageattnSparse(...here, here[1], options);
    expect(await downloadTensor(device, sparsity.blockMask.map)).toEqual(expected.sparsity.blockMask.map);
    expect(sparsity.keptFraction).toBe(expected.sparsity.keptFraction);
    const plain = await sageattn(q, k, k, options);
    expect(await downloadTensor(device, plain)).toEqual(await downloadTensor(device, output));
  });
});
