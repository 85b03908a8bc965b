import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { readGolden } from '../../test/golden/golden.ts';
import { type DenseCall, denseCall } from '../../test/support/arbitrary-attention.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { BACKWARD_PRECISIONS } from '../attention/backward.ts';
import type { AttentionOptions } from '../attention/options.ts';
import { type AttentionProblem, createProblem, createVarlenProblem, outputShapeOf } from '../attention/problem.ts';
import { fromFloat32, toFloat32 } from '../tensor/access.ts';
import { type Tensor, tensor, transpose } from '../tensor/tensor.ts';
import { BACKWARD_ALGORITHM, backwardExact, backwardQuantized } from './backward.ts';
import { attentionExact } from './exact.ts';
import { relativeL2 } from './metrics.ts';
import { attentionQuantized, PORTABLE_ALGORITHM } from './quantized.ts';

const seed = runSeed();
const settings = { seed: seed | 0, numRuns: 100 };

const normal = (random: Random, ...shape: number[]) =>
  tensor(random.normals(shape.reduce((product, size) => product * size, 1)), shape);
const float32 = (x: Tensor): Tensor => tensor(toFloat32(x), x.shape);
const dotOf = (a: ArrayLike<number>, b: ArrayLike<number>) =>
  Array.from(a).reduce((sum, value, i) => sum + value * (b[i] as number), 0);

/** A call in float32 with a gradient of its output. */
function withGradient({ q, k, v, options }: Omit<DenseCall, 'seed'>, random: Random) {
  const inputs = { q: float32(q), k: float32(k), v: float32(v), attnMask: options.attnMask as Tensor | undefined };
  const problem = createProblem(inputs.q, inputs.k, inputs.v, options);
  return { problem, inputs: { ...inputs, dOutput: normal(random, ...outputShapeOf(problem)) as Tensor } };
}
type Call = ReturnType<typeof withGradient>;

/** Derivative of sum(dOutput o output) along a direction of one input, by central differences of fourth order. */
function directional({ problem, inputs }: Call, name: 'q' | 'k' | 'v' | 'attnMask', direction: Float32Array): number {
  const step = 2 ** -7;
  const at = (steps: number) => {
    const view = inputs[name] as Tensor;
    const moved = tensor(
      toFloat32(view).map((value, i) => value + steps * step * (direction[i] as number)),
      view.shape,
    );
    const given = { ...inputs, [name]: moved };
    const options = { attnMask: given.attnMask };
    const layouts = createProblem(
      given.q,
      given.k,
      given.v,
      given.attnMask === undefined ? {} : (options as AttentionOptions),
    );
    const { q, k, v, mask } = layouts;
    return dotOf(attentionExact({ ...problem, q, k, v, mask }, given).output, toFloat32(inputs.dOutput));
  };
  return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step);
}

