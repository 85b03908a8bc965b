/**
 * Times every tile of exact attention (src/measure/peers/exact-webgpu.ts) on one GPU, with its error on some rows: what
 * the order of `EXACT_VARIANTS` is settled by. 16 heads, float16 where the device has it, else float32.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-webgpu-exact.mjs [--lengths 1024,4096] [--head-dims 64,128]
 *
 * TFLOP/s count 4 H L^2 D. Times are medians of the clock around several calls; the variants take turns.
 */
import { parseArgs } from 'node:util';
import { createWebgpuBackend, downloadTensor, uploadTensor } from '../../src/backends/webgpu/index.ts';
import { accuracyOnRows, sampleRows } from '../../src/measure/accuracy.ts';
import { randomInputs } from '../../src/measure/inputs.ts';
import { createExactAttention, exactVariants } from '../../src/measure/peers/exact-webgpu.ts';
import { median } from '../../src/measure/statistics.ts';

const { values: flags } = parseArgs({
  options: {
    heads: { type: 'string', default: '16' },
    lengths: { type: 'string', default: '1024,4096,8192' },
    'head-dims': { type: 'string', default: '64,128,256' },
  },
});
const numbers = (text: string) => text.split(',').map(Number);
const HEADS = Number(flags.heads);
const ROUNDS = 7;
const SAMPLED_ROWS = 16;
/** Of a turn, milliseconds. */
const TURN = 60;

const backend = createWebgpuBackend();
const context = await backend.context();
const { device, capabilities } = context;
console.log(`${capabilities.adapter}, ${capabilities.workgroupBytes / 1024} KiB of workgroup memory`);
const dtype = capabilities.shaderF16 ? 'float16' : 'float32';

for (const headDim of numbers(flags['head-dims'])) {
  for (const length of numbers(flags.lengths)) {
    const inputs = randomInputs({ batch: 1, heads: HEADS, kvHeads: HEADS, length, headDim }, dtype, 1);
    const gpu = {
      q: uploadTensor(device, inputs.q),
      k: uploadTensor(device, inputs.k),
      v: uploadTensor(device, inputs.v),
    };
    const contenders = [];
    for (const variant of exactVariants(capabilities, { dtype, headDim, valueDim: headDim })) {
      const attention = await createExactAttention(context, gpu, { variant });
      const output = attention.run();
      const call = { ...inputs, tensorLayout: 'HND' } as const;
      const rows = sampleRows(length, SAMPLED_ROWS);
      const { relativeL1 } = await accuracyOnRows(call, await downloadTensor(device, output), rows);
      const turn = async (calls: number) => {
        const start = performance.now();
        for (let i = 0; i < calls; i++) attention.run(output);
        await context.unlessLost(device.queue.onSubmittedWorkDone());
        return (performance.now() - start) / calls;
      };
      const calls = Math.max(1, Math.min(32, Math.floor(TURN / (await turn(2)))));
      contenders.push({ name: variant.name, attention, output, relativeL1, calls, turn, times: [] as number[] });
    }
    for (let round = 0; round < ROUNDS; round++) {
      for (const { turn, calls, times } of contenders) times.push(await turn(calls));
    }
    for (const { name, times, relativeL1, attention, output } of contenders) {
      const tera = (4 * HEADS * length ** 2 * headDim) / median(times) / 1e9;
      console.log(
        `D=${headDim} L=${length} ${dtype} ${name.padEnd(20)} ${tera.toFixed(2)} TFLOP/s, relative L1 ${relativeL1.toExponential(1)}`,
      );
      attention.dispose();
      output.buffer.destroy();
    }
    for (const { buffer } of Object.values(gpu)) buffer.destroy();
  }
}
await backend.dispose();
