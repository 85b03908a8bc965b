/** Gradient kernels with subgroup matrices, emulated: shapes beside tiles in float32. */
import { afterAll, describe, expect, vi } from 'vitest';
import { itNeeds } from '../../../test/support/requirement.ts';
import { createProblem } from '../../attention/problem.ts';
import { tensor } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import { createWebgpuBackendOn } from './backend.ts';
import { GRADIENT_VARIANTS, MATRIX_GRADIENT_VARIANTS } from './families/backward.ts';
import { type GradientErrors, gradientErrors } from './gradient-trial.ts';

/** lavapipe takes minutes to compile an emulated kernel. */
const COMPILES = process.env.SAGEATTENTION_SOFTWARE_GPU !== 'lavapipe';
/** One of each use of memory, small enough for a software driver; all run on a card (test/webgpu). */
const SHAPES = ['2s32o16p-s2-g1-plain', '1s16o16p-s1-g1-place'];
vi.setConfig({ testTimeout: 300_000 });
const test = itNeeds(process.env.SAGEATTENTION_SOFTWARE_GPU_MISSING);

describe.runIf(COMPILES)('gradient kernels with emulated matrices', () => {
  const backend = createWebgpuBackendOn({});
  afterAll(() => backend.dispose());
  const problem = { dtype: 'float32', headDim: 32, valueDim: 64 } as const;
  const x = tensor(new Float32Array(32), [1, 1, 1, 32]);
  const choice = chooseOptions(backend.defaultKernel(), createProblem(x, x, x, {}), {});
  let inFloat32: GradientErrors | undefined;

  for (const { name } of MATRIX_GRADIENT_VARIANTS.filter((variant) => SHAPES.includes(variant.name))) {
    test(name, async () => {
      const context = await backend.context();
      inFloat32 ??= await gradientErrors(context, problem, choice, {
        emulateMatrices: 'int8',
        gradientVariant: GRADIENT_VARIANTS.at(-1)?.name as string,
      });
      const errors = await gradientErrors(context, problem, choice, { emulateMatrices: 'int8', gradientVariant: name });
      for (const one of ['dq', 'dk', 'dv'] as const) {
        expect(errors[one], one).toBeLessThan(1.02 * inFloat32[one]);
      }
    });
  }
});
