/**
 * The simulator on correct kernels and on faulty ones: a fault that it does not notice would pass every test.
 */
import { describe, expect, test } from 'vitest';
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor, tma128Swizzle } from '../../ptx/layouts.ts';
import { mbarrierArrive, mbarrierArriveExpectTx, mbarrierInit, mbarrierWait } from '../../ptx/mbarrier.ts';
import { fenceProxyAsync, tensorLoad } from '../../ptx/tma.ts';
import type { Kernel } from '../../ptx/types.ts';
import {
  advanceDescriptor,
  matrixDescriptor,
  wgmma,
  wgmmaCommitGroup,
  wgmmaFence,
  wgmmaWaitGroup,
} from '../../ptx/wgmma.ts';
import type { SimulatedTensorMap } from './mbarrier.ts';
import { GlobalMemory } from './memory.ts';
import { simulateKernel } from './simulator.ts';

type Fault =
  | 'none'
  | 'no fence'
  | 'no wait for the copy'
  | 'no wait for the product'
  | 'wrong parity'
  | 'too few bytes'
  | 'an arrival too many'
  | 'a barrier that one warp misses';

const [M, N, K] = [64, 16, 64];

/**
 * out = a * b^T for INT8 a (64 x 64, written by threads) and b (16 x 64, fetched by TMA from a tensor of 12 rows), once
 * more into the same stage.
 */
function product(fault: Fault): Kernel {
  const b = new KernelBuilder({ name: 'product', target: 'sm_90a', threads: 128 });
  const [aParameter, outParameter] = [b.parameter('a', 'u64'), b.parameter('out', 'u64')];
  const map = b.tensorMapAddress(b.parameter('map', 'tensorMap'));
  const aTile = b.shared('a', M, tma128Swizzle());
  const bTile = b.shared('b', N, tma128Swizzle());
  const barrierTile = b.shared('barrier', 1, rowMajor(16));
  const thread = b.special('%tid.x');
  const first = b.setp('eq', thread, 0);
  const barrier = b.sharedAddress(barrierTile.base);
  b.when(first, () => mbarrierInit(b, barrier, 1));
  b.barSync();
  // Two threads a row, 32 bytes each.
  const row = b.shr(thread, 1);
  const source = b.add(b.loadPointer(aParameter), b.as(b.mulWide(thread, 32), 'global'));
  for (let chunk = 0; chunk < 2; chunk++) {
    const words = b.ldVector('b32', 4, source, chunk * 16);
    const place = b.xor(b.add(b.shl(b.and(thread, 1), 1), chunk), b.and(row, 7));
    b.stVector(words, b.add(b.sharedAddress(aTile.base), b.as(b.add(b.shl(row, 7), b.shl(place, 4)), 'shared')));
  }
  if (fault !== 'no fence') fenceProxyAsync(b);
  if (fault === 'a barrier that one warp misses') {
    b.if(b.setp('lt', thread, 96), () => b.namedBarrier('bar.sync', b.constant('u32', 1), 128));
  } else b.namedBarrier('bar.sync', b.constant('u32', 1), 128);
  const bytes = N * 128;
  const zero = b.constant('s32', 0);
  b.if(first, () => {
    mbarrierArriveExpectTx(b, barrier, fault === 'too few bytes' ? bytes + 16 : bytes);
    tensorLoad(b, b.sharedAddress(bTile.base), map, [zero, zero], barrier);
    if (fault === 'an arrival too many') mbarrierArrive(b, barrier);
  });
  if (fault !== 'no wait for the copy') mbarrierWait(b, barrier, b.constant('u32', fault === 'wrong parity' ? 1 : 0));
  const layout = { strideBytes: 1024, swizzle: '128B' } as const;
  const a = matrixDescriptor(b, b.sharedAddress(aTile.base), layout);
  const bb = matrixDescriptor(b, b.sharedAddress(bTile.base), layout);
  const sums = b.regs('s32', N / 2);
  wgmmaFence(b);
  for (let byte = 0; byte < K; byte += 32) {
    wgmma(b, N, 'k32.s32.s8.s8', sums, advanceDescriptor(b, a, byte), advanceDescriptor(b, bb, byte), byte > 0);
  }
  wgmmaCommitGroup(b);
  const results = fault === 'no wait for the product' ? sums.map((sum) => b.mov(sum)) : sums;
  wgmmaWaitGroup(b, 0);
  const lane = b.and(thread, 31);
  const outRow = b.add(b.shl(b.shr(thread, 5), 4), b.shr(lane, 2));
  const at = b.mad(outRow, N * 4, b.shl(b.and(lane, 3), 3));
  const out = b.add(b.loadPointer(outParameter), b.as(b.cvt('u64', at), 'global'));
  for (const [i, sum] of results.entries()) b.st(sum, out, (i >> 2) * 32 + ((i >> 1) & 1) * 8 * N * 4 + (i & 1) * 4);
  return b.build();
}

