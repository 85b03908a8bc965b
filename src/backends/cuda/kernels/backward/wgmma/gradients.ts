/**
 * The backward pass on `wgmma`, for sm_90a: the two kernels of `../gradients.ts`, each CTA with one producer warpgroup and two or three consumers
 * that own 64 tokens each. One thread of the producer sends what passes by through a ring of stages (TMA).
 *
 * P and dS are A operands from registers; dO, Q and K are read as they lie, through transposing descriptors. With schedule `ahead` a consumer
 * sends S and dP of the next tile to the tensor cores before the gradients' products of this one, and takes exponentials while those run; with
 * `scores-ahead`, which takes fewer registers, it sends S of the next tile with the last product of this one. All products of an iteration are
 * waited for in it: ptxas serializes those that are under way where a loop closes.
 *
 * Names: g = lane / 4 and t = lane % 4. Register 4n + i of a product holds row g + 8 * (i >> 1) of the warp's 16 own tokens, column
 * 8n + 2t + (i & 1) of what passes by.
 */

import type { KernelBuilder } from '../../../ptx/builder.ts';
import type { SharedTile } from '../../../ptx/layouts.ts';
import { mbarrierArrive, mbarrierWait } from '../../../ptx/mbarrier.ts';
import type { Kernel, Reg } from '../../../ptx/types.ts';
import {
  advanceDescriptor,
  matrixDescriptor,
  setMaxNReg,
  wgmma,
  wgmmaCommitGroup,
  wgmmaFence,
  wgmmaWaitGroup,
} from '../../../ptx/wgmma.ts';
import { offset } from '../../parts/addresses.ts';
import { COARSE_SCALE, MAGIC, MAGIC_BITS } from '../../parts/constants.ts';
import { chunkAddresses, laneOffset } from '../../parts/copies.ts';
import { at } from '../../parts/lists.ts';
import type { RingPlace } from '../../parts/ring.ts';
import { Turns } from '../../parts/turns.ts';
import { uniform } from '../../wgmma/instructions.ts';
import { storeGradients } from '../epilogue.ts';
import { advance, placeOf, type Sums, type ThreadPlace, type Work, workOf } from '../frame.ts';
import { coarseScore, excludePairs, forwardScale, hasExponents, keyFactorsOf } from '../weigh.ts';
import { GROUP_TOKENS, type WgmmaGradientConfig } from './config.ts';
import { eachTile, initBarriers, makeWgmmaFrames, ownToken, REGISTERS, type WgmmaFrame } from './frame.ts';
import { producer } from './producer.ts';

/**
 * One kernel for both parts of the backward pass, so that the second fills the multiprocessors that the first leaves idle at its end; or for one.
 * CTAs that stay do their share of the first, then of the second.
 */
export interface WgmmaGradientsConfig {
  readonly parts: readonly WgmmaGradientConfig[];
}

/** The kernel of one configuration. */
export function wgmmaGradients({ parts }: WgmmaGradientsConfig): Kernel {
  const { b, frames } = makeWgmmaFrames(parts);
  const [first, second] = frames as readonly [WgmmaFrame, WgmmaFrame | undefined];
  if (second === undefined) computePart(first);
  else if (first.stays) {
    computePart(first);
    // The second part's barriers lie elsewhere, where the first one's tokens may be.
    b.barSync();
    computePart(second);
  } else {
    const isFirst = b.setp('lt', b.special('%ctaid.x'), b.loadParameter(second.firstBlock));
    b.if(
      isFirst,
      () => computePart(first),
      () => computePart(second),
    );
  }
  return b.build();
}

function computePart(frame: WgmmaFrame): void {
  const { b, warpgroup } = frame;
  initBarriers(frame);
  b.if(
    b.setp('eq', warpgroup, 0),
    () => producer(frame),
    () => consumer(frame),
  );
}

/** Registers of a product of own tokens and those that pass by, in fragments of an 8-token tile. */
interface Scores {
  readonly integers: readonly Reg<'s32'>[];
  /** The same registers: first 1.5 * 2^23 + the codes' product, then P. */
  readonly weights: readonly Reg<'f32'>[];
  /** dP - D, then dS. */
  readonly gradients: readonly Reg<'f32'>[];
}

