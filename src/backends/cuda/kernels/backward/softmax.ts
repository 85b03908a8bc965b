/**
 * Softmax of rows whose logsumexp does not give their weights (`prepare.ts` marks them): it is NaN, or too far from 0 to be accurate. They
 * are few: a CTA whose 64 rows have none of them ends at once.
 *
 * Scores are those that the gradient kernels compute: to the bit on `mma.sync`, on `wgmma` but for what their exponents round (`COARSE_SCALE`).
 * A row's largest becomes its shift, and the reciprocal of its sum goes to the BF16 row of dO and to D, of which all three gradients are
 * linear functions: `dV = P'^T (w dO)`, `dS = P' (w dP - w D)`; or, with codes, to `rowWeight`, which P is multiplied by. What made a row NaN
 * is found on the way: a value leaves the row's weights as they are, a key or the mask does not.
 */
import type { Kernel, Parameter, Reg } from '../../ptx/types.ts';
import { offset } from '../parts/addresses.ts';
import { INFINITY_BITS } from '../parts/constants.ts';
import { unpackEight } from '../parts/elements.ts';
import { at } from '../parts/lists.ts';
import { quadMax, quadSum } from '../parts/quad.ts';
import { spreadFaults } from '../parts/scores.ts';
import { type GradientConfig, OPERAND_BYTES } from './config.ts';
import { StreamCopies } from './copies.ts';
import { type Frame, makeFrame, type Passing, placeOf, type ThreadPlace, type Work, workOf } from './frame.ts';
import { laneAddresses } from './gradients.ts';
import { multiplyCodes } from './products.ts';
import {
  firstOwnRow,
  hasExponents,
  keyRowOf,
  type OwnRowNumbers,
  ownConstants,
  ownRowNumbers,
  weigh,
} from './weigh.ts';

export interface SoftmaxAgainConfig extends Omit<GradientConfig, 'gradients' | 'precision'> {
  /** The logsumexp is also of keys that are not here. */
  readonly partOfKeys: boolean;
}

/** The kernel of one configuration. Its parameters are those of every gradient kernel, and the faults of keys. */
export function softmaxAgain(config: SoftmaxAgainConfig): Kernel {
  const frame = makeFrame({ ...config, gradients: [], precision: 'fp16', rowWeights: false }, 'softmaxAgain');
  const { b, pointer } = frame;
  const faults = b.parameter('keyFaults', 'u64');
  const [place, work] = [placeOf(b), workOf(frame)];
  b.section('rows that are marked');
  const firstScale = offset(b, b.loadPointer(pointer.rowScale), b.add(firstOwnRow(frame, work), place.lane), 4);
  const isMarked = (scale: Reg<'f32'>) => b.setp('lt', b.as(scale, 's32'), 0);
  const [low, high] = [0, 32].map((row) => isMarked(b.ld('f32', firstScale, row * 4))) as [Reg<'pred'>, Reg<'pred'>];
  b.when(b.notPred(b.voteAny(b.orPred(low, high))), () => b.exit());

  const before = ownRowNumbers(frame, place, work);
  const own = { ...before, scale: before.scale.map((scale) => b.abs(scale)), shift: twice(() => b.constant('f32', 0)) };
  const copies = new StreamCopies(frame, place, work);
  copies.copyOwn();
  const self: Again = { frame, place, work, copies, constants: ownConstants(frame, place, work, own) };
  const maxima = twice(() => b.constant('f32', Number.NEGATIVE_INFINITY));
  // Not a number where a row sees a key that is none.
  const poison = twice(() => b.constant('f32', 0));
  eachTile(self, 'scores', (scores, now) => {
    for (const fragment of scores) {
      for (const [i, score] of fragment.entries()) b.max(at(maxima, i >> 1), score, at(maxima, i >> 1));
    }
    spreadKeyFaults(self, now, faults, scores, poison);
  });
  const largest = maxima.map((own) => quadMax(b, own));
  const isEmpty = largest.map((max) => b.setp('eq', max, Number.NEGATIVE_INFINITY));
  for (const [r, shift] of own.shift.entries()) b.selp(0, b.neg(at(largest, r)), at(isEmpty, r), shift);
  const sums = twice(() => b.constant('f32', 0));
  eachTile(self, 'weights', (weights) => {
    for (const fragment of weights) {
      for (const [i, weight] of fragment.entries()) b.add(at(sums, i >> 1), weight, at(sums, i >> 1));
    }
  });
  for (let r = 0; r < 2; r++) {
    const sum = b.add(quadSum(b, at(sums, r)), quadSum(b, at(poison, r)));
    b.if(isMarked(at(before.scale, r)), () => storeRow(self, r, { sum, isEmpty: at(isEmpty, r), before, own, config }));
  }
  return b.build();
}

const twice = <T>(make: () => T): readonly [T, T] => [make(), make()];

interface Again {
  readonly frame: Frame;
  readonly place: ThreadPlace;
  readonly work: Work;
  readonly copies: StreamCopies;
  readonly constants: ReturnType<typeof ownConstants>;
}

