/**
 * The `mma.sync` attention kernel: INT8, INT4 or FP4 QK^T, FP16, FP8 or FP4 PV, for sm_80 and later.
 *
 * One CTA computes `rowsPerWarp * warps` rows of Q of one head against the keys of its band, 64 at a time, with the
 * online softmax of FlashAttention in base 2. Quantized operands are padded (rows to whole tiles with zeros, channels
 * to whole tensor-core steps), so only scores are masked, never loads. K is fetched a tile ahead with cp.async.
 *
 * Names: g = lane / 4 and t = lane % 4 locate a thread in the fragments of mma.m16n8: it owns rows g and g + 8 and
 * columns 2t and 2t + 1 of every 16x8 tile of scores. With per-thread scales all its scores of a tile share one scale.
 */
import type { Kernel, Reg } from '../../ptx/types.ts';
import { offset } from '../parts/addresses.ts';
import { laneOffset } from '../parts/copies.ts';
import type { AttentionConfig } from './config.ts';
import { staged, TileCopies } from './copies.ts';
import { joinSplits, joinWarps, writeResults } from './epilogue.ts';
import { Fp4Products } from './fp4-products.ts';
import { type Frame, makeFrame, placeAndWork, type ThreadPlace } from './frame.ts';
import { copyGivenQuery } from './given.ts';
import { inspectValues } from './inspect-values.ts';
import { Parked } from './parked.ts';
import { multiplyKeys, multiplyValues } from './products.ts';
import { quantizedScale, quantizeQuery } from './quantize-query.ts';
import { softmax } from './softmax.ts';
import { makeScores, makeState, type Output, type Scores, type Seeds, type SoftmaxState } from './state.ts';
import { Walk } from './walk.ts';

/** The kernel of one configuration. */
export function attention(config: AttentionConfig): Kernel {
  const frame = makeFrame(config);
  const { b } = frame;
  const { place, work } = placeAndWork(frame);
  const walk = new Walk(frame, work);

  b.section('addresses');
  const shared = frame.own();
  const paddedQueries = b.loadParameter(frame.integer.paddedQueries);
  const paddedKeys = b.loadParameter(frame.integer.paddedKeys);
  const queryRow = b.add(b.mad(work.head, paddedQueries, work.paddedQueryStart), work.firstRow);
  const keyRow = b.mad(work.keyHead, paddedKeys, work.paddedKeyStart);
  const copies = new TileCopies(frame);

  b.section('prologue: Q, first K and V on their way');
  const warpRow = b.mul(place.warp, config.rowsPerWarp);
  if (config.keyWarps > 1 && frame.fused === undefined) {
    // One Q for all warps, each of which may have no keys.
    copies.copyQuery(queryRow, b.sharedAddress());
    b.cpAsyncCommitGroup();
  }
  b.if(b.setp('lt', walk.position, work.lastTile), () => {
    const { sequence, keyHead, paddedKeyStart, keyStart, keyLength } = work;
    const { place: at, position } = walk.first(work);
    if (frame.given !== undefined) copyGivenQuery(frame, work);
    else if (config.keyWarps === 1) copies.copyQuery(queryRow, shared);
    const start = frame.given === undefined ? paddedKeyStart : keyStart;
    const place = { sequence, length: b.as(keyLength, 's32'), firstKeyTile: b.shr(keyRow, 6) };
    const keys = { keyHead, paddedKeyStart: start, ...place };
    copies.copyKey(keys, at, position, staged(frame, b.add(shared, copies.key.destination), frame.tiles.key, position));
    if (config.valueStages === 2) {
      const destination = b.add(shared, copies.value.destination);
      copies.copyValue(keys, at, position, staged(frame, destination, frame.tiles.value, position));
    }
    if (config.keyWarps === 1) b.cpAsyncCommitGroup();
  });
  if (config.keyWarps > 1) {
    b.cpAsyncCommitGroup();
    if (frame.fused === undefined) b.cpAsyncWaitGroup(1);
    else quantizeQuery(frame, work);
    b.barSync();
  }
  const queryScale = queryScaleOf(frame, place, b.add(queryRow, warpRow));
  const state = makeState(frame);
  const lanes = laneAddresses(frame, place, warpRow);
  const parked = new Parked(frame, place, work, queryRow, copies, queryScale);
  frame.sync();
  const scores = makeScores(frame);
  // With P in FP8 a register is free to hold this address across QK^T, but where FP4 is unpacked beside the sums of wide V.
  const isFree = config.pvFormat === 'e4m3' && !(frame.fp4Keys && config.paddedValueDim > 128);
  const valueLane = isFree ? valueLaneAddress(frame, place.thread) : undefined;

  const loop: Loop = { frame, copies, parked, walk, scores, ...state, lanes: { ...lanes, value: valueLane } };
  b.loop(
    () => b.setp('lt', walk.position, parked.lastTile()),
    () => attendTile(loop),
  );

  b.section('epilogue');
  writeResults(frame, parked, work.share, state.softmax, state.output);
  joinWarps(frame, parked, work.share);
  joinSplits(frame, parked, work.item, work.share);
  return b.build();
}

