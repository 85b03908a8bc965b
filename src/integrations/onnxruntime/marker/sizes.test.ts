/** Numbers that are computed from dimensions are those that onnxruntime computes. */
import * as ort from 'onnxruntime-node';
import { expect, it } from 'vitest';
import { GraphBuilder } from '../../../../test/support/graph-builder.ts';
import { Random, runSeed } from '../../../../test/support/random.ts';
import { indexGraph } from '../model/graph.ts';
import { type GraphProto, readModel } from '../onnx/codec.ts';
import { KnownSizes, numbersFrom } from './sizes.ts';

const FLOAT = 1;
const INT64 = 7;

it('computes lengths, targets of a Reshape and scales as onnxruntime does', async () => {
  const seed = runSeed();
  console.info(`seed ${seed}`);
  const random = new Random(seed);
  const g = new GraphBuilder(random);
  const x = g.input('x', ['b', 'l', 24]);
  const past = g.input('past', ['b', 'p', 24]);
  const all = g.op('Concat', [past, x], { axis: 1 });
  const shape = g.op('Shape', [g.op('Transpose', [all], { perm: [1, 0, 2] })]);
  const length = g.op('Gather', [shape, g.int(0)], { axis: 0 });
  const wide = g.op('Slice', [shape, g.ints([1]), g.ints([3])]);
  const heads = g.op('Div', [g.op('Gather', [shape, g.ints([2])], { axis: 0 }), g.ints([7])]);
  const target = g.op('Concat', [g.op('Unsqueeze', [length, g.ints([0])]), heads, wide], { axis: 0 });
  const scale = g.op('Div', [g.scalar(1), g.op('Sqrt', [g.op('Cast', [wide], { to: FLOAT })])]);
  const sums = g.op('Sub', [g.op('Mul', [g.op('Add', [target, g.ints([3])]), g.ints([2])]), heads]);
  const back = g.op('Cast', [g.op('Mul', [scale, g.scalar(100)])], { to: INT64 });
  const outputs = [length, target, scale, sums, back, g.op('Size', [all])];
  for (const name of outputs) g.output(name, undefined, name === scale ? 'float32' : 'int64');
  const bytes = g.build();
  const session = await ort.InferenceSession.create(bytes);
  const index = indexGraph(readModel(bytes).graph as GraphProto, 17);
  const facts = { inputs: new Map([['x', ['b', 'l', 24]]]), shapeOf: () => undefined };
  for (let run = 0; run < 5; run++) {
    const [b, l, p] = [random.integer(1, 5), random.integer(1, 9), random.integer(0, 9)];
    const dims = { x: [b, l, 24], past: [b, p, 24] };
    const given = Object.entries(dims).map(([name, list]) => [name, { dims: list, numbers: undefined }] as const);
    const sizes = new KnownSizes(index, facts, new Map(given));
    const floats = (list: readonly number[]) =>
      new ort.Tensor('float32', new Float32Array(list.reduce((a, n) => a * n, 1)), list);
    const results = await session.run({ x: floats(dims.x), past: floats(dims.past) });
    for (const name of outputs) {
      expect(sizes.numbers(name), name).toEqual(Array.from(results[name]?.data as BigInt64Array, Number));
    }
    expect(sizes.dims(all)).toEqual([b, l + p, 24]);
    expect(sizes.dims('nothing')).toBeUndefined();
  }
  await session.release();
});

it('sums a mask of tokens into the lengths that GroupQueryAttention reads, and says that it needs the mask', async () => {
  const seed = runSeed();
  console.info(`seed ${seed}`);
  const random = new Random(seed);
  const g = new GraphBuilder(random);
  const mask = g.input('mask', ['b', 'l'], 'int64');
  const ids = g.input('ids', ['b', 'l'], 'int64');
  const counted = [[1], [-1]].map((axes) => g.op('ReduceSum', [mask, g.ints(axes)], { keepdims: 1 }));
  const last = counted.map((sum) => g.op('Sub', [sum, g.ints([1])]));
  const byColumn = g.op('ReduceSum', [mask, g.ints([0])], { keepdims: 0 });
  const found = g.op('NonZero', [mask]);
  for (const name of [...last, byColumn, found]) g.output(name, undefined, 'int64');
  const bytes = g.build();
  const session = await ort.InferenceSession.create(bytes);
  const index = indexGraph(readModel(bytes).graph as GraphProto, 17);
  const facts = { inputs: new Map(), shapeOf: () => undefined };
  for (let run = 0; run < 5; run++) {
    const dims = [random.integer(1, 4), random.integer(1, 40)] as const;
    const numbers = Array.from({ length: dims[0] * dims[1] }, () => Number(random.uniform() < 0.8));
    const tensor = new ort.Tensor('int64', BigInt64Array.from(numbers, BigInt), dims);
    const results = await session.run({ mask: tensor, ids: tensor });
    const sizes = new KnownSizes(index, facts, new Map([['mask', { dims, numbers }]]));
    for (const name of last) {
      expect(sizes.numbers(name)).toEqual(Array.from(results[name]?.data as BigInt64Array, Number));
    }
    expect(sizes.numbers(byColumn)).toBeUndefined();
    expect(
      new KnownSizes(index, facts, new Map([['mask', { dims, numbers: undefined }]])).numbers(last[0] as string),
    ).toBe(undefined);
  }
  for (const name of last) expect(numbersFrom(index, name)).toEqual(new Set(['mask']));
  expect(numbersFrom(index, found)).toBeUndefined();
  expect(numbersFrom(index, ids)).toEqual(new Set(['ids']));
  await session.release();
});

