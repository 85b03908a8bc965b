import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import { denseCall } from '../../test/support/arbitrary-attention.ts';
import { blockByBlock } from '../../test/support/block-by-block.ts';
import { exactBackend } from '../../test/support/exact-backend.ts';
import { Random, runSeed } from '../../test/support/random.ts';
import { bandOf } from '../attention/band.ts';
import { createProblem } from '../attention/problem.ts';
import { createWasmBackend } from '../backends/wasm/index.ts';
import { attentionExact } from '../reference/exact.ts';
import { toFloat32 } from '../tensor/access.ts';
import { slice, type Tensor, tensor, transpose } from '../tensor/tensor.ts';
import { createDeviceGroup } from './group.ts';
import { HostPlace } from './host-place.ts';
import { Post } from './link.ts';
import { type ShardedShape, scheduleOf, scoresOf, sentBytes } from './schedule.ts';
import { type ShardedOptions, sageattnSharded } from './sharded.ts';
import { TOKEN_ORDERS } from './shards.ts';

const seed = runSeed();
const order = fc.constantFrom(...TOKEN_ORDERS);
const topology = fc.constantFrom(...[1, 2, 3, 4].flatMap((ring) => [1, 2, 3, 6].map((ulysses) => ({ ring, ulysses }))));

/** What one device gives, in float64. */
function expectedOf(q: Tensor, k: Tensor, v: Tensor, options: object) {
  const problem = createProblem(q, k, v, { ...options, tensorLayout: 'HND' });
  const { attnMask } = options as { attnMask?: Tensor };
  return { problem, ...attentionExact(problem, { q, k, v, attnMask }) };
}

/** Largest difference relative to 1 or the value; equal infinities and NaN in both places are none. */
function difference(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  let most = actual.length === expected.length ? 0 : Number.POSITIVE_INFINITY;
  for (let i = 0; i < expected.length; i++) {
    const [a, b] = [actual[i] as number, expected[i] as number];
    if (!Object.is(a, b) && a !== b) most = Math.max(most, Math.abs(a - b) / Math.max(1, Math.abs(b)));
  }
  return most;
}

/** One rounding of the partial outputs and one of what they are joined to. */
const ROUNDINGS = { float32: 2 ** -22, float16: 2 ** -9, bfloat16: 2 ** -6 } as const;

