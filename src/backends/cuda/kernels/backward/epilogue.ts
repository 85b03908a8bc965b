/** Stores the sums of own tokens as gradients. */
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Parameter, Reg } from '../../ptx/types.ts';
import { offset, offset64 } from '../parts/addresses.ts';
import { BYTES } from '../parts/elements.ts';
import { headAddress, storePair } from '../parts/epilogue.ts';
import { at } from '../parts/lists.ts';
import { transposeInQuad } from '../parts/quad.ts';
import type { Owner, Sums, ThreadPlace, Work } from './frame.ts';

/** Where a gradient goes. */
interface Target {
  readonly pointer: Parameter<'u64'>;
  readonly strides: {
    readonly batch: Parameter<'u64'>;
    readonly head: Parameter<'u64'>;
    readonly token: Parameter<'u64'>;
  };
  readonly head: Reg<'u32'>;
  readonly start: Reg<'u32'>;
  readonly length: Reg<'u32'>;
  readonly width: number;
}

export function storeGradients(frame: Owner, place: ThreadPlace, work: Work, sums: Sums): void {
  const { b, config, pointer, strides, smScale, ownsQueries } = frame;
  b.section('epilogue');
  const stridesOf = (name: 'query' | 'key' | 'value') => ({
    batch: strides[`${name}Batch`],
    head: strides[`${name}Head`],
    token: strides[`${name}Token`],
  });
  const keys = { head: work.keyHead, start: work.keyStart, length: work.keyLength };
  if (sums.values.length > 0) {
    const value = { pointer: pointer.valueGradient, strides: stridesOf('value'), ...keys, width: config.valueDim };
    store(frame, place, work, value, sums.values, undefined);
  }
  if (sums.channels.length === 0) return;
  // `work.head` is the first of the group where keys are owned.
  const queries = { head: work.head, start: work.queryStart, length: work.queryLength };
  const scale = b.loadParameter(smScale);
  const channels = ownsQueries
    ? { pointer: pointer.queryGradient, strides: stridesOf('query'), ...queries, width: config.headDim }
    : { pointer: pointer.keyGradient, strides: stridesOf('key'), ...keys, width: config.headDim };
  store(frame, place, work, channels, sums.channels, scale);
}

function store(
  { b, config }: Owner,
  { warpRow, g, t2 }: ThreadPlace,
  { sequence, firstOwn }: Work,
  target: Target,
  sums: readonly (readonly Reg<'f32'>[])[],
  scale: Reg<'f32'> | undefined,
): void {
  const type = config.gradientType;
  const { head, start, length, width } = target;
  const base = headAddress(b, b.loadPointer(target.pointer), { sequence, head }, target.strides);
  const tokenStride = b.loadParameter(target.strides.token);
  for (let r = 0; r < 2; r++) {
    const row = b.add(b.add(firstOwn, warpRow), b.add(g, 8 * r));
    const address = offset64(b, base, b.add(start, row), tokenStride);
    const inside = b.setp('lt', row, length);
    const pairs = sums.slice(0, Math.ceil(width / 8)).map((fragment) => {
      const [low, high] = [at(fragment, 2 * r), at(fragment, 2 * r + 1)];
      return (): Pair => (scale === undefined ? [low, high] : [b.mul(low, scale), b.mul(high, scale)]);
    });
    if (type !== 'float32' && width % 32 === 0) storeWide(b, pairs, offset(b, address, t2, 8), type, t2, inside);
    else {
      b.if(inside, () => {
        const own = offset(b, address, t2, BYTES[type]);
        for (const [n, pair] of pairs.entries()) {
          storePair(b, pair(), own, { type, first: n * 8, width, t2, inside: undefined });
        }
      });
    }
  }
}

type Pair = [Reg<'f32'>, Reg<'f32'>];

/** The four lanes of a row trade their pairs of channels so that each stores 16 bytes: rows of gradients are multiples of them. */
function storeWide(
  b: KernelBuilder,
  pairs: readonly (() => Pair)[],
  own: Reg<'global'>,
  type: 'float16' | 'bfloat16',
  t2: Reg<'u32'>,
  inside: Reg<'pred'>,
): void {
  const [odd, upper] = [2, 4].map((bit) => b.setp('ne', b.and(t2, bit), 0)) as [Reg<'pred'>, Reg<'pred'>];
  for (let first = 0; first < pairs.length; first += 4) {
    const words = pairs.slice(first, first + 4).map((pair) => {
      return b.as(b.cvtPack(type === 'float16' ? 'f16x2' : 'bf16x2', ...pair()), 'b32');
    });
    const whole = transposeInQuad(b, words, odd, upper);
    b.when(inside, () => b.stVector(whole, own, first * 16));
  }
}
