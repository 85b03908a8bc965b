/**
 * The backward pass on `mma.sync`, for sm_80 and later: FlashAttention-2's, split in two so that no sum needs an atomic. A CTA owns
 * 64 keys and the queries of all heads over them pass by (dK, dV), or it owns 64 queries and the keys pass by (dQ). Sums stay in
 * registers and have one order: the same inputs give the same bits.
 *
 * With `int8` and `fp8` the products over tokens (dV, dK, dQ) are of codes: P and dS get theirs in registers (`codes.ts`), what passes by
 * had its own before (`transpose.ts`). dP stays in BF16: the paper's ablation has the cosine of dQ at 97.5% in INT8, 99.8% in 16 bits.
 *
 * For a tile of what passes by: S from the codes of the forward pass (INT8), P = 2^(S - LSE), dP = dO V^T, dS = P (dP - D), then
 * dV += P^T dO and dK += dS^T Q, or dQ += dS K. Scores are computed with own tokens as rows, so that P and dS are, packed, the A
 * fragments of those products: nothing goes through shared memory.
 *
 * Names as in the forward kernel: g = lane / 4 and t = lane % 4; a thread owns rows g and g + 8 of its warp's 16 own tokens, and
 * columns 2t and 2t + 1 of every eight tokens that pass by. SageAttention3, arXiv 2505.11594, section 4; FlashAttention-2, arXiv
 * 2307.08691, algorithm 2.
 */
import type { SharedTile } from '../../ptx/layouts.ts';
import type { Kernel, Reg } from '../../ptx/types.ts';
import { laneOffset } from '../parts/copies.ts';
import type { GradientConfig } from './config.ts';
import { StreamCopies } from './copies.ts';
import { storeGradients } from './epilogue.ts';
import {
  advance,
  type Frame,
  makeFrame,
  type Passing,
  placeOf,
  type Sums,
  type ThreadPlace,
  type Work,
  workOf,
} from './frame.ts';
import { multiplyCodes, multiplyTokenCodes, multiplyTokens, multiplyValues } from './products.ts';
import { ownConstants, transposedScaleOf, type WeighedTile, weigh, weighGradients } from './weigh.ts';

/** The kernel of one configuration. */
export function gradients(config: GradientConfig): Kernel {
  const frame = makeFrame(config);
  const { b } = frame;
  const [place, work] = [placeOf(b), workOf(frame)];
  const sums = makeSums(frame);
  const copies = new StreamCopies(frame, place, work);

  b.if(b.setp('lt', work.firstTile, work.lastTile), () => {
    b.section('prologue: own tokens and the first that pass by are on their way');
    copies.copyOwn();
    const now = { head: b.mov(work.head), tile: b.mov(work.firstTile), stage: b.constant('u32', 0) };
    copies.copyStream(now);
    b.cpAsyncCommitGroup();
    const constants = ownConstants(frame, place, work);
    const loop: Loop = { frame, place, work, copies, sums, constants, now };
    b.loop(
      () => b.setp('lt', now.head, work.headEnd),
      () => passTile(loop),
    );
  });

  // Found out anew: what only the epilogue needs would take registers from the loop.
  storeGradients(frame, placeOf(b), workOf(frame), sums);
  return b.build();
}

function makeSums({ b, config, scoreGradients }: Frame): Sums {
  const zeros = (tiles: number) => Array.from({ length: tiles }, () => [0, 0, 0, 0].map(() => b.constant('f32', 0)));
  return {
    values: zeros(config.gradients.includes('value') ? config.paddedValueDim / 8 : 0),
    channels: zeros(scoreGradients ? config.paddedDim / 8 : 0),
  };
}

interface Loop {
  readonly frame: Frame;
  readonly place: ThreadPlace;
  readonly work: Work;
  readonly copies: StreamCopies;
  readonly sums: Sums;
  readonly constants: ReturnType<typeof ownConstants>;
  readonly now: Passing;
}

/** Places of this lane in what ldmatrix reads, in the first stage. Computed anew for each tile: held, they would cost registers. */
export function laneAddresses({ b, config, own, stream }: Frame) {
  const inCodes = config.precision !== 'fp16';
  const [thread, shared] = [b.special('%tid.x'), b.sharedAddress()];
  const lane = b.and(thread, 31);
  const warpRow = b.shl(b.shr(thread, 5), 4);
  const [low16, high16] = [b.and(lane, 15), b.shr(lane, 4)];
  const [low8, octet] = [b.and(lane, 7), b.and(b.shr(lane, 3), 1)];
  const rowOf = (tile: typeof own.codes) =>
    b.add(b.add(shared, tile.base), laneOffset(b, tile.layout, b.add(warpRow, low16), high16));
  const columnOf = (tile: typeof own.codes) =>
    b.add(b.add(shared, tile.base), laneOffset(b, tile.layout, b.add(b.shl(high16, 3), low8), octet));
  const tokenOf = (tile: typeof own.codes) =>
    b.add(b.add(shared, tile.base), laneOffset(b, tile.layout, low16, high16));
  // Transposed, channels are the columns.
  const tokensOf = (codes: SharedTile | undefined, tokens: SharedTile | undefined) => {
    if (codes !== undefined) return columnOf(codes);
    return tokens === undefined ? undefined : tokenOf(tokens);
  };
  return {
    ownCodes: rowOf(own.codes),
    ownValues: own.values === undefined ? undefined : rowOf(own.values),
    codes: columnOf(stream.codes),
    /** V or dO with tokens as columns, and with tokens as the dimension that is summed over; likewise K or Q. */
    valueColumns: own.values === undefined ? undefined : columnOf(stream.values as SharedTile),
    valueTokens: tokensOf(stream.valueCodes, stream.values),
    channelTokens: inCodes ? tokensOf(stream.channels, undefined) : tokensOf(undefined, stream.channels),
  };
}

