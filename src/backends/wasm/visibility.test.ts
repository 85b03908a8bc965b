/**
 * No key that a row does not see may cost that row its precision, however large it is; and none that no row sees
 * counts.
 */
import { afterAll, describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import type { AttentionOptions } from '../../attention/options.ts';
import { createProblem } from '../../attention/problem.ts';
import { attentionExact } from '../../reference/exact.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { slice, type Tensor, tensor } from '../../tensor/tensor.ts';
import { chooseOptions } from '../choice.ts';
import { createWasmBackendOn } from './backend.ts';
import type { Simd } from './geometry.ts';
import { ACCURATE_KERNEL, INTEGER_KERNEL } from './kernel-table.ts';

const relaxedRuns = Number(process.versions.node.split('.')[0]) >= 24;
const BUILDS: Simd[] = relaxedRuns ? ['simd128', 'relaxed'] : ['simd128'];
const backends = new Map(BUILDS.map((simd) => [simd, createWasmBackendOn({ simd, threads: 1 })]));
afterAll(async () => {
  for (const backend of backends.values()) await backend.dispose();
});

const random = new Random(runSeed());
const seed = `seed ${random.seed}`;

interface Inputs {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
}

const D = 64;
const normals = (heads: number, tokens: number, d = D) =>
  tensor(random.normals(heads * tokens * d), [1, heads, tokens, d]);
const inputsOf = (length: number, heads = 2, kvHeads = 1): Inputs => ({
  q: normals(heads, length),
  k: normals(kvHeads, length),
  v: normals(kvHeads, length),
});

/** Multiplies what `which` says of a `[1, heads, length, D]` tensor. */
function scale(x: Tensor, times: number, which: (token: number, channel: number) => boolean): void {
  const length = x.shape[2] as number;
  const data = x.data as Float32Array;
  data.forEach((value, i) => {
    if (which(Math.floor(i / D) % length, i % D)) data[i] = value * times;
  });
}

type Rows = (row: number) => boolean;

/** Relative L1 over the rows that count, all heads. */
function error(actual: Float32Array, expected: ArrayLike<number>, length: number, counts: Rows): number {
  let [difference, size] = [0, 0];
  actual.forEach((value, i) => {
    if (!counts(Math.floor(i / D) % length)) return;
    difference += Math.abs(value - (expected[i] as number));
    size += Math.abs(expected[i] as number);
  });
  return difference / size;
}

describe.each(BUILDS)('%s', (simd) => {
  describe.each([INTEGER_KERNEL, ACCURATE_KERNEL])('$name', (kernel) => {
    const backend = backends.get(simd) as NonNullable<ReturnType<typeof backends.get>>;
    const bound = kernel === INTEGER_KERNEL ? 0.025 : 0.013;
    const setup = (inputs: Inputs, options: AttentionOptions) => {
      const problem = createProblem(inputs.q, inputs.k, inputs.v, options);
      return { problem, choice: chooseOptions(kernel, problem, options) };
    };

    async function attend(inputs: Inputs, options: AttentionOptions, counts: Rows = () => true): Promise<number> {
      const { problem, choice } = setup(inputs, options);
      const plan = await backend.plan(problem, choice);
      const attnMask = options.attnMask as Tensor | undefined;
      const operands = attnMask === undefined ? inputs : { ...inputs, attnMask };
      const { output } = await plan.run(operands, {});
      const exact = attentionExact(problem, operands).output;
      return error(toFloat32(output as Tensor), exact, inputs.q.shape[2] as number, counts);
    }

    /** As `attend`, over a cache that gets the tokens in pieces. */
    async function attendCached(
      inputs: Inputs,
      options: AttentionOptions,
      pieces: readonly number[],
      counts: Rows = () => true,
    ): Promise<number> {
      const { problem, choice } = setup(inputs, options);
      const part = (x: Tensor, from: number, to: number) => slice(x, 2, from, to);
      const piece = (from: number, to: number) => {
        const [k, v] = [part(inputs.k, from, to), part(inputs.v, from, to)];
        return { k, v, problem: createProblem(part(inputs.q, 0, 1), k, v, {}) };
      };
      const first = piece(0, pieces[0] as number);
      const cache = await backend.prepareKeyValue(first.problem, choice, first.k, first.v, {});
      let from = pieces[0] as number;
      for (const count of pieces.slice(1)) {
        const { k, v, problem } = piece(from, from + count);
        await cache.append(k, v, problem, {});
        from += count;
      }
      const { output } = await cache.attend(inputs.q, problem, {}, {});
      cache.dispose();
      return error(
        toFloat32(output as Tensor),
        attentionExact(problem, inputs).output,
        inputs.q.shape[2] as number,
        counts,
      );
    }

    test.each([10, 100, 1000, 1e6])('a later token %d times as large', async (times) => {
      for (const length of [20, 120, 300]) {
        for (const smoothV of [false, true]) {
          const inputs = inputsOf(length);
          scale(inputs.v, times, (token) => token === length - 1);
          scale(inputs.k, times, (token) => token === length - 1);
          const label = `${seed}, length ${length}, smoothV ${smoothV}`;
          expect(await attend(inputs, { isCausal: true, smoothV }, (row) => row < length - 1), label).toBeLessThan(
            bound,
          );
        }
      }
    });

    test('large values in a few channels of a few later tokens', async () => {
      const inputs = inputsOf(200);
      scale(inputs.v, 1000, (token, channel) => token % 50 === 49 && channel % 7 === 0);
      expect(await attend(inputs, { isCausal: true }, (row) => row < 49), seed).toBeLessThan(bound);
    });

    test('tokens that grow: each row is as right as what it sees allows', async () => {
      const inputs = inputsOf(256);
      const data = inputs.v.data as Float32Array;
      data.forEach((value, i) => {
        data[i] = value * 1.1 ** Math.floor(i / D);
      });
      for (const [from, to] of [
        [0, 20],
        [40, 60],
        [100, 128],
        [200, 256],
      ] as const) {
        const rows = (row: number) => row >= from && row < to;
        expect(await attend(inputs, { isCausal: true }, rows), `${seed}, rows ${from}`).toBeLessThan(bound);
      }
    });

    test.each([
      [64, 0],
      [64, 400],
      [30, 0],
      [100, 400],
    ])('documents under a block-diagonal mask, split at %d, keys with an offset of %d', async (split, offset) => {
      const length = 128;
      const inputs = inputsOf(length);
      scale(inputs.v, 100, (token) => token >= split);
      scale(inputs.k, 10, (token) => token >= split);
      const keys = inputs.k.data as Float32Array;
      keys.forEach((value, i) => {
        if (Math.floor(i / D) >= split && i % 3 === 0) keys[i] = value + offset;
      });
      const document = (token: number) => Number(token >= split);
      const mask = Uint8Array.from({ length: length * length }, (_, i) =>
        Number(document(Math.floor(i / length)) === document(i % length)),
      );
      const options = { attnMask: tensor(mask, [1, 1, length, length], { dtype: 'bool' }) };
      expect(await attend(inputs, options, (row) => row < split), seed).toBeLessThan(bound);
    });

    test.each(['bool', '-1e4', '-FLT_MAX'])('garbage behind a mask (%s)', async (kind) => {
      const length = 200;
      for (const broadcast of [true, false]) {
        const inputs = inputsOf(length);
        for (const x of [inputs.k, inputs.v]) {
          const data = x.data as Float32Array;
          data.forEach((value, i) => {
            if (Math.floor(i / D) % length >= 150) data[i] = 30 + value;
          });
        }
        const rows = broadcast ? 1 : length;
        const hidden = (i: number) => i % length >= 150;
        const attnMask =
          kind === 'bool'
            ? tensor(
                Uint8Array.from({ length: rows * length }, (_, i) => Number(!hidden(i))),
                [1, 1, rows, length],
                { dtype: 'bool' },
              )
            : tensor(
                Float32Array.from({ length: rows * length }, (_, i) =>
                  hidden(i) ? (kind === '-1e4' ? -1e4 : -3.4028234663852886e38) : Math.sin(i),
                ),
                [1, 1, rows, length],
              );
        for (const smoothV of [false, true]) {
          expect(await attend(inputs, { attnMask, smoothV }), `${seed}, broadcast ${broadcast}`).toBeLessThan(bound);
        }
      }
    });

    test('a row whose additive mask is low everywhere hides nothing', async () => {
      const inputs = inputsOf(100);
      const attnMask = tensor(new Float32Array(100).fill(-1e4), [1, 1, 1, 100]);
      expect(await attend(inputs, { attnMask }), seed).toBeLessThan(bound);
    });

    test('garbage outside of a window that no row sees', async () => {
      const inputs = { ...inputsOf(300), q: normals(2, 20) };
      for (const x of [inputs.k, inputs.v]) scale(x, 1000, (token) => token < 250);
      const options: AttentionOptions = { isCausal: true, causalAlignment: 'bottom-right', windowSize: [16, 0] };
      expect(await attend(inputs, options), seed).toBeLessThan(bound);
    });

    test.each([1e-12, 1e-3, 1, 50, 1e4, 1e7, 1e12, 1e30, 3.4028234663852886e38])('softcap %d', async (softcap) => {
      for (const times of [1e-3, 1, 30]) {
        const inputs = inputsOf(60);
        scale(inputs.q, times, () => true);
        // With scores this large few keys count, and the rounding of each counts for more.
        const limit = times > 1 ? 2 * bound : bound;
        expect(await attend(inputs, { softcap }), `${seed}, scores times ${times}`).toBeLessThan(limit);
      }
    });

    test.each([
      ['one by one', Array.from({ length: 150 }, () => 1)],
      ['at once', [150]],
      ['in pieces', [1, 5, 60, 70, 14]],
    ])('a cache filled %s: sinks, offsets and first tokens that are unlike the rest', async (_, pieces) => {
      const length = 150;
      for (const smoothV of [false, true]) {
        const inputs = inputsOf(length);
        const keys = inputs.k.data as Float32Array;
        keys.forEach((value, i) => {
          keys[i] = value + (i % 5) * 4;
          if (i < D && i % 3 === 0) keys[i] = 100;
        });
        scale(inputs.v, 1e-6, (token) => token === 0);
        scale(inputs.v, 1000, (token) => token === length - 1);
        const rows = (row: number) => row > 0 && row < length - 1;
        const options = { isCausal: true, smoothV };
        const whole = await attend(inputs, options, rows);
        const cached = await attendCached(inputs, options, pieces, rows);
        expect(cached, `${seed}, smoothV ${smoothV}`).toBeLessThan(Math.max(bound, 1.3 * whole));
      }
    });
  });
});
