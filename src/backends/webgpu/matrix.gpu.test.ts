/** The matrix kernel with emulated matrices: each of its shapes against the oracle, and what is asked of devices by value. */
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { itNeeds } from '../../../test/support/requirement.ts';
import type { AttentionOptions } from '../../attention/options.ts';
import { createProblem } from '../../attention/problem.ts';
import { attentionExact } from '../../reference/exact.ts';
import { compare } from '../../reference/metrics.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { type Tensor, tensor } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import { createWebgpuBackendOn } from './backend.ts';
import type { MatrixConfig } from './capabilities.ts';
import type { Emulation } from './families/matrix.ts';
import { probeMatrixDialect } from './families/matrix-dialect.ts';
import { createWebgpuBackend, type WebgpuBackend } from './index.ts';
import { emulatedMatrices } from './kernels/matrix-operations.ts';
import { comesOutRight } from './matrix-trial.ts';
import { APPLE, H200 } from './testing/configurations.ts';

const seed = runSeed();
const MISSING = process.env.SAGEATTENTION_SOFTWARE_GPU_MISSING;
const it = itNeeds(MISSING);
/** lavapipe takes minutes to compile an emulated kernel. */
const COMPILES = process.env.SAGEATTENTION_SOFTWARE_GPU !== 'lavapipe';

/** What INT8 QK with FP16 PV loses on normal inputs, and a half more. */
const BOUND = 0.02;

interface Case {
  readonly variant: string;
  readonly emulate?: Emulation;
  readonly dims: readonly [D: number, Dv: number];
  /** Queries and keys: whole tiles and remainders. */
  readonly tokens: readonly [queries: number, keys: number];
  readonly options?: AttentionOptions;
  /** Which of the blocks of so many rows and keys are computed; a line is empty, and runs of tiles are left out. */
  readonly kept?: { readonly rows: number; readonly keys: number; readonly map: readonly (readonly number[])[] };
}

/** Each shape that has a row in the tables, with the head dims that the row is for. */
const CASES: readonly Case[] = [
  { variant: '1s16r16k-qk1-pv1', dims: [32, 64], tokens: [20, 70], options: { returnLse: true } },
  { variant: '1s16r16k-qk1-pv1', emulate: 'float32', dims: [32, 32], tokens: [20, 50], options: { softcap: 20 } },
  { variant: '4s64r16k-qk4-pv1', dims: [32, 64], tokens: [70, 90], options: { isCausal: true, smScale: -0.2 } },
  { variant: '8s64r32k-qk4-pv4-qk-pv', dims: [64, 32], tokens: [70, 90], options: { returnLse: true } },
  {
    variant: '4s64r16k-qk4-pv1',
    dims: [32, 64],
    tokens: [200, 90],
    options: { isCausal: true, causalAlignment: 'bottom-right', returnLse: true },
    kept: {
      rows: 32,
      keys: 16,
      map: ['011001', '000100', '000000', '000000', '100000', '110111', '000001'].map((line) => [...line].map(Number)),
    },
  },
  { variant: '8s128r16k-qk8-pv4', dims: [40, 32], tokens: [150, 150], options: { isCausal: true, returnLse: true } },
];

/** Largest difference of logsumexps that quantization makes here. */
const LSE_BOUND = 0.1;

describe.runIf(COMPILES)(`the matrix kernel, emulated (SAGEATTENTION_SEED=${seed})`, () => {
  const random = new Random(seed);
  for (const { variant, emulate = 'int8', dims, tokens, options: plain = {}, kept } of CASES) {
    const name = `${variant} on ${emulate} products, D ${dims}, tokens ${tokens}, ${JSON.stringify(plain)}`;
    it(`${name}${kept === undefined ? '' : ', some blocks'}`, async () => {
      const map = kept && tensor(Uint8Array.from(kept.map.flat()), [kept.map.length, kept.map[0]?.length ?? 0]);
      const options = kept && map ? { ...plain, blockMask: { rows: kept.rows, keys: kept.keys, map } } : plain;
      const backend = createWebgpuBackendOn({ emulateMatrices: emulate, variant });
      const [[D, Dv], [rows, keys]] = [dims, tokens];
      // Keys grow, so that rows outgrow their maxima and the output is rescaled.
      const k = random.normals(keys * D).map((x, i) => x * (0.2 + (3 * Math.floor(i / D)) / keys));
      const inputs = {
        q: tensor(random.normals(2 * rows * D), [1, 2, rows, D]),
        k: tensor(k, [1, 1, keys, D]),
        v: tensor(random.normals(keys * Dv), [1, 1, keys, Dv]),
        ...(map && { blockMap: map }),
      };
      const plan = await backend.createPlan(inputs, options);
      const { output, lse } = await plan.run(inputs);
      plan.dispose();
      await backend.dispose();
      const exact = attentionExact(createProblem(inputs.q, inputs.k, inputs.v, options), inputs);
      expect(compare(toFloat32(output as Tensor), exact.output).relativeL1).toBeLessThan(BOUND);
      if (lse === undefined) return;
      const differences = toFloat32(lse as Tensor).map((x, i) =>
        // Of rows that see nothing both are -Infinity.
        x === exact.lse[i] ? 0 : Math.abs(x - (exact.lse[i] as number)),
      );
      expect(Math.max(...differences)).toBeLessThan(LSE_BOUND);
    });
  }
});

describe('what a device is asked by value', () => {
  let backend: WebgpuBackend;
  beforeAll(() => {
    backend = createWebgpuBackend();
  });
  afterAll(() => backend.dispose());

  it('products that are right in one dialect are found in it, and a wrong one is named', async () => {
    const { device } = await backend.context();
    const right = { majorness: 'argument', unit: 'components' } as const;
    const broken = H200[2];
    const trial = (products: readonly (MatrixConfig | undefined)[], wrong?: MatrixConfig) =>
      probeMatrixDialect(device, 'subgroup-matrix', products as readonly MatrixConfig[], 32, (dialect) => {
        const operations = emulatedMatrices(32);
        if (dialect.majorness === right.majorness && dialect.unit === right.unit) {
          // A device that multiplies by one row too far.
          const loadRight: typeof operations.loadRight = (product, name, memory, offset, stride) =>
            operations.loadRight(product, name, memory, product === wrong ? `1u + ${offset}` : offset, stride);
          return { ...operations, loadRight };
        }
        return { ...operations, storeResult: () => '' };
      });
    expect(await trial([H200[0], H200[2], H200[3], APPLE[0]])).toEqual({ dialect: right });
    expect(await trial([H200[0], broken], broken)).toEqual({ wrong: broken });
  });

  const compiled = COMPILES ? it : () => {};
  compiled('a shape comes out right', async () => {
    const [q, k, v] = [0, 1, 2].map(() => tensor(new Float32Array(32), [1, 1, 1, 32])) as [Tensor, Tensor, Tensor];
    const problem = createProblem(q, k, v, {});
    const choice = chooseOptions(backend.defaultKernel(), problem, {});
    const forced = { emulateMatrices: 'int8', variant: '1s16r16k-qk1-pv1' } as const;
    expect(await comesOutRight(await backend.context(), problem, choice, forced)).toBe(true);
  });
});
