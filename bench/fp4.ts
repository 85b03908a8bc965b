/**
 * What FP4 loses against exact attention in float64: the official kernel's arithmetic, ours, and ours with PV in FP8, each emulated step
 * by step; and our kernel on WASM, which must give the same.
 *
 *     npx tsx bench/fp4.ts        writes bench/results/fp4.json
 */
import { writeFileSync } from 'node:fs';
import { disposeBackends, sageattn, type Tensor, tensor } from '../src/index.ts';
import { thisMachine } from '../src/measure/machine.ts';
import { Random } from '../src/measure/random.ts';
import {
  compare,
  exactAttention,
  FP4_PV_FP4_ALGORITHM,
  FP4_PV_FP8_ALGORITHM,
  OFFICIAL_FP4_ALGORITHM,
  quantizedAttention,
} from '../src/reference/index.ts';
import { toFloat32 } from '../src/tensor/access.ts';
import { type GoldenName, readGolden } from '../test/golden/golden.ts';

export interface Fp4Row {
  readonly input: string;
  /** Relative L1 by what computed it. */
  readonly errors: Readonly<Record<'official' | 'ours' | 'oursFp8' | 'wasm', number>>;
}

const SEED = 1;
const GOLDEN: readonly GoldenName[] = ['outlier-d128', 'outlier-d128-causal', 'normal-d64-gqa'];

function normal(): { q: Tensor; k: Tensor; v: Tensor } {
  const random = new Random(SEED);
  const operand = () =>
    tensor(
      Float32Array.from({ length: 1024 * 128 }, () => random.normal()),
      [1, 1, 1024, 128],
    );
  return { q: operand(), k: operand(), v: operand() };
}

const rows: Fp4Row[] = [];
for (const { input, isCausal, q, k, v } of [
  ...GOLDEN.map((name) => ({ input: `golden \`${name}\``, ...readGolden(name) })),
  { input: 'normal numbers, 1024 × 128', isCausal: false, ...normal() },
]) {
  const exact = exactAttention(q, k, v, { isCausal }).output;
  const emulated = (algorithm: typeof FP4_PV_FP4_ALGORITHM) =>
    compare(quantizedAttention(q, k, v, { isCausal, algorithm }).output, exact).relativeL1;
  const wasm = await sageattn(q, k, v, { isCausal, backend: 'wasm', kernel: 'qk-fp4-pv-fp4' });
  const errors = {
    official: emulated({ ...FP4_PV_FP4_ALGORITHM, fp4: OFFICIAL_FP4_ALGORITHM }),
    ours: emulated(FP4_PV_FP4_ALGORITHM),
    oursFp8: emulated(FP4_PV_FP8_ALGORITHM),
    wasm: compare(toFloat32(wasm), exact).relativeL1,
  };
  rows.push({ input, errors });
  console.log(input, errors);
}
await disposeBackends();

writeFileSync(
  new URL('results/fp4.json', import.meta.url),
  `${JSON.stringify({ machine: thisMachine(), seed: SEED, rows }, undefined, 1)}\n`,
);
