/**
 * Runs launches on the CPU, CTA by CTA, warp by warp in lockstep: what the kernels compute, without a GPU. It executes
 * the instruction list, not its text (ptxas checks that), and stops at what a correct kernel never does: reading what
 * was never written, leaving a buffer, misaligned accesses, races in shared memory, barriers that some threads miss.
 *
 * Divergence: lanes carry a block number each, and the lanes at the lowest one run next, which reconverges structured
 * code.
 *
 * Kernels with `mbarrier` run adversarially where the hardware is free: products read their operands and write their
 * sums only when they are waited for, copies land at random times, warps take turns at random. Found are deadlocks,
 * ordinary writes that reach `wgmma` or a copy without `fence.proxy.async`, tiles read before they have landed, too
 * many arrivals, and a stage handed back too early (its new contents meet the old products). The four warps of a
 * warpgroup compute their 16 rows apart; the hardware's requirement that they issue together is not checked.
 */
import type { KernelArgument, KernelLaunch } from '../../launches/launch.ts';
import type { Kernel } from '../../ptx/types.ts';
import { AsyncSharedMemory } from './async-memory.ts';
import { compileKernel, type ParameterValues, type Program, parameterWords, type Terminator } from './compile.ts';
import { isAsynchronous } from './compile-async.ts';
import { AsyncUnits, type SimulatedTensorMap } from './mbarrier.ts';
import { type DeviceAddresses, SharedMemory, SimulationError } from './memory.ts';
import { type Cta, Warp } from './warp.ts';
import { AsyncWarp } from './wgmma.ts';

const EXITED = -1;
/** Steps after which a warp is taken to hang. */
const STEP_LIMIT = 10_000_000;

/** Finds the lanes that run next, those at the lowest block; returns its number, or -1 when all have ended. */
function gatherLanes(warp: Warp): number {
  const { pc, lanes } = warp;
  let lowest = EXITED;
  for (const at of pc) if (at !== EXITED && (lowest === EXITED || at < lowest)) lowest = at;
  let active = 0;
  for (let lane = 0; lane < 32; lane++) if (pc[lane] === lowest) lanes[active++] = lane;
  warp.active = active;
  return lowest;
}

/** Moves the lanes that ran a block to what follows it. */
function follow(warp: Warp, block: number, terminator: Terminator): void {
  const { pc, lanes, active, u } = warp;
  const leaves = terminator.kind === 'branch' || terminator.kind === 'exit';
  const guard = leaves ? terminator.guard : undefined;
  const target = terminator.kind === 'branch' ? terminator.target : EXITED;
  for (let i = 0; i < active; i++) {
    const lane = lanes[i] as number;
    const taken = leaves && (guard === undefined || u[guard.row + lane] === guard.when);
    pc[lane] = taken ? target : block + 1;
  }
}

/** Runs a warp until it reaches a barrier (true) or ends (false). */
function runToBarrier(warp: Warp, program: Program): boolean {
  for (let step = 0; step < STEP_LIMIT; step++) {
    const at = gatherLanes(warp);
    if (at === EXITED) return false;
    const block = program.blocks[at];
    if (block === undefined) throw new SimulationError('a thread ran past the last instruction');
    block.run(warp);
    const { terminator } = block;
    follow(warp, at, terminator);
    if (terminator.kind === 'barrier') warp.requireAll('bar.sync');
    if (terminator.kind === 'barrier' || terminator.kind === 'turn') return true;
  }
  throw new SimulationError(`warp ${warp.index} did not end`);
}

function runCta(cta: Cta, warps: Warp[], program: Program): void {
  let waiting = warps;
  while (waiting.length > 0) {
    const arrived = waiting.filter((warp) => runToBarrier(warp, program));
    // Threads that have ended count as arrived.
    waiting = arrived;
    cta.shared.epoch++;
  }
}

/**
 * Runs the warps of a CTA by turns, at random, until all have ended: warps that wait for each other in other ways than
 * `bar.sync`.
 */
function runByTurns(cta: Cta, warps: readonly (Warp & { readonly asynchronous: AsyncWarp })[], program: Program): void {
  const { units } = (warps[0] as (typeof warps)[number]).asynchronous;
  const running = new Set(warps);
  const atBarrier = new Set<Warp>();
  for (let turn = 0; running.size > 0; turn++) {
    if (turn > STEP_LIMIT) throw new SimulationError('the CTA did not end');
    const ready = [...running].filter(
      (warp) =>
        warp.asynchronous.blocked === undefined &&
        !atBarrier.has(warp) &&
        warp.asynchronous.failedAt !== units.progress,
    );
    if (ready.length === 0 || units.random() < 0.05) {
      if (units.landCopies(ready.length === 0 ? 1 : 2)) continue;
      if (ready.length === 0) {
        const states = [...running].map(
          ({ index, asynchronous }) => `warp ${index} at ${asynchronous.blocked ?? asynchronous.waitsFor}`,
        );
        throw new SimulationError(`deadlock: ${states.join('; ')}`);
      }
    }
    const warp = ready[Math.floor(units.random() * ready.length)] as (typeof warps)[number];
    warp.asynchronous.yielded = false;
    if (!runToBarrier(warp, program)) {
      warp.asynchronous.finish();
      running.delete(warp);
      units.progress++;
    } else if (!warp.asynchronous.yielded) atBarrier.add(warp);
    // Threads that have ended count as arrived.
    if (atBarrier.size > 0 && atBarrier.size === running.size) {
      atBarrier.clear();
      cta.shared.epoch++;
    }
  }
}

