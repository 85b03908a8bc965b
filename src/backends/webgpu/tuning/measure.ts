/** Times the candidates of the tables on a device, for kinds of problems. */
import { createProblem } from '../../../attention/problem.ts';
import { UnsupportedOptionError } from '../../../errors.ts';
import { Random } from '../../../measure/random.ts';
import { median } from '../../../measure/statistics.ts';
import { fromFloat32 } from '../../../tensor/access.ts';
import { chooseOptions } from '../../choice.ts';
import type { GpuContext } from '../device.ts';
import { candidatesFor, chooseVariant, type Forced } from '../families/choose.ts';
import { QK_INT8_PV_FP16, QK_INT8_PV_INT8 } from '../kernel-table.ts';
import { planLaunches } from '../launches/plan.ts';
import { tryShapes } from '../matrix-trial.ts';
import { Program } from '../program.ts';
import type { Buffers } from '../scratch.ts';
import { emptyGpuTensor, GPU_BUFFER_USAGE, GPU_MAP_READ, uploadTensor } from '../tensor.ts';
import { kindOf, type TunedEntry, type TunedTime } from './record.ts';

/** What is timed: float16, batch 1. */
export interface TuningShape {
  readonly headDim: number;
  readonly queries: number;
  readonly keys: number;
  readonly heads: number;
}

/** Sizes of problems of each kind that any GPU computes in a moment. */
const SIZES = {
  few: { queries: 1, keys: 4096, heads: 8 },
  short: { queries: 1024, keys: 1024, heads: 8 },
  long: { queries: 2048, keys: 2048, heads: 16 },
} as const;

/** What `tune` times where nothing else is asked for. */
export const DEFAULT_SHAPES: readonly TuningShape[] = [64, 128].flatMap((headDim) => [
  { headDim, ...SIZES.short },
  { headDim, ...SIZES.long },
]);

/** A problem's kind at a size of its own. */
export function shapeOfKind(problem: Parameters<typeof kindOf>[0]): TuningShape {
  const { headDim, queries } = kindOf(problem);
  return { headDim, ...SIZES[queries] };
}

/** Milliseconds of GPU time for all candidates of a shape, beside one run of each. */
const BUDGET = 200;
/** Milliseconds of work before the first timing. */
const WARM_UP = 150;
/** Milliseconds of one timing: many short runs, so that starting them does not count. */
const TIMING = 5;
const MOST_RUNS = 100;
const ROUNDS = 3;
/** A candidate that takes this many times as long as the best one is timed no more. */
const HOPELESS = 2;

/** Relative L1 of both on the same inputs is below 0.02: the times of one may speak against the other. */
const KERNELS = [QK_INT8_PV_FP16, QK_INT8_PV_INT8];

interface Candidate extends Omit<TunedTime, 'milliseconds'> {
  readonly program: Program;
  readonly times: number[];
}

/** What times runs: the GPU's own clock where it tells. */
interface Clock {
  readonly querySet: GPUQuerySet;
  readonly resolved: GPUBuffer;
  readonly staging: GPUBuffer;
}

function clockOf({ device, capabilities }: GpuContext): Clock | undefined {
  if (!capabilities.timestamps) return undefined;
  const { QUERY_RESOLVE, COPY_SRC, COPY_DST, MAP_READ } = GPU_BUFFER_USAGE;
  return {
    querySet: device.createQuerySet({ type: 'timestamp', count: 2 }),
    resolved: device.createBuffer({ size: 16, usage: QUERY_RESOLVE | COPY_SRC }),
    staging: device.createBuffer({ size: 16, usage: MAP_READ | COPY_DST }),
  };
}

/** Milliseconds of a run, of `runs` that are submitted at once. */
async function timed(
  context: GpuContext,
  { program }: Candidate,
  buffers: Buffers,
  runs: number,
  clock: Clock | undefined,
): Promise<number> {
  const { device } = context;
  const started = performance.now();
  const [, outcome] = context.checked(() => {
    const all = { ...context.scratch.reserve(program.scratch), ...buffers };
    const encoder = device.createCommandEncoder({ label: 'sageattention tuning' });
    for (let i = 0; i < runs; i++) {
      const stamps = {
        ...(i === 0 ? { beginningOfPassWriteIndex: 0 } : {}),
        ...(i === runs - 1 ? { endOfPassWriteIndex: 1 } : {}),
      };
      const written = clock !== undefined && Object.keys(stamps).length > 0;
      program.encode(encoder, all, written ? { timestampWrites: { querySet: clock.querySet, ...stamps } } : {});
    }
    if (clock !== undefined) {
      encoder.resolveQuerySet(clock.querySet, 0, 2, clock.resolved, 0);
      encoder.copyBufferToBuffer(clock.resolved, 0, clock.staging, 0, 16);
    }
    device.queue.submit([encoder.finish()]);
  });
  await context.unlessLost(device.queue.onSubmittedWorkDone());
  const elapsed = performance.now() - started;
  const failure = await outcome;
  if (failure !== undefined) throw failure;
  if (clock === undefined) return elapsed / runs;
  await context.unlessLost(clock.staging.mapAsync(GPU_MAP_READ));
  const [first, last] = new BigUint64Array(clock.staging.getMappedRange().slice(0)) as unknown as [bigint, bigint];
  clock.staging.unmap();
  // A coarse clock may see no time go by.
  return last > first ? Number(last - first) / 1e6 / runs : elapsed / runs;
}

