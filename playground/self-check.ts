/** A slice of the conformance suite, run by the page: each kernel, a case of each kind. */

import type { KernelName } from '../src/attention/kernels.ts';
import type { Backend, KernelDescriptor } from '../src/backends/backend.ts';
import { FP4_PV_FP4_ALGORITHM, PORTABLE_ALGORITHM, type QuantizedAlgorithm } from '../src/reference/quantized.ts';
import { CASES, type ConformanceCase } from '../test/conformance/cases.ts';
import { FP4_RELATIVE_L1 } from '../test/conformance/fp4-target.ts';
import { runCase, type Target } from '../test/conformance/suite.ts';
import { survivingLoss } from './workers/backends.ts';

export interface CheckResult {
  readonly backend: string;
  readonly kernel: string;
  readonly name: string;
  readonly milliseconds: number;
  /** What was wrong; none when it passed. */
  readonly failure?: string;
}

/** Group of a case and the start of its name. */
const SLICE: readonly (readonly [group: string, name: string])[] = [
  ['dtype and layout', 'float32 NHD'],
  ['dtype and layout', 'float16 HND'],
  ['dtype and layout', 'bfloat16 HND'],
  ['length', '1'],
  ['length', '129'],
  ['head dim', '40'],
  ['head dim', '128'],
  ['heads', 'GQA'],
  ['causal', 'bottom-right 5 over 200'],
  ['window', '[33,20]'],
  ['mask', 'bool [B,1,1,Lk]'],
  ['mask', 'additive float32'],
  ['scale', 'softcap'],
  ['varlen', '5, 0, 64'],
  ['strides', 'views of one packed [B,L,3,H,D] float32'],
  ['extreme', 'one huge outlier channel in K'],
  ['not a number', 'in keys and values that the mask hides from all rows, float32'],
];

/**
 * Of kernels that share nearly all of their code with another on the same backend, the cases in which they differ: FP4, which computes from
 * tables and takes several times as long, and INT8 PV on WebGPU, each of whose shapes a software GPU compiles for seconds.
 */
const FEW_CASES = ['float32 NHD', '129', 'one huge outlier channel in K'];

const cases = SLICE.map(([group, name]): ConformanceCase => {
  const found = CASES.find((entry) => entry.group === group && entry.name.startsWith(name));
  if (found === undefined) throw new Error(`the conformance suite has no case '${group}: ${name}'`);
  return found;
});

/** The bounds of the package's own tests: the official FP16 kernels' accuracy, and for integer PV their FP8 kernels'. */
const BOUNDS: Partial<Readonly<Record<KernelName, { relativeL1: number; algorithm: QuantizedAlgorithm }>>> = {
  'qk-int8-pv-fp16': { relativeL1: 0.02, algorithm: PORTABLE_ALGORITHM },
  'qk-int8-pv-int8': {
    relativeL1: 0.05,
    algorithm: { ...PORTABLE_ALGORITHM, pvFormat: 'fp8', pvAccumDtype: 'fp32+fp32' },
  },
  'qk-fp4-pv-fp4': { relativeL1: FP4_RELATIVE_L1, algorithm: FP4_PV_FP4_ALGORITHM },
};

function targetOf(backend: Backend, { name }: KernelDescriptor): Target | undefined {
  const bounds = BOUNDS[name];
  return bounds && { name, backend: backend.name, kernel: name, ...bounds };
}

const casesOf = (backend: Backend, { name }: KernelDescriptor): readonly ConformanceCase[] =>
  name.includes('fp4') || (backend.name === 'webgpu' && name === 'qk-int8-pv-int8')
    ? cases.filter((_, i) => FEW_CASES.includes((SLICE[i] as (typeof SLICE)[number])[1]))
    : cases;

/** Number of lines that {@link selfCheck} gives for these backends. */
export const checkCount = (backends: readonly Backend[]): number =>
  backends.flatMap((backend) =>
    backend.kernels.filter(({ name }) => name in BOUNDS).flatMap((kernel) => casesOf(backend, kernel)),
  ).length;

/** Runs every case on every kernel, one after the other. */
export async function* selfCheck(backends: readonly Backend[], seed: number): AsyncGenerator<CheckResult> {
  for (const backend of backends) {
    for (const kernel of backend.kernels) {
      const target = targetOf(backend, kernel);
      if (target === undefined) continue;
      for (const [i, testCase] of casesOf(backend, kernel).entries()) {
        const start = performance.now();
        let failure: string | undefined;
        try {
          await survivingLoss(() => runCase(target, testCase, seed + i));
        } catch (error) {
          failure = error instanceof Error ? error.message : String(error);
        }
        yield {
          backend: backend.name,
          kernel: kernel.name,
          name: `${testCase.group}: ${testCase.name}`,
          milliseconds: performance.now() - start,
          ...(failure === undefined ? {} : { failure }),
        };
      }
    }
  }
}
