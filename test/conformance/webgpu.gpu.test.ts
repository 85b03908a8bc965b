/**
 * The suite on a software GPU: the whole of it for one family, and for the others what their own code decides. The
 * vitest project names the driver; a driver that is missing is a named failure in CI.
 */
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { setBackend } from '../../src/backends/registry.ts';
import { createWebgpuBackendOn } from '../../src/backends/webgpu/backend.ts';
import type { Forced } from '../../src/backends/webgpu/families/choose.ts';
import { createWebgpuBackend, type WebgpuBackend } from '../../src/backends/webgpu/index.ts';
import { runSeed } from '../support/random.ts';
import { itNeeds } from '../support/requirement.ts';
import { sampled } from '../support/sample.ts';
import { conformanceTests, type Target } from './suite.ts';
import { WEBGPU_FP4_TARGET, WEBGPU_INT8_TARGET, WEBGPU_TARGET } from './webgpu-target.ts';

const DRIVER = process.env.SAGEATTENTION_SOFTWARE_GPU ?? 'the GPU of this machine';
const MISSING = process.env.SAGEATTENTION_SOFTWARE_GPU_MISSING;

const target = (name: string, settings: Partial<Target> = {}): Target => ({
  ...WEBGPU_TARGET,
  name,
  randomCases: 6,
  ...settings,
});

interface Run {
  readonly options: Forced;
  readonly target: Target;
  /** Tests whose names contain one of these; default all. */
  readonly only?: readonly string[];
}

/** What the way of computing decides, whatever prepares and splits: masks, bands, softcap, poison, LSE. */
const KERNEL_TESTS = [
  'dtype and layout: float16',
  'mask: additive float16',
  'mask: bool [Lq',
  'causal, window and softcap',
  'Dv 33',
  'causal: bottom-right 5',
  'not a number: in one',
  'not a number: in a value',
  'varlen: 5',
  'no keys',
  'V near the float32',
  'one key at a time',
  'sinks, softcap',
  'sinks, decoding 3',
];

const SWIFTSHADER = process.env.SAGEATTENTION_SOFTWARE_GPU === 'swiftshader';
/** Each family is tested whole on one driver, and where it differs from the other on the other. */
const [WHOLE, OTHER] = SWIFTSHADER ? (['base', 'subgroup'] as const) : (['subgroup', 'base'] as const);

const RUNS: readonly Run[] = [
  { options: { family: WHOLE }, target: target(`family ${WHOLE}`) },
  { options: { family: OTHER }, target: target(`family ${OTHER}`), only: KERNEL_TESTS },
  {
    options: { family: OTHER },
    target: target('per-thread scales', { options: { qkQuantGran: 'per-thread' }, relativeL1: 0.0185 }),
    only: ['GQA', 'varlen: 5', 'one key at a time'],
  },
  {
    options: { family: OTHER },
    target: target('per-warp scales', { options: { qkQuantGran: 'per-warp' } }),
    only: ['GQA', 'varlen: 5'],
  },
  {
    options: { family: OTHER },
    target: target('smoothed V', { options: { smoothV: true } }),
    only: [
      'mask: bool [Lq',
      'varlen: 5',
      'V near the float32',
      'not a number: in a value',
      'one key at a time',
      'sinks, rows that see nothing',
    ],
  },
  {
    options: { family: 'base', variant: '32x32s' },
    target: target('base, wide tiles in shared memory'),
    only: ['GQA', 'mask: bool [Lq'],
  },
  ...(['subgroup', 'base'] as const).map((family) => ({
    options: { family },
    target: { ...WEBGPU_INT8_TARGET, name: `INT8 PV, ${family}`, randomCases: 6 },
    only: KERNEL_TESTS,
  })),
  // lavapipe takes half a minute to compile the kernels of one of these.
  {
    options: { family: OTHER },
    target: { ...WEBGPU_FP4_TARGET, name: 'FP4' },
    only: SWIFTSHADER ? ['causal, window and softcap', 'varlen: 5', 'sinks, few'] : ['mask: bool [Lq', 'sinks, few'],
  },
  // The matrix kernel's smallest shape with its matrix operations emulated; the others: src/backends/webgpu/matrix.gpu.test.ts.
  // lavapipe takes minutes to compile them.
  ...(SWIFTSHADER
    ? [
        {
          options: { emulateMatrices: 'int8', variant: '1s16r16k-qk1-pv1' } as const,
          target: target('matrix kernel, emulated'),
          only: [
            'smScale 0.3',
            'mask: bool [Lq',
            'additive float16',
            'varlen: 5',
            'not a number: in a value',
            'one key at a time',
            'sinks, softcap',
          ],
        },
        {
          options: { emulateMatrices: 'float32', variant: '1s16r16k-qk1-pv1' } as const,
          target: target('matrix kernel on float32 products, emulated'),
          only: ['smScale 0.3'],
        },
      ]
    : []),
];

/** Shares of each target's tests: a driver compiles each one's kernels for seconds. On a card `test/webgpu` runs all. */
const SHARES = SWIFTSHADER ? { byHand: 0.05, otherwise: 0.08 } : { byHand: 0.04, otherwise: 0.1 };

const seed = runSeed();
const test = itNeeds(MISSING);

for (const { options, target, only } of RUNS) {
  describe(`WebGPU on ${DRIVER}: ${target.name} (SAGEATTENTION_SEED=${seed})`, () => {
    let backend: WebgpuBackend | undefined;
    beforeAll(async () => {
      if (MISSING !== undefined) return;
      backend = createWebgpuBackendOn(options);
      await setBackend(backend);
    });
    afterAll(() => backend?.dispose());
    const chosen = conformanceTests(target, seed).filter(
      ({ name }) => only === undefined || only.some((text) => name.includes(text)),
    );
    for (const { name, run } of sampled(chosen, seed, SHARES, target.name)) test(name, run);
  });
}

describe(`WebGPU on ${DRIVER}`, () => {
  test('is what the tests run on', async () => {
    const backend = createWebgpuBackend();
    const { details } = await backend.availability();
    await backend.dispose();
    expect(details.adapter).toMatch(
      DRIVER === 'lavapipe' ? /llvmpipe/ : DRIVER === 'swiftshader' ? /SwiftShader/ : /./,
    );
  });
});
