/**
 * The tests that need an NVIDIA GPU: the conformance suite on every kernel, agreement with the official kernels'
 * outputs, same bits, graphs, large offsets, compute-sanitizer. `npm run test:cuda` builds and runs this; the built
 * program needs Node and koffi only.
 *
 *     node test-cuda.mjs [--only TEXT] [--jobs PROCESSES]
 *
 * Ends with 0 when everything passed, 1 when something failed, 2 when nothing could run.
 */
import { spawn, spawnSync } from 'node:child_process';
import { availableParallelism } from 'node:os';
import { createInterface } from 'node:readline';
import { createProblem } from '../../src/attention/problem.ts';
import { type Cuda, CudaBackend, type CudaDevice } from '../../src/backends/cuda/index.ts';
import { lackedBy } from '../../src/backends/cuda/kernel-table.ts';
import { type AttentionOptions, type KernelName, sageattn, setBackend } from '../../src/index.ts';
import type { Granularity, PvAccumDtype } from '../../src/quantization/schemes.ts';
import { attentionExact } from '../../src/reference/exact.ts';
import { compare } from '../../src/reference/metrics.ts';
import { toFloat32 } from '../../src/tensor/access.ts';
import { blockMapChecks } from '../conformance/block-map.ts';
import { conformanceTests, type Target } from '../conformance/suite.ts';
import { GOLDEN_NAMES, readGolden } from '../golden/golden.ts';
import { runSeed } from '../support/random.ts';
import { backwardChecks } from './backward-checks.ts';
import { type Check, deviceChecks, hostCost, kernelChecks, largeChecks, memoryChecks } from './checks.ts';
import { distributedChecks } from './distributed-checks.ts';
import { driverChecks } from './driver-checks.ts';
import { pageCases, pageChecks } from './page-checks.ts';
import { targetsFor } from './targets.ts';

/** Under compute-sanitizer: one small case of each kernel and no more. */
const SANITIZED = '--sanitized';
const TOOLS = ['memcheck', 'racecheck', 'synccheck'] as const;
const SANITIZER_STATUS = 86;
/** What offsets above 2^31 need, in bytes. */
const LARGE_MEMORY = 30 * 2 ** 30;

const only = argumentOf('--only') ?? '';
const counts = { passed: 0, failed: 0 };
const notRun: string[] = [];

/** Runs checks one after another. False when the device is lost and nothing more can run. */
async function run(group: string, checks: readonly Check[], device: CudaDevice): Promise<boolean> {
  for (const { name, run: body } of checks) {
    const title = `${group}: ${name}`;
    if (!title.includes(only)) continue;
    const start = performance.now();
    try {
      const remark = await body();
      counts.passed++;
      const milliseconds = (performance.now() - start).toFixed(0);
      console.log(`ok      ${title} (${milliseconds} ms${remark === undefined ? '' : `, ${remark}`})`);
    } catch (error) {
      counts.failed++;
      console.log(`FAILED  ${title}\n        ${error instanceof Error ? (error.stack ?? error.message) : error}`);
      if (device.lost !== undefined) {
        console.log('The device is lost to this process; nothing more can run.');
        return false;
      }
    }
  }
  return true;
}

/** Official kernels of which this backend has the same: the options that make it so. */
function officialOptions(output: string): (AttentionOptions & { readonly kernel: KernelName }) | undefined {
  const [kernel, ...settings] = output.split('.');
  const granularity = settings.find((text) => text.startsWith('per_'))?.replace('_', '-') as Granularity | undefined;
  const accumulation = settings.find((text) => text.startsWith('fp')) as PvAccumDtype | undefined;
  const options = {
    ...(granularity === undefined ? {} : { qkQuantGran: granularity }),
    ...(accumulation === undefined ? {} : { pvAccumDtype: accumulation }),
  };
  if (kernel === 'qk_int8_pv_fp16_triton') return { kernel: 'qk-int8-pv-fp16' };
  if (kernel === 'qk_int8_pv_fp16_cuda') return { ...options, kernel: 'qk-int8-pv-fp16-cuda' };
  if (kernel === 'qk_int8_pv_fp8_cuda') return { ...options, kernel: 'qk-int8-pv-fp8-cuda' };
  if (kernel === 'qk_int8_pv_fp8_cuda_sm90') return { ...options, kernel: 'qk-int8-pv-fp8-cuda-sm90' };
  return undefined;
}

/** Roundings of other instructions: V in FP8 may be multiplied in FP16, the mean of K be another vector. */
const GOLDEN_SLACK = 1.15;

