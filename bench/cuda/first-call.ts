/**
 * The first call of a process: opening the device, the first call of each family of shapes, and the second one, with nothing compiled,
 * with the driver's own cache, and with the folder of compiled kernels. Each case is a process of its own.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-cuda-first-call.mjs OUTPUT_FOLDER
 *
 * Writes `first-call.json` there, and prints it as a table.
 */
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { download, emptyCudaTensor, openCuda } from '../../src/backends/cuda/index.ts';
import { type AttentionOptions, prepareKeyValue, sageattn } from '../../src/index.ts';
import { median } from '../../src/measure/statistics.ts';

interface Family {
  readonly name: string;
  readonly length: number;
  readonly keyLength: number;
  readonly headDim: number;
  readonly options: AttentionOptions;
  readonly prepared?: true;
}

const FAMILIES: readonly Family[] = [
  { name: '4096 tokens', length: 4096, keyLength: 4096, headDim: 128, options: {} },
  { name: '4096 tokens, causal', length: 4096, keyLength: 4096, headDim: 128, options: { isCausal: true } },
  { name: '256 tokens, D=64', length: 256, keyLength: 256, headDim: 64, options: {} },
  { name: 'decoding over 8192 keys', length: 1, keyLength: 8192, headDim: 128, options: {}, prepared: true },
];

/** Milliseconds. */
interface Times {
  readonly open: number;
  readonly first: number;
  readonly second: number;
}

/** Runs one family in this process. Tensors hold what memory held: times of compiling do not depend on it. */
async function measure({ length, keyLength, headDim, options, prepared }: Family): Promise<Times> {
  const now = () => performance.now();
  const start = now();
  const device = (await openCuda()).device(0);
  device.stream.synchronize();
  const opened = now();
  const [q, k, v] = [length, keyLength, keyLength].map((tokens) => {
    const made = emptyCudaTensor(device, [1, 8, tokens, headDim], 'bfloat16');
    device.call('cuMemsetD8Async', 'clearing', made.memory.pointer, 0, made.memory.byteLength, device.stream.handle);
    return made;
  }) as [ReturnType<typeof emptyCudaTensor>, ReturnType<typeof emptyCudaTensor>, ReturnType<typeof emptyCudaTensor>];
  device.stream.synchronize();
  const call = async (): Promise<number> => {
    const before = now();
    const cache = prepared && (await prepareKeyValue(k, v));
    const output = cache ? await cache.attend(q) : await sageattn(q, k, v, { ...options, returnLse: false });
    download(output as typeof q);
    const taken = now() - before;
    (output as typeof q).memory.dispose();
    if (cache) cache.dispose();
    return taken;
  };
  return { open: opened - start, first: await call(), second: await call() };
}

const REPEATS = 5;

function inProcess(family: number, environment: NodeJS.ProcessEnv): Times {
  const program = process.argv[1] as string;
  const env = { ...process.env, ...environment };
  return JSON.parse(execFileSync(process.execPath, [program, '--family', `${family}`], { env, encoding: 'utf8' }));
}

function medians(times: readonly Times[]): Times {
  const of = (name: keyof Times) => median(times.map((one) => one[name]));
  return { open: of('open'), first: of('first'), second: of('second') };
}

function main(folder: string): void {
  mkdirSync(folder, { recursive: true });
  const scratch = mkdtempSync(join(tmpdir(), 'first-call-'));
  const results: object[] = [];
  try {
    FAMILIES.forEach(({ name }, family) => {
      const [kernels, driverCache] = [join(scratch, `kernels-${family}`), join(scratch, `driver-${family}`)];
      const none = { CUDA_CACHE_DISABLE: '1', SAGEATTENTION_KERNELS: '' };
      const driver = { CUDA_CACHE_DISABLE: '0', CUDA_CACHE_PATH: driverCache, SAGEATTENTION_KERNELS: '' };
      const kept = { CUDA_CACHE_DISABLE: '1', SAGEATTENTION_KERNELS: kernels };
      const keeping = inProcess(family, kept);
      inProcess(family, driver);
      const measured: Record<string, Times[]> = { none: [], driver: [], kept: [] };
      // In turn, so that what drifts meets all alike.
      for (let repeat = 0; repeat < REPEATS; repeat++) {
        for (const [which, environment] of Object.entries({ none, driver, kept })) {
          measured[which]?.push(inProcess(family, environment));
        }
      }
      const files = readdirSync(kernels);
      const bytes = files.reduce((sum, file) => sum + statSync(join(kernels, file)).size, 0);
      const times = Object.fromEntries(Object.entries(measured).map(([which, all]) => [which, medians(all)]));
      results.push({ name, keeping, ...times, files: files.length, bytes });
      const shown = Object.entries({ keeping, ...times }).map(
        ([which, { open, first, second }]) =>
          `${which} ${open.toFixed(0)} + ${first.toFixed(1)}, then ${second.toFixed(2)}`,
      );
      console.log(`${name}: ${shown.join('; ')} ms; ${files.length} files, ${(bytes / 1024).toFixed(0)} KiB`);
    });
  } finally {
    rmSync(scratch, { recursive: true, force: true });
  }
  writeFileSync(join(folder, 'first-call.json'), `${JSON.stringify(results, null, 1)}\n`);
}

const [first, second] = process.argv.slice(2);
if (first === '--family') {
  process.stdout.write(JSON.stringify(await measure(FAMILIES[Number(second)] as Family)));
  process.exit(0);
} else if (first === undefined) {
  console.error('usage: bench-cuda-first-call.mjs OUTPUT_FOLDER');
  process.exitCode = 2;
} else main(first);