describe(`exact gradients (seed ${seed})`, () => {
  it('are the derivatives that differences show, for every semantics', () => {
    fc.assert(
      fc.property(denseCall, (call) => {
        const random = new Random(call.seed);
        const own = withGradient(call, random);
        const { dq, dk, dv } = backwardExact(own.problem, own.inputs);
        for (const [name, gradient] of [
          ['q', dq],
          ['k', dk],
          ['v', dv],
        ] as const) {
          const direction = random.normals(gradient.length);
          const expected = directional(own, name, direction);
          const size = Math.sqrt(dotOf(gradient, gradient));
          expect(Math.abs(dotOf(gradient, direction) - expected)).toBeLessThan(1e-3 + 1e-3 * size);
        }
      }),
      settings,
    );
  });

  it('of an additive mask are those that differences show', () => {
    const random = new Random(seed);
    const call = {
      q: normal(random, 2, 4, 5, 3),
      k: normal(random, 2, 2, 7, 3),
      v: normal(random, 2, 2, 7, 2),
      options: { attnMask: normal(random, 2, 4, 5, 7), softcap: 2, isCausal: true, causalAlignment: 'bottom-right' },
    } as const;
    const own = withGradient(call, random);
    const { dMask } = backwardExact(own.problem, own.inputs, true);
    const direction = random.normals(2 * 4 * 5 * 7);
    expect(dotOf(dMask as Float64Array, direction)).toBeCloseTo(directional(own, 'attnMask', direction), 4);
  });

  it('do not change what softmax does not see: keys summed over tokens, without a cap', () => {
    fc.assert(
      fc.property(denseCall, (call) => {
        const { softcap: _, ...options } = call.options;
        const own = withGradient({ ...call, options }, new Random(call.seed));
        const { dk } = backwardExact(own.problem, own.inputs);
        const [batch, heads, length, dim] = own.inputs.k.shape as [number, number, number, number];
        for (let head = 0; head < batch * heads; head++) {
          for (let d = 0; d < dim; d++) {
            let sum = 0;
            for (let token = 0; token < length; token++) sum += dk[(head * length + token) * dim + d] as number;
            // The same vector added to all keys changes no output.
            expect(Math.abs(sum)).toBeLessThan(1e-10);
          }
        }
      }),
      settings,
    );
  });

  it('are exact zeros where nothing is seen, and a NaN stays with those that see it', () => {
    const random = new Random(seed);
    const [q, k, v] = [normal(random, 1, 1, 4, 3), normal(random, 1, 1, 5, 3), normal(random, 1, 1, 5, 2)];
    const own = withGradient({ q, k, v, options: { isCausal: true, windowSize: [1, 0] } }, random);
    (own.inputs.k.data as Float32Array).fill(Number.NaN, 3 * 3, 4 * 3);
    const { dq, dk, dv } = backwardExact(own.problem, own.inputs);
    // Row 3 sees keys 2 and 3, and no other row sees key 3; no row sees key 4.
    expect([...dq].map(Number.isNaN)).toEqual([...Array(9).fill(false), ...Array(3).fill(true)]);
    expect([...dk].map(Number.isNaN)).toEqual([
      ...Array(6).fill(false),
      ...Array(6).fill(true),
      ...Array(3).fill(false),
    ]);
    expect([...dk.subarray(12), ...dv.subarray(8)]).toEqual([0, 0, 0, 0, 0]);
    const nothing = withGradient({ q, k, v, options: { attnMask: tensor(new Uint8Array(5), [5]) } }, random);
    (nothing.inputs.dOutput.data as Float32Array).fill(Number.NaN);
    for (const gradient of Object.values(backwardExact(nothing.problem, nothing.inputs))) {
      expect(gradient.every((value: number) => value === 0)).toBe(true);
    }
  });

  it('follow the layout: NHD, and packed sequences as one dense call each', () => {
    const random = new Random(seed);
    const nhd = (x: Tensor) => float32(transpose(x, [0, 2, 1, 3]));
    const [q, k, v] = [normal(random, 1, 4, 5, 3), normal(random, 1, 2, 7, 3), normal(random, 1, 2, 7, 2)];
    const dOutput = normal(random, 1, 4, 5, 2);
    const expected = backwardExact(createProblem(q, k, v, {}), { q, k, v, dOutput });
    const swapped = { q: nhd(q), k: nhd(k), v: nhd(v), dOutput: nhd(dOutput) };
    const layout = { tensorLayout: 'NHD' } as const;
    const actual = backwardExact(createProblem(swapped.q, swapped.k, swapped.v, layout), swapped);
    const back = (x: Float64Array, heads: number, length: number, dim: number) =>
      toFloat32(transpose(tensor(Float32Array.from(x), [1, length, heads, dim]), [0, 2, 1, 3]));
    expect(back(actual.dq, 4, 5, 3)).toEqual(Float32Array.from(expected.dq));
    expect(back(actual.dk, 2, 7, 3)).toEqual(Float32Array.from(expected.dk));
    expect(back(actual.dv, 2, 7, 2)).toEqual(Float32Array.from(expected.dv));

    const rows = (x: Tensor, start: number, end: number) => {
      const row = (x.shape[2] as number) * (x.shape[3] as number);
      return tensor((x.data as Float32Array).slice(start * row, end * row), [1, end - start, ...x.shape.slice(2)]);
    };
    const flat = (x: Tensor) => tensor(x.data, x.shape.slice(1));
    const causal = { isCausal: true, causalAlignment: 'bottom-right' } as const;
    const packedInputs = { q: flat(swapped.q), k: flat(swapped.k), v: flat(swapped.v), dOutput: flat(swapped.dOutput) };
    const packed = backwardExact(
      createVarlenProblem(packedInputs.q, packedInputs.k, packedInputs.v, [0, 2, 2, 5], [0, 3, 4, 7], causal),
      packedInputs,
    );
    const parts = (
      [
        [0, 2, 0, 3],
        [2, 2, 3, 4],
        [2, 5, 4, 7],
      ] as const
    ).map(([q0, q1, k0, k1]) => {
      const own = {
        q: rows(swapped.q, q0, q1),
        k: rows(swapped.k, k0, k1),
        v: rows(swapped.v, k0, k1),
        dOutput: rows(swapped.dOutput, q0, q1),
      };
      return backwardExact(createProblem(own.q, own.k, own.v, { ...layout, ...causal }), own);
    });
    for (const name of ['dq', 'dk', 'dv'] as const) {
      expect([...packed[name]]).toEqual(parts.flatMap((part) => [...part[name]]));
    }
  });
});

