/**
 * Block-sparse attention in WebGPU against the dense kernel of the same family: each map's time, and how many times as fast it is.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-webgpu-sparse.mjs [--tokens 4096] [--head-dim 128] [--families matrix,subgroup,base]
 *         [--out FILE]
 *
 * 16 heads, float16 where the device has it, else float32; blocks of 128 rows by 64 keys. Times are medians of the clock around several
 * calls on tensors of the device, quantization included; the contenders take turns. `all included` chooses as many blocks by `topK` in each call.
 */
import { writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { contiguousBlocks } from '../../src/attention/block-choice.ts';
import { createProblem } from '../../src/attention/problem.ts';
import { settleSparsity } from '../../src/attention/sparsity.ts';
import { chooseOptions } from '../../src/backends/choice.ts';
import { createWebgpuBackendOn } from '../../src/backends/webgpu/backend.ts';
import { uploadTensor } from '../../src/backends/webgpu/index.ts';
import type { WebgpuPlan } from '../../src/backends/webgpu/plan.ts';
import { type GpuTensor, isGpuTensor } from '../../src/backends/webgpu/tensor.ts';
import { randomInputs } from '../../src/measure/inputs.ts';
import { Random } from '../../src/measure/random.ts';
import { median } from '../../src/measure/statistics.ts';
import { blockMapOf } from '../block-maps.ts';

const { values: flags } = parseArgs({
  options: {
    tokens: { type: 'string', default: '4096' },
    'head-dim': { type: 'string', default: '128' },
    families: { type: 'string', default: 'matrix,subgroup,base' },
    out: { type: 'string' },
  },
});
const [tokens, headDim] = [Number(flags.tokens), Number(flags['head-dim'])];
const [HEADS, ROWS, KEYS, ROUNDS] = [16, 128, 64, 9];
/** Of a turn, milliseconds. */
const TURN = 60;
const size = { heads: HEADS, rowBlocks: Math.ceil(tokens / ROWS), keyBlocks: Math.ceil(tokens / KEYS) };

const results = [];
let adapter = '';
for (const family of flags.families.split(',')) {
  const backend = createWebgpuBackendOn({ family: family as never });
  const context = await backend.context();
  const { device, capabilities } = context;
  adapter = capabilities.adapter;
  const dtype = capabilities.shaderF16 ? 'float16' : 'float32';
  const here = randomInputs({ batch: 1, heads: HEADS, kvHeads: HEADS, length: tokens, headDim }, dtype, 1);
  const inputs = { q: uploadTensor(device, here.q), k: uploadTensor(device, here.k), v: uploadTensor(device, here.v) };
  const dense = createProblem(inputs.q, inputs.k, inputs.v, {});
  const sparse = { ...dense, blocks: contiguousBlocks(dense, { rows: ROWS, keys: KEYS }) };
  const choice = chooseOptions(backend.defaultKernel(), dense, {});
  const [densePlan, sparsePlan] = [await backend.plan(dense, choice), await backend.plan(sparse, choice)] as [
    WebgpuPlan,
    WebgpuPlan,
  ];
  const made: GpuTensor[] = [];
  const runDense = async () => {
    made.push((await densePlan.run(inputs, {})).output as GpuTensor);
  };
  const runMap = (blockMap: GpuTensor) => async () => {
    made.push((await sparsePlan.run({ ...inputs, blockMap }, {})).output as GpuTensor);
  };
  const runChoosing = async (topK: number) => {
    const plan = await backend.planBlockMap(sparse, settleSparsity({ topK, rows: ROWS, keys: KEYS }));
    return async () => {
      const chosen = await plan.run(inputs, {});
      await runMap(chosen.map as GpuTensor)();
      chosen.dispose();
    };
  };
  const random = new Random(tokens);
  const upload = (share: number, places: Random | 'bands') => uploadTensor(device, blockMapOf(size, share, places));
  const contenders: { name: string; share: number; run: () => Promise<void> }[] = [
    { name: 'dense', share: 1, run: runDense },
    { name: 'all blocks in a map', share: 1, run: runMap(upload(1, 'bands')) },
  ];
  for (const share of [0.5, 0.25]) {
    contenders.push({ name: 'random', share, run: runMap(upload(share, random)) });
    contenders.push({ name: 'bands', share, run: runMap(upload(share, 'bands')) });
    contenders.push({ name: 'all included', share, run: await runChoosing(share) });
  }
  const turn = async (run: () => Promise<void>, calls: number) => {
    const start = performance.now();
    for (let i = 0; i < calls; i++) await run();
    await context.unlessLost(device.queue.onSubmittedWorkDone());
    const time = (performance.now() - start) / calls;
    for (const output of made.splice(0)) if (isGpuTensor(output)) output.buffer.destroy();
    return time;
  };
  const calls: number[] = [];
  for (const { run } of contenders) {
    await turn(run, 1);
    calls.push(Math.max(1, Math.min(32, Math.floor(TURN / (await turn(run, 2))))));
  }
  const times = contenders.map(() => [] as number[]);
  for (let round = 0; round < ROUNDS; round++) {
    for (const [i, { run }] of contenders.entries()) times[i]?.push(await turn(run, calls[i] as number));
  }
  const first = median(times[0] as number[]);
  for (const [i, { name, share }] of contenders.entries()) {
    const milliseconds = median(times[i] as number[]);
    results.push({ family, contender: name, share, milliseconds, ofDense: first / milliseconds });
    console.log(
      `${family.padEnd(9)} ${name.padEnd(20)} ${share} kept ${milliseconds.toFixed(3).padStart(9)} ms ${(first / milliseconds).toFixed(2)}x`,
    );
  }
  await backend.dispose();
}
if (flags.out !== undefined) {
  const settings = { tokens, headDim, heads: HEADS, rows: ROWS, keys: KEYS, rounds: ROUNDS };
  const commit = process.env.SAGEATTENTION_COMMIT;
  writeFileSync(flags.out, `${JSON.stringify({ adapter, commit, settings, results }, null, 2)}\n`);
}
