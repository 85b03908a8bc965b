/** Blocks that the kernels choose, in the simulator. */
import { describe, expect, it } from 'vitest';
import { blockMapChecks, inBlocks } from '../../../test/conformance/block-map.ts';
import { Random, runSeed } from '../../../test/support/random.ts';
import { sageattn, sageattnSparse } from '../../api/sageattn.ts';
import { setBackend } from '../registry.ts';
import { type CudaTensor, downloadAsync, upload } from './tensor.ts';
import { createSimulatedBackend } from './testing/simulator/backend.ts';

const seed = runSeed();
const backend = createSimulatedBackend(80);

describe(`blocks chosen by simulated kernels (seed ${seed})`, () => {
  for (const { name, run } of blockMapChecks(async () => backend, seed, 12)) it(name, run);

  it('of tensors on the device stay there, and are freed where nobody is given them', async () => {
    const random = new Random(seed);
    const shape = { heads: [2, 1], lengths: [48, 96], dim: 16, dtype: 'float16', layout: 'HND' } as const;
    const here = [inBlocks(random, [2, 48], shape), inBlocks(random, [1, 96], shape)] as const;
    await setBackend(backend);
    const device = (await backend.cuda()).device();
    const [q, k] = here.map((tensor) => upload(tensor, device)) as [CudaTensor, CudaTensor];
    const options = { backend: 'cuda', sparsity: { topP: 0.6, rows: 16, keys: 16 } } as const;
    const { output, sparsity } = await sageattnSparse(q, k, k, options);
    expect(sparsity.blockMask.map).toMatchObject({ location: 'cuda', dtype: 'bool', shape: [1, 2, 3, 6] });
    const expected = await sageattnSparse(...here, here[1], options);
    expect(await downloadAsync(sparsity.blockMask.map)).toEqual(expected.sparsity.blockMask.map);
    expect(sparsity.keptFraction).toBe(expected.sparsity.keptFraction);
    const plain = await sageattn(q, k, k, options);
    expect(await downloadAsync(plain)).toEqual(await downloadAsync(output));
  });
});