/** Calls back with the scores or weights of each tile of keys. */
function eachTile(
  { frame, place, work, copies, constants }: Again,
  until: 'scores' | 'weights',
  body: (scores: readonly (readonly Reg<'f32'>[])[], now: Passing) => void,
): void {
  const { b, columnTiles } = frame;
  const now = { head: work.head, tile: b.mov(work.firstTile), stage: b.constant('u32', 0) };
  b.loop(
    () => b.setp('lt', now.tile, work.lastTile),
    () => {
      copies.bringStream(now);
      b.section('S');
      const lanes = laneAddresses(frame);
      const codes = Array.from({ length: columnTiles }, () => b.regs('s32', 4));
      multiplyCodes(frame, codes, lanes.ownCodes, lanes.codes);
      weigh({ frame, place, work, now, constants, rows: undefined, codes }, until);
      const scores = codes.map((fragment) => fragment.map((register) => b.as(register, 'f32')));
      body(scores, now);
      b.add(now.tile, 1, now.tile);
      b.barSync();
    },
  );
}

function spreadKeyFaults(
  { frame, place, work, constants }: Again,
  now: Passing,
  faults: Parameter<'u64'>,
  scores: readonly (readonly Reg<'f32'>[])[],
  poison: readonly Reg<'f32'>[],
): void {
  const { b } = frame;
  b.section('keys that are not finite');
  b.if(hasExponents(b, constants.keyScaleOf(now)), () => {
    const tile = b.shr(keyRowOf(frame, work, b.as(b.shl(now.tile, 6), 'u32')), 6);
    const ofTile = { faults: offset(b, b.loadPointer(faults), tile, 8), firstColumn: place.t2 };
    spreadFaults(b, ofTile, (visit) => {
      scores.forEach((fragment, n) => {
        for (const [i, score] of fragment.entries()) visit(score, i >> 1, 8 * n + (i & 1));
      });
    });
    for (const fragment of scores) {
      fragment.forEach((score, i) => {
        b.when(b.notPred(b.setp('eq', score, score)), () => b.mov(score, at(poison, i >> 1)));
      });
    }
  });
}

interface Made {
  readonly sum: Reg<'f32'>;
  readonly isEmpty: Reg<'pred'>;
  readonly before: OwnRowNumbers;
  readonly own: OwnRowNumbers;
  readonly config: SoftmaxAgainConfig;
}

/** Row g, or g + 8: its numbers by the first of its four lanes, its dO by all. */
function storeRow({ frame, place, work }: Again, r: number, { sum, isEmpty, before, own, config }: Made): void {
  const { b, pointer } = frame;
  b.section('a row made anew');
  const row = b.add(firstOwnRow(frame, work), b.add(b.add(place.warpRow, place.g), 8 * r));
  const weight = b.rcp(sum);
  if (config.partOfKeys) {
    // Of all keys' weights these have as much as the logsumexp says, and not more than all.
    const share = b.ex2(b.sub(at(before.shift, r), at(own.shift, r)));
    b.min(weight, share, weight);
    b.when(b.notPred(isNumber(share)), () => b.set(weight, Number.NaN));
  }
  const shift = b.mov(at(own.shift, r));
  b.when(b.notPred(isNumber(weight)), () => b.set(shift, Number.NaN));
  b.when(isEmpty, () => b.set(shift, Number.NEGATIVE_INFINITY));
  b.if(b.setp('eq', place.t2, 0), () => {
    const store = (name: 'rowScale' | 'rowShift' | 'rowDelta' | 'rowWeight', value: Reg<'f32'>) =>
      b.st(value, offset(b, b.loadPointer(pointer[name]), row, 4));
    store('rowScale', at(own.scale, r));
    store('rowShift', shift);
    if (config.rowWeights) {
      const whole = b.andPred(isNumber(weight), b.notPred(isEmpty));
      store('rowWeight', b.selp(weight, b.constant('f32', 1), whole));
    } else store('rowDelta', b.mul(at(before.minusDelta, r), weight));
  });
  if (config.rowWeights) return;
  b.if(b.andPred(isNumber(weight), b.notPred(isEmpty)), () => {
    const rowBytes = config.paddedValueDim * OPERAND_BYTES;
    const chunk = b.shr(place.t2, 1);
    const first = offset(b, b.loadPointer(pointer.outputGradient), row, rowBytes);
    const own = offset(b, first, chunk, 16);
    for (let byte = 0; byte < rowBytes; byte += 64) {
      b.if(b.setp('lt', chunk, (rowBytes - byte) / 16), () => {
        const eight = unpackEight(b, 'bfloat16', b.ldVector('b32', 4, own, byte));
        const scaled = eight.map((value) => b.mul(value, weight));
        const words = [0, 2, 4, 6].map((i) => b.cvtPack('bf16x2', at(scaled, i), at(scaled, i + 1)));
        b.stVector(words, own, byte);
      });
    }
  });

  function isNumber(value: Reg<'f32'>): Reg<'pred'> {
    return b.setp('lt', b.and(b.as(value, 'u32'), 0x7fffffff), INFINITY_BITS);
  }
}
