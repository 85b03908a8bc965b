/** Kernels that read from their lists what is hidden give the bits of those that look at the map. */
import { expect, it } from 'vitest';
import { Random, runSeed } from '../../../../../test/support/random.ts';
import { place } from '../../../../../test/support/tensors.ts';
import { sageattn } from '../../../../api/sageattn.ts';
import { tensor } from '../../../../tensor/tensor.ts';
import { setBackend } from '../../../registry.ts';
import { createSimulatedBackend } from '../../testing/simulator/backend.ts';

const seed = runSeed();

it.each(['qk-int8-pv-fp8-cuda-sm90', 'qk-int8-pv-fp16-cuda-sm90', 'exact'] as const)(
  `%s (seed ${seed})`,
  async (kernel) => {
    await setBackend(createSimulatedBackend(90));
    const random = new Random(seed);
    const [heads, lq, lk, dim] = [2, 140, 300, 32];
    const draw = (length: number) => place(random.normals(heads * length * dim), [1, heads, length, dim], 'bfloat16');
    const [q, k, v] = [draw(lq), draw(lk), draw(lk)];
    const keys = [16, 48, 64, 128][random.integer(0, 3)] as number;
    const keyBlocks = Math.ceil(lk / keys);
    const isKept = Array.from({ length: heads * 2 * keyBlocks }, () => random.uniform() < 0.5);
    const mapOf = (rows: number) => {
      const rowBlocks = Math.ceil(lq / rows);
      const flags = Uint8Array.from({ length: heads * rowBlocks * keyBlocks }, (_, i) => {
        const [line, block] = [Math.floor(i / keyBlocks), i % keyBlocks];
        const [head, row] = [Math.floor(line / rowBlocks), Math.floor(((line % rowBlocks) * rows) / 128)];
        return Number(isKept[(head * 2 + row) * keyBlocks + block]);
      });
      return { rows, keys, map: tensor(flags, [1, heads, rowBlocks, keyBlocks]) };
    };
    const options = { backend: 'cuda', kernel, returnLse: true, isCausal: random.uniform() < 0.5 } as const;
    const [fromList, fromMap] = [
      await sageattn(q, k, v, { ...options, blockMask: mapOf(128) }),
      await sageattn(q, k, v, { ...options, blockMask: mapOf(32) }),
    ];
    expect(fromList).toEqual(fromMap);
    const all = await sageattn(q, k, v, options);
    expect(fromList.lse.data).not.toEqual(all.lse.data);
  },
);
