/**
 * Block masks against the dense kernel of the same run: attention with its lists of tiles, and with quantization.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-cuda-sparse.mjs OUTPUT_FOLDER [--tokens 16384] [--heads 16]
 *
 * D = 128, bfloat16, one map for each head: blocks kept at random, and bands around the diagonal. Blocks are 128 by 64 and 128 by 128;
 * the Hopper kernel's tiles have 128 keys, so of random blocks of 64 it can leave fewer tiles out. A full map must give the bits of the
 * dense kernel, and rows of the others are compared with exact attention over the keys that they keep. The kernels that choose blocks are
 * timed by themselves, and their maps compared with the reference's. Writes `sparse.json` there.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { contiguousBlocks, fractionsOfLines } from '../../src/attention/block-choice.ts';
import { blockMapOutputs } from '../../src/attention/outputs.ts';
import { createProblem } from '../../src/attention/problem.ts';
import { type Sparsity, settleSparsity } from '../../src/attention/sparsity.ts';
import { chooseOptions } from '../../src/backends/choice.ts';
import {
  CudaBackend,
  type CudaDevice,
  type CudaTensor,
  cudaTensorOn,
  download,
  emptyCudaTensor,
  upload,
} from '../../src/backends/cuda/index.ts';
import { descriptorOf, lackedBy } from '../../src/backends/cuda/kernel-table.ts';
import { planBlockMap } from '../../src/backends/cuda/launches/block-map.ts';
import { planLaunches } from '../../src/backends/cuda/launches/plan.ts';
import type { KernelName } from '../../src/index.ts';
import { timeOnDevice } from '../../src/measure/cuda-timing.ts';
import { buildBlockMap } from '../../src/reference/block-map.ts';
import { compare } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { contiguousStrides, type Tensor, tensor } from '../../src/tensor/tensor.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { exactRow, type HostInputs, normalBits } from './inputs.ts';
import { factsOf, isAttention, nvidiaSmi, Workbench } from './workbench.ts';

const DIM = 128;
const KERNELS: readonly KernelName[] = [
  'qk-int8-pv-fp16-cuda',
  'qk-int8-pv-fp8-cuda',
  'qk-int8-pv-fp8-cuda-sm90',
  'qk-int8-pv-fp16-cuda-sm90',
];
const BLOCKS = [
  [128, 64],
  [128, 128],
] as const;
const FRACTIONS = [1, 0.5, 0.25] as const;
const KINDS = ['random', 'band'] as const;
/** Rows that are compared with exact attention. */
const ROWS = 4;

interface BlockMap {
  readonly kind: (typeof KINDS)[number];
  readonly fraction: number;
  readonly rows: number;
  readonly keys: number;
  /** `[heads, nq, nk]` */
  readonly flags: Uint8Array;
  readonly nq: number;
  readonly nk: number;
}

function blockMap(
  random: Random,
  { kind, fraction, rows, keys }: Pick<BlockMap, 'kind' | 'fraction' | 'rows' | 'keys'>,
  heads: number,
  tokens: number,
): BlockMap {
  const [nq, nk] = [Math.ceil(tokens / rows), Math.ceil(tokens / keys)];
  const flags = new Uint8Array(heads * nq * nk);
  const kept = Math.max(1, Math.round(fraction * nk));
  const columns = Uint32Array.from({ length: nk }, (_, i) => i);
  for (let row = 0; row < heads * nq; row++) {
    if (kind === 'random') {
      // The first of a shuffled row, so that each row keeps as many.
      for (let i = 0; i < kept; i++) {
        const other = random.integer(i, nk - 1);
        const column = columns[other] as number;
        columns[other] = columns[i] as number;
        columns[i] = column;
        flags[row * nk + column] = 1;
      }
      continue;
    }
    const middle = (((row % nq) + 0.5) * rows) / keys;
    const first = Math.min(nk - kept, Math.max(0, Math.round(middle - kept / 2)));
    flags.fill(1, row * nk + first, row * nk + first + kept);
  }
  return { kind, fraction, rows, keys, flags, nq, nk };
}

/** Rows of the output over the keys that the map keeps, in float64. */
function exactRows(bits: HostInputs, map: BlockMap, tokens: number, rows: readonly (readonly [number, number])[]) {
  return rows.flatMap(([head, token]) => {
    const ofRow = (head * map.nq + Math.floor(token / map.rows)) * map.nk;
    const kept = Array.from({ length: tokens }, (_, key) => key).filter(
      (key) => map.flags[ofRow + Math.floor(key / map.keys)] === 1,
    );
    const gather = (source: Uint16Array) => {
      const own = new Uint16Array(kept.length * DIM);
      kept.forEach((key, i) => {
        const at = (head * tokens + key) * DIM;
        own.set(source.subarray(at, at + DIM), i * DIM);
      });
      return own;
    };
    const at = (head * tokens + token) * DIM;
    const inputs = { q: bits.q.subarray(at, at + DIM), k: gather(bits.k), v: gather(bits.v) };
    const shape = { batch: 1, heads: 1, tokens: kept.length, headDim: DIM, isCausal: false };
    return [...exactRow(inputs, shape, { head: 0, token: 0 })];
  });
}

