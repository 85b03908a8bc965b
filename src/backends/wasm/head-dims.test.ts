/** Heads larger than what GPUs take, as those of image decoders (VAEs) are. */
import { afterAll, describe, expect, it } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import type { AttentionOptions } from '../../attention/options.ts';
import { createProblem } from '../../attention/problem.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { fromFloat32, toFloat32 } from '../../tensor/access.ts';
import { type Tensor, tensor } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import { createWasmBackend } from './backend.ts';
import { KERNELS } from './kernel-table.ts';

const seed = runSeed();
const relaxedRuns = Number(process.versions.node.split('.')[0]) >= 24;
const BOUNDS: Readonly<Record<string, number>> = {
  'qk-int8-pv-int8': 0.03,
  'qk-int8-pv-fp16': 0.0129,
  'qk-fp4-pv-fp4': 0.2,
  exact: 3e-6,
};

describe.each(relaxedRuns ? (['simd128', 'relaxed'] as const) : (['simd128'] as const))(
  `head dims up to 512 on %s (seed ${seed})`,
  (simd) => {
    const backend = createWasmBackend({ threads: 2, simd });
    afterAll(() => backend.dispose());
    const random = new Random(seed);

    const draw = (heads: number, length: number, dim: number) => {
      const values = random.normals(heads * length * dim);
      return tensor(values, [1, heads, length, dim]);
    };

    const cases: readonly (readonly [
      name: string,
      lengths: readonly [queries: number, keys: number],
      dims: readonly [d: number, dv: number],
      options: AttentionOptions,
    ])[] = [
      ['the largest', [70, 300], [512, 512], {}],
      ['odd ones', [33, 140], [509, 257], { isCausal: true, causalAlignment: 'bottom-right' }],
      ['more of Q and K than of V', [9, 40], [512, 8], { softcap: 20 }],
      ['more of V than of Q and K', [9, 40], [8, 512], { windowSize: [20, 3] }],
      ['one row', [1, 200], [512, 512], {}],
    ];

    describe.each([...KERNELS])('$name', (kernel) => {
      it.each(cases)('%s', async (_, [queries, keys], [d, dv], options) => {
        const q = draw(4, queries, d);
        const k = draw(2, keys, d);
        const v = draw(2, keys, dv);
        const problem = createProblem(q, k, v, { ...options, returnLse: true });
        const choice = chooseOptions(kernel, problem, {});
        const plan = await backend.plan(problem, choice);
        const made = await plan.run({ q, k, v }, {});
        const exact = attentionExact(problem, { q, k, v });
        const bound = BOUNDS[kernel.name] as number;
        expect(compare(toFloat32(made.output as Tensor), exact.output).relativeL1).toBeLessThan(bound);
        // A cache makes other means and scales, to the same accuracy.
        if (options.windowSize !== undefined) return;
        const held = await backend.prepareKeyValue(problem, choice, k, v, {});
        const attended = await held.attend(q, problem, {}, {});
        held.dispose();
        expect(compare(toFloat32(attended.output as Tensor), exact.output).relativeL1).toBeLessThan(bound);
      });

      it('what is not finite stays where it is seen', async () => {
        const [q, k, v] = [draw(1, 6, 512), draw(1, 150, 512), draw(1, 150, 512)];
        const mask = new Float32Array(6 * 150);
        for (let row = 0; row < 3; row++) mask[row * 150 + 140] = Number.NEGATIVE_INFINITY;
        (v.data as Float32Array)[140 * 512 + 511] = Number.NaN;
        const attnMask = tensor(mask, [1, 1, 6, 150]);
        const problem = createProblem(q, k, v, { attnMask });
        const plan = await backend.plan(problem, chooseOptions(kernel, problem, {}));
        const output = toFloat32((await plan.run({ q, k, v, attnMask }, {})).output as Tensor);
        for (let i = 0; i < output.length; i++) {
          const wanted = Math.floor(i / 512) >= 3 && i % 512 === 511;
          if (Number.isNaN(output[i]) !== wanted) throw new Error(`row ${Math.floor(i / 512)}, channel ${i % 512}`);
        }
      });
    });

    it('half precision', async () => {
      const [q, k, v] = [draw(1, 5, 512), draw(1, 20, 512), draw(1, 20, 512)].map((x) =>
        fromFloat32(x.data as Float32Array, x.shape, 'bfloat16'),
      ) as [Tensor, Tensor, Tensor];
      const problem = createProblem(q, k, v, {});
      const plan = await backend.plan(problem, chooseOptions(await backend.defaultKernel(problem), problem, {}));
      const output = toFloat32((await plan.run({ q, k, v }, {})).output as Tensor);
      expect(compare(output, attentionExact(problem, { q, k, v }).output).relativeL1).toBeLessThan(0.005);
    });

    it('gradients are refused above 256', async () => {
      const problem = (dim: number) => createProblem(draw(1, 4, dim), draw(1, 4, dim), draw(1, 4, dim), {});
      expect(await backend.backwardSupport?.(problem(256))).toBeDefined();
      expect(await backend.backwardSupport?.(problem(257))).toBeUndefined();
    });
  },
);