/** On the golden inputs each kernel must be as accurate as the official one, and as near to it as both errors allow. */
function goldenChecks(computeCapability: number): Check[] {
  return GOLDEN_NAMES.flatMap((name) => {
    const golden = readGolden(name);
    const problem = createProblem(golden.q, golden.k, golden.v, { isCausal: golden.isCausal });
    const exact = attentionExact(problem, golden).output;
    return golden.outputs.flatMap((output) => {
      const options = officialOptions(output);
      if (options === undefined || lackedBy(options.kernel, computeCapability) !== undefined) return [];
      const check: Check = {
        name: `${name} as ${output}`,
        async run() {
          const { q, k, v, isCausal } = golden;
          const call = { ...options, isCausal, backend: 'cuda', returnLse: false } as const;
          const actual = toFloat32(await sageattn(q, k, v, call));
          const official = golden.float32(`out.${output}`);
          const ours = compare(actual, exact).relativeL1;
          const theirs = compare(official, exact).relativeL1;
          const apart = compare(actual, official).relativeL1;
          if (!(ours <= GOLDEN_SLACK * theirs)) throw new Error(`relative L1 ${ours}, official ${theirs}`);
          if (!(apart <= ours + theirs)) throw new Error(`${apart} from the official output`);
          return `relative L1 ${ours.toFixed(4)}, official ${theirs.toFixed(4)}, apart ${apart.toFixed(4)}`;
        },
      };
      return [check];
    });
  });
}

/** The first target of each kernel: its default options. */
function defaultTargets(targets: readonly Target[]): Target[] {
  const kernels = new Set(targets.map(({ kernel }) => kernel));
  return [...kernels].map((kernel) => targets.find((target) => target.kernel === kernel) as Target);
}

/** Runs this program again under each tool of compute-sanitizer. */
function sanitizerChecks(): Check[] {
  const { status } = spawnSync('compute-sanitizer', ['--version']);
  if (status !== 0) {
    notRun.push('compute-sanitizer (part of the CUDA toolkit, on the PATH)');
    return [];
  }
  return TOOLS.map((tool) => ({
    name: tool,
    async run() {
      const options = ['--tool', tool, '--error-exitcode', String(SANITIZER_STATUS), '--launch-timeout', '120'];
      const program = [process.execPath, process.argv[1] as string, SANITIZED];
      const { status, stdout, stderr } = spawnSync('compute-sanitizer', [...options, ...program], {
        encoding: 'utf8',
        maxBuffer: 2 ** 28,
        timeout: 20 * 60_000,
      });
      if (status !== 0) throw new Error(`ended with ${status}\n${stdout.slice(-6000)}${stderr.slice(-2000)}`);
      return stdout.match(/ERROR SUMMARY: .*/)?.[0];
    },
  }));
}

/** Checks that run in one process of their own: a fault of the device ends that process's use of it and no other's. */
interface Group {
  readonly name: string;
  checks(): readonly Check[];
  /** It wants the device's memory, or its attention, for itself. */
  readonly alone: boolean;
}

function groupsOf(backend: CudaBackend, cuda: Cuda, targets: readonly Target[], seed: number): Group[] {
  const device = cuda.device();
  return [
    { name: 'driver', checks: () => driverChecks(backend, cuda, device, seed), alone: true },
    { name: 'golden', checks: () => goldenChecks(device.computeCapability), alone: false },
    { name: 'backward', checks: () => backwardChecks(device.computeCapability, seed), alone: false },
    {
      name: 'blocks that are chosen',
      checks: () =>
        blockMapChecks(async () => backend, seed, 100).map(({ name, run: body }) => ({
          name,
          run: async () => {
            await body();
            return undefined;
          },
        })),
      alone: false,
    },
    {
      name: 'pages',
      checks: () => pageChecks(() => ({ device, seed }), pageCases(device.computeCapability)),
      alone: false,
    },
    { name: 'distributed', checks: () => distributedChecks(backend, cuda, seed), alone: false },
    ...targets.map((target) => ({
      name: target.name,
      checks: () => [
        ...conformanceTests(target, seed).map(({ name, run: body }) => ({
          name,
          run: async () => {
            await body();
            return undefined;
          },
        })),
        ...deviceChecks(target, device, seed),
      ],
      alone: false,
    })),
    ...targets.map((target) => ({
      name: `${target.name}, memory`,
      checks: () => memoryChecks(target, device, seed),
      alone: true,
    })),
    ...defaultTargets(targets).map((target) => ({
      name: `${target.name}, large`,
      checks: () => {
        if (device.memoryInfo().free >= LARGE_MEMORY) return largeChecks(target, device, seed);
        notRun.push(`${target.name}: offsets above 2^31 (30 GiB of free device memory)`);
        return [];
      },
      alone: true,
    })),
    {
      name: 'host',
      checks: () => [{ name: 'a repeated call takes under 50 microseconds', run: () => hostCost(device, seed) }],
      alone: true,
    },
    { name: 'compute-sanitizer', checks: sanitizerChecks, alone: true },
  ];
}