interface Consumer {
  readonly frame: WgmmaFrame;
  readonly place: ThreadPlace;
  readonly work: Work;
  readonly group: Reg<'u32'>;
  readonly leader: Reg<'pred'>;
  readonly scores: Scores;
  /** dV, and dK or dQ. */
  readonly values: readonly Reg<'f32'>[];
  readonly channels: readonly Reg<'f32'>[];
  /** The tile whose scores are computed, and its stage. */
  readonly next: { readonly head: Reg<'u32'>; readonly tile: Reg<'s32'> };
  readonly ringPlace: RingPlace;
  /** The stage of the tile before, where its products are still to be made. */
  readonly stage: Reg<'u32'>;
  /** Scale of the thread's own keys, or of its columns of the tile. */
  readonly keyScale: Reg<'f32'>;
  /** Own queries: scale, shift and -D of the thread's two rows. */
  readonly rows: readonly (readonly Reg<'f32'>[])[];
  readonly held: Held;
  readonly turns: Turns;
}

/** Own operands that are not read from shared memory, in steps of 32 bytes. */
interface Held {
  readonly codes: readonly (readonly Reg<'s8x4'>[])[] | undefined;
  readonly values: readonly (readonly Reg<'bf16x2'>[])[] | undefined;
}

function consumer(frame: WgmmaFrame): void {
  const { b, config, ring, warpgroup } = frame;
  setMaxNReg(b, 'inc', REGISTERS[config.consumers].consumer);
  b.section('consumer');
  const group = uniform(b, b.sub(warpgroup, 1));
  const turns = new Turns(b, group, config.turns === 'none' ? undefined : config.consumers);
  const state: State = { group, turns, ringPlace: ring.place(), ownParity: b.constant('u32', 0) };
  eachTile(frame, (tile, work) => consumeTile(tile, work, state));
  if (frame.stays) turns.end();
}

/** What a consumer keeps from one tile of own tokens to the next. */
interface State extends Pick<Consumer, 'group' | 'turns' | 'ringPlace'> {
  readonly ownParity: Reg<'u32'>;
}

function consumeTile(frame: WgmmaFrame, work: Work, { ownParity, ...state }: State): void {
  const { b, config, barriers, ownFull, ownEmpty, ownsQueries } = frame;
  const { group } = state;
  b.section('own tile');
  const zeros = (count: number) => Array.from({ length: count }, () => b.constant('f32', 0));
  const values = zeros(config.gradients.includes('value') ? config.valueDim / 2 : 0);
  const channels = zeros(config.headDim / 2);
  b.if(b.setp('lt', work.firstTile, work.lastTile), () => {
    const place = placeOf(b, 128);
    const integers = b.regs('s32', config.streamTokens / 2);
    const scores = {
      integers,
      weights: integers.map((register) => b.as(register, 'f32')),
      gradients: b.regs('f32', config.streamTokens / 2),
    };
    const next = { head: b.mov(work.head), tile: b.mov(work.firstTile) };
    const leader = b.setp('eq', place.lane, 0);
    mbarrierWait(b, barriers, ownParity, ownFull);
    const held = holdOwn(frame, place);
    const release = () => {
      b.when(leader, () => mbarrierArrive(b, barriers, ownEmpty));
      b.xor(ownParity, 1, ownParity);
    };
    if (frame.stays && config.held === 'both') release();
    const self: Consumer = {
      ...{ frame, place, work, scores, values, channels, next, held, leader },
      ...state,
      stage: b.constant('u32', 0),
      keyScale: b.constant('f32', 0),
      rows: ownsQueries ? ownRows(frame, place, work, group) : [],
    };
    if (!ownsQueries) b.mov(loadKeyScale(self, ownToken(frame, work, group), b.shr(place.g, 1)), self.keyScale);
    const pass = { ahead: passAhead, 'scores-ahead': passScoresAhead };
    pass[config.schedule](self);
    if (frame.stays && config.held !== 'both') release();
  });
  const fragments = (registers: readonly Reg<'f32'>[]) =>
    Array.from({ length: registers.length / 4 }, (_, n) => registers.slice(4 * n, 4 * n + 4));
  const sums: Sums = { values: fragments(values), channels: fragments(channels) };
  // Found out anew: what only the epilogue needs would take registers from the loop.
  storeGradients(frame, placeOf(b, 128), workOf(frame), sums);
}

