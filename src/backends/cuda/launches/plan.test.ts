import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { runSeed } from '../../../../test/support/random.ts';
import { createProblem } from '../../../attention/problem.ts';
import { emptyTensor } from '../../../tensor/tensor.ts';
import type { KernelChoice } from '../../backend.ts';
import { CUDA_KERNELS, type CudaKernelDescriptor, lackedBy } from '../kernel-table.ts';
import { TARGET_FEATURES, TARGETS } from '../ptx/targets.ts';
import type { SimulatableModule } from './arguments.ts';
import { planAttend, planKeyValue, planLaunches } from './plan.ts';
import { keepsQuery, targetOfKernel } from './scheme.ts';

const choiceOf = (descriptor: CudaKernelDescriptor): KernelChoice => ({
  descriptor,
  qkQuantGran: descriptor.qkQuantGran[0] ?? 'per-block',
  pvAccumDtype: descriptor.pvAccumDtype[0] ?? 'fp32',
  smoothK: true,
  smoothV: false,
  smoothQ: descriptor.smoothQ[0],
});

const operand = (length: number) => emptyTensor([1, 2, length, 64], 'float16');
const problem = createProblem(operand(200), operand(300), operand(300), { isCausal: true });

/** The largest head dims, and odd ones. */
const DIMS = [
  [256, 256],
  [256, 61],
  [64, 256],
  [1, 1],
] as const;

const COMBINATIONS = TARGETS.flatMap((target) => CUDA_KERNELS.map((kernel) => ({ target, kernel, name: kernel.name })));

describe.each(COMBINATIONS)('$name on $target', ({ target, kernel }) => {
  const device = { target, multiprocessors: 132 };
  const lacked = lackedBy(kernel.name, Number(target.replace(/\D/g, '')));

  if (lacked !== undefined) {
    it('is refused with what it needs', () => {
      for (const plan of [planLaunches, planKeyValue, planAttend]) {
        expect(() => plan(problem, choiceOf(kernel), device)).toThrow(
          expect.objectContaining({
            argument: 'options.kernel',
            expected: `a kernel that runs on ${target}`,
            received: `${kernel.name}, which needs ${lacked}`,
          }),
        );
      }
    });
    return;
  }

  it('has launches whose buffers are inputs, scratch or constants, and whose shared memory fits', () => {
    const { launches, scratch, constants } = planLaunches(problem, choiceOf(kernel), device);
    const known = new Set(['q', 'k', 'v', 'output', ...Object.keys(scratch), ...Object.keys(constants)]);
    for (const { name, module, sharedBytes, arguments: args } of launches) {
      const buffers = args.flatMap((argument) =>
        argument.kind === 'pointer' ? [argument.buffer] : argument.kind === 'tensor-map' ? [argument.map.buffer] : [],
      );
      for (const buffer of buffers) expect(known, `${name} names ${buffer}`).toContain(buffer);
      expect(args.length).toBe((module as SimulatableModule).kernel().parameters.length);
      expect(sharedBytes).toBeLessThanOrEqual(TARGET_FEATURES[target].sharedBytesPerBlock);
    }
  });

  it('has a configuration that fits for every head dim, accumulator and smoothing, prefilling and decoding', () => {
    const of = (length: number, dim: number) => emptyTensor([1, 1, length, dim], 'float16');
    for (const [d, dv] of DIMS) {
      for (const queries of [1, 200]) {
        const shaped = createProblem(of(queries, d), of(300, d), of(300, dv), {});
        for (const pvAccumDtype of kernel.pvAccumDtype) {
          for (const smoothQ of kernel.smoothQ) {
            for (const { sharedBytes } of planLaunches(shaped, { ...choiceOf(kernel), pvAccumDtype, smoothQ }, device)
              .launches) {
              expect(sharedBytes).toBeLessThanOrEqual(TARGET_FEATURES[target].sharedBytesPerBlock);
            }
          }
        }
      }
    }
  });

  it('does the same in two parts, over buffers that the first keeps', () => {
    const choice = choiceOf(kernel);
    const whole = planLaunches(problem, choice, device);
    const first = planKeyValue(problem, choice, device);
    const second = planAttend(problem, choice, device);
    if (keepsQuery(problem, choice, targetOfKernel(choice, target))) {
      // Over a cache Q and P are not FP4: K and V are the same.
      expect(whole.launches.slice(0, first.launches.length)).toEqual(first.launches);
      expect(whole.scratch).toMatchObject(first.kept);
      expect(second.launches.map(({ name }) => name)).toEqual(['quantize Q', 'attention']);
      return;
    }
    expect([...first.launches, ...second.launches]).toEqual(whole.launches);
    expect({ ...first.kept, ...first.scratch, ...second.scratch }).toEqual(whole.scratch);
  });
});

it('takes parts of a tile from the caller, for measurements', () => {
  const blocksOf = (name: CudaKernelDescriptor['name'], overrides: object) => {
    const kernel = CUDA_KERNELS.find((descriptor) => descriptor.name === name) as CudaKernelDescriptor;
    const { launches } = planLaunches(
      problem,
      choiceOf(kernel),
      { target: 'sm_90a', multiprocessors: 132 },
      { overrides },
    );
    return launches.find((launch) => launch.name === 'attention')?.grid[0];
  };
  expect(blocksOf('qk-int8-pv-fp16-cuda-sm90', { consumers: 1, pingPong: false })).toBe(8);
  expect(blocksOf('qk-int8-pv-fp16-cuda', { warps: 4, rowsPerWarp: 16 })).toBe(8);
});

it('every kernel takes shared memory that its target has, for any head dims and numbers of queries', () => {
  const seed = runSeed();
  const runs = COMBINATIONS.filter(
    ({ target, name }) => lackedBy(name, Number(target.replace(/\D/g, ''))) === undefined,
  );
  const dim = fc.integer({ min: 1, max: 256 });
  fc.assert(
    fc.property(
      fc.constantFrom(...runs),
      fc.record({ d: dim, dv: dim, queries: fc.constantFrom(1, 2, 3, 8, 16, 17, 40, 200) }),
      fc.constantFrom('float32', 'float16'),
      ({ target, kernel }, { d, dv, queries }, dtype) => {
        if (kernel.dtypes?.includes(dtype) === false) return;
        const of = (length: number, channels: number) => emptyTensor([1, 2, length, channels], dtype);
        const shaped = createProblem(of(queries, d), of(300, d), of(300, dv), {});
        const { launches } = planLaunches(shaped, choiceOf(kernel), { target, multiprocessors: 132 });
        for (const { name, sharedBytes } of launches) {
          expect(sharedBytes, name).toBeLessThanOrEqual(TARGET_FEATURES[target].sharedBytesPerBlock);
        }
      },
    ),
    { seed: seed | 0, numRuns: 80 },
  );
});
