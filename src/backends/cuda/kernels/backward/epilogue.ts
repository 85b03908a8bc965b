/** Stores the sums of own tokens as gradients. */
import type { Parameter, Reg } from '../../ptx/types.ts';
import { offset, offset64 } from '../parts/addresses.ts';
import { BYTES } from '../parts/elements.ts';
import { headAddress, storePair } from '../parts/epilogue.ts';
import { at } from '../parts/lists.ts';
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
    const rowAddress = offset64(b, base, b.add(start, row), tokenStride);
    const address = offset(b, rowAddress, t2, BYTES[type]);
    b.if(b.setp('lt', row, length), () => {
      for (let n = 0; n < sums.length && n * 8 < width; n++) {
        const pair = [0, 1].map((j) => {
          const sum = at(at(sums, n), 2 * r + j);
          return scale === undefined ? sum : b.mul(sum, scale);
        });
        storePair(b, [at(pair, 0), at(pair, 1)], address, { type, first: n * 8, width, t2, inside: undefined });
      }
    });
  }
}
