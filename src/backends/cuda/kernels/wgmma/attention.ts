/**
 * The Hopper attention kernel: INT8 QK^T and FP8 or FP16 PV on `wgmma`, for sm_90a. docs/hopper.md draws the pipeline and counts
 * its clocks.
 *
 * A CTA has one producer warpgroup and `consumers` more. One thread of the producer sends K and V, 128 keys at a time, through
 * rings of stages in shared memory (TMA); each consumer owns 64 rows of Q and runs the online softmax of FlashAttention in
 * base 2 on them. `full` barriers count a stage's bytes in, `empty` barriers the warps that are done with it. With schedule
 * `ahead` a consumer issues QK^T of the next tile before PV of this one, so that tensor cores work while it takes
 * exponentials. A CTA goes through work items (a tile of Q rows of one head, or a split of its keys) `gridDim` apart, so the
 * producer fetches the next item's operands during the last one's epilogue.
 *
 * Names: g = lane / 4 and t = lane % 4. Of every 8 columns of the scores a thread owns columns 2t and 2t + 1 of rows g
 * and g + 8 of its warp's 16; register 4n + i holds row g + 8 * (i >> 1), column 8n + 2t + (i & 1). P in E4M3 is the A fragment of
 * the next product just as the thread has it, because V's tokens are stored in permuted order (see `TOKEN_PERMUTATION`).
 */
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor } from '../../ptx/layouts.ts';
import {
  fenceMbarrierInit,
  mbarrierArrive,
  mbarrierArriveExpectTx,
  mbarrierInit,
  mbarrierTest,
  mbarrierWait,
} from '../../ptx/mbarrier.ts';
import { fenceProxyAsync, prefetchTensorMap, tensorLoad } from '../../ptx/tma.ts';
import type { Kernel, Reg } from '../../ptx/types.ts';
import {
  advanceDescriptor,
  matrixDescriptor,
  setMaxNReg,
  wgmma,
  wgmmaCommitGroup,
  wgmmaFence,
  wgmmaWaitGroup,
} from '../../ptx/wgmma.ts';
import { divide, integers, offset, offset64, pointers } from '../parts/addresses.ts';
import { bandParameters, type KeyRange, keyRange } from '../parts/band.ts';
import { LOG2_E, MAGIC, MAGIC_BITS } from '../parts/constants.ts';
import { BYTES, unpackPair } from '../parts/elements.ts';
import { headAddress, logSumExp, rowFactor, storePair } from '../parts/epilogue.ts';
import { at, maxOf } from '../parts/lists.ts';
import { quadMax, quadSum } from '../parts/quad.ts';
import { capScores, excludeBeyondBand, maskRow, spreadFaults } from '../parts/scores.ts';
import { loadSequence } from '../parts/sequences.ts';
import { EXACT_SCALE, type HopperConfig, MIN_SCALE, SCALE_BITS, sharedPlanOf } from './config.ts';
import { exp2Halves, uniform } from './instructions.ts';

/** The lowest finite float32. */
const LOWEST = -3.4028234663852886e38;
/** Bits of 1.0. */
const ONE_BITS = 0x3f800000;

/** Keys of a tile. Scales of K are those of each 64. */
export const HOPPER_BLOCK_K = 128;
/** Rows of a consumer warpgroup. */
export const CONSUMER_ROWS = 64;

export const HOPPER_POINTERS = [
  'sequences',
  'query',
  'queryScale',
  'rowBias',
  'keyMean',
  'keyScale',
  'keyFaults',
  'valueScale',
  'valueTileScale',
  'valueMean',
  'mask',
  'output',
  'lse',
] as const;
export const HOPPER_INTEGERS = [
  'queryHeads',
  'headsPerKeyHead',
  'queryTiles',
  'splits',
  'paddedQueries',
  'paddedKeys',
  'work',
  'headGroup',
] as const;
/** In bytes. `query` strides are of the caller's Q, which a kernel that quantizes it reads. */
export const HOPPER_STRIDES = [
  'queryBatch',
  'queryHead',
  'queryToken',
  'maskBatch',
  'maskHead',
  'maskQuery',
  'maskKey',
  'outputBatch',
  'outputHead',
  'outputToken',
  'lseBatch',
  'lseHead',
] as const;
export const HOPPER_MAPS = ['queryMap', 'keyMap', 'valueMap'] as const;

/** A place in a ring of stages: which stage, and the parity of the phase in which it is filled. */
interface RingPlace {
  readonly stage: Reg<'u32'>;
  readonly parity: Reg<'u32'>;
}

/** One item of work, as each role works it out for itself. */
interface Work extends KeyRange {
  readonly split: Reg<'u32'> | undefined;
  readonly sequence: Reg<'u32'>;
  /** First head of Q of the tile, and head of K and V. */
  readonly head: Reg<'u32'>;
  readonly keyHead: Reg<'u32'>;
  readonly queryStart: Reg<'u32'>;
  readonly queryLength: Reg<'u32'>;
  readonly keyLength: Reg<'u32'>;
  readonly paddedQueryStart: Reg<'u32'>;
  readonly paddedKeyStart: Reg<'u32'>;
  /** First row of the tile; rows are tokens, or `packedHeads` heads of each token. */
  readonly firstRow: Reg<'u32'>;
}

