/**
 * Decoding over prepared keys in each format of the cache, with the error of its output beside it, and PyTorch's attention over a cache
 * of bfloat16 on the same card in the same run.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-cuda-caches.mjs OUTPUT_FOLDER [--keys 65536] [--batch 1] [--variants]
 *
 * `--variants` times other configurations of each kernel beside the one it has, and no PyTorch. One token of 32 heads over 8 heads of K and V, D = 128. Writes `caches.json` there.
 */
import { spawnSync } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { createProblem } from '../../src/attention/problem.ts';
import { chooseOptions } from '../../src/backends/choice.ts';
import {
  CudaBackend,
  type CudaDevice,
  cudaTensorOn,
  download,
  emptyCudaTensor,
} from '../../src/backends/cuda/index.ts';
import { descriptorOf, lackedBy } from '../../src/backends/cuda/kernel-table.ts';
import type { Tuning } from '../../src/backends/cuda/launches/context.ts';
import { planAttend, planKeyValue } from '../../src/backends/cuda/launches/plan.ts';
import { packBuffers } from '../../src/backends/cuda/run/bound-launches.ts';
import type { KernelName } from '../../src/index.ts';
import { timeOnDevice } from '../../src/measure/cuda-timing.ts';
import { compare } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { exactRow, normalBits } from './inputs.ts';
import { TORCH_TIMED } from './torch.ts';
import { cacheAddresses, copyBandwidth, factsOf, type KernelTime, nvidiaSmi, Workbench } from './workbench.ts';

const [HEADS, KEY_HEADS, DIM] = [32, 8, 128] as const;
const KERNELS: readonly KernelName[] = [
  'qk-int8-pv-fp16-cuda',
  'qk-int8-pv-fp8-cuda',
  'qk-int8-pv-fp16-cuda-sm90',
  'qk-int8-pv-fp8-cuda-sm90',
  'qk-fp4-pv-fp4',
  'qk-fp4-pv-fp8-cuda',
];
/** Other configurations of a kernel, for `--variants`. */
const VARIANTS: Partial<Record<KernelName, readonly Partial<Tuning>[]>> = {
  'qk-int8-pv-fp16-cuda': [{ keyWarps: 4, keyStages: 2, valueStages: 2 }],
  'qk-int8-pv-fp8-cuda': [
    { keyWarps: 6, keyStages: 2, valueStages: 2 },
    { keyWarps: 8, keyStages: 1, valueStages: 1 },
  ],
  'qk-int8-pv-fp8-cuda-sm90': [{ minBlocks: 1, stages: 3, registers: undefined }],
  'qk-fp4-pv-fp8-cuda': [{ keyWarps: 12, keyStages: 1, valueStages: 1 }],
  'qk-fp4-pv-fp4': [{ keyWarps: 12, keyStages: 2, valueStages: 2 }],
};
/** Heads of Q whose output is compared. */
const COMPARED = [0, 13, 31];

const TORCH = `
import json, statistics, sys, torch
from torch.nn.attention import sdpa_kernel, SDPBackend
${TORCH_TIMED}
keys, batch = int(sys.argv[1]), int(sys.argv[2])
q = torch.randn(batch, ${HEADS}, 1, ${DIM}, device="cuda", dtype=torch.bfloat16)
k, v = (torch.randn(batch, ${KEY_HEADS}, keys, ${DIM}, device="cuda", dtype=torch.bfloat16) for _ in range(2))
rows = q.view(batch, ${KEY_HEADS}, ${HEADS / KEY_HEADS}, ${DIM})
found = {}
for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
    for how, call in (("heads as rows", lambda: torch.nn.functional.scaled_dot_product_attention(rows, k, v)),
                      ("enable_gqa", lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                timed(call, 20)
                found[f"{name}, {how}"] = 1000 * statistics.median(timed(call, 200) for _ in range(5))
        except Exception as error:
            print(name, how, error, file=sys.stderr)
json.dump(found, sys.stdout)
`;

