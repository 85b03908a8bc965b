/**
 * What an element of dO that is not a number makes of dV: NaN in its channel, for the keys that its row sees. The copy of dO that the
 * products read has 0 there, since 0 * NaN would reach keys that the row does not see, and the other channels of those that it does.
 *
 * A CTA owns 64 keys of a head, and ends where no row that may see them has such an element: `prepare.ts` says which 64 rows do. Otherwise a
 * thread looks for them key by key, channel by channel: slow, and rare. It comes after the kernel that stores dV.
 */
import type { DType } from '../../../../tensor/dtype.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor } from '../../ptx/layouts.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Reg } from '../../ptx/types.ts';
import { offset, offset64, pointers } from '../parts/addresses.ts';
import { BYTES, type LoadWidth, loadEight } from '../parts/elements.ts';
import { headAddress } from '../parts/epilogue.ts';
import { loadEntry } from '../quantize/visible-keys.ts';
import { type GradientConfig, OWN_TOKENS } from './config.ts';
import { declareParameters, GRADIENT_THREADS, type Owner, type Work, workOf } from './frame.ts';
import { COPY_TOKENS, ROW_FAULT_BYTES } from './prepare.ts';

export interface ValueFaultsConfig
  extends Pick<GradientConfig, 'banded' | 'mask' | 'gradientType' | 'headDim' | 'valueDim'> {
  readonly target: Target;
  /** Of dO. */
  readonly dtype: DType;
  readonly loadWidth: LoadWidth;
}

/** Parameters after those of every gradient kernel: dO as given, and which 64 rows have such an element. */
export const VALUE_FAULTS_POINTERS = ['givenGradient', 'rowFaults'] as const;
/** In bytes, of dO. */
export const VALUE_FAULTS_STRIDES = ['gradientBatch', 'gradientHead', 'gradientToken'] as const;

/** Half of the threads take one half of the octets of channels, the others the other. */
const HALVES = GRADIENT_THREADS / OWN_TOKENS;