function measure(
  device: CudaDevice,
  kernel: KernelName,
  bits: HostInputs,
  [heads, tokens]: readonly [number, number],
  maps: readonly { readonly map: BlockMap; readonly exact: readonly number[] }[],
  rows: readonly (readonly [number, number])[],
) {
  using held = new DisposableStack();
  const send = (source: Uint16Array | Uint8Array) => {
    const memory = device.allocate(source.byteLength);
    held.defer(() => memory.dispose());
    device.call('cuMemcpyHtoDAsync', 'copying', memory.pointer, source, source.byteLength, device.stream.handle);
    device.stream.synchronize();
    return memory;
  };
  const shape = [1, heads, tokens, DIM] as const;
  const [q, k, v] = [bits.q, bits.k, bits.v].map((source) => cudaTensorOn(send(source), 'bfloat16', shape)) as [
    ReturnType<typeof cudaTensorOn>,
    ReturnType<typeof cudaTensorOn>,
    ReturnType<typeof cudaTensorOn>,
  ];
  const output = emptyCudaTensor(device, shape, 'bfloat16');
  held.defer(() => output.memory.dispose());
  const pointers = { q: q.memory.pointer, k: k.memory.pointer, v: v.memory.pointer, output: output.memory.pointer };
  const timed = (map: BlockMap | undefined) => {
    const mapShape = map === undefined ? [] : [1, heads, map.nq, map.nk];
    const description = {
      location: 'cuda',
      dtype: 'bool',
      shape: mapShape,
      strides: contiguousStrides(mapShape),
      offset: 0,
    } as const;
    const options = map === undefined ? {} : { blockMask: { rows: map.rows, keys: map.keys, map: description } };
    const problem = createProblem(q, k, v, options);
    const choice = chooseOptions(descriptorOf(kernel), problem, options);
    const flags = map === undefined ? {} : { blockMap: send(map.flags).pointer };
    using bench = new DisposableStack();
    const workbench = new Workbench(device, planLaunches(problem, choice, factsOf(device)), { ...pointers, ...flags });
    bench.defer(() => workbench.dispose());
    workbench.run();
    const codes = download(output).data as Uint16Array;
    const times = {
      attention: timeOnDevice(device, () => workbench.run((name) => isAttention(name) || name === 'list tiles')),
      whole: timeOnDevice(device, () => workbench.run()),
    };
    return { codes, times, resources: workbench.resourcesOf('attention') };
  };
  const dense = timed(undefined);
  console.log(
    `${kernel}: dense ${dense.times.attention.toFixed(3)} ms, ${dense.times.whole.toFixed(3)} with quantization`,
  );
  const sparse = maps.map(({ map, exact }) => {
    const { codes, times, resources } = timed(map);
    const { kind, fraction } = map;
    const actual = rows.flatMap(([head, token]) => {
      const at = (head * tokens + token) * DIM;
      return [...toFloat32(tensor(codes.slice(at, at + DIM), [DIM], { dtype: 'bfloat16' }))];
    });
    const { relativeL1 } = compare(actual, exact);
    const sameBits = fraction === 1 && codes.every((code, i) => code === dense.codes[i]);
    const result = {
      ...{ kind, fraction, block: [map.rows, map.keys], times, resources, relativeL1 },
      speedup: dense.times.attention / times.attention,
      speedupWhole: dense.times.whole / times.whole,
      ...(fraction === 1 ? { sameBits } : {}),
    };
    const ofBits =
      fraction === 1 ? (sameBits ? ', bits of the dense kernel' : ', OTHER BITS THAN THE DENSE KERNEL') : '';
    const texts = [times.attention.toFixed(3), result.speedup.toFixed(2), result.speedupWhole.toFixed(2)];
    console.log(
      `  ${kind} ${result.block.join('x')} ${fraction}: ${texts[0]} ms with lists, ${texts[1]}x; with quantization ${texts[2]}x; L1 ${relativeL1.toFixed(4)}${ofBits}`,
    );
    return result;
  });
  return { kernel, dense: { times: dense.times, resources: dense.resources }, sparse };
}

/** Ways of choosing blocks that are timed. */
const CHOICES: readonly Sparsity[] = [{ topK: 0.5 }, { topP: 0.9 }, { threshold: 0.6, mass: 0.9 }];