interface Bits {
  readonly q: Uint16Array;
  readonly k: Uint16Array;
  readonly v: Uint16Array;
}

/** Exact outputs of the compared heads. */
function exactHeads({ q, k, v }: Bits, keys: number): number[] {
  return COMPARED.flatMap((head) => {
    const from = Math.floor(head / (HEADS / KEY_HEADS)) * keys * DIM;
    const own = { k: k.subarray(from, from + keys * DIM), v: v.subarray(from, from + keys * DIM) };
    const shape = { batch: 1, heads: 1, tokens: keys, headDim: DIM, isCausal: false };
    return [...exactRow({ q: q.subarray(head * DIM, (head + 1) * DIM), ...own }, shape, { head: 0, token: 0 })];
  });
}

interface Case {
  readonly bits: Bits;
  readonly keys: number;
  readonly batch: number;
  readonly exact: readonly number[];
  readonly variants: boolean;
}

function measure(device: CudaDevice, kernel: KernelName, { bits, keys, batch, exact, variants }: Case) {
  const memory: { dispose(): void }[] = [];
  const upload = (source: Uint16Array) => {
    const held = device.allocate(source.byteLength);
    memory.push(held);
    device.call('cuMemcpyHtoDAsync', 'copying', held.pointer, source, source.byteLength, device.stream.handle);
    device.stream.synchronize();
    return held;
  };
  const [q, k, v] = [
    cudaTensorOn(upload(bits.q), 'bfloat16', [batch, HEADS, 1, DIM]),
    cudaTensorOn(upload(bits.k), 'bfloat16', [batch, KEY_HEADS, keys, DIM]),
    cudaTensorOn(upload(bits.v), 'bfloat16', [batch, KEY_HEADS, keys, DIM]),
  ];
  const problem = createProblem(q, k, v, {});
  const choice = chooseOptions(descriptorOf(kernel), problem, {});
  const quantize = planKeyValue(problem, choice, factsOf(device));
  const { offsets, byteLength } = packBuffers(quantize.kept);
  const kept = device.allocate(byteLength);
  const output = emptyCudaTensor(device, [batch, HEADS, 1, DIM], 'bfloat16');
  memory.push(kept, output.memory);
  const addresses = cacheAddresses({ q, k, v, output }, offsets, kept.pointer);
  const preparing = new Workbench(device, quantize, addresses);
  preparing.run();
  const attending = new Workbench(device, planAttend(problem, choice, factsOf(device)), addresses);
  const microseconds = 1000 * timeOnDevice(device, () => attending.run());
  const values = toFloat32(download(output));
  const actual = COMPARED.flatMap((head) => [...values.subarray(head * DIM, (head + 1) * DIM)]);
  const { relativeL1, cosineSimilarity } = compare(actual, exact);
  const result = {
    kernel,
    microseconds,
    keptBytes: byteLength,
    tokensPerSecond: (1e6 * batch) / microseconds,
    bitsPerElement: (8 * byteLength) / (2 * batch * KEY_HEADS * keys * DIM),
    preparingMicroseconds: 1000 * timeOnDevice(device, () => preparing.run()),
    relativeL1,
    cosineSimilarity,
    launches: attending.kernels,
  };
  const others = (variants ? (VARIANTS[kernel] ?? []) : []).map((overrides) => {
    const other = new Workbench(device, planAttend(problem, choice, factsOf(device), { overrides }), addresses);
    memory.push(other);
    const own = { overrides, microseconds: 1000 * timeOnDevice(device, () => other.run()), launches: other.kernels };
    const got = toFloat32(download(output));
    const found = COMPARED.flatMap((head) => [...got.subarray(head * DIM, (head + 1) * DIM)]);
    return { ...own, relativeL1: compare(found, exact).relativeL1 };
  });
  for (const held of [preparing, attending, ...memory]) held.dispose();
  return { ...result, variants: others };
}