export function valueFaults(config: ValueFaultsConfig): Kernel {
  const { target } = config;
  const b = new KernelBuilder({ name: 'valueFaults', target, threads: GRADIENT_THREADS });
  const parameters = declareParameters(b);
  const pointer = pointers(b, VALUE_FAULTS_POINTERS);
  const strides = pointers(b, VALUE_FAULTS_STRIDES);
  const found = b.shared('found', 1, rowMajor(16));
  const owner: Owner = {
    ...parameters,
    b,
    config: { ...config, streamTokens: COPY_TOKENS },
    ...{ ownsQueries: false, ownTokens: OWN_TOKENS, rank: () => b.special('%ctaid.x'), stays: false },
  };
  const thread = b.special('%tid.x');
  const work = workOf(owner);
  const faults = b.loadPointer(pointer.rowFaults);
  /** Whether 64 rows of a head have such an element. */
  const haveFaults = (head: Reg<'u32'>, tile: Reg<'s32'>) => {
    const rows = b.mad(head, b.loadParameter(parameters.integer.paddedQueries), work.paddedQueryStart);
    const block = b.add(b.shr(rows, Math.log2(COPY_TOKENS)), b.as(tile, 'u32'));
    const [low, high] = b.ldVector('b32', 2, offset(b, faults, block, ROW_FAULT_BYTES)) as [Reg<'b32'>, Reg<'b32'>];
    return b.setp('ne', b.or(low, high), 0);
  };

  b.section('rows that may see own keys');
  const shared = b.sharedAddress(found.base);
  b.when(b.setp('eq', thread, 0), () => b.st(b.constant('u32', 0), shared));
  b.barSync();
  forEachHead(owner, work, (head) => {
    const tile = b.add(work.firstTile, b.as(thread, 's32'));
    b.loop(
      () => b.setp('lt', tile, work.lastTile),
      () => {
        b.when(haveFaults(head, tile), () => b.st(b.constant('u32', 1), shared));
        b.add(tile, GRADIENT_THREADS, tile);
      },
    );
  });
  b.barSync();
  b.when(b.setp('eq', b.ld('u32', shared), 0), () => b.exit());

  b.section('channels of own key');
  const key = b.add(work.firstOwn, b.and(thread, OWN_TOKENS - 1));
  b.when(b.setp('ge', key, work.keyLength), () => b.exit());
  const octet = b.mov(b.shr(thread, Math.log2(OWN_TOKENS)));
  b.loop(
    () => b.setp('lt', octet, Math.ceil(config.valueDim / 8)),
    () => {
      const channel = b.shl(octet, 3);
      const sums = b.regs('f32', 8);
      for (const sum of sums) b.set(sum, 0);
      const given = b.loadPointer(pointer.givenGradient);
      const { gradientBatch: batch, gradientHead: ofHead, gradientToken } = strides;
      const tokenStride = b.loadParameter(gradientToken);
      const lastTile = b.mov(work.lastTile);
      forEachHead(owner, work, (head) => {
        const rowsAt = headAddress(b, given, { sequence: work.sequence, head }, { batch, head: ofHead });
        const tile = b.mov(work.firstTile);
        b.loop(
          () => b.setp('lt', tile, lastTile),
          () => {
            b.if(haveFaults(head, tile), () => {
              const row = b.as(b.shl(tile, Math.log2(COPY_TOKENS)), 'u32');
              const end = b.min(b.add(row, COPY_TOKENS), work.queryLength);
              const from = b.mov(row);
              b.loop(
                () => b.setp('lt', from, end),
                () => {
                  const token = b.add(work.queryStart, from);
                  const at = offset(b, offset64(b, rowsAt, token, tokenStride), channel, BYTES[config.dtype]);
                  const sees = seesKey(owner, config, work, head, from, key);
                  const eight = loadEight(b, config.dtype, config.loadWidth, at, channel, config.valueDim, sees);
                  sums.forEach((sum, i) => {
                    b.fma(eight[i] as Reg<'f32'>, 0, sum, sum);
                  });
                  b.add(from, 1, from);
                },
              );
              // Where all channels have one, no other row matters.
              const left = sums.map((sum) => b.setp('eq', sum, 0)).reduce((x, y) => b.orPred(x, y));
              b.when(left, () => b.mov(work.firstTile, lastTile), true);
            });
            b.add(tile, 1, tile);
          },
        );
      });
      store(channel, sums);
      b.add(octet, HALVES, octet);
    },
  );
  return b.build();

  function store(channel: Reg<'u32'>, sums: readonly Reg<'f32'>[]): void {
    const { pointer: own, strides: to } = parameters;
    const place = { sequence: work.sequence, head: work.keyHead };
    const base = headAddress(b, b.loadPointer(own.valueGradient), place, { batch: to.valueBatch, head: to.valueHead });
    const ofKey = offset64(b, base, b.add(work.keyStart, key), b.loadParameter(to.valueToken));
    const bytes = BYTES[config.gradientType];
    const first = offset(b, ofKey, channel, bytes);
    const nan =
      config.gradientType === 'float32' ? b.constant('f32', Number.NaN) : b.cvt('b16', b.constant('u32', 0x7fff));
    sums.forEach((sum, i) => {
      const inside = b.setp('lt', b.add(channel, i), config.valueDim);
      // Each is 0 or NaN.
      b.when(b.andPred(b.notPred(b.setp('eq', sum, 0)), inside), () => b.st(nan, first, i * bytes));
    });
  }
}

/** Every head of Q whose queries pass by. */
function forEachHead({ b }: Owner, work: Work, body: (head: Reg<'u32'>) => void): void {
  const head = b.mov(work.head);
  b.loop(
    () => b.setp('lt', head, work.headEnd),
    () => {
      body(head);
      b.add(head, 1, head);
    },
  );
}

/** Whether a row sees a key: by the band, and by the mask. */
function seesKey(
  { b, pointer, strides }: Owner,
  { banded, mask }: ValueFaultsConfig,
  { lower, upper, sequence }: Work,
  head: Reg<'u32'>,
  row: Reg<'u32'>,
  key: Reg<'u32'>,
): Reg<'pred'> {
  const [i, j] = [b.as(row, 's32'), b.as(key, 's32')];
  const inBand = banded
    ? b.andPred(b.setp('ge', j, b.add(i, lower)), b.setp('le', j, b.add(i, upper)))
    : b.setp('ge', j, 0);
  if (mask === 'none') return inBand;
  const ofHead = { batch: strides.maskBatch, head: strides.maskHead };
  const base = headAddress(b, b.loadPointer(pointer.mask), { sequence, head }, ofHead);
  const ofRow = offset64(b, base, row, b.loadParameter(strides.maskQuery));
  const entryAt = offset64(b, ofRow, key, b.loadParameter(strides.maskKey));
  const entry = loadEntry(b, mask, entryAt, inBand, Number.NEGATIVE_INFINITY);
  const shown =
    mask === 'boolean' ? b.setp('ne', b.as(entry, 'u32'), 0) : b.setp('ne', entry, Number.NEGATIVE_INFINITY);
  return b.andPred(inBand, shown);
}