/** The kernels that choose blocks: their times, and in how many blocks they differ from the reference. */
function measureChoosing(device: CudaDevice, bits: HostInputs, [heads, tokens]: readonly [number, number]) {
  const ofHeads = (count: number) =>
    [bits.q, bits.k].map((data) =>
      tensor(data.subarray(0, count * tokens * DIM), [1, count, tokens, DIM], { dtype: 'bfloat16' }),
    ) as [Tensor, Tensor];
  const [q, k] = ofHeads(1);
  const [onDevice, other] = ofHeads(heads).map((all) => upload(all, device)) as [CudaTensor, CudaTensor];
  const dense = createProblem(onDevice, other, other, {});
  const results = CHOICES.map((asked) => {
    const sparsity = settleSparsity(asked);
    const problem = { ...dense, blocks: contiguousBlocks(dense, sparsity) };
    const [map, lines] = blockMapOutputs(problem).map(({ shape, dtype }) => emptyCudaTensor(device, shape, dtype)) as [
      CudaTensor,
      CudaTensor,
    ];
    const addresses = { q: onDevice.memory.pointer, k: other.memory.pointer, map: map.memory.pointer };
    const launches = planBlockMap(problem, sparsity, factsOf(device));
    const workbench = new Workbench(device, launches, { ...addresses, lines: lines.memory.pointer });
    workbench.run();
    const flags = download(map).data as Uint8Array;
    // One head is enough for the reference, which takes seconds.
    const one = createProblem(q, k, k, {});
    const ofOne = { ...one, blocks: contiguousBlocks(one, sparsity) };
    const expected = buildBlockMap(ofOne, sparsity, { q, k }).map.data;
    const result = {
      sparsity: asked,
      milliseconds: timeOnDevice(device, () => workbench.run()),
      launches: workbench.kernels,
      otherBlocks: expected.filter((flag, i) => flag !== flags[i]).length / expected.length,
      ...fractionsOfLines(download(lines).data as Float32Array),
    };
    for (const resource of [workbench, map, lines]) resource.dispose();
    const parts = result.launches.map((launch) => `${launch.name} ${launch.milliseconds.toFixed(3)}`).join(', ');
    console.log(
      `choosing ${JSON.stringify(asked)}: ${result.milliseconds.toFixed(3)} ms (${parts}); kept ${result.keptFraction.toFixed(4)}, lost ${result.lostMass.toFixed(4)}, ${result.otherBlocks.toFixed(5)} of blocks unlike the reference`,
    );
    return result;
  });
  onDevice.dispose();
  other.dispose();
  return results;
}

async function main(): Promise<number> {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: { tokens: { type: 'string', default: '16384' }, heads: { type: 'string', default: '16' } },
  });
  const [folder] = positionals;
  const backend = new CudaBackend();
  const { available, reason } = await backend.availability();
  if (folder === undefined || !available) {
    console.error(
      folder === undefined ? 'usage: bench-cuda-sparse.mjs OUTPUT_FOLDER [--tokens N] [--heads N]' : reason,
    );
    return 2;
  }
  const device = (await backend.cuda()).device();
  const [tokens, heads] = [Number(values.tokens), Number(values.heads)];
  const random = new Random(runSeed());
  const length = heads * tokens * DIM;
  const bits = { q: normalBits(random, length, 0), k: normalBits(random, length, 2), v: normalBits(random, length, 0) };
  const choosing = measureChoosing(device, bits, [heads, tokens]);
  const rows = Array.from(
    { length: ROWS },
    () => [random.integer(0, heads - 1), random.integer(0, tokens - 1)] as const,
  );
  const maps = BLOCKS.flatMap(([blockRows, keys]) =>
    FRACTIONS.flatMap((fraction) =>
      (fraction === 1 ? (['band'] as const) : KINDS).map((kind) => {
        const map = blockMap(random, { kind, fraction, rows: blockRows, keys }, heads, tokens);
        return { map, exact: exactRows(bits, map, tokens, rows) };
      }),
    ),
  );
  const results = KERNELS.filter((kernel) => lackedBy(kernel, device.computeCapability) === undefined).map((kernel) =>
    measure(device, kernel, bits, [heads, tokens], maps, rows),
  );
  let wrong = choosing.filter(({ otherBlocks }) => otherBlocks > 0.01).length;
  wrong += results.flatMap(({ sparse }) => sparse).filter(({ sameBits }) => sameBits === false).length;
  mkdirSync(folder, { recursive: true });
  const report = {
    ...{ date: new Date().toISOString(), commit: process.env.SAGEATTENTION_COMMIT, nvidiaSmi: nvidiaSmi() },
    ...{ tokens, heads, headDim: DIM, results, choosing },
  };
  writeFileSync(join(folder, 'sparse.json'), `${JSON.stringify(report, null, 1)}\n`);
  await backend.dispose();
  return wrong === 0 ? 0 : 1;
}

process.exitCode = await main();