const partsOf = (launches: readonly KernelTime[]) =>
  launches
    .map(
      ({ name, milliseconds, registers }) => `${name} ${(1000 * milliseconds).toFixed(1)} with ${registers} registers`,
    )
    .join(', ');

function printResult(result: ReturnType<typeof measure>, copied: number): void {
  const { kernel, microseconds, bitsPerElement, relativeL1, keptBytes, launches, variants } = result;
  const share = (keptBytes / (microseconds / 1e6) / copied) * 100;
  console.log(
    `${kernel}: ${microseconds.toFixed(1)} us, ${share.toFixed(0)}% of a copy's rate, ${bitsPerElement.toFixed(2)} bits, L1 ${relativeL1.toFixed(4)} (${partsOf(launches)})`,
  );
  for (const { overrides, ...other } of variants) {
    console.log(
      `  ${JSON.stringify(overrides)}: ${other.microseconds.toFixed(1)} us, L1 ${other.relativeL1.toFixed(4)} (${partsOf(other.launches)})`,
    );
  }
}

async function main(): Promise<number> {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      keys: { type: 'string', default: '65536' },
      batch: { type: 'string', default: '1' },
      variants: { type: 'boolean', default: false },
    },
  });
  const [folder] = positionals;
  const backend = new CudaBackend();
  const { available, reason } = await backend.availability();
  if (folder === undefined || !available) {
    console.error(folder === undefined ? 'usage: bench-cuda-caches.mjs OUTPUT_FOLDER [--keys 65536]' : reason);
    return 2;
  }
  const device = (await backend.cuda()).device();
  const [keys, batch] = [Number(values.keys), Number(values.batch)];
  const copied = copyBandwidth(device);
  console.log(`a copy reads and writes ${(copied / 1e9).toFixed(0)} GB/s`);
  const random = new Random(runSeed());
  const bits: Bits = {
    q: normalBits(random, batch * HEADS * DIM, 0),
    k: normalBits(random, batch * KEY_HEADS * keys * DIM, 2),
    v: normalBits(random, batch * KEY_HEADS * keys * DIM, 0),
  };
  // A peak for each query, as attention has: averages of 65,536 random values would be nearly nothing.
  for (let head = 0; head < KEY_HEADS; head++) {
    for (let i = 0; i < DIM; i++) {
      const query = bits.q[head * (HEADS / KEY_HEADS) * DIM + i] as number;
      for (const key of [7, Math.floor(keys / 3), keys - 5]) bits.k[(head * keys + key) * DIM + i] = query;
    }
  }
  const exact = exactHeads(bits, keys);
  const given = { bits, keys, batch, exact, variants: values.variants };
  const results = KERNELS.filter((kernel) => lackedBy(kernel, device.computeCapability) === undefined).map((kernel) => {
    const result = measure(device, kernel, given);
    printResult(result, copied);
    return result;
  });
  const torch = values.variants
    ? { status: 1, stderr: '', stdout: '' }
    : spawnSync('python3', ['-c', TORCH, String(keys), String(batch)], { encoding: 'utf8', timeout: 120_000 });
  if (torch.stderr !== '') console.error(torch.stderr);
  const bfloat16 = torch.status === 0 ? (JSON.parse(torch.stdout) as Record<string, number>) : undefined;
  for (const [name, microseconds] of Object.entries(bfloat16 ?? {}))
    console.log(`bfloat16, ${name}: ${microseconds.toFixed(1)} us`);
  mkdirSync(folder, { recursive: true });
  const report = {
    date: new Date().toISOString(),
    commit: process.env.SAGEATTENTION_COMMIT,
    nvidiaSmi: nvidiaSmi(),
    keys,
    batch,
    copyBytesPerSecond: copied,
    results,
    bfloat16Microseconds: bfloat16,
  };
  writeFileSync(join(folder, 'caches.json'), `${JSON.stringify(report, null, 1)}\n`);
  await backend.dispose();
  return 0;
}

process.exitCode = await main();