type Counts = typeof counts;

const summary = ({ passed, failed }: Counts) => `${passed} passed, ${failed} failed`;

function add(total: Counts, { passed, failed }: Counts): void {
  total.passed += passed;
  total.failed += failed;
}

function argumentOf(name: string): string | undefined {
  const at = process.argv.indexOf(name);
  return at < 0 ? undefined : process.argv[at + 1];
}

/** Processes at a time: exact results are computed on the CPU, which is most of the time. */
const jobsOf = (groups: number): number =>
  Math.max(1, Math.min(groups, Number(argumentOf('--jobs') ?? Math.ceil(availableParallelism() / 2))));

/** Lines of a group's process that are its results. */
const RESULT_LINE = /^(ok|FAILED|not run| {8}| {4}at )/;

/** Runs a group in a process of its own and prints its results as they come: a run that is cut short keeps them. */
function child(group: Group, seed: number): Promise<Counts> {
  const filter = only === '' ? [] : ['--only', only];
  const running = spawn(process.execPath, [process.argv[1] as string, '--group', group.name, ...filter], {
    env: { ...process.env, SAGEATTENTION_SEED: String(seed) },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let printed = '';
  for (const stream of [running.stdout, running.stderr]) {
    createInterface({ input: stream }).on('line', (line) => {
      printed += `${line}\n`;
      if (RESULT_LINE.test(line)) console.log(line);
    });
  }
  return new Promise((resolve) => {
    running.on('close', (status, signal) => {
      const [, passed, failed] = printed.match(/(\d+) passed, (\d+) failed\s*$/) ?? [];
      if (passed !== undefined && failed !== undefined) {
        resolve({ passed: Number(passed), failed: Number(failed) });
        return;
      }
      console.log(`FAILED  ${group.name}: its process ended with ${signal ?? status}\n${printed.slice(-4000)}`);
      resolve({ passed: 0, failed: 1 });
    });
  });
}

async function main(): Promise<number> {
  const backend = new CudaBackend();
  const { available, reason, remedy, details } = await backend.availability();
  if (!available) {
    console.error(`test:cuda could not run: ${reason}. ${remedy}`);
    return 2;
  }
  await setBackend(backend);
  const cuda = await backend.cuda();
  const device = cuda.device();
  const targets = targetsFor(device.computeCapability);
  const seed = runSeed();
  for (const [name, value] of Object.entries(details)) console.log(`${name}: ${value}`);
  console.log(`SAGEATTENTION_SEED=${seed}`);

  if (process.argv.includes(SANITIZED)) {
    for (const target of defaultTargets(targets)) {
      const checks = kernelChecks(target, device, { tokens: 150, headDim: 64 }, seed, 1);
      if (!(await run(target.name, checks, device))) break;
    }
    return counts.failed === 0 ? 0 : 1;
  }

  const groups = groupsOf(backend, cuda, targets, seed);
  const asked = argumentOf('--group');
  if (asked !== undefined) {
    const group = groups.find(({ name }) => name === asked);
    if (group === undefined) throw new Error(`no group '${asked}'`);
    await run(group.name, group.checks(), device);
    for (const what of notRun) console.log(`not run: ${what}`);
    console.log(summary(counts));
    await backend.dispose();
    return counts.failed === 0 ? 0 : 1;
  }
  // The device is the children's now.
  await backend.dispose();
  const total = { passed: 0, failed: 0 };
  const together = groups.filter(({ alone }) => !alone);
  const running = Array.from({ length: jobsOf(together.length) }, async () => {
    for (let group = together.shift(); group !== undefined; group = together.shift())
      add(total, await child(group, seed));
  });
  await Promise.all(running);
  for (const group of groups.filter(({ alone }) => alone)) add(total, await child(group, seed));
  console.log(`\n${summary(total)}`);
  if (total.passed + total.failed === 0) return 2;
  return total.failed === 0 ? 0 : 1;
}

process.exitCode = await main();
