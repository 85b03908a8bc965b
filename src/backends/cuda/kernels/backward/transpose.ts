/**
 * 8-bit codes of Q, K or dO with tokens innermost, as products over tokens want them: `[head, 32 tokens, channel, 32 codes]`, from the BF16
 * copies of `prepare.ts`. Each 64 tokens of a head share a scale. Tokens lie in the order of `TOKEN_PERMUTATION`, in which a thread has its
 * columns of P and dS.
 *
 * Tokens that count for nothing are zeros, and in no scale: rows of Q that see no key, and keys that no row sees.
 */
import { TOKEN_PERMUTATION } from '../../../../quantization/value-fp8.ts';
import { KernelBuilder } from '../../ptx/builder.ts';
import { rowMajor } from '../../ptx/layouts.ts';
import type { Target } from '../../ptx/targets.ts';
import type { Kernel, Reg } from '../../ptx/types.ts';
import { divide, integers, offset, pointers } from '../parts/addresses.ts';
import { at } from '../parts/lists.ts';
import { loadSequence } from '../parts/sequences.ts';
import { type HiddenKeys, loadVisibleRange, seenInBlock } from '../quantize/visible-keys.ts';
import { type CodePrecision, codeScalesOf, roundFour } from './codes.ts';
import { CODE_ROW_TOKENS, OPERAND_BYTES } from './config.ts';
import { COPY_TOKENS, PREPARE_THREADS } from './prepare.ts';

export interface TransposeConfig {
  readonly target: Target;
  readonly precision: CodePrecision;
  readonly operand: 'query' | 'key';
  /** D or Dv padded to 16. */
  readonly paddedDim: number;
  /** Of keys. */
  readonly hidden: HiddenKeys;
}

/** `rowShift` of queries, `visibleKeys` of keys. */
export const TRANSPOSE_POINTERS = ['sequences', 'copy', 'rowShift', 'visibleKeys', 'codes', 'scales'] as const;
export const TRANSPOSE_INTEGERS = ['heads', 'blocks', 'paddedTokens'] as const;

