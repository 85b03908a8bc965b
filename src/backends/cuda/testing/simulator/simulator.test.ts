/** The simulator stops at what correct kernels never do, and its instructions compute what PTX says. */
import { describe, expect, test } from 'vitest';
import { Random, runSeed } from '../../../../../test/support/random.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor } from '../../ptx/layouts.ts';
import type { Kernel, Reg } from '../../ptx/types.ts';
import { GlobalMemory, SimulationError } from './memory.ts';
import { simulateKernel } from './simulator.ts';

const seed = runSeed();

type Body = (b: KernelBuilder, out: Reg<'global'>, thread: Reg<'u32'>, input: Reg<'global'>) => void;

function kernelOf(body: Body, threads = 64): Kernel {
  const b = new KernelBuilder({ name: 'test', target: 'sm_90a', threads });
  const [outParameter, inParameter] = [b.parameter('out', 'u64'), b.parameter('in', 'u64')];
  body(b, b.loadPointer(outParameter), b.special('%tid.x'), b.loadPointer(inParameter));
  return b.build();
}

interface RunOptions {
  readonly threads?: number;
  readonly input?: Uint8Array;
  /** Size of `out`. */
  readonly words?: number;
}

/** Runs one CTA; `input` is what `in` points at. Returns `out`, four bytes a thread. */
function run(body: Body, options: RunOptions = {}): DataView {
  const { threads = 64, input = new Uint8Array(4096) } = options;
  const { words = threads } = options;
  const memory = new GlobalMemory();
  const out = memory.allocate('out', words * 4);
  const source = memory.allocate('in', input.length, input);
  simulateKernel(kernelOf(body, threads), 1, { out, in: source }, memory);
  return memory.at(out, 4, 'test').view;
}

const perThread = (b: KernelBuilder, base: Reg<'global'>, thread: Reg<'u32'>) =>
  b.add(base, b.as(b.mulWide(thread, 4), 'global'));

describe('what correct kernels never do', () => {
  const fails = (body: Body, message: RegExp) => {
    expect(() => run(body)).toThrow(SimulationError);
    expect(() => run(body)).toThrow(message);
  };
  const shared = (b: KernelBuilder, thread: Reg<'u32'>) => {
    b.shared('tile', 1, rowMajor(256));
    return b.add(b.sharedAddress(), b.as(b.shl(thread, 2), 'shared'));
  };

  test('reading what another warp wrote without a barrier', () => {
    fails((b, _, thread) => {
      const own = shared(b, thread);
      b.st(thread, own);
      b.ld('u32', b.sharedAddress());
    }, /no barrier between/);
  });

  test('writing over what another warp may still read', () => {
    fails((b, _, thread) => {
      const own = shared(b, thread);
      b.st(thread, own);
      b.barSync();
      b.ld('u32', b.sharedAddress());
      b.st(thread, own);
    }, /no barrier between/);
  });

  test('reading shared or global memory that was never written', () => {
    fails((b, _, thread) => void b.ld('u32', shared(b, thread)), /never written/);
    fails((b, out) => void b.ld('u32', out), /never written/);
  });

  test('leaving a buffer, and misaligned accesses', () => {
    fails((b, out, thread) => b.st(thread, perThread(b, out, b.add(thread, 1))), /outside every buffer/);
    fails((b, _, thread) => b.st(thread, shared(b, b.add(thread, 1))), /shared bytes/);
    fails((b, out, thread) => b.st(thread, out, 2), /not a multiple/);
  });

  test('a barrier that some threads of a warp miss', () => {
    fails((b, _, thread) => b.if(b.setp('lt', thread, 40), () => b.barSync()), /arrive together/);
  });

  test('touching shared memory that a copy is on its way to', () => {
    fails((b, _, thread, input) => {
      const tile = b.shared('tile', 1, rowMajor(1024));
      const own = b.add(b.sharedAddress(tile.base), b.as(b.shl(thread, 4), 'shared'));
      b.cpAsync16(own, b.add(input, b.as(b.mulWide(thread, 16), 'global')));
      b.cpAsyncCommitGroup();
      b.ld('u32', own);
    }, /copy under way/);
  });

  test('a warp-wide instruction in a branch that some lanes left', () => {
    fails((b, _, thread) => b.if(b.setp('lt', thread, 5), () => void b.shflBfly(thread, 1)), /executed by 5 lanes/);
  });
});

