import { describe, expect, expectTypeOf, test } from 'vitest';
import { assemble, ptxasVersion } from '../testing/ptxas.ts';
import { KernelBuilder } from './builder.ts';
import { listing, liveAfter, opcodeCounts, registerPressure } from './inspect.ts';
import { xorSwizzle } from './layouts.ts';
import { printKernel } from './printer.ts';
import { TARGETS } from './targets.ts';
import type { Reg } from './types.ts';

/** y[i] = a * x[i] + y[i] with a run-time loop, a branch, a guard, shared memory and a conversion. */
function axpy(target: (typeof TARGETS)[number]) {
  const b = new KernelBuilder({ name: 'axpy', target, threads: 64 });
  const [xParameter, yParameter] = [b.parameter('x', 'u64'), b.parameter('y', 'u64')];
  const [aParameter, countParameter] = [b.parameter('a', 'f32'), b.parameter('count', 'u32')];
  const tile = b.shared('tile', 64, xorSwizzle(16));
  b.section('addresses');
  const thread = b.special('%tid.x');
  const offset = b.mulWide(thread, 4);
  const x = b.add(b.loadPointer(xParameter), b.as(offset, 'global'));
  const y = b.add(b.loadPointer(yParameter), b.as(offset, 'global'));
  const a = b.loadParameter(aParameter);
  const count = b.loadParameter(countParameter);
  const staging = b.add(b.sharedAddress(tile.base), b.as(b.shl(thread, 4), 'shared'));
  b.section('loop over rows');
  const i = b.mov(thread);
  b.loop(
    () => b.setp('lt', i, count),
    () => {
      const product = b.mul(b.ld('f32', x, 0, { readOnly: true }), a);
      b.st(product, staging);
      b.barSync();
      const sum = b.add(b.ld('f32', staging), b.ld('f32', y));
      b.if(
        b.setp('gt', sum, 1e30),
        () => b.set(sum, 1e30),
        () => b.max(sum, -1e30, sum),
      );
      b.when(b.setp('eq', a, 0), () => b.set(sum, 0));
      b.st(sum, y);
      b.add(i, 64, i);
      b.add(x, 256, x);
      b.add(y, 256, y);
    },
  );
  return b.build();
}

describe('types', () => {
  const b = new KernelBuilder({ name: 'types', target: 'sm_90a', threads: 32 });
  const [float, integer, predicate] = [b.reg('f32'), b.reg('s32'), b.reg('pred')];
  const [shared, global, half2] = [b.reg('shared'), b.reg('global'), b.reg('f16x2')];

  test('results carry their kind', () => {
    expectTypeOf(b.add(float, 1)).toEqualTypeOf<Reg<'f32'>>();
    expectTypeOf(b.setp('lt', integer, 3)).toEqualTypeOf<Reg<'pred'>>();
    expectTypeOf(b.cvtPack('f16x2', float, float)).toEqualTypeOf<Reg<'f16x2'>>();
    expectTypeOf(b.cvt('f32', integer)).toEqualTypeOf<Reg<'f32'>>();
    expectTypeOf(b.ldmatrix('s8x4', 4, shared)).toEqualTypeOf<Reg<'s8x4'>[]>();
    expectTypeOf(b.as(integer, 'f32')).toEqualTypeOf<Reg<'f32'>>();
  });

  test('mixtures do not compile', () => {
    // Never called: the compiler is the test.
    const wrong = () => {
      // @ts-expect-error a predicate added to a float
      b.add(float, predicate);
      // @ts-expect-error a float added to a predicate
      b.add(predicate, float);
      // @ts-expect-error an integer multiplied by a float
      b.mul(integer, float);
      // @ts-expect-error literals of packed halves do not exist
      b.add(half2, 1);
      // @ts-expect-error the predicate of a branch
      b.if(float, () => {});
      // @ts-expect-error ldmatrix reads shared memory
      b.ldmatrix('s8x4', 4, global);
      // @ts-expect-error cp.async goes from global to shared
      b.cpAsync16(global, shared);
      // @ts-expect-error a float as an address
      b.ld('f32', float);
      // @ts-expect-error 64 bits are not 32
      b.as(global, 'f32');
      // @ts-expect-error there is no such conversion
      b.cvt('e4m3x2', integer);
      // @ts-expect-error fragments of the wrong kind
      b.mma('m16n8k32.row.col.s32.s8.s8.s32', [integer], [half2], [half2]);
    };
    expect(wrong).toBeTypeOf('function');
  });
});

describe('printing', () => {
  test('is PTX with the kernel’s own sections', () => {
    const text = printKernel(axpy('sm_80'));
    expect(text).toContain('.target sm_80');
    expect(text).toContain('// loop over rows');
    expect(text).toMatch(/mul\.rn\.f32 %r\d+, %r\d+, %r\d+;/);
    expect(text).toContain('0f7149F2CA');
    expect(text).toMatch(/@%p\d+ mov\.f32/);
  });

  test('float arithmetic names its rounding', () => {
    const b = new KernelBuilder({ name: 'rounding', target: 'sm_80', threads: 32 });
    const [x, halves] = [b.reg('f32'), b.reg('f16x2')];
    b.mul(x, x, undefined, 'rp');
    b.fma(x, x, x, undefined, 'rm');
    b.sub(x, 1);
    b.add(halves, halves);
    b.add(b.reg('u32'), 1);
    const opcodes = b.build().instructions.map(({ opcode }) => opcode);
    expect(opcodes).toEqual(['mul.rp.f32', 'fma.rm.f32', 'sub.rn.f32', 'add.rn.f16x2', 'add.u32', 'ret']);
    expect(() => b.mul(halves, halves, undefined, 'rp')).toThrow(RangeError);
  });

  test('refuses literals that are no integers', () => {
    const b = new KernelBuilder({ name: 'literal', target: 'sm_80', threads: 32 });
    b.add(b.special('%tid.x'), 0.5);
    expect(() => printKernel(b.build())).toThrow(RangeError);
  });

  test.skipIf(ptxasVersion() === undefined).each(TARGETS)('ptxas accepts it for %s', (target) => {
    expect(assemble(axpy(target))).toMatchObject({ spillStoreBytes: 0, spillLoadBytes: 0 });
  });
});

describe('inspection', () => {
  test('liveness ends at the last use and spans loops', () => {
    const b = new KernelBuilder({ name: 'live', target: 'sm_80', threads: 32 });
    const early = b.constant('f32', 1);
    const counter = b.constant('u32', 0);
    const sum = b.constant('f32', 0);
    b.loop(
      () => b.setp('lt', counter, 8),
      () => {
        b.add(sum, early, sum);
        b.add(counter, 1, counter);
      },
    );
    const kernel = b.build();
    const live = liveAfter(kernel);
    const branch = kernel.instructions.map(({ opcode }) => opcode).lastIndexOf('bra');
    expect([...(live[branch] as Set<number>)].sort((x, y) => x - y)).toEqual([early.id, counter.id, sum.id]);
    expect((live.at(-1) as Set<number>).size).toBe(0);
    expect(registerPressure(kernel)).toMatchObject({ registers: 3, predicates: 1 });
  });

  test('pressure, counts and listing', () => {
    const kernel = axpy('sm_90a');
    expect(kernel.sharedBytes).toBe(1024);
    expect(opcodeCounts(kernel).get('bar.sync')).toBe(1);
    expect(listing(kernel)).toContain('-- loop over rows');
    const { registers, byKind } = registerPressure(kernel);
    expect(registers).toBeGreaterThan(8);
    expect(byKind.global).toBe(2);
  });
});
