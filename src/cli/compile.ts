/**
 * `sageattention compile`: the CUDA kernels of an application's calls, made before it runs: as machine code where `ptxas` is installed,
 * else as PTX. No GPU is asked.
 */
import { spawnSync } from 'node:child_process';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { chooseOptions } from '../backends/choice.ts';
import { digestOf, KernelFiles } from '../backends/cuda/driver/kernel-files.ts';
import { fastestKernel, quantizingKernel } from '../backends/cuda/fastest.ts';
import { GENERATOR_DIGEST } from '../backends/cuda/generator.ts';
import { CUDA_KERNELS, lackedBy, targetFor } from '../backends/cuda/kernel-table.ts';
import type { KernelModule } from '../backends/cuda/launches/launch.ts';
import { planAttend, planKeyValue, planLaunches } from '../backends/cuda/launches/plan.ts';
import type { TensorView } from '../tensor/tensor.ts';
import { UserError } from './errors.ts';
import { type AttentionOptions, createProblem, type KernelName, messageOf } from './library.ts';
import { print, table } from './terminal.ts';

export interface CompileOptions {
  /** major * 10 + minor of the devices. */
  readonly computeCapability: readonly number[];
  /** Default: what each call takes by itself. */
  readonly kernel?: readonly KernelName[];
  readonly headDim: readonly number[];
  readonly length: readonly number[];
  readonly keyLength?: readonly number[];
  readonly batch: number;
  readonly heads: number;
  readonly kvHeads?: number;
  readonly dtype: 'float16' | 'bfloat16' | 'float32';
  readonly causal: 'no' | 'yes' | 'both';
  readonly multiprocessors: number;
  /** Whether prepared keys and values are attended to as well. */
  readonly prepared: boolean;
  readonly output: string;
  readonly ptxas: string;
}

interface Shape {
  readonly headDim: number;
  readonly length: number;
  readonly keyLength: number;
  readonly isCausal: boolean;
}

function shapesOf({ headDim, length, keyLength, causal }: CompileOptions): Shape[] {
  const causalities = causal === 'both' ? [false, true] : [causal === 'yes'];
  return headDim.flatMap((dim) =>
    length.flatMap((tokens) =>
      (keyLength ?? [tokens]).flatMap((keys) =>
        causalities.map((isCausal) => ({ headDim: dim, length: tokens, keyLength: keys, isCausal })),
      ),
    ),
  );
}

function problemOf(shape: Shape, { batch, heads, kvHeads = heads, dtype }: CompileOptions) {
  const operand = (count: number, tokens: number): TensorView => ({
    location: 'cpu',
    dtype,
    shape: [batch, count, tokens, shape.headDim],
    strides: [count * tokens * shape.headDim, tokens * shape.headDim, shape.headDim, 1],
    offset: 0,
  });
  const options: AttentionOptions =
    shape.isCausal && shape.length !== shape.keyLength
      ? { isCausal: true, causalAlignment: 'bottom-right' }
      : { isCausal: shape.isCausal };
  const keys = operand(kvHeads, shape.keyLength);
  return createProblem(operand(heads, shape.length), keys, keys, options);
}

/** The modules of every launch, each once. */
function modulesOf(computeCapability: number, options: CompileOptions): Map<string, KernelModule> {
  const target = targetFor(computeCapability);
  if (target === undefined) throw new UserError(`no kernel runs on compute capability ${computeCapability / 10}`);
  const device = { target, multiprocessors: options.multiprocessors };
  const modules = new Map<string, KernelModule>();
  for (const shape of shapesOf(options)) {
    const problem = problemOf(shape, options);
    const named = options.kernel?.map((name) => CUDA_KERNELS.find((kernel) => kernel.name === name));
    const whole = named ?? [fastestKernel(problem, computeCapability)];
    const quantizing = named ?? [quantizingKernel(problem, computeCapability)];
    const add = (launches: readonly { readonly module: KernelModule }[]) => {
      for (const { module } of launches) modules.set(module.id, module);
    };
    for (const descriptor of new Set([...whole, ...(options.prepared ? quantizing : [])])) {
      if (descriptor === undefined) throw new UserError('a kernel of --kernel is none of CUDA');
      const lacked = lackedBy(descriptor.name, computeCapability);
      if (lacked !== undefined) throw new UserError(`${descriptor.name} needs ${lacked}`);
      const choice = chooseOptions(descriptor, problem, {});
      if (whole.includes(descriptor)) add(planLaunches(problem, choice, device).launches);
      if (options.prepared && quantizing.includes(descriptor) && descriptor.name !== 'exact') {
        add(planKeyValue(problem, choice, device).launches);
        add(planAttend(problem, choice, device).launches);
      }
    }
  }
  return modules;
}