/** The forward pass of a kernel, rounded as its tensors are. */
function forward(problem: AttentionProblem, inputs: Call['inputs'], algorithm = PORTABLE_ALGORITHM) {
  const { output, lse } = attentionQuantized(problem, inputs, algorithm);
  const shape = outputShapeOf(problem);
  return {
    output: fromFloat32(Float32Array.from(output), shape, problem.dtype),
    lse: tensor(Float32Array.from(lse), [lse.length]),
  };
}

describe(`quantized gradients (seed ${seed})`, () => {
  it.each(BACKWARD_PRECISIONS)('%s: close to the exact ones for every semantics', (precision) => {
    const errors = { dq: 0, dk: 0, dv: 0 };
    const sizes = { dq: 0, dk: 0, dv: 0 };
    fc.assert(
      fc.property(denseCall, (call) => {
        const { problem, inputs } = withGradient(call, new Random(call.seed));
        const all = { ...inputs, ...forward(problem, inputs) };
        const actual = backwardQuantized(problem, all, PORTABLE_ALGORITHM, { ...BACKWARD_ALGORITHM, precision });
        const expected = backwardExact(problem, inputs);
        for (const name of ['dq', 'dk', 'dv'] as const) {
          expect(actual[name].every(Number.isFinite)).toBe(true);
          expected[name].forEach((value, i) => {
            errors[name] += ((actual[name][i] as number) - value) ** 2;
            sizes[name] += value ** 2;
          });
        }
      }),
      settings,
    );
    // The usual level is 1% in 16 bits and 4% in 8: a semantics misread on a tenth of the problems would cost several times that.
    const bound = precision === 'fp16' ? 0.04 : 0.08;
    for (const name of ['dq', 'dk', 'dv'] as const) {
      expect(Math.sqrt(errors[name] / sizes[name])).toBeLessThan(bound);
    }
  });

  // dO as fixed as the file: a few rows decide dQ's error. Measured 0.30/0.18/0.059 for the paper's, 0.21/0.13/0.061 for fp8.
  it('on inputs with outliers are more accurate than the paper’s, whose forward pass has P.V in INT8', () => {
    const golden = readGolden('outlier-d128');
    const shape = [...golden.q.shape];
    const dOutput = fromFloat32(new Random(1).normals(shape.reduce((a, b) => a * b)), shape, 'bfloat16');
    const problem = createProblem(golden.q, golden.k, golden.v, { isCausal: golden.isCausal });
    const inputs = { q: golden.q, k: golden.k, v: golden.v, attnMask: undefined, dOutput };
    const exact = backwardExact(problem, inputs);
    const tiled = { ...PORTABLE_ALGORITHM, tiling: { blockQ: 64, warpQ: 16, blockK: 64, warpK: 64 } };
    const errorsOf = (algorithm: typeof tiled, precision: (typeof BACKWARD_PRECISIONS)[number]) => {
      const all = { ...inputs, ...forward(problem, inputs, algorithm) };
      const actual = backwardQuantized(problem, all, algorithm, { ...BACKWARD_ALGORITHM, precision });
      return (['dq', 'dk', 'dv'] as const).map((name) => relativeL2(actual[name], exact[name]));
    };
    const paper = errorsOf({ ...tiled, pvFormat: 'int8' }, 'int8') as [number, number, number];
    for (const precision of BACKWARD_PRECISIONS) {
      const [dq, dk, dv] = errorsOf(tiled, precision) as [number, number, number];
      expect(dq).toBeLessThan(0.302);
      expect(dq).toBeLessThan(paper[0]);
      expect(dk).toBeLessThan(0.186);
      expect(dk).toBeLessThan(paper[1]);
      expect(dv).toBeLessThan(0.07);
    }
  });
});
