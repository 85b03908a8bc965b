import { describe, expect, test } from 'vitest';
import { assemble, ptxasVersion } from '../testing/ptxas.ts';
import { KernelBuilder } from './builder.ts';
import { clusterArrive, clusterWait, electSync, mapa } from './cluster.ts';
import { readsOf, writesOf } from './inspect.ts';
import { tma128Swizzle } from './layouts.ts';
import {
  fenceMbarrierInit,
  mbarrierArrive,
  mbarrierArriveExpectTx,
  mbarrierArriveRemote,
  mbarrierInit,
  mbarrierWait,
} from './mbarrier.ts';
import { printKernel } from './printer.ts';
import { fenceProxyAsync, prefetchTensorMap, tensorLoad } from './tma.ts';
import {
  advanceDescriptor,
  matrixDescriptor,
  setMaxNReg,
  wgmma,
  wgmmaCommitGroup,
  wgmmaFence,
  wgmmaWaitGroup,
} from './wgmma.ts';

/** One of everything: a producer warpgroup on TMA, a consumer on wgmma, a cluster of two. */
function everything() {
  const b = new KernelBuilder({ name: 'everything', target: 'sm_90a', threads: 256, clusterSize: 2 });
  const load = b.parameter('loadMap', 'tensorMap');
  const out = b.parameter('out', 'u64');
  const tile = b.shared('tile', 128, tma128Swizzle());
  const barriers = b.shared('barriers', 1, { ...tma128Swizzle(), rowBytes: 16, alignment: 8 });
  const tileAt = b.sharedAddress(tile.base);
  const barrier = b.sharedAddress(barriers.base);
  const thread = b.special('%tid.x');
  const map = b.tensorMapAddress(load);
  b.when(b.setp('eq', thread, 0), () => {
    prefetchTensorMap(b, map);
    mbarrierInit(b, barrier, 1);
    mbarrierInit(b, barrier, 128, 8);
    fenceMbarrierInit(b);
  });
  clusterArrive(b);
  clusterWait(b);
  const zero = b.constant('s32', 0);
  const parity = b.constant('u32', 0);
  b.if(
    b.setp('lt', thread, 128),
    () => {
      setMaxNReg(b, 'dec', 40);
      b.if(b.setp('lt', thread, 32), () => {
        b.when(electSync(b), () => {
          mbarrierArriveExpectTx(b, barrier, 128 * 128);
          tensorLoad(b, tileAt, map, [zero, zero, zero], barrier);
          tensorLoad(b, tileAt, map, [zero, zero], barrier, { multicast: b.cvt('b16', b.constant('u32', 3)) });
        });
        const remote = mapa(b, barrier, b.special('%cluster_ctarank'));
        mbarrierArriveRemote(b, remote, 8);
      });
    },
    () => {
      setMaxNReg(b, 'inc', 240);
      mbarrierWait(b, barrier, parity);
      const descriptor = matrixDescriptor(b, tileAt, { strideBytes: 1024, swizzle: '128B' });
      const scores = b.regs('s32', 64);
      const sums = b.regs('f32', 64);
      const halfSums = b.regs('f32', 32);
      for (const sum of [...sums, ...halfSums]) b.set(sum, 0);
      wgmmaFence(b);
      for (let k = 0; k < 4; k++) {
        const step = advanceDescriptor(b, descriptor, 32 * k);
        wgmma(b, 128, 'k32.s32.s8.s8', scores, step, step, k > 0);
      }
      const p = b.ldmatrix('e4m3x4', 4, tileAt);
      wgmma(b, 128, 'k32.f32.e4m3.e4m3', sums, p, descriptor, b.setp('ne', thread, 128));
      wgmma(b, 64, 'k16.f32.f16.f16', halfSums, b.ldmatrix('f16x2', 4, tileAt), descriptor, true, true);
      wgmma(b, 64, 'k16.f32.f16.f16', halfSums, descriptor, descriptor, true, true);
      wgmmaCommitGroup(b);
      wgmmaWaitGroup(b, 0);
      mbarrierArrive(b, barrier, 8);
      b.namedBarrier('bar.sync', 1, 128);
      b.namedBarrier('bar.arrive', 2, 256);
      fenceProxyAsync(b);
      const total = b.cvt(
        'f32',
        scores.reduce((x, y) => b.add(x, y)),
      );
      b.st(
        [...sums, ...halfSums].reduce((x, y) => b.add(x, y), total),
        b.loadPointer(out),
      );
    },
  );
  return b.build();
}

describe('instructions of sm_90a', () => {
  test.skipIf(ptxasVersion() === undefined)('ptxas accepts them for sm_90a', () => {
    const { registers } = assemble(everything());
    expect(registers).toBeGreaterThan(100);
  });

  test('print as PTX names them', () => {
    const text = printKernel(everything());
    expect(text).toContain('.reqnctapercluster 2, 1, 1');
    expect(text).toMatch(/wgmma\.mma_async\.sync\.aligned\.m64n128k32\.s32\.s8\.s8 \{.*\}, %d\d+, %d\d+, 0;/);
    expect(text).toMatch(/elect\.sync %r\d+\|%p\d+, 4294967295;/);
    expect(text).toContain('.param .align 64 .b8 loadMap[128]');
  });

  test('an accumulating product reads its accumulator, the first does not', () => {
    const products = everything().instructions.filter(({ opcode }) => opcode.includes('s32.s8.s8'));
    const reads = products.map((product) => {
      const written = new Set(writesOf(product).map(({ id }) => id));
      return readsOf(product).some(({ id }) => written.has(id));
    });
    expect(reads).toEqual([false, true, true, true]);
  });

  test('wrong accumulators and budgets are refused', () => {
    const b = new KernelBuilder({ name: 'wrong', target: 'sm_90a', threads: 128 });
    const descriptor = b.constant('u64', 0);
    expect(() => wgmma(b, 128, 'k32.s32.s8.s8', b.regs('s32', 32), descriptor, descriptor, true)).toThrow(RangeError);
    expect(() => setMaxNReg(b, 'inc', 100)).toThrow(RangeError);
  });
});