describe(`sageattnSharded (SAGEATTENTION_SEED=${seed})`, () => {
  const backend = createWasmBackend();
  afterAll(() => backend.dispose());

  it('gives what one device gives, for any ranks, orders, masks and bands', async () => {
    const backend = exactBackend();
    await fc.assert(
      fc.asyncProperty(
        denseCall,
        topology,
        order,
        order,
        fc.boolean(),
        async (call, shape, queryOrder, keyOrder, nhd) => {
          const { q, k, v, options } = call;
          const [heads, kvHeads] = [q.shape[1] as number, k.shape[1] as number];
          const { ulysses } = shape;
          fc.pre(heads % ulysses === 0 && (kvHeads % ulysses === 0 || ulysses % kvHeads === 0));
          const group = await createDeviceGroup({ ranks: ulysses * shape.ring, backend });
          const tensorLayout = nhd ? 'NHD' : 'HND';
          const given = (x: Tensor) => (nhd ? transpose(x, [0, 2, 1, 3]) : x);
          const sharded = await Promise.all([
            group.shard(given(q), { tensorLayout, order: queryOrder }),
            group.shard(given(k), { tensorLayout, order: keyOrder }),
            group.shard(given(v), { tensorLayout, order: keyOrder }),
          ]);
          const { output, lse } = await sageattnSharded(...sharded, { ...options, ...shape, returnLse: true });
          const expected = expectedOf(q, k, v, options);
          const whole = given(await group.gather(output));
          expect(whole.shape).toEqual([...q.shape.slice(0, 3), v.shape[3]]);
          expect(difference(toFloat32(whole), expected.output)).toBeLessThan(
            ROUNDINGS[q.dtype as keyof typeof ROUNDINGS] * 8,
          );
          expect(difference(toFloat32(await group.gather(lse)), expected.lse)).toBeLessThan(1e-5);
        },
      ),
      { seed: seed | 0, numRuns: 60 },
    );
    expect(backend.disposed).toBeGreaterThan(0);
  });

  it('takes tensors that lie on the ranks already, and refuses what does not', async () => {
    const group = await createDeviceGroup({ ranks: 2, backend: exactBackend() });
    const random = new Random(seed);
    const make = (tokens: number) => tensor(random.normals(2 * tokens * 8), [1, 2, tokens, 8]);
    const [left, right] = [make(6), make(7)];
    const wrapped = group.wrap([left, right], 13);
    expect(wrapped.shape).toEqual([1, 2, 13, 8]);
    const whole = await group.gather(wrapped);
    expect(toFloat32(slice(whole, 2, 6, 13))).toEqual(toFloat32(right));
    const { output } = expectedOf(whole, whole, whole, {});
    const divided = await group.gather(await sageattnSharded(wrapped, wrapped, wrapped));
    expect(difference(toFloat32(divided), output)).toBeLessThan(1e-5);
    for (const [parts, argument] of [
      [[right, left], 'parts[0]'],
      [[left], 'parts'],
      [[left, { ...right, location: 'cuda' }], 'parts[1]'],
      [[left, right, left], 'parts[2]'],
    ] as const) {
      expect(() => group.wrap(parts as never, 13)).toThrow(expect.objectContaining({ argument }));
    }
  });

  it('joint tokens are keys before or behind the sequence', async () => {
    const backend = exactBackend();
    const random = new Random(seed);
    const make = (heads: number, tokens: number, dim: number) =>
      tensor(random.normals(2 * heads * tokens * dim), [2, heads, tokens, dim]);
    for (const where of ['front', 'back'] as const) {
      for (const isCausal of [false, true]) {
        const group = await createDeviceGroup({ ranks: 4, backend });
        const [q, k, v] = [make(4, 13, 8), make(2, 18, 8), make(2, 18, 5)];
        const [joint, own] =
          where === 'front'
            ? [
                [0, 5],
                [5, 18],
              ]
            : [
                [13, 18],
                [0, 13],
              ];
        const cut = (x: Tensor, [start, end]: number[]) => slice(x, 2, start as number, end as number);
        const sharded = await Promise.all([
          group.shard(q, { order: 'zigzag' }),
          group.shard(cut(k, own), { order: 'zigzag' }),
          group.shard(cut(v, own), { order: 'zigzag' }),
        ]);
        const output = await sageattnSharded(...sharded, {
          ulysses: 2,
          isCausal,
          joint: { k: cut(k, joint), v: cut(v, joint), where },
        });
        // The first row is the first token of the sequence proper.
        const options = isCausal ? (where === 'front' ? { windowSize: [-1, 5] as const } : { isCausal }) : {};
        const problem = createProblem(q, k, v, { ...options, tensorLayout: 'HND' });
        expect(
          difference(toFloat32(await group.gather(output)), attentionExact(problem, { q, k, v }).output),
        ).toBeLessThan(1e-5);
      }
    }
  });

  it('gives the bits of its blocks one after another, for any ranks, orders and bands', async () => {
    await fc.assert(
      fc.asyncProperty(denseCall, topology, order, async ({ q, k, v, options }, { ulysses, ring }, tokenOrder) => {
        const [heads, kvHeads] = [q.shape[1] as number, k.shape[1] as number];
        fc.pre(heads % ulysses === 0 && (kvHeads % ulysses === 0 || ulysses % kvHeads === 0));
        const { attnMask: _, ...own } = options;
        const group = await createDeviceGroup({ ranks: ulysses * ring, backend });
        const parts = await Promise.all([q, k, v].map((x) => group.shard(x, { order: tokenOrder })));
        const { output, lse } = await sageattnSharded(...(parts as [never, never, never]), {
          ...own,
          ...{ ulysses, ring, returnLse: true },
        });
        const expected = await blockByBlock(new HostPlace(backend), { q, k, v }, tokenOrder, { ...own, ulysses, ring });
        expect(toFloat32(await group.gather(output))).toEqual(expected.output);
        expect(toFloat32(await group.gather(lse))).toEqual(expected.lse);
      }),
      { seed: seed | 0, numRuns: 30 },
    );
  });

  it('runs the quantized kernels, whose error it does not raise', async () => {
    const random = new Random(seed);
    const make = (heads: number) => tensor(random.normals(heads * 300 * 64), [1, heads, 300, 64]);
    const [q, k, v] = [make(4), make(2), make(2)];
    const exact = expectedOf(q, k, v, { isCausal: true }).output;
    const errorOf = async (ranks: number, options: ShardedOptions) => {
      const group = await createDeviceGroup({ ranks, backend });
      const sharded = await Promise.all([q, k, v].map((x) => group.shard(x, { order: 'zigzag' })));
      const [sq, sk, sv] = sharded as [never, never, never];
      const output = toFloat32(
        await group.gather(await sageattnSharded(sq, sk, sv, { isCausal: true, ...options, returnLse: false })),
      );
      let [error, size] = [0, 0];
      for (let i = 0; i < exact.length; i++) {
        error += Math.abs((output[i] as number) - (exact[i] as number));
        size += Math.abs(exact[i] as number);
      }
      return error / size;
    };
    const one = await errorOf(1, {});
    expect(one).toBeLessThan(0.03);
    for (const [ranks, options] of [
      [3, {}],
      [4, { ulysses: 2 }],
      [4, { ulysses: 4 }],
    ] as const) {
      expect(await errorOf(ranks, options)).toBeLessThan(one * 1.2);
    }
  });

  it('every rank ends with a typed error where one fails, and nothing is held', async () => {
    const backend = exactBackend();
    const prepare = backend.prepareKeyValue.bind(backend);
    let prepared = 0;
    let failing = 5;
    backend.prepareKeyValue = async (...given) => {
      if (--failing === 0) throw new Error('a device fell off the bus');
      prepared++;
      return prepare(...given);
    };
    const group = await createDeviceGroup({ ranks: 4, backend });
    const x = await group.shard(tensor(new Random(seed).normals(4 * 40 * 8), [1, 4, 40, 8]));
    await expect(sageattnSharded(x, x, x, { ulysses: 2 })).rejects.toThrow('a device fell off the bus');
    expect(backend.disposed).toBe(prepared);
    failing = -1;
    await sageattnSharded(x, x, x, { ulysses: 2 });
  });

  it('refuses what cannot be divided, naming the argument', async () => {
    const group = await createDeviceGroup({ ranks: 4, backend: exactBackend() });
    const make = (heads: number) => group.shard(tensor(new Float32Array(heads * 8 * 8), [1, heads, 8, 8]));
    const [six, four] = [await make(6), await make(4)];
    for (const [options, argument] of [
      [{ ulysses: 3 }, 'options.ring'],
      [{ ulysses: 2, ring: 3 }, 'options.ulysses'],
      [{ ulysses: 4 }, 'q'],
    ] as const) {
      await expect(sageattnSharded(six, six, six, options)).rejects.toMatchObject({ argument });
    }
    const other = await createDeviceGroup({ ranks: 4, backend: exactBackend() });
    const elsewhere = await other.shard(tensor(new Float32Array(4 * 8 * 8), [1, 4, 8, 8]));
    await expect(sageattnSharded(four, elsewhere, four)).rejects.toMatchObject({
      code: 'mixed-locations',
      argument: 'k',
    });
    await expect(sageattnSharded(four, four, tensor(new Float32Array(1), [1]) as never)).rejects.toMatchObject({
      argument: 'v',
    });
    await expect(createDeviceGroup({ ranks: 0 })).rejects.toMatchObject({ argument: 'options.ranks' });
    await expect(createDeviceGroup({})).rejects.toMatchObject({ argument: 'options.ranks' });
    group.dispose();
    await expect(sageattnSharded(four, four, four)).rejects.toMatchObject({ code: 'disposed' });
  });
});