/** Hands the stage of the tile before back. */
function releaseStage({ frame: { b, barriers, ring }, leader, stage }: Consumer): void {
  const barrier = b.add(barriers, b.as(b.shl(stage, 3), 'shared'));
  b.when(leader, () => mbarrierArrive(b, barrier, ring.empty));
}

/** S of the next tile is issued with the last product of this one, whose scores have left their registers by then. */
function passScoresAhead(self: Consumer): void {
  const { frame, work, scores, values, next, ringPlace, stage, turns } = self;
  const { b, config, ring } = frame;
  const tile = b.mov(next.tile);
  const step = () => {
    b.section('next tile');
    b.mov(ringPlace.stage, stage);
    b.mov(next.tile, tile);
    ring.advance(ringPlace);
    advance(b, work, next);
  };
  const issueCodes = () => {
    awaitCodes(self);
    multiplyCodes(self);
  };
  const body = (isLast: boolean) => {
    seedValues(self, stage);
    multiplyValues(self, stage);
    exponentials(self, tile, stage);
    turns.take();
    if (values.length > 0) multiplyStage(self, 'values', pack(self, scores.weights), stage);
    wgmmaWaitGroup(b, values.length > 0 ? 1 : 0);
    multiplyWeights(self, tile);
    multiplyStage(self, 'channels', pack(self, scores.gradients), stage);
    if (!isLast) issueCodes();
    if (config.turns === 'ended') wgmmaWaitGroup(b, 1);
    turns.give();
    wgmmaWaitGroup(b, 0);
    releaseStage(self);
    if (!isLast) step();
  };
  issueCodes();
  wgmmaWaitGroup(b, 0);
  step();
  b.loop(
    () => b.setp('lt', next.head, work.headEnd),
    () => body(false),
  );
  body(true);
}

/** S and dP of the next tile are issued before the gradients' products of this one. */
function passAhead(self: Consumer): void {
  const { frame, work, scores, values, next, ringPlace, stage, turns } = self;
  const { b, config, ring } = frame;
  const registers = () => Array.from({ length: scores.weights.length / 8 }, () => b.regs('bf16x2', 4));
  const [weights, gradients] = [values.length > 0 ? registers() : [], registers()];
  const packAll = () => {
    if (values.length > 0) pack(self, scores.weights, weights);
    pack(self, scores.gradients, gradients);
  };
  const multiply = () => {
    if (values.length > 0) multiplyStage(self, 'values', weights, stage, false);
    multiplyStage(self, 'channels', gradients, stage);
  };
  const step = () => {
    b.section('next tile');
    b.mov(ringPlace.stage, stage);
    ring.advance(ringPlace);
    advance(b, work, next);
  };
  issueScores(self);
  wgmmaWaitGroup(b, 0);
  exponentials(self);
  multiplyWeights(self);
  packAll();
  step();
  b.loop(
    () => b.setp('lt', next.head, work.headEnd),
    () => {
      turns.take();
      issueScores(self);
      multiply();
      if (config.turns === 'issued') turns.give();
      wgmmaWaitGroup(b, 2);
      exponentials(self);
      wgmmaWaitGroup(b, 1);
      if (config.turns === 'ended') turns.give();
      multiplyWeights(self);
      wgmmaWaitGroup(b, 0);
      releaseStage(self);
      packAll();
      step();
    },
  );
  multiply();
  wgmmaWaitGroup(b, 0);
  if (frame.stays) releaseStage(self);
}

/** Scale, shift and -D of the thread's rows g and g + 8. */
function ownRows(frame: WgmmaFrame, { warpRow, g }: ThreadPlace, work: Work, group: Reg<'u32'>) {
  const { b, integer, pointer } = frame;
  const head = b.mad(work.head, b.loadParameter(integer.paddedQueries), work.paddedQueryStart);
  const row = b.add(b.add(head, ownToken(frame, work, group)), b.add(b.and(warpRow, GROUP_TOKENS - 1), g));
  return (['rowScale', 'rowShift', 'rowDelta'] as const).map((name) => {
    const base = offset(b, b.loadPointer(pointer[name]), row, 4);
    return [0, 8].map((r) => b.ld('f32', base, r * 4, { readOnly: true }));
  });
}