/** The kernel of one configuration. */
export function hopperAttention(config: HopperConfig): Kernel {
  const { pvFormat, qkRowBytes, valueDim, paddedValueDim, consumers, stages, packedHeads, schedule } = config;
  const fp8 = pvFormat === 'e4m3';
  const fused = config.fusedQuery !== undefined;
  const rows = consumers * CONSUMER_ROWS;
  const threads = 128 * (1 + consumers);
  const b = new KernelBuilder({
    name: 'hopperAttention',
    target: 'sm_90a',
    threads,
    minBlocksPerMultiprocessor: config.minBlocks,
  });
  const pointer = pointers(b, HOPPER_POINTERS);
  const integer = integers(b, HOPPER_INTEGERS);
  const strides = pointers(b, HOPPER_STRIDES);
  const band = bandParameters(b);
  const smScale = b.parameter('smScale', 'f32');
  const softcap = b.parameter('softcap', 'f32'); // softcap * log2(e)
  const maps = HOPPER_MAPS.map((name) => b.parameter(name, 'tensorMap'));

  b.section('shared memory');
  const plan = sharedPlanOf(config);
  const { rowLayout, rowBlocks } = plan;
  const queryTile = b.shared('query', rowBlocks * rows, rowLayout);
  const keyTile = b.shared('key', stages * rowBlocks * HOPPER_BLOCK_K, rowLayout);
  const valueTile = b.shared('value', stages * plan.valueStageRows, plan.valueLayout);
  const biasTile = b.shared('row bias', 1, rowMajor(rows * 4));
  const barrierTile = b.shared('barriers', 1, rowMajor(8 * (4 * stages + 2)));
  const keyStageBytes = keyTile.bytes / stages;
  const valueStageBytes = valueTile.bytes / stages;
  const queryBlockBytes = rows * rowLayout.rowBytes;
  const keyBlockBytes = HOPPER_BLOCK_K * rowLayout.rowBytes;

  const shared = b.sharedAddress();
  const barriers = b.add(shared, barrierTile.base);
  const BARRIER = { keyFull: 0, valueFull: 8 * stages, keyEmpty: 16 * stages, valueEmpty: 24 * stages } as const;
  const queryFull = 32 * stages;
  const queryEmpty = queryFull + 8;
  const barrierOf = (kind: keyof typeof BARRIER, stage: Reg<'u32'>) =>
    [b.add(barriers, b.as(b.shl(stage, 3), 'shared')), BARRIER[kind]] as const;

  b.section('barriers');
  const thread = b.special('%tid.x');
  const warpgroup = uniform(b, b.shr(thread, 7));
  b.if(b.setp('eq', thread, 0), () => {
    for (let stage = 0; stage < stages; stage++) {
      mbarrierInit(b, barriers, 1, BARRIER.keyFull + 8 * stage);
      mbarrierInit(b, barriers, 1, BARRIER.valueFull + 8 * stage);
      mbarrierInit(b, barriers, 4 * consumers, BARRIER.keyEmpty + 8 * stage);
      mbarrierInit(b, barriers, 4 * consumers, BARRIER.valueEmpty + 8 * stage);
    }
    mbarrierInit(b, barriers, 1, queryFull);
    mbarrierInit(b, barriers, 4 * consumers, queryEmpty);
    fenceMbarrierInit(b);
  });
  if (config.onesColumn) writeOnes();
  b.barSync();

  const R = 2; // rows of a thread
  const NT = HOPPER_BLOCK_K / 8;
  const cooked = config.softcap || (config.mask !== 'none' && config.mask !== 'boolean');

  b.if(b.setp('eq', warpgroup, 0), producer, consumer);
  return b.build();

  // ---- work

  /** Emits `body` in a loop over this CTA's items of work; items without rows are left out. */
  function eachWork(body: (work: Work) => void): void {
    const index = b.special('%ctaid.x');
    const total = b.loadParameter(integer.work);
    b.loop(
      () => b.setp('lt', index, total),
      () => {
        b.section('which work');
        const queryHeads = b.loadParameter(integer.queryHeads);
        const headUnits = packedHeads === 1 ? queryHeads : b.shr(queryHeads, Math.log2(packedHeads));
        let item = index;
        let split: Reg<'u32'> | undefined;
        if (config.split) [split, item] = divide(b, item, b.loadParameter(integer.splits));
        // Heads in groups that share the L2 cache; in a group all heads' longest tiles first.
        const queryTiles = b.loadParameter(integer.queryTiles);
        const headGroup = b.loadParameter(integer.headGroup);
        const [inGroup, group] = divide(b, item, b.mul(queryTiles, headGroup));
        const units = b.div(total, config.split ? b.mul(queryTiles, b.loadParameter(integer.splits)) : queryTiles);
        const firstUnit = b.mul(group, headGroup);
        const [unitRank, tileRank] = divide(b, inGroup, b.min(headGroup, b.sub(units, firstUnit)));
        const [unit, sequence] = divide(b, b.add(firstUnit, unitRank), headUnits);
        const tileIndex = config.banded ? b.sub(b.sub(queryTiles, 1), tileRank) : tileRank;
        const head = packedHeads === 1 ? unit : b.shl(unit, Math.log2(packedHeads));
        const keyHead = b.div(head, b.loadParameter(integer.headsPerKeyHead));
        const table = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
        const firstRow = b.mul(tileIndex, rows);
        const firstToken = tokenOf(firstRow);
        b.if(b.setp('lt', firstToken, table.queryLength), () => {
          const { queryLength, keyLength } = table;
          const low = b.as(firstToken, 's32');
          const high = b.min(b.add(low, Math.ceil(rows / packedHeads) - 1), b.sub(b.as(queryLength, 's32'), 1));
          const splits = () => b.loadParameter(integer.splits);
          const range = keyRange(
            b,
            config.banded ? band : undefined,
            { low, high, queryLength, keyLength },
            HOPPER_BLOCK_K,
            split === undefined ? undefined : { split, splits },
          );
          body({ split, sequence, head, keyHead, firstRow, ...table, ...range });
        });
        b.add(index, b.special('%nctaid.x'), index);
      },
    );
  }

  function tokenOf(row: Reg<'u32'>): Reg<'u32'> {
    return packedHeads === 1 ? row : b.shr(row, Math.log2(packedHeads));
  }

  // ---- the rings

  /** Places start at stage 0, and their barriers at the phase of parity 0. */
  function ringPlace(): RingPlace {
    return { stage: b.constant('u32', 0), parity: b.constant('u32', 0) };
  }

  function advance({ stage, parity }: RingPlace): void {
    b.add(stage, 1, stage);
    const wraps = b.setp('eq', stage, stages);
    b.when(wraps, () => {
      b.set(stage, 0);
      b.xor(parity, 1, parity);
    });
  }

  // ---- the producer

  function producer(): void {
    if (config.registers !== undefined) setMaxNReg(b, 'dec', config.registers.producer);
    b.if(b.setp('eq', thread, 0), () => {
      const [queryMap, keyMap, valueMap] = maps.map((map) => b.tensorMapAddress(map)) as [
        Reg<'global'>,
        Reg<'global'>,
        Reg<'global'>,
      ];
      for (const map of fused ? [keyMap, valueMap] : [queryMap, keyMap, valueMap]) prefetchTensorMap(b, map);
      const place = ringPlace();
      const queryParity = b.constant('u32', 1);
      eachWork((work) => {
        const { firstTile, lastTile, keyHead, paddedKeyStart } = work;
        if (!fused) {
          b.section('producer: Q');
          // Also for an item without tiles: consumers count on it.
          mbarrierWait(b, barriers, queryParity, queryEmpty);
          b.xor(queryParity, 1, queryParity);
          sendQuery(work, queryMap);
        }
        const paddedKeys = b.loadParameter(integer.paddedKeys);
        const keyRow = b.as(b.mad(keyHead, paddedKeys, paddedKeyStart), 's32');
        const token = b.as(paddedKeyStart, 's32');
        const valueRow = b.as(fp8 ? b.mul(keyHead, paddedValueDim) : b.as(keyRow, 'u32'), 's32');
        const tile = b.mov(firstTile);
        b.loop(
          () => b.setp('lt', tile, lastTile),
          () => {
            const emptyParity = b.xor(place.parity, 1);
            const firstKey = b.shl(tile, 7);
            b.section('producer: K');
            const [keyEmpty, keyEmptyOffset] = barrierOf('keyEmpty', place.stage);
            mbarrierWait(b, keyEmpty, emptyParity, keyEmptyOffset);
            mbarrierArriveExpectTx(b, keyEmpty, keyStageBytes, BARRIER.keyFull);
            const keyAt = b.add(shared, b.as(b.mad(place.stage, keyStageBytes, keyTile.base), 'shared'));
            for (let block = 0; block < rowBlocks; block++) {
              const column = b.constant('s32', block * rowLayout.rowBytes);
              tensorLoad(b, keyAt, keyMap, [column, b.add(keyRow, firstKey)], keyEmpty, {
                intoOffset: block * keyBlockBytes,
                barrierOffset: BARRIER.keyFull,
              });
            }
            b.section('producer: V');
            mbarrierWait(b, keyEmpty, emptyParity, BARRIER.valueEmpty);
            mbarrierArriveExpectTx(b, keyEmpty, plan.valueCopyBytes, BARRIER.valueFull);
            const valueAt = b.add(shared, b.as(b.mad(place.stage, valueStageBytes, valueTile.base), 'shared'));
            for (let block = 0; block < plan.valueBlocks; block++) {
              const coordinates = fp8
                ? [b.add(token, firstKey), valueRow]
                : [b.constant('s32', block * plan.valueBlockChannels), b.add(valueRow, firstKey)];
              tensorLoad(b, valueAt, valueMap, coordinates, keyEmpty, {
                intoOffset: block * plan.valueBlockBytes,
                barrierOffset: BARRIER.valueFull,
              });
            }
            advance(place);
            b.add(tile, 1, tile);
          },
        );
      });
    });
  }

  function sendQuery({ head, firstRow, paddedQueryStart }: Work, queryMap: Reg<'global'>): void {
    mbarrierArriveExpectTx(b, barriers, queryTile.bytes, queryFull);
    const into = b.add(shared, queryTile.base);
    const token = b.add(paddedQueryStart, tokenOf(firstRow));
    const coordinates =
      packedHeads === 1
        ? [b.as(b.mad(head, b.loadParameter(integer.paddedQueries), token), 's32')]
        : [b.as(head, 's32'), b.as(token, 's32')];
    for (let block = 0; block < rowBlocks; block++) {
      const column = b.constant('s32', block * rowLayout.rowBytes);
      tensorLoad(b, into, queryMap, [column, ...coordinates], barriers, {
        intoOffset: block * queryBlockBytes,
        barrierOffset: queryFull,
      });
    }
  }

  /** Behind the channels of V's tiles: one row of ones, whose product with P is the sum of P's rows, and seven of zeros. */
  function writeOnes(): void {
    b.section('ones behind V');
    b.if(b.setp('lt', thread, 64), () => {
      // 64 chunks of 16 bytes, the first row's eight full of 1.0 in E4M3.
      const first = b.setp('lt', thread, 8);
      const ones = b.selp<'b32'>(0x38383838, b.constant('b32', 0), first);
      const chunk = b.add(shared, b.as(b.shl(thread, 4), 'shared'));
      for (let stage = 0; stage < stages; stage++) {
        b.stVector([ones, ones, ones, ones], chunk, valueTile.base + stage * valueStageBytes + paddedValueDim * 128);
      }
      fenceProxyAsync(b);
    });
  }

  // ---- the consumers

  function consumer(): void {
    if (config.registers !== undefined) setMaxNReg(b, 'inc', config.registers.consumer);
    b.section('consumer');
    const lane = b.and(thread, 31);
    const leader = b.setp('eq', lane, 0);
    const [g, t] = [b.shr(lane, 2), b.and(lane, 3)];
    const t2 = b.shl(t, 1);
    const group = b.sub(warpgroup, 1);
    const warpRow = b.mad(group, CONSUMER_ROWS, b.shl(b.and(b.shr(thread, 5), 3), 4));
    const threadRow = b.add(warpRow, g);
    const groupQuery = b.add(
      b.add(shared, queryTile.base),
      b.as(b.mul(group, CONSUMER_ROWS * rowLayout.rowBytes), 'shared'),
    );
    const swizzle = rowLayout.rowBytes === 128 ? '128B' : '64B';
    const strideBytes = 8 * rowLayout.rowBytes;
    const queryDescriptor = matrixDescriptor(b, groupQuery, { strideBytes, swizzle });
    const keyDescriptor = matrixDescriptor(b, b.add(shared, keyTile.base), { strideBytes, swizzle });
    const valueDescriptor = matrixDescriptor(
      b,
      b.add(shared, valueTile.base),
      fp8
        ? { strideBytes: 1024, swizzle: '128B' }
        : {
            strideBytes: 8 * plan.valueLayout.rowBytes,
            leadingBytes: plan.valueBlockBytes,
            swizzle: plan.valueSwizzle,
          },
    );
    const staged = (descriptor: Reg<'u64'>, { stage }: RingPlace, bytes: number) =>
      b.add(descriptor, b.cvt('u64', b.mul(stage, bytes / 16)));
    const keyPlace = ringPlace();
    const valuePlace = ringPlace();
    const queryParity = b.constant('u32', 0);
    const release = (kind: 'keyEmpty' | 'valueEmpty', place: RingPlace) => {
      const [barrier, barrierOffset] = barrierOf(kind, place.stage);
      b.when(leader, () => mbarrierArrive(b, barrier, barrierOffset));
      advance(place);
    };
    const awaitStage = (kind: 'keyFull' | 'valueFull', place: RingPlace, known?: Reg<'pred'>) => {
      const [barrier, barrierOffset] = barrierOf(kind, place.stage);
      const wait = () => mbarrierWait(b, barrier, place.parity, barrierOffset);
      if (known === undefined) wait();
      else b.if(b.notPred(known), wait);
    };
    // To ask a barrier takes 40 clocks: those of the next products are asked long before.
    const keyKnown = b.reg('pred');
    const valueKnown = b.reg('pred');
    const askAhead = () => {
      for (const [kind, place, known] of [
        ['keyFull', keyPlace, keyKnown],
        ['valueFull', valuePlace, valueKnown],
      ] as const) {
        const [barrier, barrierOffset] = barrierOf(kind, place.stage);
        mbarrierTest(b, barrier, place.parity, barrierOffset, known);
      }
    };

    // Consumers take turns at issuing products: the one whose turn it is waits at its own barrier. The first needs none.
    const turn = b.add(group, 1);
    const nextTurn = b.selp(1, b.add(turn, 1), b.setp('eq', turn, consumers));
    if (config.pingPong) {
      b.if(b.setp('eq', turn, consumers), () => b.namedBarrier('bar.arrive', b.constant('u32', 1), 256));
    }

    const scoreRegisters = b.regs('s32', NT * 4);
    const scores = scoreRegisters.map((register) => b.as(register, 'f32'));
    const eachScore = (body: (score: Reg<'f32'>, row: number, column: number) => void) => {
      for (const [index, score] of scores.entries()) body(score, (index >> 1) & 1, 8 * (index >> 2) + (index & 1));
    };

    eachWork((work) => {
      const { firstTile, lastTile, keyHead, paddedKeyStart } = work;
      const rowOf = (r: number) => b.add(b.add(work.firstRow, threadRow), 8 * r);
      const headOf = (row: Reg<'u32'>) =>
        packedHeads === 1 ? work.head : b.add(work.head, b.and(row, packedHeads - 1));

      const queryScale = fused ? quantizeQuery() : loadQueryScales();

      b.section('sums and outputs');
      // Finite also before a row's first key, so that no difference is one of infinities.
      const rowMax = Array.from({ length: R }, () => b.constant('f32', LOWEST));
      const rowSum = Array.from({ length: R }, () => b.constant('f32', 0));
      /** What the output must be multiplied by before the tile at hand is added, and a column of row sums among it. */
      const factor = Array.from({ length: R }, () => b.constant('f32', 1));
      const sumFactor = config.onesColumn ? Array.from({ length: R }, () => b.constant('f32', 1)) : factor;
      /** Register i of the output, and of what the tensor cores sum for it, belongs to row (i >> 1) & 1. */
      const factorOf = (i: number) => at(i < paddedValueDim / 2 ? factor : sumFactor, (i >> 1) & 1);
      /** Scale of V's codes in the last tile taken; the output is in its units. */
      const tileScale = b.constant('f32', 1);
      const columns = paddedValueDim + (config.onesColumn ? 8 : 0);
      if (!config.promoted && (config.valueChunk < columns || config.onesColumn)) {
        throw new RangeError('sums of PV in chunks, and row sums among them, need promotion');
      }
      const output = Array.from({ length: columns / 2 }, () => b.constant('f32', 0));
      /** Sums of the tensor cores that are still to be added to the output. */
      const partial = !config.promoted ? output : config.valueChunk < columns ? [] : b.regs('f32', columns / 2);
      const fragments = Array.from({ length: fp8 ? 4 : 8 }, () => b.regs('b32', 4));

      const tile = b.mov(firstTile);
      const keyTileIndex = b.shr(b.mad(keyHead, b.loadParameter(integer.paddedKeys), paddedKeyStart), 6);
      const lastScaleTile = b.shr(b.sub(b.as(work.keyLength, 's32'), 1), 6);
      /** Of the next tile that the softmax takes, as is `tileScaleNext`. */
      const keyScale = [b.constant('f32', 0), b.constant('f32', 0)];
      const tileScaleNext = b.constant('f32', 1);
      const firstScale = b.add(keyTileIndex, b.as(b.shl(firstTile, 1), 'u32'));
      const keyScaleAt = offset(
        b,
        b.loadPointer(pointer.keyScale),
        config.keyScales === 4 ? b.mad(firstScale, 4, t) : firstScale,
        4,
      );
      const tileScaleAt = fp8 ? offset(b, b.loadPointer(pointer.valueTileScale), firstScale, 4) : undefined;
      /** Loads the scales of a tile; each tile's in its turn. */
      const fetchScales = (of: Reg<'s32'>) => {
        const load = (address: Reg<'global'>, into: Reg<'f32'>, at = 0) =>
          b.ld('f32', address, at, { readOnly: true, into });
        b.when(b.setp('lt', of, lastTile), () => {
          load(keyScaleAt, at(keyScale, 0));
          if (tileScaleAt !== undefined) load(tileScaleAt, tileScaleNext);
        });
        // The second half of the last tile may not exist.
        b.when(b.setp('lt', b.shl(of, 1), lastScaleTile), () =>
          load(keyScaleAt, at(keyScale, 1), 4 * config.keyScales),
        );
        b.add(keyScaleAt, 8 * config.keyScales, keyScaleAt);
        if (tileScaleAt !== undefined) b.add(tileScaleAt, 8, tileScaleAt);
      };

      if (!fused) {
        mbarrierWait(b, barriers, queryParity, queryFull);
        b.xor(queryParity, 1, queryParity);
      }
      b.if(b.setp('lt', tile, lastTile), () => {
        fetchScales(tile);
        if (schedule === 'ahead') {
          b.section('first S = Q K^T');
          seedScores();
          issueScores();
          wgmmaWaitGroup(b, 0);
          release('keyEmpty', keyPlace);
          softmax(askAhead);
          seedScores();
          rescale();
          b.add(tile, 1, tile);
          b.loop(
            () => b.setp('lt', tile, lastTile),
            () => {
              takeTurn();
              b.section('S = Q K^T of the next tile');
              issueScores(keyKnown);
              b.section('O += P V');
              issueValues(0, columns, partial, valueKnown);
              giveTurn();
              wgmmaWaitGroup(b, 1);
              release('keyEmpty', keyPlace);
              // Exponentials wait 8 clocks for each other: what else there is to do stands beside them, for ptxas to fill the gaps with.
              softmax(() => {
                wgmmaWaitGroup(b, 0);
                release('valueEmpty', valuePlace);
                askAhead();
                promote();
              });
              seedScores();
              rescale();
              b.add(tile, 1, tile);
            },
          );
          b.section('last O += P V');
          issueValues(0, columns, partial, valueKnown);
          wgmmaWaitGroup(b, 0);
          release('valueEmpty', valuePlace);
          promote();
        } else {
          b.loop(
            () => b.setp('lt', tile, lastTile),
            () => {
              takeTurn();
              b.section('S = Q K^T');
              seedScores();
              issueScores();
              wgmmaWaitGroup(b, 0);
              giveTurn();
              release('keyEmpty', keyPlace);
              softmax();
              rescale();
              b.section('O += P V');
              multiplyInChunks();
              release('valueEmpty', valuePlace);
              b.add(tile, 1, tile);
            },
          );
        }
      });
      if (!fused) b.when(leader, () => mbarrierArrive(b, barriers, queryEmpty));

      b.section('epilogue');
      writeResults();

      function takeTurn(): void {
        if (config.pingPong) b.namedBarrier('bar.sync', turn, 256);
      }

      function giveTurn(): void {
        if (config.pingPong) b.namedBarrier('bar.arrive', nextTurn, 256);
      }

      /** INT32 scores are summed on top of the bits of 1.5 * 2^23, so that read as floats they are 1.5 * 2^23 + q . k. */
      function seedScores(): void {
        for (const register of scoreRegisters) b.set(register, MAGIC_BITS);
      }

      /** Sends S = Q K^T of the stage at hand to the tensor cores. */
      function issueScores(known?: Reg<'pred'>): void {
        awaitStage('keyFull', keyPlace, known);
        const key = staged(keyDescriptor, keyPlace, keyStageBytes);
        wgmmaFence(b);
        for (let byte = 0; byte < qkRowBytes; byte += 32) {
          const [block, inBlock] = [Math.floor(byte / rowLayout.rowBytes), byte % rowLayout.rowBytes];
          const q = advanceDescriptor(b, queryDescriptor, block * queryBlockBytes + inBlock);
          const k = advanceDescriptor(b, key, block * keyBlockBytes + inBlock);
          wgmma(b, HOPPER_BLOCK_K, 'k32.s32.s8.s8', scoreRegisters, q, k, true);
        }
        wgmmaCommitGroup(b);
      }

      /** Sends columns `first`..`first + count` of P V of the stage at hand to the tensor cores. */
      function issueValues(
        first: number,
        count: number,
        into: readonly Reg<'f32'>[],
        known?: Reg<'pred'> | 'waited',
      ): void {
        if (known !== 'waited') awaitStage('valueFull', valuePlace, known);
        const value = staged(valueDescriptor, valuePlace, valueStageBytes);
        wgmmaFence(b);
        fragments.forEach((fragment, k) => {
          const accumulate = !config.promoted || k > 0;
          if (fp8) {
            const p = fragment.map((register) => b.as(register, 'e4m3x4'));
            const v = advanceDescriptor(b, value, first * 128 + k * 32);
            wgmma(b, count, 'k32.f32.e4m3.e4m3', into, p, v, accumulate);
          } else {
            const p = fragment.map((register) => b.as(register, 'f16x2'));
            const v = advanceDescriptor(b, value, k * 16 * plan.valueLayout.rowBytes);
            wgmma(b, count, 'k16.f32.f16.f16', into, p, v, accumulate, true);
          }
        });
        wgmmaCommitGroup(b);
      }

      /** PV to its end, as many columns at a time as there are registers for. */
      function multiplyInChunks(): void {
        if (config.valueChunk >= columns) {
          issueValues(0, columns, partial);
          wgmmaWaitGroup(b, 0);
          promote();
          return;
        }
        for (let first = 0; first < columns; first += config.valueChunk) {
          const count = Math.min(config.valueChunk, columns - first);
          const sums = b.regs('f32', count / 2);
          issueValues(first, count, sums, first === 0 ? undefined : 'waited');
          wgmmaWaitGroup(b, 0);
          for (const [i, sum] of sums.entries()) {
            const register = at(output, first / 2 + i);
            b.fma(register, factorOf(first / 2 + i), sum, register);
          }
        }
      }

      /** Adds what the tensor cores summed to the output, where they do not sum into the output itself. */
      function promote(): void {
        if (!config.promoted) return;
        b.section('promotion to float32');
        for (const [i, register] of output.entries()) b.fma(register, factorOf(i), at(partial, i), register);
      }

      /** Where the output is not multiplied with every promotion: multiplies it now, if the maximum of a row of this warp grew. */
      function rescale(): void {
        if (config.promoted) return;
        const grown = b.orPred(b.setp('ne', at(factor, 0), 1), b.setp('ne', at(factor, 1), 1));
        b.if(b.voteAny(grown), () => {
          b.section('rescale the output to the new maximum');
          for (const [i, register] of output.entries()) b.mul(register, factorOf(i), register);
        });
      }

      /**
       * From scores to P and the factors of the output. `finishValues` ends PV of the last tile, which reads P and sums to
       * what the factors are for.
       */
      function softmax(finishValues = (): void => {}): void {
        b.section('scale and maximum');
        // A group of zeros has scale 0; the smallest normal keeps -Infinity * scale from being NaN. With fewer bits, 1.5 * 2^23 times
        // the scale is exact.
        const scale = keyScale.map((key) => {
          const magnitude = b.abs(key);
          const make = (query: Reg<'f32'>) =>
            b.as(b.and(b.as(b.max(b.mul(query, magnitude), MIN_SCALE), 'b32'), SCALE_BITS), 'f32');
          const first = make(at(queryScale, 0));
          return [first, queryScale.length === 1 ? first : make(at(queryScale, 1))];
        });
        // A register for each row also where rows share a scale: for large scores the two part, unless they are scaled before.
        const zeroPoint = scale.map((ofRows) => {
          const first = b.mul(at(ofRows, 0), -MAGIC);
          if (ofRows[0] !== ofRows[1]) return [first, b.mul(at(ofRows, 1), -MAGIC)];
          return [first, cooked ? first : b.mov(first)];
        });
        const scaleOf = (r: number, column: number) => at(at(scale, column >> 6), r);
        const zeroOf = (r: number, column: number) => at(at(zeroPoint, column >> 6), r);

        if (cooked) cookScores(scaleOf, zeroOf);
        if (config.mask !== 'none') maskScores();
        treatRareTiles(scale, zeroPoint);
        // Scales of V's tiles are powers of two: the ratio of the last to this one is a difference of exponents.
        const exponentsApart = fp8 ? b.sub(b.as(tileScale, 's32'), b.as(tileScaleNext, 's32')) : undefined;
        if (fp8) b.mov(tileScaleNext, tileScale);
        fetchScales(b.add(tile, 1));

        // Positive floats, and -Infinity below them, order like the integers of their bits; three-input integer maxima exist. Chains of
        // maxima take turns, and so do the rows' shuffles: each waits for its last.
        const chains = [0, 1, 2, 3].map((chain) =>
          scoreRegisters.filter((_, i) => ((i >> 5) << 1) + ((i >> 1) & 1) === chain),
        );
        const raw = chains.map((chain) => at(chain, 0));
        for (let i = 1; i < at(chains, 0).length; i++) {
          chains.forEach((chain, c) => {
            const [so, next] = [at(raw, c), at(chain, i)];
            raw[c] = cooked ? b.as(b.max(b.as(so, 'f32'), b.as(next, 'f32')), 's32') : b.max(so, next);
          });
        }
        const newMax = Array.from({ length: R }, (_, r) => {
          const halves = [0, 1].map((half) => {
            const own = b.as(at(raw, 2 * half + r), 'f32');
            return cooked ? own : b.fma(own, scaleOf(r, 64 * half), zeroOf(r, 64 * half));
          });
          return b.max(at(halves, 0), at(halves, 1));
        });
        for (const lanes of [1, 2]) {
          const others = newMax.map((largest) => b.shflBfly(largest, lanes));
          for (const [r, other] of others.entries()) newMax[r] = b.max(at(newMax, r), other);
        }
        // The maxima of few tiles grow. The branch also keeps ptxas from waiting for PV before the maxima are found.
        const nextFactor = rowMax.map(() => b.constant('f32', 1));
        const grown = newMax.map((largest, r) => {
          const { rescaleThreshold } = config;
          const limit = rescaleThreshold > 0 ? b.add(at(rowMax, r), rescaleThreshold) : at(rowMax, r);
          return b.setp('gt', largest, limit);
        }) as [Reg<'pred'>, Reg<'pred'>];
        b.if(b.voteAny(b.orPred(...grown)), () => {
          for (const [r, largest] of newMax.entries()) {
            const change = b.ex2(b.sub(at(rowMax, r), largest));
            b.when(at(grown, r), () => {
              b.mov(change, at(nextFactor, r));
              b.mov(largest, at(rowMax, r));
            });
          }
        });

        finishValues();
        b.section('P = exp2(S - max)');
        const pOffset = config.exponentOffset;
        // The maximum first: where it is large, what is near it loses nothing.
        const folded = [0, 1].map((half) =>
          rowMax.map((max, r) => (cooked ? max : b.add(b.sub(zeroOf(r, 64 * half), max), pOffset))),
        );
        const exponentOf = (score: Reg<'f32'>, r: number, column: number) => {
          const constant = at(at(folded, column >> 6), r);
          return cooked ? b.add(b.sub(score, constant), pOffset) : b.fma(score, scaleOf(r, column), constant);
        };
        const tileSums = Array.from({ length: R }, () => [] as Reg<'f32'>[]);
        /** exp2 of two neighbours of a row, counted into its sum. */
        const exponentials = (n: number, r: number): [Reg<'f32'>, Reg<'f32'>] =>
          [0, 1].map((j) => {
            const value = b.ex2(exponentOf(at(scores, 4 * n + 2 * r + j), r, 8 * n));
            if (!config.onesColumn) {
              const sums = at(tileSums, r);
              const chain = sums[j];
              if (chain === undefined) sums[j] = value;
              else sums[j] = b.add(chain, value);
            }
            return value;
          }) as [Reg<'f32'>, Reg<'f32'>];
        let pairs = 0;
        const e4m3Pair = (n: number, r: number): Reg<'e4m3x2'> => {
          const period = config.polynomialShare === 0 ? 0 : 1 / config.polynomialShare;
          if (period > 0 && pairs++ % period === 0) {
            const [x, y] = [0, 1].map((j) => exponentOf(at(scores, 4 * n + 2 * r + j), r, 8 * n)) as [
              Reg<'f32'>,
              Reg<'f32'>,
            ];
            return exp2Halves(b, b.cvtPack('f16x2', x, y));
          }
          return b.cvtPack('e4m3x2', ...exponentials(n, r));
        };
        for (const [k, fragment] of fragments.entries()) {
          for (const [index, register] of fragment.entries()) {
            const [r, half] = [index & 1, index >> 1];
            if (fp8) {
              const n = 4 * k + 2 * half;
              const packed = b.pack('e4m3x4', e4m3Pair(n, r), e4m3Pair(n + 1, r));
              b.mov(b.as(packed, 'b32'), register);
            } else b.cvtPack('f16x2', ...exponentials(2 * k + half, r), b.as(register, 'f16x2'));
          }
        }
        if (!config.onesColumn) {
          for (const [r, chains] of tileSums.entries()) {
            const sum = at(rowSum, r);
            b.fma(sum, at(nextFactor, r), b.add(at(chains, 0), at(chains, 1)), sum);
          }
        }
        if (config.onesColumn) for (const [r, register] of sumFactor.entries()) b.mov(at(nextFactor, r), register);
        const ratio = exponentsApart === undefined ? undefined : b.as(b.add(exponentsApart, ONE_BITS), 'f32');
        for (const [r, register] of factor.entries()) {
          if (ratio === undefined) b.mov(at(nextFactor, r), register);
          else b.mul(at(nextFactor, r), ratio, register);
        }
      }

      /**
       * What few tiles need, behind one branch: keys outside the band or beyond the last, keys that are not finite, and scales so large
       * that 1.5 * 2^23 times the scale swallows differences between scores.
       */
      function treatRareTiles(
        scale: readonly (readonly Reg<'f32'>[])[],
        zeroPoint: readonly (readonly Reg<'f32'>[])[],
      ): void {
        b.section('keys out of reach or not finite, large scores');
        const tileStart = b.shl(tile, 7);
        let edge = b.setp('gt', b.add(tileStart, HOPPER_BLOCK_K), work.wholeUntil);
        if (work.wholeFrom !== undefined) edge = b.orPred(edge, b.setp('lt', tileStart, work.wholeFrom));
        const faulty = b.setp('lt', b.or(b.as(at(keyScale, 0), 's32'), b.as(at(keyScale, 1), 's32')), 0);
        const large = cooked
          ? undefined
          : b.setp(
              'gt',
              maxOf([...new Set(scale.flat())], (x, y) => b.max(x, y)),
              EXACT_SCALE,
            );
        const rare = b.orPred(edge, large === undefined ? faulty : b.orPred(faulty, large));
        b.if(b.voteAny(rare), () => {
          b.if(edge, () => excludeKeys(tileStart));
          if (large !== undefined) b.if(b.voteAny(large), () => subtractMaximum(scale, zeroPoint));
          spreadFaultsOfTile();
        });
      }

      /** Scores become floats of scale 1 above 128 less than the row's maximum; what lies lower counts nothing. */
      function subtractMaximum(
        scale: readonly (readonly Reg<'f32'>[])[],
        zeroPoint: readonly (readonly Reg<'f32'>[])[],
      ): void {
        b.section('large scores');
        const largest = Array.from({ length: R }, () => b.constant('f32', Number.NEGATIVE_INFINITY));
        eachScore((score, r, column) => {
          b.mul(b.sub(score, MAGIC), at(at(scale, column >> 6), r), score);
          b.max(at(largest, r), score, at(largest, r));
        });
        const zero = largest.map((own, r) => {
          return b.add(b.max(quadMax(b, own), at(rowMax, r)), -128);
        });
        eachScore((score, r) => {
          const excluded = b.setp('eq', score, Number.NEGATIVE_INFINITY);
          b.max(b.sub(score, at(zero, r)), 0, score);
          b.when(excluded, () => b.set(score, Number.NEGATIVE_INFINITY));
        });
        for (const registers of scale) for (const register of registers) b.set(register, 1);
        for (const registers of zeroPoint)
          for (const [r, register] of registers.entries()) b.mov(at(zero, r), register);
      }

      /** Scores in base 2, with softcap. */
      function cookScores(
        scaleOf: (r: number, column: number) => Reg<'f32'>,
        zeroOf: (r: number, column: number) => Reg<'f32'>,
      ): void {
        b.section('scores in base 2: scale, softcap');
        eachScore((score, r, column) => {
          b.fma(score, scaleOf(r, column), zeroOf(r, column), score);
        });
        if (!config.softcap) return;
        capScores(b, softcap, eachScore, () => Array.from({ length: R }, (_, r) => loadBias(r)));
      }

      /** Excludes (boolean) or adds (float) mask elements, read from the caller's tensor. */
      function maskScores(): void {
        b.section('mask');
        const kind = config.mask as Exclude<HopperConfig['mask'], 'none'>;
        const keyStride = b.loadParameter(strides.maskKey);
        const firstColumn = b.add(b.as(b.shl(tile, 7), 'u32'), t2);
        const batch = offset64(b, b.loadPointer(pointer.mask), work.sequence, b.loadParameter(strides.maskBatch));
        const columnsLeft = b.sub(b.as(work.keyLength, 's32'), b.as(firstColumn, 's32'));
        for (let r = 0; r < R; r++) {
          const row = rowOf(r);
          const token = tokenOf(row);
          const rowInside = b.setp('lt', token, work.queryLength);
          let address = offset64(b, batch, headOf(row), b.loadParameter(strides.maskHead));
          address = offset64(b, address, token, b.loadParameter(strides.maskQuery));
          address = offset64(b, address, firstColumn, keyStride);
          maskRow(b, kind, { address, keyStride, inside: rowInside, columnsLeft }, NT, (n, j) =>
            at(scores, 4 * n + 2 * r + j),
          );
        }
      }

      /** Keys outside the band or beyond the last. */
      function excludeKeys(tileStart: Reg<'s32'>): void {
        const { lower, upper } = work;
        const token = (r: number) => b.as(tokenOf(rowOf(r)), 's32');
        const origin = b.add(tileStart, b.as(t2, 's32'));
        const band = config.banded ? { lower, upper, token } : undefined;
        excludeBeyondBand(b, R, { origin, keyLength: b.as(work.keyLength, 's32'), band }, eachScore);
      }

      function spreadFaultsOfTile(): void {
        for (const [half, scale] of keyScale.entries()) {
          const place = () => {
            const index = b.min(b.add(b.shl(tile, 1), half), lastScaleTile);
            const inHead = b.loadPointer(pointer.keyFaults);
            return { faults: offset(b, inHead, b.add(keyTileIndex, b.as(index, 'u32')), 8), t2 };
          };
          spreadFaults(b, scale, place, (body) =>
            eachScore((score, row, column) => {
              if (column >> 6 === half) body(score, row, column);
            }),
          );
        }
      }

      /** smScale * log2(e) * q . mean(K) of a row, NaN for a row that is not finite. */
      function loadBias(r: number): Reg<'f32'> {
        if (fused) {
          const row = b.add(threadRow, 8 * r);
          return b.ld('f32', b.add(b.add(shared, biasTile.base), b.as(b.shl(row, 2), 'shared')));
        }
        return b.ld('f32', offset(b, b.loadPointer(pointer.rowBias), paddedRow(r), 4), 0, { readOnly: true });
      }

      /** A row's place in the padded, quantized Q; rows beyond the sequence stand in for its last. */
      function paddedRow(r: number): Reg<'u32'> {
        const row = rowOf(r);
        const token = b.min(tokenOf(row), b.sub(work.queryLength, 1));
        return b.add(b.mad(headOf(row), b.loadParameter(integer.paddedQueries), work.paddedQueryStart), token);
      }

      /** Scales of this thread's rows; one when they share it. */
      function loadQueryScales(): Reg<'f32'>[] {
        const [scaleRows, scaleCount] = config.queryScales;
        const toBase2 = b.mul(b.abs(b.loadParameter(smScale)), LOG2_E);
        // Rows g and g + 8 of a warp lie in one group of 16 or more tokens, unless rows are heads.
        return Array.from({ length: packedHeads === 1 ? 1 : R }, (_, r) => {
          const row = paddedRow(r);
          const set = b.shr(row, Math.log2(scaleRows));
          // Of the last token, which stands in for rows beyond the end, the group is its own too.
          const index = scaleCount === 8 ? b.add(b.shl(set, 3), b.and(row, 7)) : set;
          const scale = b.ld('f32', offset(b, b.loadPointer(pointer.queryScale), index, 4), 0, { readOnly: true });
          return b.mul(scale, toBase2);
        });
      }

      /** Quantizes this consumer's rows of the caller's Q into shared memory; rows g and g + 8 of a warp share a scale, or have one each. */
      function quantizeQuery(): Reg<'f32'>[] {
        b.section('quantize Q');
        const { dtype, headDim, keyMean } = config.fusedQuery as NonNullable<HopperConfig['fusedQuery']>;
        const bytes = BYTES[dtype];
        const signed = b.mul(b.loadParameter(smScale), LOG2_E);
        // Threads of the group may still read the last item's.
        b.namedBarrier('bar.sync', b.add(warpgroup, 8), 128);
        const chunks = qkRowBytes / 16;
        const channelTerm = b.shl(t, 2);
        const values = Array.from({ length: R }, (_, r) => {
          const row = rowOf(r);
          const token = tokenOf(row);
          const inside = b.setp('lt', token, work.queryLength);
          let source = offset64(b, b.loadPointer(pointer.query), work.sequence, b.loadParameter(strides.queryBatch));
          source = offset64(b, source, headOf(row), b.loadParameter(strides.queryHead));
          source = offset64(b, source, b.add(work.queryStart, token), b.loadParameter(strides.queryToken));
          source = offset(b, source, channelTerm, bytes);
          return Array.from({ length: chunks }, (__, c) => {
            const words = b.regs('b32', bytes);
            for (const word of words) b.set(word, 0);
            if (16 * c < headDim) {
              const left = headDim - 16 * c;
              const guard = left >= 16 ? inside : b.andPred(inside, b.setp('lt', channelTerm, left));
              b.when(guard, () =>
                b.ldVector('b32', bytes as 2 | 4, source, 16 * c * bytes, { readOnly: true, into: words }),
              );
            }
            return dtype === 'float32'
              ? words.map((word) => b.as(word, 'f32'))
              : words.flatMap((word) => unpackPair(b, dtype, word));
          });
        });
        const faulty: Reg<'pred'>[] = [];
        const rowMaxima = values.map((row) => {
          let own = b.constant('u32', 0);
          for (const value of row.flat()) own = b.max(own, b.and(b.as(value, 'u32'), 0x7fffffff));
          own = quadMax(b, own);
          const fault = b.setp('ge', own, 0x7f800000);
          b.when(fault, () => b.set(own, 0));
          faulty.push(fault);
          return own;
        });
        const groups = config.queryScalePerRow ? rowMaxima : [maxOf(rowMaxima, (x, y) => b.max(x, y))];
        const maxima = groups.map((largest) => {
          const maximum = b.as(largest, 'f32');
          b.when(b.setp('lt', maximum, 1e-36), () => b.set(maximum, 0));
          return maximum;
        });
        const reciprocals = maxima.map((maximum) => {
          const signedLargest = b.selp(-127, b.constant('f32', 127), b.setp('lt', signed, 0));
          const reciprocal = b.divF32(signedLargest, maximum);
          b.when(b.setp('eq', maximum, 0), () => b.set(reciprocal, 0));
          return reciprocal;
        });
        const magic = b.constant('f32', MAGIC);
        values.forEach((row, r) => {
          const inGroup = b.sub(b.add(threadRow, 8 * r), b.mul(group, CONSUMER_ROWS));
          const permutation = b.shl(b.and(b.shr(inGroup, rowLayout.rowShift), rowLayout.rowMask), 4);
          const rowAt = b.add(b.mul(inGroup, rowLayout.rowBytes), channelTerm);
          row.forEach((four, c) => {
            const words = four.map((value) =>
              b.as(b.fma(value, at(reciprocals, config.queryScalePerRow ? r : 0), magic), 'b32'),
            ) as [Reg<'b32'>, Reg<'b32'>, Reg<'b32'>, Reg<'b32'>];
            const packed = b.prmt(b.prmt(words[0], words[1], 0x0040), b.prmt(words[2], words[3], 0x0040), 0x5410);
            const [block, chunk] = [Math.floor((16 * c) / rowLayout.rowBytes), (16 * c) % rowLayout.rowBytes];
            // The chunk's bits are zero in the row's address, so that adding and XORing them is the same.
            const place = b.add(groupQuery, b.as(b.xor(b.add(rowAt, chunk), permutation), 'shared'));
            b.st(packed, place, block * queryBlockBytes);
          });
          let bias = b.constant('f32', 0);
          if (keyMean && (config.lse || config.split || config.softcap)) bias = meanScore(row, headDim, signed);
          b.when(at(faulty, r), () => b.set(bias, Number.NaN));
          const biasAt = b.add(b.add(shared, biasTile.base), b.as(b.shl(b.add(threadRow, 8 * r), 2), 'shared'));
          b.when(b.setp('eq', t, 0), () => b.st(bias, biasAt));
        });
        fenceProxyAsync(b);
        b.namedBarrier('bar.sync', b.add(warpgroup, 8), 128);
        return maxima.map((maximum) => b.mul(b.mul(maximum, 1 / 127), b.abs(signed)));
      }

      /** smScale * log2(e) * q . mean(K), over the four lanes that hold a row. */
      function meanScore(row: readonly Reg<'f32'>[][], headDim: number, signed: Reg<'f32'>): Reg<'f32'> {
        const keyHeads = b.div(b.loadParameter(integer.queryHeads), b.loadParameter(integer.headsPerKeyHead));
        const mean = offset(
          b,
          b.loadPointer(pointer.keyMean),
          b.mad(b.mad(work.sequence, keyHeads, keyHead), qkRowBytes, b.shl(t, 2)),
          4,
        );
        let dot = b.constant('f32', 0);
        row.forEach((four, c) => {
          if (16 * c >= headDim) return;
          const means = b.ldVector('f32', 4, mean, 64 * c, { readOnly: true });
          for (const [i, value] of four.entries()) dot = b.fma(value, at(means, i), dot);
        });
        return b.mul(quadSum(b, dot), signed);
      }

      /** Normalizes and stores this thread's rows. */
      function writeResults(): void {
        const queryHeads = b.loadParameter(integer.queryHeads);
        const keyHeads = b.div(queryHeads, b.loadParameter(integer.headsPerKeyHead));
        const channelBase = b.mad(b.mad(work.sequence, keyHeads, keyHead), paddedValueDim, t2);
        const VT = paddedValueDim / 8;
        const channelTerms = (name: 'valueScale' | 'valueMean') => {
          const base = offset(b, b.loadPointer(pointer[name]), channelBase, 4);
          return (n: number) => b.ldVector('f32', 2, base, n * 32, { readOnly: true });
        };
        const scaleAt = fp8 ? channelTerms('valueScale') : undefined;
        const meanAt = config.smoothV ? channelTerms('valueMean') : undefined;
        const tokenStride = b.loadParameter(strides.outputToken);
        const type = config.split ? 'float32' : config.outputType;
        const width = config.split ? paddedValueDim : valueDim;
        const finished = Array.from({ length: R }, (_, r) => {
          const sum = quadSum(b, config.onesColumn ? at(output, paddedValueDim / 2 + 2 * r) : at(rowSum, r));
          const bias = loadBias(r);
          const { empty, factor: inverse } = rowFactor(b, sum, bias, fp8 ? tileScale : undefined);
          const row = rowOf(r);
          const token = tokenOf(row);
          const head = headOf(row);
          const inside = b.setp('lt', token, work.queryLength);
          const partialRow =
            work.split === undefined
              ? undefined
              : b.mad(
                  work.split,
                  b.mul(b.loadParameter(integer.paddedQueries), queryHeads),
                  b.add(b.mad(head, b.loadParameter(integer.paddedQueries), work.paddedQueryStart), token),
                );
          if (config.lse || config.split) {
            const { exponentOffset } = config;
            const lse = logSumExp(
              b,
              { sum, max: at(rowMax, r), empty, bias },
              { exponentOffset, biased: config.softcap, natural: !config.split },
            );
            const base = b.loadPointer(pointer.lse);
            let address: Reg<'global'>;
            if (partialRow === undefined) {
              const { sequence } = work;
              address = headAddress(b, base, { sequence, head }, { batch: strides.lseBatch, head: strides.lseHead });
              address = offset(b, address, b.add(work.queryStart, token), 4);
            } else address = offset(b, base, partialRow, 4);
            b.when(b.andPred(inside, b.setp('eq', t, 0)), () => b.st(lse, address));
          }
          let address = b.loadPointer(pointer.output);
          if (partialRow === undefined) {
            const { sequence } = work;
            const outputStrides = { batch: strides.outputBatch, head: strides.outputHead };
            address = headAddress(b, address, { sequence, head }, outputStrides);
            address = offset64(b, address, b.add(work.queryStart, token), tokenStride);
          } else address = offset(b, address, partialRow, paddedValueDim * 4);
          return { inverse, empty, inside, address: offset(b, address, t2, BYTES[type]) };
        });
        for (let n = 0; n < VT && n * 8 < width; n++) {
          const scales = scaleAt?.(n);
          const means = meanAt?.(n);
          for (const [r, { inverse, empty, inside, address }] of finished.entries()) {
            const pair = [0, 1].map((j) => {
              // A channel's scale may be so small or large that only the result itself can bear it.
              const result = b.mul(at(output, 4 * n + 2 * r + j), inverse);
              if (scales !== undefined) {
                b.mul(result, at(scales, j), result);
                // A sequence without keys has no scales of V either.
                b.when(empty, () => b.set(result, 0));
              }
              if (means === undefined) return result;
              const smoothed = b.add(result, at(means, j));
              b.when(empty, () => b.set(smoothed, 0));
              return smoothed;
            }) as [Reg<'f32'>, Reg<'f32'>];
            storePair(b, pair, address, { type, first: n * 8, width, t2, inside });
          }
        }
      }
    });
  }
}