/** The scale of the thread's rows of Q times the scale of all scores. */
function queryScaleOf(frame: Frame, place: ThreadPlace, row: Reg<'u32'>): Reg<'f32'> {
  if (frame.given !== undefined) return frame.b.loadParameter(frame.scoreScale);
  return frame.fused === undefined ? loadQueryScale(frame, place, row) : quantizedScale(frame, place);
}

function loadQueryScale({ b, config, pointer, scoreScale }: Frame, { g }: ThreadPlace, row: Reg<'u32'>): Reg<'f32'> {
  const [scaleRows, scaleCount] = config.queryScales;
  const group = b.shr(row, Math.log2(scaleRows));
  const scales = b.loadPointer(pointer.queryScale);
  const own = offset(b, scales, scaleCount === 8 ? b.add(b.shl(group, 3), g) : group, 4);
  return b.mul(b.ld('f32', own, 0, { readOnly: true }), b.loadParameter(scoreScale));
}

/** Places of this lane in the matrices that ldmatrix reads of Q and K. */
function laneAddresses({ b, config, tiles, own }: Frame, { lane }: ThreadPlace, warpRow: Reg<'u32'>) {
  const [low16, high16] = [b.and(lane, 15), b.shr(lane, 4)];
  const [low8, octet] = [b.and(lane, 7), b.shr(lane, 3)];
  const query = b.add(
    b.sharedAddress(tiles.query.base),
    laneOffset(b, tiles.query.layout, b.add(warpRow, low16), high16),
  );
  const keyBase = own(tiles.key.base);
  // One ldmatrix brings 16 keys of 32 bytes, or 32 keys of 16 bytes.
  const place =
    config.qkFormat === 'e2m1-as-f16'
      ? laneOffset(b, tiles.key.layout, lane, b.constant('u32', 0))
      : laneOffset(b, tiles.key.layout, b.add(b.shl(high16, 3), low8), b.and(octet, 1));
  return { query, key: b.add(keyBase, place) };
}

/** The place of this lane in the matrices that ldmatrix reads of V. */
function valueLaneAddress({ b, config, tiles, own }: Frame, thread: Reg<'u32'>): Reg<'shared'> {
  const { layout, base } = tiles.value;
  const lane = b.and(thread, 31);
  const [low16, high16, low8, octet] = [b.and(lane, 15), b.shr(lane, 4), b.and(lane, 7), b.shr(lane, 3)];
  const place = {
    f16: () => laneOffset(b, layout, low16, high16),
    bf16: () => laneOffset(b, layout, low16, high16),
    e4m3: () => laneOffset(b, layout, low8, octet),
    'e4m3-as-f16': () => laneOffset(b, layout, lane, b.constant('u32', 0)),
    e2m1: () => laneOffset(b, layout, b.add(b.shl(high16, 3), low8), b.and(octet, 1)),
    'e2m1-as-f16': () => laneOffset(b, layout, lane, b.constant('u32', 0)),
  };
  return b.add(own(base), place[config.pvFormat]());
}

/** What the loop over the tiles of keys works with. */
interface Loop {
  readonly frame: Frame;
  readonly copies: TileCopies;
  readonly parked: Parked;
  readonly walk: Walk;
  readonly scores: Scores;
  readonly softmax: SoftmaxState;
  readonly output: Output;
  readonly seeds: Seeds;
  /** The addresses that this lane gives to ldmatrix; the one of V is undefined where it is computed anew. */
  readonly lanes: {
    readonly query: Reg<'shared'>;
    readonly key: Reg<'shared'>;
    readonly value: Reg<'shared'> | undefined;
  };
}