/** The scale of this thread's keys, its sign that of exponents, among the 64 that `token` belongs to. */
function loadKeyScale({ frame, work }: Consumer, token: Reg<'u32'>, group: Reg<'u32'>): Reg<'f32'> {
  const { b, config, integer, pointer } = frame;
  const start = b.mad(work.keyHead, b.loadParameter(integer.paddedKeys), work.paddedKeyStart);
  const tile = b.shr(b.add(start, token), 6);
  const index = config.keyScales === 4 ? b.add(b.shl(tile, 2), group) : tile;
  return b.ld('f32', offset(b, b.loadPointer(pointer.keyScale), index, 4), 0, { readOnly: true });
}

/** Sends S and dP of the tile at `next` to the tensor cores, each a group. */
function issueScores(self: Consumer): void {
  const { stage } = self.ringPlace;
  awaitCodes(self);
  // Before S: between two products ptxas waits for the first.
  seedValues(self, stage);
  multiplyCodes(self);
  multiplyValues(self, stage);
}

/** Waits for the tile at `next`, and has the registers of S ready. */
function awaitCodes(self: Consumer): void {
  const { frame, place, scores, next, ringPlace, keyScale } = self;
  const { b, config, ring, ownsQueries } = frame;
  b.section('the next tile has landed');
  if (ownsQueries) {
    const token = b.as(b.shl(next.tile, Math.log2(config.streamTokens)), 'u32');
    b.mov(loadKeyScale(self, token, b.shr(place.t2, 1)), keyScale);
  }
  ring.awaitFull(ringPlace);
  for (const register of scores.integers) b.set(register, MAGIC_BITS);
}

/** Sends S of the tile at `next` to the tensor cores. */
function multiplyCodes({ frame, group, scores, ringPlace, held }: Consumer): void {
  const { b, config, plan, tiles, shared } = frame;
  const { streamTokens, codeBytes } = config;
  b.section('S of the next tile');
  const stride = { strideBytes: 8 * codeBytes, swizzle: plan.codesSwizzle };
  const own = held.codes ?? ownDescriptor(b, shared, tiles.ownCodes, group, GROUP_TOKENS * codeBytes, stride);
  const codes = matrixDescriptor(b, stageAddress(frame, 'codes', plan.codesBytes, ringPlace.stage), stride);
  wgmmaFence(b);
  for (let k = 0; k < codeBytes / 32; k++) {
    const x = 'kind' in own ? advanceDescriptor(b, own, k * 32) : at(own, k);
    const y = advanceDescriptor(b, codes, k * 32);
    wgmma(b, streamTokens, 'k32.s32.s8.s8', scores.integers, x, y, true);
  }
  wgmmaCommitGroup(b);
}

/** The sums of dP start from -D. */
function seedValues(self: Consumer, stage: Reg<'u32'>): void {
  const { frame, scores, rows } = self;
  const { b, config, ownsQueries } = frame;
  b.section('-D');
  if (ownsQueries) {
    const minusDelta = at(rows, 2);
    for (const [i, register] of scores.gradients.entries()) b.mov(at(minusDelta, (i >> 1) & 1), register);
    return;
  }
  const deltas = rowsAt(self, stage, 2);
  for (let n = 0; n < config.streamTokens / 8; n++) {
    const fragment = scores.gradients.slice(4 * n, 4 * n + 4);
    b.ldVector('f32', 2, deltas, n * 32, { into: fragment.slice(0, 2) });
    b.mov(at(fragment, 0), at(fragment, 2));
    b.mov(at(fragment, 1), at(fragment, 3));
  }
}

/** Sends dP - D of a stage to the tensor cores. */
function multiplyValues({ frame, group, scores, held }: Consumer, stage: Reg<'u32'>): void {
  const { b, config, plan, tiles, shared } = frame;
  const { streamTokens, valueDim } = config;
  b.section('dP');
  const blocks = { strideBytes: 1024, swizzle: '128B' } as const;
  const own = held.values ?? ownDescriptor(b, shared, tiles.ownValues, group, GROUP_TOKENS * 128, blocks);
  const values = matrixDescriptor(b, stageAddress(frame, 'values', plan.valuesBytes, stage), blocks);
  wgmmaFence(b);
  for (let k = 0; k < valueDim / 16; k++) {
    const [block, byte] = [k >> 2, (k & 3) * 32];
    const x = 'kind' in own ? advanceDescriptor(b, own, block * frame.ownTokens * 128 + byte) : at(own, k);
    const y = advanceDescriptor(b, values, block * streamTokens * 128 + byte);
    wgmma(b, streamTokens, 'k16.f32.bf16.bf16', scores.gradients, x, y, true);
  }
  wgmmaCommitGroup(b);
}