/** Runs every CTA of a grid. */
export function simulateKernel(
  kernel: Kernel,
  grid: number,
  parameters: ParameterValues,
  global: DeviceAddresses,
  maps: ReadonlyMap<string, SimulatedTensorMap> = new Map(),
): void {
  const program = compileKernel(kernel);
  const words = parameterWords(kernel, parameters);
  const tensorMapIndex = (name: string) => [...maps.keys()].indexOf(name);
  for (let block = 0; block < grid; block++) {
    try {
      if (isAsynchronous(kernel.instructions)) {
        const shared = new AsyncSharedMemory(kernel.sharedBytes);
        const units = new AsyncUnits(shared, global, [...maps.values()], block + 1);
        const cta: Cta = { shared, global, block, gridBlocks: grid, parameters: words, tensorMapIndex };
        const warps = Array.from({ length: kernel.threads / 32 }, (_, index) => {
          const warp = new Warp(index, cta, program.words);
          const asynchronous = new AsyncWarp(warp, units);
          return Object.assign(warp, { asynchronous });
        });
        runByTurns(cta, warps, program);
      } else {
        const cta: Cta = {
          shared: new SharedMemory(kernel.sharedBytes),
          global,
          block,
          gridBlocks: grid,
          parameters: words,
          tensorMapIndex,
        };
        const warps = Array.from({ length: kernel.threads / 32 }, (_, index) => new Warp(index, cta, program.words));
        runCta(cta, warps, program);
      }
    } catch (error) {
      if (error instanceof SimulationError) {
        throw new SimulationError(`${kernel.name}, block ${block} of ${grid}: ${error.message}`, { cause: error });
      }
      throw error;
    }
  }
}

function argumentValue(argument: KernelArgument, addresses: ReadonlyMap<string, number>): number | bigint {
  switch (argument.kind) {
    case 'pointer': {
      const address = addresses.get(argument.buffer);
      if (address === undefined) throw new Error(`no buffer '${argument.buffer}'`);
      return address + (argument.byteOffset ?? 0);
    }
    case 'null':
      return 0;
    case 'tensor-map':
      throw new Error('a tensor map has no value');
    default:
      return argument.value;
  }
}

const ELEMENT_BYTES = { u8: 1, f16: 2, bf16: 2, f32: 4, s32: 4 } as const;

function simulatedMap(argument: KernelArgument, addresses: ReadonlyMap<string, number>): SimulatedTensorMap {
  if (argument.kind !== 'tensor-map') throw new Error(`a ${argument.kind} for a tensor map`);
  const { buffer, byteOffset = 0, elementType, dimensions, byteStrides, box, swizzle } = argument.map;
  const address = (addresses.get(buffer) as number) + byteOffset;
  const swizzleBytes = swizzle === 'none' ? 0 : (Number.parseInt(swizzle, 10) as 32 | 64 | 128);
  return { address, elementBytes: ELEMENT_BYTES[elementType], dimensions, byteStrides, box, swizzleBytes };
}

/** Runs launches in order. Their modules must be able to give the kernel as data. */
export function simulateLaunches(
  launches: readonly KernelLaunch[],
  addresses: ReadonlyMap<string, number>,
  global: DeviceAddresses,
): void {
  for (const { name, module, grid, block, sharedBytes, arguments: values } of launches) {
    if (!('kernel' in module) || typeof module.kernel !== 'function') throw new Error(`${name}: no kernel to simulate`);
    const kernel = module.kernel() as Kernel;
    if (block[0] !== kernel.threads || sharedBytes !== kernel.sharedBytes || grid[1] !== 1 || grid[2] !== 1) {
      throw new Error(`${name}: launch and kernel disagree on threads or shared memory`);
    }
    if (values.length !== kernel.parameters.length) {
      throw new Error(`${name}: ${values.length} arguments for ${kernel.parameters.length} parameters`);
    }
    const parameters: Record<string, number | bigint> = {};
    const maps = new Map<string, SimulatedTensorMap>();
    kernel.parameters.forEach((parameter, i) => {
      const argument = values[i] as KernelArgument;
      const kind = argument.kind === 'pointer' || argument.kind === 'null' ? 'u64' : argument.kind;
      if (kind !== parameter.kind && !(kind === 'tensor-map' && parameter.kind === 'tensorMap'))
        throw new Error(`${name}: argument ${parameter.name} is ${kind}, not ${parameter.kind}`);
      if (kind === 'tensor-map') maps.set(parameter.name, simulatedMap(argument, addresses));
      else parameters[parameter.name] = argumentValue(argument, addresses);
    });
    simulateKernel(kernel, grid[0], parameters, global, maps);
  }
}