it('knows the dimensions of a text encoder behind its position table, which onnxruntime does not infer', async () => {
  const seed = runSeed();
  console.info(`seed ${seed}`);
  const random = new Random(seed);
  const g = new GraphBuilder(random);
  const ids = g.input('ids', ['b', 'l'], 'int64');
  const mask = g.input('mask', ['b', 'l'], 'int64');
  const length = g.op('Gather', [g.op('Shape', [ids]), g.ints([1])], { axis: 0 });
  const table = g.op('Slice', [g.floats([1, 40, 24], random.normals(960)), g.ints([0]), length, g.ints([1])]);
  const words = g.op('Gather', [g.floats([50, 24], random.normals(1200)), ids]);
  const sum = g.op('Add', [words, table]);
  const weight = g.floats([24, 72], random.normals(24 * 72));
  const centered = g.op('Sub', [sum, g.op('ReduceMean', [sum], { axes: [-1] })]);
  const projected = g.op('MatMul', [centered, weight]);
  const [first, second] = [0, 1].map((i) => `part${i}`) as [string, string];
  g.op('Split', [projected, g.ints([48, 24])], { axis: -1 }, { outputs: [first, second] });
  const heads = g.op('Transpose', [g.op('Reshape', [second, g.ints([0, -1, 3, 8])])], { perm: [0, 2, 1, 3] });
  const scalar = g.op('Squeeze', [length, g.ints([0])]);
  const positions = g.op('Unsqueeze', [g.op('Range', [g.int(0), scalar, g.int(1)]), g.ints([0, 2])]);
  const wide = g.op('Expand', [
    g.op('Unsqueeze', [mask, g.ints([1, 2])]),
    g.op('Concat', [g.ints([1, 5]), length, length], { axis: 0 }),
  ]);
  const chosen = g.op('Where', [g.op('Equal', [wide, g.int(1)]), g.scalar(0), g.scalar(-1)]);
  const part = g.op('Slice', [projected, g.ints([-60, 1]), g.ints([-2, 9]), g.ints([2, 1]), g.ints([3, 2])]);
  const zeros = g.op('ConstantOfShape', [g.op('Concat', [length, g.ints([4])], { axis: 0 })]);
  const outputs = [sum, centered, first, heads, positions, chosen, part, zeros, g.op('Softmax', [heads])];
  for (const name of outputs) g.output(name, undefined, name === positions ? 'int64' : 'float32');
  const bytes = g.build();
  const session = await ort.InferenceSession.create(bytes);
  const index = indexGraph(readModel(bytes).graph as GraphProto, 17);
  const facts = { inputs: new Map(), shapeOf: () => undefined };
  for (let run = 0; run < 6; run++) {
    const [b, l] = [random.integer(1, 5), random.integer(1, 40)];
    const given = new Map(['ids', 'mask'].map((name) => [name, { dims: [b, l], numbers: undefined }] as const));
    const sizes = new KnownSizes(index, facts, given);
    const tokens = () =>
      new ort.Tensor(
        'int64',
        BigInt64Array.from({ length: b * l }, () => BigInt(random.integer(0, 49))),
        [b, l],
      );
    const results = await session.run({ ids: tokens(), mask: tokens() });
    for (const name of outputs) expect(sizes.dims(name), name).toEqual(results[name]?.dims);
  }
  const tooLong = new Map(['ids', 'mask'].map((name) => [name, { dims: [1, 41], numbers: undefined }] as const));
  expect(new KnownSizes(index, facts, tooLong).dims(sum)).toBeUndefined();
  await session.release();
});