/** Candidates take turns until each has its timings, or the time is spent. */
async function timeAll(
  context: GpuContext,
  candidates: readonly Candidate[],
  buffers: Buffers,
  clock: Clock | undefined,
): Promise<TunedTime[]> {
  // An idle GPU lowers its clock, several times over.
  const [first] = candidates;
  for (const start = performance.now(); first !== undefined && performance.now() - start < WARM_UP; ) {
    await timed(context, first, buffers, 1, clock);
  }
  for (const candidate of candidates) {
    await timed(context, candidate, buffers, 1, clock);
    candidate.times.push(await timed(context, candidate, buffers, 1, clock));
  }
  const once = candidates.map(({ times }) => times[0] as number);
  const started = performance.now();
  for (let round = 0; round < ROUNDS && performance.now() - started < BUDGET; round++) {
    const best = Math.min(...candidates.map(({ times }) => Math.min(...times)));
    for (const [i, candidate] of candidates.entries()) {
      if (Math.min(...candidate.times) > HOPELESS * best) continue;
      const runs = Math.max(1, Math.min(MOST_RUNS, Math.round(TIMING / Math.max(once[i] as number, 0.01))));
      candidate.times.push(await timed(context, candidate, buffers, runs, clock));
    }
  }
  return candidates
    .map(({ kernel, family, variant, times }) => ({ kernel, family, variant, milliseconds: median(times) }))
    .sort((a, b) => a.milliseconds - b.milliseconds);
}

/**
 * Times what the tables offer for one shape. Kernels are compiled first, all at once; a shape of the matrix kernel that comes out wrong
 * is no candidate.
 *
 * @throws {ExecutionError} `device-lost`, `out-of-memory`
 */
export async function measureShape(context: GpuContext, shape: TuningShape): Promise<TunedEntry> {
  const { headDim, queries, keys, heads } = shape;
  const { device, capabilities } = context;
  const random = new Random(1);
  const made = (tokens: number) =>
    uploadTensor(
      device,
      fromFloat32(
        Float32Array.from({ length: heads * tokens * headDim }, () => random.uniform(-1, 1)),
        [1, heads, tokens, headDim],
        'float16',
      ),
    );
  const [q, k, v] = [made(queries), made(keys), made(keys)] as const;
  const output = emptyGpuTensor(device, 'float16', [1, heads, queries, headDim]);
  const problem = createProblem(q, k, v, {});
  const clock = clockOf(context);
  const compiled = KERNELS.flatMap((descriptor) => {
    const choice = chooseOptions(descriptor, problem, {});
    return candidatesFor(capabilities, problem, choice).map(
      async ({ family, variant }): Promise<Candidate | undefined> => {
        const forced: Forced = { family, variant };
        try {
          await tryShapes(context, problem, choice, forced);
          const { launches, sizes, tables } = planLaunches(context.capabilities, problem, choice, forced);
          const program = await Program.create(context, launches, sizes, tables);
          return { kernel: descriptor.name, family, variant, program, times: [] };
        } catch (error) {
          if (error instanceof UnsupportedOptionError) return undefined;
          throw error;
        }
      },
    );
  });
  const settled = await Promise.allSettled(compiled);
  const candidates = settled.flatMap((result) => (result.status === 'fulfilled' ? (result.value ?? []) : []));
  try {
    const failed = settled.find((result) => result.status === 'rejected');
    if (failed !== undefined) throw failed.reason;
    const buffers = { q: q.buffer, k: k.buffer, v: v.buffer, output: output.buffer };
    const times = await timeAll(context, candidates, buffers, clock);
    const usual = chooseVariant(
      { ...context.capabilities, tuning: [] },
      problem,
      chooseOptions(QK_INT8_PV_FP16, problem, {}),
      {},
    );
    const table = { family: usual.family, variant: usual.name };
    return { ...kindOf(problem), measured: { heads, queries, keys }, table, times };
  } finally {
    for (const { program } of candidates) program.dispose();
    for (const tensor of [q, k, v, output]) tensor.dispose();
    clock?.querySet.destroy();
    clock?.resolved.destroy();
    clock?.staging.destroy();
  }
}