/** One tile of keys. */
function attendTile(loop: Loop): void {
  const { frame, parked, walk, scores, output, seeds, lanes } = loop;
  const { b, config, tiles, fp4Keys, fp4Values } = frame;
  b.section('K (and V) of this tile have landed; fetch the next');
  b.cpAsyncWaitGroup(0);
  frame.sync();
  const { tile, position, place } = walk.now();
  // Loaded here because its latency is about as long as QK^T.
  const keyScale = frame.given === undefined ? loadKeyScale(loop, place) : b.constant('f32', 1);
  const unit = fp4Values ? loadValueUnit(loop, place) : undefined;
  fetchTiles(loop, place);
  const fp4 = fp4Keys || fp4Values ? new Fp4Products(frame, parked, position) : undefined;

  b.section('S = Q K^T');
  const keys = staged(frame, lanes.key, tiles.key, position);
  if (fp4Keys) fp4?.multiplyKeys(scores, seeds, lanes.query, keys);
  else multiplyKeys(frame, scores, seeds, lanes.query, keys);
  if (config.keyStages === 1) {
    frame.sync();
    fetchKeys(loop);
  }
  const awaitValues = () => {
    if (config.valueStages === 2) return;
    b.section('V of this tile has landed');
    b.cpAsyncWaitGroup(1);
    frame.sync();
  };
  if (frame.given !== undefined) {
    // The softmax must know which values are not finite.
    awaitValues();
    inspectValues(frame, parked, tile, staged(frame, frame.own(tiles.value.base), tiles.value, position));
  }
  softmax({ frame, parked, tile, place, cut: walk.isCut(), scores, state: loop.softmax, output, keyScale });

  if (frame.given === undefined) awaitValues();
  b.section('O += P V');
  const lane = lanes.value ?? valueLaneAddress(frame, parked.threadNow());
  const base = config.valueStages === 1 ? lane : staged(frame, lane, tiles.value, position);
  if (unit !== undefined) fp4?.multiplyValues(scores, output, loop.softmax, unit, base);
  else multiplyValues(frame, scores, output, seeds, base, channelScalesAt(loop, position));

  b.section('next tile');
  walk.advance(parked);
}

function loadKeyScale({ frame, parked }: Loop, place: Reg<'s32'>): Reg<'f32'> {
  const { b, config, pointer } = frame;
  const tileIndex = b.add(parked.reload().firstKeyTile, b.as(place, 'u32'));
  const index = config.keyScales === 4 ? b.add(b.shl(tileIndex, 2), b.and(parked.threadNow(), 3)) : tileIndex;
  return b.ld('f32', offset(b, b.loadPointer(pointer.keyScale), index, 4), 0, { readOnly: true });
}

/** What this tile of V was divided by. */
function loadValueUnit({ frame, parked }: Loop, place: Reg<'s32'>): Reg<'f32'> {
  const { b, fp4 } = frame;
  if (fp4 === undefined) throw new Error('V is not NVFP4');
  const index = b.add(parked.reload().firstKeyTile, b.as(place, 'u32'));
  return b.ld('f32', offset(b, b.loadPointer(fp4.valueTileScale), index, 4), 0, { readOnly: true });
}

/** Where this lane's two channels of the first eight have their scales of this tile; undefined where V has none by tile. */
function channelScalesAt({ frame, parked }: Loop, position: Reg<'s32'>): Reg<'shared'> | undefined {
  const { b, config, tiles } = frame;
  if (tiles.valueScales === undefined) return undefined;
  const lane = b.as(b.shl(b.and(parked.threadNow(), 3), 3), 'shared');
  const own = b.add(frame.own(tiles.valueScales.base), lane);
  return config.valueStages === 1 ? own : staged(frame, own, tiles.valueScales, position);
}

/** Sends for the next tile of K and V, or for this one's V where it has one buffer. */
function fetchTiles({ frame, copies, parked, walk }: Loop, place: Reg<'s32'>): void {
  const { b, config } = frame;
  if (config.valueStages === 1) {
    copies.copyValue(parked.reload(), place, walk.position, parked.valueDestination());
    b.cpAsyncCommitGroup();
  }
  if (config.keyStages === 2) fetchKeys({ frame, copies, parked, walk });
}

/** Sends for the next tile of K, and of V where it has two buffers. */
function fetchKeys({ frame, copies, parked, walk }: Pick<Loop, 'frame' | 'copies' | 'parked' | 'walk'>): void {
  const { b, config, tiles } = frame;
  b.if(b.setp('lt', b.add(walk.position, 1), parked.lastTile()), () => {
    const { place: next, position } = walk.next(parked);
    copies.copyKey(parked.reload(), next, position, staged(frame, parked.keyDestination(), tiles.key, position));
    if (config.valueStages === 2) {
      const place = parked.reload();
      copies.copyValue(place, next, position, staged(frame, parked.valueDestination(), tiles.value, position));
    }
  });
  b.cpAsyncCommitGroup();
}