/** One tile of what passes by. */
function passTile({ frame, place, work, copies, sums, constants, now }: Loop): void {
  const { b, config, stageBytes, columnTiles, scoreGradients, ownsQueries } = frame;
  const isThere = ({ head }: Passing) => b.setp('lt', head, work.headEnd);
  const next = { head: b.mov(now.head), tile: b.mov(now.tile), stage: b.mov(now.stage) };
  advance(b, work, next);
  if (config.stages === 2) b.xor(next.stage, 1, next.stage);
  b.section('the tile has landed; fetch the next');
  b.cpAsyncWaitGroup(0);
  b.barSync();
  if (config.stages === 2) {
    b.if(isThere(next), () => copies.copyStream(next));
    b.cpAsyncCommitGroup();
  }
  const staged = (address: Reg<'shared'>) =>
    config.stages === 1 ? address : b.as(b.mad(now.stage, stageBytes, b.as(address, 'u32')), 'shared');

  b.section('S');
  const lanes = laneAddresses(frame);
  const codes = Array.from({ length: columnTiles }, () => b.regs('s32', 4));
  multiplyCodes(frame, codes, lanes.ownCodes, staged(lanes.codes));
  const rows = ownsQueries ? undefined : staged(b.add(frame.shared, (frame.stream.rows as SharedTile).base));
  const gradientsOfP = Array.from({ length: scoreGradients ? columnTiles : 0 }, () => b.regs('f32', 4));
  const tile = { frame, place, work, now, constants, rows, codes, gradientsOfP };
  const makeGradientsOfP = () => {
    if (!scoreGradients) return;
    b.section('dP - D');
    const [ownValues, columns] = [lanes.ownValues, lanes.valueColumns] as [Reg<'shared'>, Reg<'shared'>];
    multiplyValues(frame, gradientsOfP, ownValues, staged(columns), constants.minusDelta(rows));
  };
  const weights = codes.map((fragment) => fragment.map((register) => b.as(register, 'f32')));
  const add = (sums: Fragments, rounded: Fragments, operand: PassingOperand | undefined) => {
    if (operand !== undefined) addProduct(tile, staged, sums, rounded, operand);
  };
  const { values, channels } = passingOperands(frame, lanes);
  if (config.precision === 'fp16') {
    makeGradientsOfP();
    const slopes = weigh(tile);
    if (scoreGradients) weighGradients(tile, slopes);
    add(sums.values, weights, values);
  } else {
    // P in codes before there is dP: rounding wants all of a tile in registers at once.
    const slopes = weigh(tile);
    add(sums.values, weights, values);
    makeGradientsOfP();
    if (scoreGradients) weighGradients(tile, slopes);
  }
  add(sums.channels, gradientsOfP, channels);

  b.section('next tile');
  if (config.stages === 1) {
    b.barSync();
    b.if(isThere(next), () => copies.copyStream(next));
    b.cpAsyncCommitGroup();
  }
  for (const name of ['head', 'tile', 'stage'] as const) b.mov(next[name] as Reg<'u32'>, now[name] as Reg<'u32'>);
}

type Fragments = readonly (readonly Reg<'f32'>[])[];

/** What passes by of a product over tokens. */
interface PassingOperand {
  readonly name: string;
  readonly tile: SharedTile;
  readonly lane: Reg<'shared'>;
  /** Of its codes. */
  readonly scale: Parameters<typeof transposedScaleOf>[3];
}

/** dO for dV; Q for dK, or K for dQ. Undefined where the kernel has no such product. */
function passingOperands({ config, stream, ownsQueries }: Frame, lanes: ReturnType<typeof laneAddresses>) {
  const operandOf = (
    name: string,
    tile: SharedTile | undefined,
    lane: Reg<'shared'> | undefined,
    scale: PassingOperand['scale'],
  ): PassingOperand | undefined => (tile === undefined || lane === undefined ? undefined : { name, tile, lane, scale });
  const values = config.gradients.includes('value') ? (stream.valueCodes ?? stream.values) : undefined;
  return {
    values: operandOf('dV += P^T dO', values, lanes.valueTokens, 'outputGradientTransposedScale'),
    channels: ownsQueries
      ? operandOf('dQ += dS K', stream.channels, lanes.channelTokens, 'keyTransposedScale')
      : operandOf('dK += dS^T Q', stream.channels, lanes.channelTokens, 'queryTransposedScale'),
  };
}

/** sums += P or dS times an operand that passes by. */
function addProduct(
  { frame, work, now }: Pick<WeighedTile, 'frame' | 'work' | 'now'>,
  staged: (address: Reg<'shared'>) => Reg<'shared'>,
  sums: Fragments,
  weights: Fragments,
  { name, tile, lane, scale }: PassingOperand,
): void {
  frame.b.section(name);
  if (frame.config.precision === 'fp16') multiplyTokens(frame, sums, weights, tile, staged(lane));
  else multiplyTokenCodes(frame, sums, weights, tile, staged(lane), transposedScaleOf(frame, work, now, scale));
}
