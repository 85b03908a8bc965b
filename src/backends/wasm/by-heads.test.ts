/** Calls that are run by heads: the same bits as at once. */
import { afterAll, beforeAll, expect, it } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import type { AttentionOptions } from '../../attention/options.ts';
import { createProblem, createVarlenProblem } from '../../attention/problem.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { type Tensor, tensor, transpose } from '../../tensor/tensor.ts';
import { chooseOptions, sideOf } from '../choice.ts';
import { HeadsAtOnce, runByHeads } from './by-heads.ts';
import { type Arithmetic, arithmeticOf, WholeCalls } from './calls.ts';
import { CallerExecutor } from './executor.ts';
import { INTEGER_KERNEL } from './kernel-table.ts';
import { MemoryPool } from './memory.ts';
import { compileUnshared, loadModule } from './modules.ts';
import { Runtime } from './runtime.ts';

const random = new Random(runSeed());
const seed = `seed ${random.seed}`;
const draw = (...shape: number[]) => tensor(random.normals(shape.reduce((a, b) => a * b, 1)), shape);
const flags = (...shape: number[]) =>
  tensor(
    Uint8Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => Number(random.uniform() < 0.5)),
    shape,
  );
const arithmetic: Arithmetic = arithmeticOf(
  chooseOptions(INTEGER_KERNEL, createProblem(draw(1, 1, 1, 8), draw(1, 1, 1, 8), draw(1, 1, 1, 8), {}), {}),
);

let runtime: Runtime;
beforeAll(async () => {
  const { simd, relaxed } = await loadModule('auto');
  runtime = new Runtime(await CallerExecutor.create(await compileUnshared(simd), 'a test'), simd, relaxed);
});
afterAll(() => runtime.executor.dispose());

const [q, k, v] = [draw(2, 6, 20, 24), draw(2, 3, 70, 24), draw(2, 3, 70, 16)];
const nhd = (x: Tensor) => transpose(x, [0, 2, 1, 3]);
const packed = [draw(30, 6, 24), draw(80, 3, 24), draw(80, 3, 16)] as const;
const cases: [string, readonly [Tensor, Tensor, Tensor], AttentionOptions, (readonly number[])[]?][] = [
  ['HND', [q, k, v], { returnLse: true }],
  ['NHD', [nhd(q), nhd(k), nhd(v)], { tensorLayout: 'NHD', returnLse: true, isCausal: true }],
  ['a mask of each head', [q, k, v], { attnMask: draw(2, 6, 20, 70) }],
  ['a mask of all heads', [q, k, v], { attnMask: draw(2, 1, 1, 70), returnLse: true }],
  [
    'sinks and a block mask of each head',
    [q, k, v],
    { sinks: draw(6), blockMask: { rows: 16, keys: 32, map: flags(2, 6, 2, 3) }, returnLse: true },
  ],
  ['a block mask of all heads', [q, k, v], { blockMask: { rows: 16, keys: 32, map: flags(2, 1, 2, 3) } }],
  [
    'varlen',
    packed,
    { returnLse: true },
    [
      [0, 11, 30],
      [0, 5, 80],
    ],
  ],
];

it.each(cases)(`%s (${seed})`, async (_, [ownQ, ownK, ownV], options, starts) => {
  const problem =
    starts === undefined
      ? createProblem(ownQ, ownK, ownV, options)
      : createVarlenProblem(ownQ, ownK, ownV, starts[0] as number[], starts[1] as number[], options);
  const inputs = { q: ownQ, k: ownK, v: ownV, ...sideOf(options) };
  const whole = await runtime.run({}, new WholeCalls(problem, arithmetic, runtime.simd).parts(runtime, inputs));
  for (const heads of [1, 2, 3]) {
    const parts = await runByHeads(runtime, problem, arithmetic, inputs, {}, heads);
    expect(parts).toEqual(whole);
    const shape = whole.output.shape;
    const out = tensor(new Float32Array(shape.reduce((a, b) => a * b, 1)).fill(Number.NaN), shape);
    const into = await runByHeads(runtime, problem, arithmetic, inputs, { out }, heads);
    expect(into.output).toBe(out);
    expect(out.data).toEqual((whole.output as Tensor).data);
  }
});

it(`packed sequences in views of a packed QKV tensor give what copies of them give (${seed})`, async () => {
  const qkv = draw(40, 3, 2, 16);
  const views = [0, 1, 2].map((which) =>
    tensor(qkv.data, [40, 2, 16], { offset: which * 32, strides: [96, 16, 1] }),
  ) as [Tensor, Tensor, Tensor];
  const copies = views.map((view) => tensor(toFloat32(view), [40, 2, 16])) as [Tensor, Tensor, Tensor];
  const [inViews, inCopies] = await Promise.all(
    [views, copies].map(([ownQ, ownK, ownV]) => {
      const inputs = { q: ownQ as Tensor, k: ownK as Tensor, v: ownV as Tensor };
      const problem = createVarlenProblem(inputs.q, inputs.k, inputs.v, [0, 9, 40], [0, 9, 40], {});
      return runtime.run({}, new WholeCalls(problem, arithmetic, runtime.simd).parts(runtime, inputs));
    }),
  );
  expect(inViews).toEqual(inCopies);
});

it('as many heads as fit, and all where not even one does', () => {
  const keys = draw(2, 3, 700, 24);
  const problem = createProblem(q, keys, keys, {});
  const heads = new HeadsAtOnce(problem, arithmetic, runtime.simd);
  const found = Array.from({ length: 60 }, (_, i) => heads.in(new MemoryPool(0, i, () => {})));
  expect(found.join('')).toMatch(/^3+1+2+3+$/);
});