/** Descriptor of a consumer's part of own tokens. */
function ownDescriptor(
  b: KernelBuilder,
  shared: Reg<'shared'>,
  tile: SharedTile,
  group: Reg<'u32'>,
  groupBytes: number,
  options: Parameters<typeof matrixDescriptor>[2],
): Reg<'u64'> {
  return matrixDescriptor(b, b.add(shared, b.as(b.mad(group, groupBytes, tile.base), 'shared')), options);
}

/** Own operands as A fragments, for the whole kernel: read from shared memory with each tile, they take half of its bandwidth. */
function holdOwn({ b, config, tiles, shared, ownTokens }: WgmmaFrame, { lane, warpRow }: ThreadPlace): Held {
  b.section('own operands');
  const { held } = config;
  const laneAt = ({ base, layout }: SharedTile) => {
    const offset = laneOffset(b, layout, b.add(warpRow, b.and(lane, 15)), b.shr(lane, 4));
    return chunkAddresses(b, layout, b.add(b.add(shared, base), offset));
  };
  const fragments = <K extends 's8x4' | 'bf16x2'>(kind: K, tile: SharedTile, count: number, blockBytes: number) => {
    const chunkAt = laneAt(tile);
    return Array.from({ length: count }, (_, k) => {
      // A block has 128 bytes of each token, four steps of a product.
      const [address, bytes] = chunkAt(2 * (k & 3));
      return b.ldmatrix(kind, 4, address, bytes + (k >> 2) * blockBytes);
    });
  };
  return {
    codes: held === 'none' ? undefined : fragments('s8x4', tiles.ownCodes, config.codeBytes / 32, 0),
    values: held === 'both' ? fragments('bf16x2', tiles.ownValues, config.valueDim / 16, ownTokens * 128) : undefined,
  };
}

const stageAddress = (
  { b, tiles, shared }: WgmmaFrame,
  name: 'codes' | 'values' | 'channels' | 'rows',
  bytes: number,
  stage: Reg<'u32'>,
): Reg<'shared'> => b.add(shared, b.as(b.mad(stage, bytes, tiles[name].base), 'shared'));

/** One of the three numbers of the queries that pass by, from this thread's first column on. */
function rowsAt({ frame, place }: Consumer, stage: Reg<'u32'>, which: number): Reg<'shared'> {
  const { b, plan, config } = frame;
  const at = b.add(stageAddress(frame, 'rows', plan.rowsBytes, stage), b.as(b.shl(place.t2, 2), 'shared'));
  return which === 0 ? at : b.add(at, which * config.streamTokens * 4);
}

/** dP - D to dS. */
function multiplyWeights(self: Consumer, tile = self.next.tile): void {
  const { b } = self.frame;
  const { weights, gradients } = self.scores;
  b.section('dS = P (dP - D)');
  for (const [i, gradient] of gradients.entries()) b.mul(gradient, at(weights, i), gradient);
  // Where D is not a number.
  excludeFrom(self, gradients, tile);
}

/** P or dS as A fragments of BF16. */
function pack(
  { frame: { b, config } }: Consumer,
  weights: readonly Reg<'f32'>[],
  into?: readonly (readonly Reg<'bf16x2'>[])[],
): Reg<'bf16x2'>[][] {
  return Array.from({ length: config.streamTokens / 16 }, (_, k) =>
    [0, 2, 4, 6].map((i) => {
      const register = into === undefined ? b.reg('bf16x2') : at(at(into, k), i / 2);
      return b.cvtPack('bf16x2', at(weights, 8 * k + i), at(weights, 8 * k + i + 1), register);
    }),
  );
}

/** dV += P^T dO, or dK += dS^T Q, or dQ += dS K, with the tokens of a stage. */
function multiplyStage(
  { frame, values, channels }: Consumer,
  name: 'values' | 'channels',
  fragments: readonly (readonly Reg<'bf16x2'>[])[],
  stage: Reg<'u32'>,
  commit = true,
): void {
  const { b, config, plan } = frame;
  const { streamTokens } = config;
  b.section(name === 'values' ? 'dV += P^T dO' : frame.ownsQueries ? 'dQ += dS K' : 'dK += dS^T Q');
  const [sums, bytes] = name === 'values' ? [values, plan.valuesBytes] : [channels, plan.channelsBytes];
  const options = { strideBytes: 1024, leadingBytes: streamTokens * 128, swizzle: '128B' } as const;
  const tokens = matrixDescriptor(b, stageAddress(frame, name, bytes, stage), options);
  wgmmaFence(b);
  for (const [k, a] of fragments.entries()) {
    wgmma(b, sums.length * 2, 'k16.f32.bf16.bf16', sums, a, advanceDescriptor(b, tokens, k * 16 * 128), true, true);
  }
  if (commit) wgmmaCommitGroup(b);
}

