/**
 * The gradient of an additive mask: that of the scores it is added to, `P (dP - D)`, summed over what the mask broadcasts over.
 *
 * A CTA owns a tile of the mask, and the tiles of scores that it is added to pass by: those of every sequence, head, row or key that share
 * an element, always in the same order. Scores are computed as for dQ, with rows of Q as own tokens; none are stored, no sum needs an
 * atomic, and the same inputs give the same bits.
 */
import { rowMajor } from '../../ptx/layouts.ts';
import type { Kernel, Reg } from '../../ptx/types.ts';
import { divide, integers, offset, offset64 } from '../parts/addresses.ts';
import { at } from '../parts/lists.ts';
import { loadSequence } from '../parts/sequences.ts';
import { type GradientConfig, MASK_GRADIENT_INTEGERS, OWN_TOKENS } from './config.ts';
import { StreamCopies } from './copies.ts';
import { type Frame, makeFrame, passingOf, placeOf, type ThreadPlace, type Work } from './frame.ts';
import { laneAddresses } from './gradients.ts';
import { multiplyCodes, multiplyValues } from './products.ts';
import { ownConstants, weigh, weighGradients } from './weigh.ts';

export interface MaskGradientConfig extends Omit<GradientConfig, 'gradients' | 'precision'> {
  /** All rows, or all keys, share an element. */
  readonly sumsRows: boolean;
  readonly sumsKeys: boolean;
}

/** What the parts of the kernel share. */
interface MaskFrame {
  readonly frame: Frame;
  readonly config: MaskGradientConfig;
  readonly place: ThreadPlace;
  /** Sums of the tile's elements, by 8-key tile. */
  readonly sums: readonly (readonly Reg<'f32'>[])[];
  readonly tile: MaskTile;
}

/** Which tile of the gradient a CTA owns. */
interface MaskTile {
  readonly rowTile: Reg<'u32'>;
  readonly keyTile: Reg<'u32'>;
  readonly maskHead: Reg<'u32'>;
  readonly maskBatch: Reg<'u32'>;
  readonly maskHeads: Reg<'u32'>;
  readonly maskBatches: Reg<'u32'>;
  readonly sequenceCount: Reg<'u32'>;
  readonly maskRows: Reg<'u32'>;
  readonly maskKeys: Reg<'u32'>;
}

/** The kernel of one configuration. */
export function maskGradients(config: MaskGradientConfig): Kernel {
  const frame = makeFrame({ ...config, gradients: ['mask'], precision: 'fp16' }, 'maskGradients');
  const { b } = frame;
  const gradient = b.parameter('maskGradient', 'u64');
  const integer = integers(b, MASK_GRADIENT_INTEGERS);
  b.section('which tile of the mask');
  const load = (name: (typeof MASK_GRADIENT_INTEGERS)[number]) => b.loadParameter(integer[name]);
  const [maskHeads, maskBatches] = [load('maskHeads'), load('maskBatches')];
  const [keyTile, rows] = divide(b, b.special('%ctaid.x'), load('keyTiles'));
  const [rowTile, lane] = divide(b, rows, load('rowTiles'));
  const [maskHead, maskBatch] = divide(b, lane, maskHeads);
  const counts = { sequenceCount: load('sequenceCount'), maskRows: load('maskRows'), maskKeys: load('maskKeys') };
  const tile = { rowTile, keyTile, maskHead, maskBatch, maskHeads, maskBatches, ...counts };
  const sums = Array.from({ length: frame.columnTiles }, () => [0, 0, 0, 0].map(() => b.constant('f32', 0)));
  const self: MaskFrame = { frame, config, place: placeOf(b), sums, tile };

  const [sequence, sequenceEnd] = shared(frame, maskBatch, maskBatches, tile.sequenceCount);
  b.loop(
    () => b.setp('lt', sequence, sequenceEnd),
    () => {
      addSequence(self, sequence);
      b.add(sequence, 1, sequence);
    },
  );
  store(self, b.loadPointer(gradient));
  return b.build();
}

/** The first and the last (exclusive) that share own index: all where the mask has one. */
function shared({ b }: Frame, own: Reg<'u32'>, count: Reg<'u32'>, all: Reg<'u32'>) {
  const [first, end] = [b.mov(own), b.mov(all)];
  b.when(b.setp('gt', count, 1), () => b.add(own, 1, end));
  return [first, end] as const;
}

/** Adds the scores' gradients of a sequence, of all its heads and rows that share the tile. */
function addSequence(self: MaskFrame, sequence: Reg<'u32'>): void {
  const { frame, config, tile } = self;
  const { b, pointer, integer } = frame;
  const table = loadSequence(b, b.loadPointer(pointer.sequences), sequence);
  const rowFirst = b.mul(tile.rowTile, OWN_TOKENS);
  const rowEnd = config.sumsRows ? table.queryLength : b.min(table.queryLength, b.add(rowFirst, OWN_TOKENS));
  const [head, headEnd] = shared(frame, tile.maskHead, tile.maskHeads, b.loadParameter(integer.queryHeads));
  b.loop(
    () => b.setp('lt', head, headEnd),
    () => {
      const keyHead = b.div(head, b.loadParameter(integer.headsPerKeyHead));
      const firstOwn = b.mov(rowFirst);
      b.loop(
        () => b.setp('lt', firstOwn, rowEnd),
        () => {
          const passing = passingOf(frame, table, firstOwn);
          addRows(self, { ...table, sequence, keyHead, head, headEnd, firstOwn, ...passing });
          b.add(firstOwn, OWN_TOKENS, firstOwn);
        },
      );
      b.add(head, 1, head);
    },
  );
}