describe('scheduleOf', () => {
  const base = {
    batch: 1,
    queryHeads: 12,
    kvHeads: 6,
    queryLength: 96,
    keyLength: 96,
    headDim: 64,
    valueDim: 64,
    queryOrder: 'zigzag',
    keyOrder: 'zigzag',
    limits: bandOf({ band: { lower: -(2 ** 30), upper: 0, align: 0 } }, { queryLength: 96, keyLength: 96 }),
    masked: false,
  } as const satisfies ShardedShape;
  const wire = { query: 2, keyValue: 1 };

  it('sends what the formulas say', () => {
    for (const { ring, ulysses } of [
      { ring: 4, ulysses: 1 },
      { ring: 1, ulysses: 6 },
      { ring: 2, ulysses: 3 },
    ]) {
      const ranks = ring * ulysses;
      for (let rank = 0; rank < ranks; rank++) {
        const sent = sentBytes(base, scheduleOf(base, { ring, ulysses }, rank), wire);
        const shard = (base.queryLength / ranks) * base.headDim;
        expect(sent.ulysses).toBe((shard * (2 * 12 * 2 + 2 * 6) * (ulysses - 1)) / ulysses);
        expect(sent.ring).toBe((2 * 96 * (6 / ulysses) * 64 * (ring - 1)) / ring);
      }
    }
  });

  it('counts the scores that rows see', () => {
    const limit = fc.integer({ min: -15, max: 15 });
    fc.assert(
      fc.property(fc.nat(9), fc.nat(9), limit, limit, (queryLength, keyLength, lower, upper) => {
        const whole = { ...base, queryLength, keyLength, queryHeads: 1, kvHeads: 1, limits: { lower, upper } };
        let expected = 0;
        for (let i = 0; i < queryLength; i++) {
          for (let j = 0; j < keyLength; j++) if (j - i >= lower && j - i <= upper) expected++;
        }
        const one = { ...whole, queryOrder: 'contiguous', keyOrder: 'contiguous' } as const;
        expect(scoresOf(one, scheduleOf(one, { ring: 1, ulysses: 1 }, 0))).toBe(expected);
      }),
    );
  });

  it('a causal zigzag gives every rank the same work, a contiguous ring twice the mean to the last', () => {
    const work = (dealt: 'zigzag' | 'contiguous') =>
      Array.from({ length: 4 }, (_, rank) =>
        scoresOf(base, scheduleOf({ ...base, queryOrder: dealt, keyOrder: dealt }, { ring: 4, ulysses: 1 }, rank)),
      );
    const total = (12 * 96 * 97) / 2;
    expect(work('zigzag')).toEqual([total / 4, total / 4, total / 4, total / 4]);
    expect(work('contiguous').reduce((sum, each) => sum + each, 0)).toBe(total);
    expect((work('contiguous')[3] as number) / (total / 4)).toBeGreaterThan(1.7);
  });
});

describe('Post', () => {
  it('rejects whoever waits, and whoever asks later, once a rank has failed', async () => {
    const post = new Post();
    const waiting = post.receive(0, 1, 'q');
    post.send(2, 1, 'k', 7);
    post.abort(0, new Error('gone'));
    await expect(waiting).rejects.toMatchObject({ code: 'execution-failed', message: 'rank 0 failed: gone' });
    await expect(post.receive(0, 2, 'q')).rejects.toMatchObject({ code: 'execution-failed' });
    expect(await post.receive(2, 1, 'k')).toBe(7);
  });
});
