/** The walk over tiles of keys that a block mask leaves, over random maps, bands and sizes, beside one that looks at every tile. */
import { afterAll, describe, expect, it } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { createWebgpuBackend, downloadTensor, emptyGpuTensor } from './index.ts';
import { BLOCK_DECLARATIONS, BLOCK_PARAMS, MAP_AT, NOTHING_SEEN, nextTile, nextTileFrom } from './kernels/blocks.ts';
import { encodeParams, params } from './kernels/layout.ts';
import { GPU_BUFFER_USAGE } from './tensor.ts';

const seed = runSeed();
const backend = createWebgpuBackend();
afterAll(() => backend.dispose());

const WALK_PARAMS = [...BLOCK_PARAMS, 'firstRow', 'rowCount', 'fromKey', 'endKey', 'keyCount'];
const MOST_TILES = 4096;
const RUNS = 24;

/** One thread writes where each tile begins, and whether a part of it is hidden. */
const walkKernel = (keys: number) => `
${params(0, WALK_PARAMS)}
@group(0) @binding(1) var<storage, read_write> tiles: array<u32>;
${BLOCK_DECLARATIONS}
${nextTile(keys)}
@compute @workgroup_size(1)
fn main() {
  let sequence = 0u; let head = 0u; let first_row = P.firstRow; let count = P.rowCount;
  let key_end = i32(P.endKey); let length = i32(P.keyCount);
  ${MAP_AT}
  var at = 1u;
  for (var seen = ${nextTileFrom(NOTHING_SEEN, 'i32(P.fromKey)')}; seen.start < key_end; seen = ${nextTileFrom('seen', `seen.start + ${keys}`)}) {
    tiles[at] = u32(seen.start) * 2u + select(0u, 1u, seen.cut != 0u);
    at++;
  }
  tiles[0] = at - 1u;
}`;

describe.each([16, 32])(`tiles of %i keys (seed ${seed})`, (keys) => {
  it('are those of which a block is computed, in order', async () => {
    const random = new Random(seed + keys);
    const { device } = await backend.context();
    const module = device.createShaderModule({ code: walkKernel(keys) });
    const pipeline = await device.createComputePipelineAsync({ layout: 'auto', compute: { module } });
    for (let run = 0; run < RUNS; run++) {
      const [blockRows, blockKeys] = [random.integer(1, 70), random.pick([1, 3, 16, 48, 64, 100, 1000])];
      const keyCount = random.integer(1, run % 2 === 0 ? 300 : 6000);
      const [firstRow, rowCount] = [random.integer(0, 99), random.integer(1, 80)];
      const keyBlocks = Math.ceil(keyCount / blockKeys);
      const rowBlocks = Math.ceil((firstRow + rowCount) / blockRows);
      const share = random.pick([0, 0.03, 0.5, 1]);
      const map = Uint8Array.from({ length: rowBlocks * keyBlocks }, () => Number(random.uniform() < share));
      const fromKey = Math.floor(random.integer(0, keyCount - 1) / keys) * keys;
      const endKey = random.integer(fromKey, keyCount);

      const expected: number[] = [];
      for (let start = fromKey; start < endKey; start += keys) {
        const last = Math.min(start + keys, keyCount) - 1;
        const found = new Set<number>();
        for (let r = Math.floor(firstRow / blockRows); r <= Math.floor((firstRow + rowCount - 1) / blockRows); r++) {
          for (let k = Math.floor(start / blockKeys); k <= Math.floor(last / blockKeys); k++) {
            found.add(map[r * keyBlocks + k] as number);
          }
        }
        if (found.has(1)) expected.push(start * 2 + Number(found.has(0)));
      }

      const values = encodeParams(WALK_PARAMS, {
        ...{ blockRows, blockKeys, mapBatchStride: 0, mapHeadStride: 0, mapRowStride: keyBlocks, mapKeyStride: 1 },
        ...{ mapOffset: 0, firstRow, rowCount, fromKey, endKey, keyCount },
      });
      const uniforms = device.createBuffer({
        size: values.byteLength,
        usage: GPU_BUFFER_USAGE.UNIFORM | GPU_BUFFER_USAGE.COPY_DST,
      });
      device.queue.writeBuffer(uniforms, 0, values);
      const words = new Uint8Array(Math.ceil(map.length / 4) * 4);
      words.set(map);
      const blockMap = device.createBuffer({
        size: words.length,
        usage: GPU_BUFFER_USAGE.STORAGE | GPU_BUFFER_USAGE.COPY_DST,
      });
      device.queue.writeBuffer(blockMap, 0, words);
      const tiles = emptyGpuTensor(device, 'float32', [MOST_TILES]);
      const group = device.createBindGroup({
        layout: pipeline.getBindGroupLayout(0),
        entries: [
          uniforms,
          tiles.buffer,
          undefined,
          undefined,
          undefined,
          undefined,
          undefined,
          undefined,
          undefined,
          blockMap,
        ].flatMap((buffer, binding) => (buffer === undefined ? [] : [{ binding, resource: { buffer } }])),
      });
      const encoder = device.createCommandEncoder();
      const pass = encoder.beginComputePass();
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, group);
      pass.dispatchWorkgroups(1);
      pass.end();
      device.queue.submit([encoder.finish()]);
      const { data } = await downloadTensor(device, tiles);
      const found = new Uint32Array((data as Float32Array).buffer, (data as Float32Array).byteOffset, MOST_TILES);
      const of = JSON.stringify({ run, blockRows, blockKeys, keyCount, firstRow, rowCount, fromKey, endKey, share });
      expect([...found.subarray(1, 1 + (found[0] as number))], of).toEqual(expected);
      for (const buffer of [uniforms, blockMap, tiles.buffer]) buffer.destroy();
    }
  });
});