/** Adds those of a tile of rows of one head. */
function addRows(self: MaskFrame, work: Work): void {
  const { frame, config, place, tile } = self;
  const { b } = frame;
  if (!config.sumsKeys) {
    const own = b.as(tile.keyTile, 's32');
    b.max(work.firstTile, own, work.firstTile);
    b.min(work.lastTile, b.add(own, 1), work.lastTile);
  }
  const now = { head: work.head, tile: work.firstTile, stage: b.constant('u32', 0) };
  b.if(b.setp('lt', work.firstTile, work.lastTile), () => {
    const copies = new StreamCopies(frame, place, work);
    copies.copyOwn();
    const constants = ownConstants(frame, place, work);
    b.loop(
      () => b.setp('lt', now.tile, work.lastTile),
      () => {
        copies.bringStream(now);
        const lanes = laneAddresses(frame);
        const codes = Array.from({ length: frame.columnTiles }, () => b.regs('s32', 4));
        b.section('S');
        multiplyCodes(frame, codes, lanes.ownCodes, lanes.codes);
        b.section('dP - D');
        const gradientsOfP = Array.from({ length: frame.columnTiles }, () => b.regs('f32', 4));
        const minusDelta = constants.minusDelta(undefined);
        const [ownValues, columns] = [lanes.ownValues, lanes.valueColumns] as Reg<'shared'>[];
        multiplyValues(frame, gradientsOfP, ownValues as Reg<'shared'>, columns as Reg<'shared'>, minusDelta);
        const tile = { frame, place, work, now, constants, rows: undefined, codes, gradientsOfP };
        weighGradients(tile, weigh(tile));
        b.section('the sum');
        for (let r = 0; r < 2; r++) {
          const row = b.add(b.add(work.firstOwn, place.warpRow), b.add(place.g, 8 * r));
          b.if(b.setp('lt', row, work.queryLength), () => {
            gradientsOfP.forEach((fragment, n) => {
              for (const i of [2 * r, 2 * r + 1])
                b.add(at(at(self.sums, n), i), at(fragment, i), at(at(self.sums, n), i));
            });
          });
        }
        b.add(now.tile, 1, now.tile);
        b.barSync();
      },
    );
  });
}

/** Stores the sums, added up over rows or keys that share an element. */
function store({ frame, config, place, sums, tile }: MaskFrame, gradient: Reg<'global'>): void {
  const { b, shared: memory } = frame;
  const { warpRow, g, t2, thread } = place;
  const { streamTokens, sumsRows, sumsKeys } = config;
  b.section('epilogue');
  const { maskBatch, maskHead, maskHeads, maskRows, maskKeys } = tile;
  const firstRow = b.mul(b.mad(maskBatch, maskHeads, maskHead), maskRows);
  const rowBytes = b.cvt('u64', b.shl(maskKeys, 2));
  const [ownRow, ownKey] = [b.mul(tile.rowTile, OWN_TOKENS), b.mul(tile.keyTile, streamTokens)];
  const storeAt = (row: Reg<'u32'>, key: Reg<'u32'>, value: Reg<'f32'>) => {
    const inside = b.andPred(b.setp('lt', row, maskRows), b.setp('lt', key, maskKeys));
    b.if(inside, () => b.st(value, offset(b, offset64(b, gradient, b.add(firstRow, row), rowBytes), key, 4)));
  };
  const rowOf = (r: number) => b.add(warpRow, b.add(g, 8 * r));
  if (!sumsRows && !sumsKeys) {
    sums.forEach((fragment, n) => {
      fragment.forEach((sum, i) => {
        storeAt(b.add(ownRow, rowOf(i >> 1)), b.add(ownKey, b.add(t2, 8 * n + (i & 1))), sum);
      });
    });
    return;
  }
  const pitch = Math.max(128, streamTokens * 4);
  const base = b.add(memory, b.shared('sums', OWN_TOKENS, rowMajor(pitch)).base);
  const addressOf = (row: Reg<'u32'>, byte: Reg<'u32'>) =>
    b.add(b.add(base, b.as(b.mul(row, pitch), 'shared')), b.as(byte, 'shared'));
  for (let r = 0; r < 2; r++) {
    const address = addressOf(rowOf(r), b.shl(t2, 2));
    sums.forEach((fragment, n) => {
      b.stVector(fragment.slice(2 * r, 2 * r + 2), address, n * 32);
    });
  }
  b.barSync();
  const zero = b.constant('u32', 0);
  /** Adds up `count` numbers that lie `step` bytes apart. */
  const total = (address: Reg<'shared'>, count: number, step: number) => {
    const sum = b.constant('f32', 0);
    for (let i = 0; i < count; i++) b.add(sum, b.ld('f32', address, i * step), sum);
    return sum;
  };
  if (!sumsKeys) {
    b.if(b.setp('lt', thread, streamTokens), () =>
      storeAt(zero, b.add(ownKey, thread), total(addressOf(zero, b.shl(thread, 2)), OWN_TOKENS, pitch)),
    );
    return;
  }
  b.if(b.setp('lt', thread, OWN_TOKENS), () => {
    const sum = total(addressOf(thread, zero), streamTokens, 4);
    if (sumsRows) b.st(sum, addressOf(thread, zero));
    else storeAt(b.add(ownRow, thread), zero, sum);
  });
  if (!sumsRows) return;
  b.barSync();
  b.if(b.setp('eq', thread, 0), () => storeAt(zero, zero, total(addressOf(zero, zero), OWN_TOKENS, pitch)));
}