describe('instructions', () => {
  test('divergent loops and branches reconverge', () => {
    const view = run((b, out, thread) => {
      const sum = b.constant('u32', 0);
      const i = b.constant('u32', 0);
      // Thread t adds 0 + 1 + ... + (t - 1), odd threads twice.
      b.loop(
        () => b.setp('lt', i, thread),
        () => {
          b.add(sum, i, sum);
          b.add(i, 1, i);
        },
      );
      b.if(
        b.setp('eq', b.and(thread, 1), 1),
        () => b.add(sum, sum, sum),
        () => b.add(sum, 1000, sum),
      );
      b.st(b.add(sum, b.shflBfly(b.constant('u32', 5), 1)), perThread(b, out, thread));
    });
    for (let t = 0; t < 64; t++) {
      const triangle = (t * (t - 1)) / 2;
      expect(view.getUint32(4 * t, true)).toBe((t % 2 === 1 ? 2 * triangle : triangle + 1000) + 5);
    }
  });

  test('64-bit addresses carry', () => {
    const view = run((b, out, thread) => {
      const big = b.mulWide(b.constant('u32', 0xffffffff), 0xffffffff);
      const sum = b.add(big, b.mulWide(b.constant('u32', 0x10), 0xfffffff0));
      const [low, high] = b.unpack(sum, 'u32');
      b.st(b.selp(0, b.add(low, high), b.setp('gt', thread, 63)), perThread(b, out, thread));
    });
    const exact = 0xffffffffn * 0xffffffffn + 0x10n * 0xfffffff0n;
    const expected = Number(((exact & 0xffffffffn) + (exact >> 32n)) & 0xffffffffn);
    expect(view.getUint32(0, true)).toBe(expected);
  });

  test('mma.m16n8k32 of s8 and ldmatrix agree with a plain product', () => {
    const [a, bt] = [new Int8Array(16 * 32), new Int8Array(8 * 32)].map((matrix, seed) =>
      matrix.map((_, i) => ((i * 37 + seed * 11 + (i >> 5) * 5) % 255) - 127),
    ) as [Int8Array, Int8Array];
    const input = new Uint8Array(16 * 32 + 8 * 32);
    input.set(new Uint8Array(a.buffer));
    input.set(new Uint8Array(bt.buffer), 16 * 32);
    const view = run(
      (b, out, thread, source) => {
        // A and B^T as they lie: rows of 32 bytes.
        const tile = b.shared('matrices', 24, rowMajor(32));
        const base = b.sharedAddress(tile.base);
        const lane = b.and(thread, 31);
        for (const part of [0, 512]) {
          b.when(b.setp('lt', thread, part === 0 ? 32 : 16), () => {
            const at = b.as(b.shl(thread, 4), 'shared');
            b.cpAsync16(b.add(base, at), b.add(source, b.as(b.mulWide(thread, 16), 'global')), part, part);
          });
        }
        b.cpAsyncCommitGroup();
        b.cpAsyncWaitGroup(0);
        b.barSync();
        const row = b.and(lane, 15);
        const fragmentA = b.ldmatrix('s8x4', 4, b.add(base, b.as(b.mad(row, 32, b.and(lane, 16)), 'shared')));
        const rowB = b.and(lane, 7);
        const chunk = b.shl(b.and(b.shr(lane, 3), 1), 4);
        const fragmentB = b.ldmatrix('s8x4', 2, b.add(base, b.as(b.mad(rowB, 32, chunk), 'shared')), 512);
        const d = b.regs('s32', 4);
        for (const register of d) b.set(register, 7);
        b.mma('m16n8k32.row.col.s32.s8.s8.s32', d, fragmentA, fragmentB);
        b.stVector(d, b.add(out, b.as(b.mulWide(thread, 16), 'global')));
      },
      { threads: 32, input, words: 128 },
    );
    for (let lane = 0; lane < 32; lane++) {
      for (let i = 0; i < 4; i++) {
        const [m, n] = [(lane >> 2) + 8 * (i >> 1), 2 * (lane & 3) + (i & 1)];
        let sum = 7;
        for (let k = 0; k < 32; k++) sum += (a[m * 32 + k] as number) * (bt[n * 32 + k] as number);
        expect(view.getInt32((lane * 4 + i) * 4, true)).toBe(sum);
      }
    }
  });

  test(`bitwise functions are their truth tables, and larger magnitudes are NaN where either is (SAGEATTENTION_SEED=${seed})`, () => {
    const threads = 32;
    // Signed zeros, subnormals, ordinary numbers, infinities and NaN of both 16-bit formats among random bits.
    const special = [0, 0x8000, 1, 0x3c00, 0xbf80, 0x7c00, 0xfc00, 0x7c01, 0x7f80, 0xff80, 0x7f81, 0xffff];
    const random = new Random(seed);
    const halves = Uint16Array.from({ length: 6 * threads }, () =>
      random.uniform() < 0.5 ? random.pick(special) : random.integer(0, 65535),
    );
    const table = random.integer(0, 255);
    const view = run(
      (b, out, thread, source) => {
        const at = b.add(source, b.as(b.mulWide(thread, 12), 'global'));
        const [x, y, z] = [0, 4, 8].map((byte) => b.ld('b32', at, byte)) as [Reg<'b32'>, Reg<'b32'>, Reg<'b32'>];
        const own = b.add(out, b.as(b.mulWide(thread, 12), 'global'));
        b.st(b.lop3(x, y, z, table), own);
        for (const [i, kind] of (['f16x2', 'bf16x2'] as const).entries()) {
          const larger = b.reg('b32');
          b.maxMagnitude(kind, x, y, larger);
          b.st(larger, own, 4 + 4 * i);
        }
      },
      { threads, input: new Uint8Array(halves.buffer), words: 3 * threads },
    );
    const words = new Uint32Array(halves.buffer);
    for (let thread = 0; thread < threads; thread++) {
      const [x, y, z] = words.subarray(3 * thread, 3 * thread + 3) as unknown as [number, number, number];
      const got = [0, 4, 8].map((byte) => view.getUint32(12 * thread + byte, true)) as [number, number, number];
      for (let bit = 0; bit < 32; bit++) {
        const row = 4 * ((x >>> bit) & 1) + 2 * ((y >>> bit) & 1) + ((z >>> bit) & 1);
        expect((got[0] >>> bit) & 1).toBe((table >> row) & 1);
      }
      for (const [i, infinity] of [0x7c00, 0x7f80].entries()) {
        for (const shift of [0, 16]) {
          const [p, q] = [(x >>> shift) & 0x7fff, (y >>> shift) & 0x7fff];
          const largest = p > infinity || q > infinity ? 0x7fff : Math.max(p, q);
          expect(((got[1 + i] as number) >>> shift) & 0x7fff).toBe(largest);
        }
      }
    }
  });

  test('float arithmetic rounds once, in the direction asked for', () => {
    const one = 1 + 2 ** -23;
    // a, b, c and what a * b + c is: rounded to nearest, up and down.
    const cases = [
      [one, one, 0, 1 + 2 ** -22, 1 + 3 * 2 ** -23, 1 + 2 ** -22],
      [-one, one, 0, -1 - 2 ** -22, -1 - 2 ** -22, -1 - 3 * 2 ** -23],
      // Exactly between two floats, but for a term far below float64's last bit.
      [1, 1 + 2 ** -23, 2 ** -24, 1 + 2 ** -22, 1 + 2 ** -22, one],
      [one, 2 ** -24 * one, 1, one, one, 1],
      [2 ** -60, 2 ** -60, one, one, 1 + 2 ** -22, one],
      [2 ** -60, -(2 ** -60), one, one, one, 1],
      [2 ** 100, 2 ** 100, 0, Number.POSITIVE_INFINITY, Number.POSITIVE_INFINITY, (2 - 2 ** -23) * 2 ** 127],
      [2 ** -140, 2 ** -140, 0, 0, 2 ** -149, 0],
    ];
    const table = Float32Array.from(cases.flatMap((row) => row.slice(0, 3)));
    const input = new Uint8Array(4 * 3 * 32);
    input.set(new Uint8Array(table.buffer));
    const threads = 32;
    const roundings = ['rn', 'rp', 'rm'] as const;
    const view = run(
      (b, out, thread, source) => {
        const at = b.add(source, b.as(b.mulWide(thread, 12), 'global'));
        const [x, y, z] = [0, 4, 8].map((offset) => b.ld('f32', at, offset)) as [Reg<'f32'>, Reg<'f32'>, Reg<'f32'>];
        const own = b.add(out, b.as(b.mulWide(thread, 36), 'global'));
        roundings.forEach((rounding, i) => {
          b.st(b.fma(x, y, z, undefined, rounding), own, 4 * i);
          b.st(b.mul(x, y, undefined, rounding), own, 12 + 4 * i);
          b.st(b.sub(x, y, undefined, rounding), own, 24 + 4 * i);
        });
      },
      { threads, input, words: threads * 9 },
    );
    cases.forEach(([a = 0, b = 0, c = 0, ...fused], i) => {
      const results = (first: number) => [0, 4, 8].map((at) => view.getFloat32(36 * i + first + at, true));
      const [product, difference] = [results(12), results(24)];
      expect(results(0), `${a} * ${b} + ${c}`).toEqual(fused);
      expect(product[0]).toBe(Math.fround(a * b));
      expect(product[1]).toBeGreaterThanOrEqual(a * b);
      expect(product[2]).toBeLessThanOrEqual(a * b);
      expect(difference[0]).toBe(Math.fround(a - b));
      expect(difference[1]).toBeGreaterThanOrEqual(a - b);
      expect(difference[2]).toBeLessThanOrEqual(a - b);
    });
  });

  test('float conversions round as PTX says', () => {
    const values = [0.1, 65504, 65520, 1e-8, 448, 500, -0.0146, Number.POSITIVE_INFINITY];
    const input = new Uint8Array(Float32Array.from(values).buffer);
    const view = run(
      (b, out, thread, source) => {
        const value = b.ld('f32', perThread(b, source, b.and(thread, 7)));
        const half = b.cvtPack('f16x2', value, value);
        const codes = b.cvt('u32', b.as(b.cvtPack('e4m3x2', value, value), 'b16'));
        b.st(b.or(b.and(b.as(half, 'u32'), 0xffff), b.shl(b.and(codes, 0xff), 16)), perThread(b, out, thread));
      },
      { threads: 32, input },
    );
    const words = values.map((_, i) => view.getUint32(4 * i, true));
    expect(words.map((word) => word & 0xffff)).toEqual([0x2e66, 0x7bff, 0x7c00, 0, 0x5f00, 0x5fd0, 0xa37a, 0x7c00]);
    expect(words.map((word) => word >>> 16)).toEqual([0x1d, 0x7e, 0x7e, 0, 0x7e, 0x7e, 0x87, 0x7e]);
  });
});
