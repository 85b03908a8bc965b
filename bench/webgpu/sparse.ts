/**
 * Block-sparse attention in WebGPU against the dense kernel of the same family: each map's time, and how many times as fast it is.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-webgpu-sparse.mjs [--tokens 4096] [--head-dim 128] [--families matrix,subgroup,base]
 *         [--out FILE]
 *
 * 16 heads, float16 where the device has it, else float32; blocks of 128 rows by 64 keys. Times are the device's own (timestamps around
 * repetitions in one pass), medians of rounds in which the contenders take turns: attention alone, and all that a call takes, with
 * quantization and, of a map, choosing as many blocks by `topK`.
 */
import { writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { contiguousBlocks } from '../../src/attention/block-choice.ts';
import { type AttentionProblem, createProblem } from '../../src/attention/problem.ts';
import { settleSparsity } from '../../src/attention/sparsity.ts';
import { chooseOptions } from '../../src/backends/choice.ts';
import { DAWN_FLAGS } from '../../src/backends/webgpu/device.ts';
import { createWebgpuBackend, emptyGpuTensor, uploadTensor } from '../../src/backends/webgpu/index.ts';
import { planBlockMapLaunches } from '../../src/backends/webgpu/launches/block-map.ts';
import { planLaunches } from '../../src/backends/webgpu/launches/plan.ts';
import { Program } from '../../src/backends/webgpu/program.ts';
import { allocate } from '../../src/backends/webgpu/scratch.ts';
import { enableNodeWebgpu } from '../../src/integrations/onnxruntime/node-webgpu.ts';
import { randomInputs } from '../../src/measure/inputs.ts';
import { Random } from '../../src/measure/random.ts';
import { median } from '../../src/measure/statistics.ts';
import { blockMapOf } from '../block-maps.ts';
import { gpuMicroseconds } from './gpu-time.ts';

const { values: flags } = parseArgs({
  options: {
    tokens: { type: 'string', default: '4096' },
    'head-dim': { type: 'string', default: '128' },
    families: { type: 'string', default: 'matrix,subgroup,base' },
    rounds: { type: 'string', default: '3' },
    out: { type: 'string' },
  },
});
const [tokens, headDim, rounds] = [Number(flags.tokens), Number(flags['head-dim']), Number(flags.rounds)];
const [HEADS, ROWS, KEYS, REPETITIONS] = [16, 128, 64, 2];
const size = { heads: HEADS, rowBlocks: Math.ceil(tokens / ROWS), keyBlocks: Math.ceil(tokens / KEYS) };

const gpu = await enableNodeWebgpu([...DAWN_FLAGS, 'disable-dawn-features=timestamp_quantization']);
const backend = createWebgpuBackend({ gpu });
const context = await backend.context();
const { device, capabilities } = context;
if (!capabilities.timestamps) throw new Error('this device has no timestamps');
const dtype = capabilities.shaderF16 ? 'float16' : 'float32';
const here = randomInputs({ batch: 1, heads: HEADS, kvHeads: HEADS, length: tokens, headDim }, dtype, 1);
const [q, k, v] = [here.q, here.k, here.v].map((x) => uploadTensor(device, x)) as [
  ReturnType<typeof uploadTensor>,
  ReturnType<typeof uploadTensor>,
  ReturnType<typeof uploadTensor>,
];
const output = emptyGpuTensor(device, dtype, [1, HEADS, tokens, headDim]);
const own = { q: q.buffer, k: k.buffer, v: v.buffer, output: output.buffer };
const dense = createProblem(q, k, v, {});
const sparse = { ...dense, blocks: contiguousBlocks(dense, { rows: ROWS, keys: KEYS }) };
const choice = chooseOptions(backend.defaultKernel(), dense, {});
const random = new Random(tokens);

const results = [];
for (const family of flags.families.split(',')) {
  const planned = (problem: AttentionProblem) =>
    planLaunches(capabilities, problem, choice, { family: family as 'matrix' });
  const programsOf = async (problem: AttentionProblem) => {
    const { launches, sizes, tables } = planned(problem);
    const attends = launches.slice(launches.map(({ label }) => label).lastIndexOf('prepare') + 1);
    const made = await Promise.all([launches, attends].map((some) => Program.create(context, some, sizes, tables)));
    const [whole, attention] = made as [Program, Program];
    return { whole, attention, scratch: allocate(device, sizes) };
  };
  const [all, some] = [await programsOf(dense), await programsOf(sparse)];
  const chooser = async (topK: number) => {
    const plan = planBlockMapLaunches(capabilities, sparse, settleSparsity({ topK, rows: ROWS, keys: KEYS }));
    const program = await Program.create(context, plan.launches, plan.sizes, plan.tables);
    const lines = HEADS * size.rowBlocks;
    const made = allocate(device, { map: lines * size.keyBlocks, lines: lines * 16 });
    return { share: topK, program, buffers: { q: own.q, k: own.k, ...made }, times: [] as number[] };
  };
  const masked = (name: string, share: number, places: Random | 'bands') => {
    const buffers = { ...some.scratch, ...own, blockMap: uploadTensor(device, blockMapOf(size, share, places)).buffer };
    return { name, share, programs: some, buffers };
  };
  const contenders = [
    { name: 'dense', share: 1, programs: all, buffers: { ...all.scratch, ...own } },
    masked('all blocks in a map', 1, 'bands'),
    ...[0.5, 0.25].flatMap((share) => [masked('random', share, random), masked('bands', share, 'bands')]),
  ];
  const choosers = [await chooser(0.5), await chooser(0.25)];
  const times = contenders.map(() => ({ attention: [] as number[], whole: [] as number[] }));
  for (let round = 0; round < rounds; round++) {
    for (const [i, { programs, buffers }] of contenders.entries()) {
      for (const part of ['whole', 'attention'] as const) {
        times[i]?.[part].push(
          await gpuMicroseconds(device, (pass) => programs[part].record(pass, buffers as never), REPETITIONS),
        );
      }
    }
    for (const { program, buffers, times: taken } of choosers) {
      taken.push(await gpuMicroseconds(device, (pass) => program.record(pass, buffers as never), REPETITIONS));
    }
  }
  const medians = times.map(({ attention, whole }) => ({ attention: median(attention), whole: median(whole) }));
  const [first] = medians as [(typeof medians)[0]];
  for (const [i, { name, share }] of contenders.entries()) {
    const { attention, whole } = medians[i] as typeof first;
    const chooser = choosers.find((one) => one.share === share);
    const choosing = chooser === undefined ? 0 : median(chooser.times);
    const included = whole + choosing;
    const row = {
      ...{ family, contender: name, share, attention, whole, choosing },
      ...{ ofDense: first.attention / attention, ofDenseIncluded: first.whole / included },
    };
    results.push(row);
    console.log(
      `${family.padEnd(9)} ${name.padEnd(20)} ${share} kept: ${attention.toFixed(0).padStart(6)} us ${row.ofDense.toFixed(2)}x; all included ${included.toFixed(0).padStart(6)} us ${row.ofDenseIncluded.toFixed(2)}x`,
    );
  }
  for (const { program } of choosers) program.dispose();
  for (const { whole, attention, scratch } of [all, some]) {
    for (const program of [whole, attention]) program.dispose();
    for (const buffer of Object.values(scratch)) buffer?.destroy();
  }
}
if (flags.out !== undefined) {
  const settings = { tokens, headDim, heads: HEADS, dtype, rows: ROWS, keys: KEYS, rounds, repetitions: REPETITIONS };
  const commit = process.env.SAGEATTENTION_COMMIT;
  const { adapter } = capabilities;
  writeFileSync(flags.out, `${JSON.stringify({ adapter, commit, settings, results }, null, 2)}\n`);
}
await backend.dispose();