/** The version of the assembler, or undefined where there is none. */
function assemblerVersion(ptxas: string): string | undefined {
  const { status, stdout } = spawnSync(ptxas, ['--version'], { encoding: 'utf8' });
  return status === 0 ? stdout.match(/release [^,]*/)?.[0] : undefined;
}

/** What ptxas is told to assemble for: PTX of an `a` or `f` target runs on that one only. */
function architectureOf(ptx: string, computeCapability: number): string {
  const target = ptx.match(/\.target\s+(sm_\w+)/)?.[1] as string;
  return /\d$/.test(target) ? `sm_${computeCapability}` : target;
}

async function assemble(ptxas: string, ptx: string, computeCapability: number, folder: string): Promise<Uint8Array> {
  const [source, output] = [path.join(folder, 'kernel.ptx'), path.join(folder, 'kernel.cubin')];
  await writeFile(source, ptx);
  const target = `-arch=${architectureOf(ptx, computeCapability)}`;
  const { status, stderr, stdout } = spawnSync(ptxas, [target, source, '-o', output], { encoding: 'utf8' });
  if (status !== 0) throw new UserError(`${ptxas} ${target}: ${(stderr || stdout).trim()}`);
  return readFile(output);
}

/** Writes the kernels of every shape and device. */
export async function compile(options: CompileOptions): Promise<void> {
  const version = assemblerVersion(options.ptxas);
  const files = new KernelFiles(path.resolve(options.output));
  const scratch = await mkdtemp(path.join(tmpdir(), 'sageattention-compile-'));
  const rows: string[][] = [];
  try {
    for (const computeCapability of options.computeCapability) {
      for (const module of modulesOf(computeCapability, options).values()) {
        const ptx = module.ptx();
        const kind = version === undefined ? 'ptx' : 'cubin';
        const bytes =
          kind === 'ptx'
            ? new TextEncoder().encode(ptx)
            : await assemble(options.ptxas, ptx, computeCapability, scratch);
        const file = writeTo(files, digestOf(module, GENERATOR_DIGEST), computeCapability, kind, bytes);
        const name = ptx.match(/\.entry\s+(\w+)/)?.[1] as string;
        rows.push([name, `${computeCapability / 10}`, `${(bytes.length / 1024).toFixed(0)} KiB`, file.slice(0, 12)]);
      }
    }
  } finally {
    await rm(scratch, { recursive: true, force: true });
  }
  print(table(['kernel', '>device', '>size', 'file'], rows));
  print();
  const made = version === undefined ? `no ${options.ptxas}: PTX, which the driver compiles` : `ptxas, ${version}`;
  print(`${rows.length} kernels in ${options.output} (${made})`);
  print(`Programs find them with SAGEATTENTION_KERNELS=${options.output}, or cuda.kernelFolder`);
}

function writeTo(
  files: KernelFiles,
  digest: string,
  computeCapability: number,
  kind: 'cubin' | 'ptx',
  bytes: Uint8Array,
): string {
  try {
    return files.write(digest, { computeCapability }, kind, bytes);
  } catch (error) {
    throw new UserError(`cannot write to ${files.folder}: ${messageOf(error)}`);
  }
}