/** From 1.5 * 2^23 + codes to P. */
function exponentials(self: Consumer, tile = self.next.tile, stage = self.ringPlace.stage): void {
  const { frame, place, work, group, scores, keyScale } = self;
  const { b, config, ownsQueries } = frame;
  const { weights } = scores;
  b.section('P = exp2(S - LSE)');
  const scales = scalesOf(self, stage);
  const scaleAt = (i: number) => at(scales, ownsQueries ? (i >> 1) & 1 : 2 * (i >> 4) + (i & 1));
  const largest = scales.reduce((most, scale) => b.max(most, scale));
  const rare = b.orPred(hasExponents(b, keyScale), b.setp('gt', largest, COARSE_SCALE));
  b.if(rare, () => {
    b.if(
      hasExponents(b, keyScale),
      () => {
        const warpRow = b.and(place.warpRow, GROUP_TOKENS - 1);
        const firstOwn = b.add(ownToken(frame, work, group), warpRow);
        const firstPassing = b.as(b.shl(tile, Math.log2(config.streamTokens)), 'u32');
        const factorOf = keyFactorsOf(frame, place, work, { firstOwn, firstPassing });
        for (const [i, register] of weights.entries()) {
          const codes = b.mul(b.sub(register, MAGIC), factorOf((i >> 1) & 1, 8 * (i >> 2) + (i & 1)));
          b.mul(codes, scaleAt(i), register);
        }
      },
      () => {
        for (const [i, register] of weights.entries()) coarseScore(b, b.sub(register, MAGIC), scaleAt(i), register);
      },
    );
    for (const scale of scales) b.set(scale, 1);
  });
  // What registers have more than the products of codes. Times a scale it is exact, as that has two bits less.
  const excess = b.selp(0, b.constant('f32', -MAGIC), rare);
  const exponential = (i: number, shift: Reg<'f32'>) => {
    const register = at(weights, i);
    b.ex2(b.fma(register, scaleAt(i), shift), register);
  };
  if (ownsQueries) {
    const shift = at(self.rows, 1).map((own, r) => b.fma(at(scales, r), excess, own));
    for (let i = 0; i < weights.length; i++) exponential(i, at(shift, (i >> 1) & 1));
  } else {
    const shifts = rowsAt(self, stage, 1);
    for (let n = 0; n < config.streamTokens / 8; n++) {
      const shift = b.ldVector('f32', 2, shifts, n * 32).map((own, j) => b.fma(scaleAt(4 * n + j), excess, own));
      for (let i = 0; i < 4; i++) exponential(4 * n + i, at(shift, i & 1));
    }
  }
  excludeFrom(self, weights, tile);
}

/** Scales of the thread's two rows, or of its two columns of each 32: rows of Q that lie 8 apart share one, among 32 or more. */
function scalesOf(self: Consumer, stage: Reg<'u32'>): Reg<'f32'>[] {
  const { frame, rows, keyScale } = self;
  const { b, config, ownsQueries } = frame;
  const scale = (own: Reg<'f32'>) => forwardScale(b, own, keyScale);
  if (ownsQueries) return at(rows, 0).map(scale);
  const from = rowsAt(self, stage, 0);
  return Array.from({ length: config.streamTokens / 32 }, (_, i) =>
    b.ldVector('f32', 2, from, i * 128).map(scale),
  ).flat();
}

/** 0 for pairs of the tile that do not see each other. */
function excludeFrom({ frame, place, work }: Consumer, weights: readonly Reg<'f32'>[], tile: Reg<'s32'>): void {
  // Rows beyond the last have weights of 0.
  if (!frame.config.banded && !frame.ownsQueries) return;
  const fragments = Array.from({ length: weights.length / 4 }, (_, n) => weights.slice(4 * n, 4 * n + 4));
  excludePairs({ frame, place, work, now: { tile } }, fragments);
}
