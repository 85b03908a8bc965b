/** The end of a row: its sum, its logsumexp, and its channels on their way to the caller or to `combine`. */
import type { DType } from '../../../../tensor/dtype.ts';
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Parameter, Reg } from '../../ptx/types.ts';
import { offset64 } from './addresses.ts';
import { BYTES } from './elements.ts';

/**
 * What a row's output is multiplied by: 1 / sum, 0 for a row that saw no key.
 *
 * @param bias NaN for a row of Q that is not finite
 * @param unit a further factor
 */
export function rowFactor(
  b: KernelBuilder,
  sum: Reg<'f32'>,
  bias: Reg<'f32'>,
  unit?: Reg<'f32'>,
): { readonly empty: Reg<'pred'>; readonly factor: Reg<'f32'> } {
  const empty = b.setp('eq', sum, 0);
  const reciprocal = b.fma(bias, 0, b.rcp(sum));
  const factor = unit === undefined ? reciprocal : b.mul(reciprocal, unit);
  b.when(empty, () => b.set(factor, 0));
  return { empty, factor };
}

export interface RowSum {
  readonly sum: Reg<'f32'>;
  /** In base 2. */
  readonly max: Reg<'f32'>;
  readonly empty: Reg<'pred'>;
  /** What smoothing K took from the row's scores, in base 2. */
  readonly bias: Reg<'f32'>;
}

/**
 * A row's logsumexp: in base 2 between splits, natural for the caller.
 *
 * @param exponentOffset what was added to each exponent; undefined: nothing
 * @param biased the scores have the bias already, as softcap needs it
 */
export function logSumExp(
  b: KernelBuilder,
  { sum, max, empty, bias }: RowSum,
  {
    exponentOffset,
    biased,
    natural,
  }: { readonly exponentOffset: number | Reg<'f32'> | undefined; readonly biased: boolean; readonly natural: boolean },
): Reg<'f32'> {
  let lse = b.add(b.lg2(sum), max);
  if (exponentOffset !== undefined) lse = b.sub(lse, exponentOffset);
  lse = biased ? b.fma(bias, 0, lse) : b.add(lse, bias);
  if (natural) lse = b.mul(lse, Math.LN2);
  b.when(empty, () => b.set(lse, Number.NEGATIVE_INFINITY));
  return lse;
}

/** `base` of a tensor `[sequence, head, ...]` moved to a head. Strides in bytes. */
export function headAddress(
  b: KernelBuilder,
  base: Reg<'global'>,
  { sequence, head }: { readonly sequence: Reg<'u32'>; readonly head: Reg<'u32'> },
  strides: { readonly batch: Parameter<'u64'>; readonly head: Parameter<'u64'> },
): Reg<'global'> {
  const ofSequence = offset64(b, base, sequence, b.loadParameter(strides.batch));
  return offset64(b, ofSequence, head, b.loadParameter(strides.head));
}

/**
 * Stores channels 8n + 2t and 8n + 2t + 1 of a row, skipping those beyond `width`.
 *
 * @param address of the row's channel 2t
 * @param first 8n
 * @param inside whether the row exists; undefined where it does
 */
export function storePair(
  b: KernelBuilder,
  [low, high]: readonly [Reg<'f32'>, Reg<'f32'>],
  address: Reg<'global' | 'shared'>,
  {
    type,
    first,
    width,
    t2,
    inside,
  }: {
    readonly type: DType;
    readonly first: number;
    readonly width: number;
    readonly t2: Reg<'u32'>;
    readonly inside: Reg<'pred'> | undefined;
  },
): void {
  const bytes = BYTES[type];
  const packed = type === 'float32' ? undefined : b.cvtPack(type === 'float16' ? 'f16x2' : 'bf16x2', low, high);
  const guarded = (channel: () => Reg<'u32'>, store: () => void) => {
    const exists = first + 8 <= width ? undefined : b.setp('lt', channel(), width - first);
    const guard = exists === undefined ? inside : inside === undefined ? exists : b.andPred(inside, exists);
    if (guard === undefined) store();
    else b.when(guard, store);
  };
  if (width % 2 === 0) {
    const at = first * bytes;
    guarded(
      () => t2,
      () => (packed === undefined ? b.stVector([low, high], address, at) : b.st(packed, address, at)),
    );
    return;
  }
  // Odd Dv: rows are not aligned to pairs.
  const halves = packed === undefined ? [low, high] : b.unpack(packed, 'b16');
  halves.forEach((half, j) => {
    guarded(
      () => b.add(t2, j),
      () => b.st(half, address, (first + j) * bytes),
    );
  });
}