/** A CTA takes 64 tokens of a head. A thread takes four tokens, permuted neighbours, of eight channels. */
export function transposeTokens(config: TransposeConfig): Kernel {
  const { target, precision, operand, paddedDim, hidden } = config;
  const b = new KernelBuilder({ name: 'transposeTokens', target, threads: PREPARE_THREADS });
  const pointer = pointers(b, TRANSPOSE_POINTERS);
  const integer = integers(b, TRANSPOSE_INTEGERS);
  const warpMaxima = b.shared('largest of each warp', 1, rowMajor((PREPARE_THREADS / 32) * 4));

  b.section('which tokens');
  const thread = b.special('%tid.x');
  const heads = b.loadParameter(integer.heads);
  const [block, headAndSequence] = divide(b, b.special('%ctaid.x'), b.loadParameter(integer.blocks));
  const [head, sequence] = divide(b, headAndSequence, heads);
  const sequences = b.loadPointer(pointer.sequences);
  const table = loadSequence(b, sequences, sequence);
  const [length, paddedStart] =
    operand === 'query' ? [table.queryLength, table.paddedQueryStart] : [table.keyLength, table.paddedKeyStart];
  const firstToken = b.mul(block, COPY_TOKENS);
  // Of 128 padded rows of Q the second 64 may be beyond the length: they are read, with weights of 0.
  const padding = operand === 'query' ? 127 : 63;
  b.when(b.setp('ge', firstToken, b.and(b.add(length, padding), 0xffffffff - padding)), () => b.exit());
  const paddedTokens = b.loadParameter(integer.paddedTokens);
  const paddedToken = b.add(paddedStart, firstToken);
  const firstRow = b.add(b.mul(head, paddedTokens), paddedToken);

  /** Whether a token of the block counts. */
  const countsOf = (): ((token: Reg<'u32'>) => Reg<'pred'>) => {
    if (operand === 'query') {
      const shifts = offset(b, b.loadPointer(pointer.rowShift), firstRow, 4);
      return (token) => b.setp('ne', b.ld('f32', offset(b, shifts, token, 4)), Number.NEGATIVE_INFINITY);
    }
    const range = loadVisibleRange(b, sequences, sequence);
    return seenInBlock(b, range, {
      hiddenKeys: hidden,
      visibleKeys: pointer.visibleKeys,
      head,
      paddedTokens: () => paddedTokens,
      paddedStart,
      firstToken,
    });
  };
  const counts = countsOf();

  b.section('their elements');
  const octets = paddedDim / 8;
  const items = octets * (COPY_TOKENS / 4);
  const rounds = Math.ceil(items / PREPARE_THREADS);
  const source = offset(b, b.loadPointer(pointer.copy), firstRow, paddedDim * OPERAND_BYTES);
  const largest = b.constant('f32', 0);
  const taken = Array.from({ length: rounds }, (_, round) => {
    const item = b.add(thread, round * PREPARE_THREADS);
    const inside = (round + 1) * PREPARE_THREADS <= items ? undefined : b.setp('lt', item, items);
    // Lanes take the eight words of a row of codes first, so that they store it whole.
    const rest = b.shr(item, 3);
    const half = b.div(rest, b.constant('u32', octets));
    const octet = b.sub(rest, b.mul(half, octets));
    const word = b.and(item, 7);
    // Position 4w + i of 16 holds token TOKEN_PERMUTATION[4w + i] = 2w + TOKEN_PERMUTATION[i].
    const first = b.add(b.mad(half, CODE_ROW_TOKENS, b.shl(b.shr(word, 2), 4)), b.shl(b.and(word, 3), 1));
    const elements = TOKEN_PERMUTATION.slice(0, 4).map((later) => {
      const words = b.regs('b32', 4);
      for (const register of words) b.set(register, 0);
      const load = () => {
        const token = b.add(first, later);
        const own = offset(b, offset(b, source, token, paddedDim * OPERAND_BYTES), octet, 16);
        const loaded = b.ldVector('b32', 4, own);
        const counted = counts(token);
        for (const [i, register] of words.entries()) b.when(counted, () => b.mov(at(loaded, i), register));
      };
      if (inside === undefined) load();
      else b.if(inside, load);
      return words;
    });
    for (const eight of elements) {
      for (const pair of eight) for (const element of floatsOf(b, pair)) b.max(largest, b.abs(element), largest);
    }
    return { elements, inside, half, octet, word };
  });

  b.section('their scale');
  for (let lanes = 1; lanes < 32; lanes *= 2) b.max(largest, b.shflBfly(largest, lanes), largest);
  const shared = b.sharedAddress(warpMaxima.base);
  const isFirstLane = b.setp('eq', b.and(thread, 31), 0);
  b.when(isFirstLane, () => b.st(largest, b.add(shared, b.as(b.shl(b.shr(thread, 5), 2), 'shared'))));
  b.barSync();
  const ofWarps = [0, 16].flatMap((from) => b.ldVector('f32', 4, shared, from));
  const { toCodes, toValues } = codeScalesOf(
    b,
    precision,
    ofWarps.reduce((x, y) => b.max(x, y)),
  );
  const scaleAt = offset(b, b.loadPointer(pointer.scales), b.shr(firstRow, 6), 4);
  b.when(b.setp('eq', thread, 0), () => b.st(toValues, scaleAt));

  b.section('codes');
  const into = offset(b, b.loadPointer(pointer.codes), firstRow, paddedDim);
  for (const { elements, inside, half, octet, word } of taken) {
    const row = b.mad(half, paddedDim, b.shl(octet, 3));
    const own = offset(b, offset(b, into, row, CODE_ROW_TOKENS), word, 4);
    const store = () => {
      for (let pair = 0; pair < 4; pair++) {
        const tokens = elements.map((eight) => floatsOf(b, at(eight, pair)));
        for (const channel of [0, 1]) {
          const four = tokens.map((two) => at(two, channel));
          b.st(roundFour(b, precision, four, toCodes), own, (2 * pair + channel) * CODE_ROW_TOKENS);
        }
      }
    };
    if (inside === undefined) store();
    else b.if(inside, store);
  }
  return b.build();
}

/** Of two BF16 numbers. */
const floatsOf = (b: KernelBuilder, pair: Reg<'b32'>): [Reg<'f32'>, Reg<'f32'>] => [
  b.as(b.shl(pair, 16), 'f32'),
  b.as(b.and(pair, 0xffff0000), 'f32'),
];