function run(fault: Fault): { actual: Int32Array; expected: Int32Array } {
  const rows = 12;
  const random = (length: number, seed: number) =>
    Int8Array.from({ length }, (_, i) => (Math.imul(i + seed, 2654435761) >>> 24) - 128);
  const [a, other] = [random(M * K, 1), random(rows * K, 77)];
  const memory = new GlobalMemory();
  const aAddress = memory.allocate('a', a.byteLength, new Uint8Array(a.buffer));
  const bAddress = memory.allocate('b', other.byteLength, new Uint8Array(other.buffer));
  const out = memory.allocate('out', M * N * 4);
  // Boxes of 128 bytes over rows of 64: the rest reads as zeros, as do the four rows that the tensor lacks.
  const map: SimulatedTensorMap = {
    address: bAddress,
    elementBytes: 1,
    dimensions: [K, rows],
    byteStrides: [K],
    box: [128, N],
    swizzleBytes: 128,
  };
  simulateKernel(product(fault), 1, { a: aAddress, out }, memory, new Map([['map', map]]));
  const { bytes } = memory.read('out');
  const expected = new Int32Array(M * N);
  for (let m = 0; m < M; m++) {
    for (let n = 0; n < rows; n++) {
      let sum = 0;
      for (let k = 0; k < K; k++) sum += (a[m * K + k] as number) * (other[n * K + k] as number);
      expected[m * N + n] = sum;
    }
  }
  return { actual: new Int32Array(bytes.buffer, bytes.byteOffset, M * N), expected };
}

test('a product of a written and a fetched tile is right', () => {
  const { actual, expected } = run('none');
  expect(actual).toEqual(expected);
});

describe('what a correct kernel never does', () => {
  test.each([
    ['no fence', /no fence\.proxy\.async/],
    ['no wait for the copy', /has a copy under way|was never written/],
    // Who comes late waits for a phase that never comes.
    ['wrong parity', /has a copy under way|was never written|deadlock/],
    ['too few bytes', /deadlock/],
    // Or it opens the next phase, if the copy has landed by then.
    ['an arrival too many', /arrivals at a barrier of 1|deadlock/],
    ['a barrier that one warp misses', /deadlock/],
  ] as const)('%s', (fault, message) => {
    expect(() => run(fault)).toThrow(message);
  });

  test('sums read before their product has ended hold nonsense', () => {
    const { actual, expected } = run('no wait for the product');
    expect(actual).not.toEqual(expected);
  });
});

/** Warp 1 writes words that warp 0 reads and then writes over, each after the other by way of a barrier each. */
function handOver(fault: 'none' | 'reads at once' | 'writes at once'): Kernel {
  const b = new KernelBuilder({ name: 'handOver', target: 'sm_90a', threads: 64 });
  const out = b.parameter('out', 'u64');
  const words = b.shared('words', 1, rowMajor(128));
  const barriers = b.sharedAddress(b.shared('barriers', 1, rowMajor(16)).base);
  const thread = b.special('%tid.x');
  b.when(b.setp('eq', thread, 0), () => {
    for (const at of [0, 8]) mbarrierInit(b, barriers, 1, at);
  });
  b.barSync();
  const lane = b.and(thread, 31);
  const own = b.add(b.sharedAddress(words.base), b.as(b.shl(lane, 2), 'shared'));
  const leader = b.setp('eq', lane, 0);
  const zero = b.constant('u32', 0);
  b.if(
    b.setp('ge', thread, 32),
    () => {
      b.st(lane, own);
      b.when(leader, () => mbarrierArrive(b, barriers));
      if (fault !== 'writes at once') mbarrierWait(b, barriers, zero, 8);
      b.st(b.add(lane, 100), own);
    },
    () => {
      if (fault !== 'reads at once') mbarrierWait(b, barriers, zero);
      const value = b.ld('u32', own);
      b.st(value, b.add(b.loadPointer(out), b.as(b.mulWide(lane, 4), 'global')));
      b.when(leader, () => mbarrierArrive(b, barriers, 8));
    },
  );
  return b.build();
}

describe('words that warps hand to each other', () => {
  const run = (fault: Parameters<typeof handOver>[0]) => {
    const memory = new GlobalMemory();
    const out = memory.allocate('out', 128);
    simulateKernel(handOver(fault), 1, { out }, memory);
    return new Uint32Array(memory.read('out').bytes.slice().buffer);
  };

  test('an arrival orders what came before it', () => {
    expect(run('none')).toEqual(Uint32Array.from({ length: 32 }, (_, i) => i));
  });

  test.each(['reads at once', 'writes at once'] as const)('%s', (fault) => {
    expect(() => run(fault)).toThrow(/no barrier between|was never written/);
  });
});
