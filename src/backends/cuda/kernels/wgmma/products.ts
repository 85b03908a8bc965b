/** The products of a consumer, and how their sums join the output. */
import type { Reg } from '../../ptx/types.ts';
import {
  advanceDescriptor,
  matrixDescriptor,
  wgmma,
  wgmmaCommitGroup,
  wgmmaFence,
  wgmmaWaitGroup,
} from '../../ptx/wgmma.ts';
import { MAGIC_BITS } from '../parts/constants.ts';
import { at } from '../parts/lists.ts';
import type { RingPlace } from '../parts/ring.ts';
import { type Frame, WGMMA_BLOCK_K } from './frame.ts';
import type { ConsumerThread } from './rows.ts';
import type { Item, Scores } from './state.ts';

/** Matrix descriptors of the group's rows of Q, and of stage 0 of K and V. */
export interface Descriptors {
  readonly query: Reg<'u64'>;
  readonly key: Reg<'u64'>;
  readonly value: Reg<'u64'>;
}

export function descriptorsOf({ b, plan, tiles, shared, fp8 }: Frame, { groupQuery }: ConsumerThread): Descriptors {
  const { rowLayout } = plan;
  const swizzle = rowLayout.rowBytes === 128 ? '128B' : '64B';
  const strideBytes = 8 * rowLayout.rowBytes;
  return {
    query: matrixDescriptor(b, groupQuery, { strideBytes, swizzle }),
    key: matrixDescriptor(b, b.add(shared, tiles.key.base), { strideBytes, swizzle }),
    value: matrixDescriptor(
      b,
      b.add(shared, tiles.value.base),
      fp8
        ? { strideBytes: 1024, swizzle: '128B' }
        : {
            strideBytes: 8 * plan.valueLayout.rowBytes,
            leadingBytes: plan.valueBlockBytes,
            swizzle: plan.valueSwizzle,
          },
    ),
  };
}

/** A consumer's position in the rings, and which of its next stages it knows to be ready. */
export interface Stages {
  readonly key: RingPlace;
  readonly value: RingPlace;
  readonly keyReady: Reg<'pred'>;
  readonly valueReady: Reg<'pred'>;
}

/** Testing a barrier takes 40 clocks, so the barriers of the next products are tested long before. */
export function testNextStages({ keys, values }: Frame, { key, value, keyReady, valueReady }: Stages): void {
  keys.testFull(key, keyReady);
  values.testFull(value, valueReady);
}

/** Products of 16-bit operands, of 16 elements a step. */
const HALF_PRODUCTS = { f16: 'k16.f32.f16.f16', bf16: 'k16.f32.bf16.bf16' } as const;

/** INT32 scores are summed on top of the bits of 1.5 * 2^23, so that read as floats they are 1.5 * 2^23 + q . k. */
export function seedScores({ b, exact }: Frame, { integers }: Scores): void {
  if (exact) return;
  for (const register of integers) b.set(register, MAGIC_BITS);
}

const stageOf = ({ b }: Frame, descriptor: Reg<'u64'>, { stage }: RingPlace, bytes: number) =>
  b.add(descriptor, b.cvt('u64', b.mul(stage, bytes / 16)));

/** Sends S = Q K^T of the stage at hand to the tensor cores. */
export function issueScores(
  frame: Frame,
  { query, key }: Descriptors,
  stages: Stages,
  { integers, floats }: Scores,
  ready?: Reg<'pred'>,
): void {
  const { b, config, plan, bytes } = frame;
  const { rowBytes } = plan.rowLayout;
  frame.keys.awaitFull(stages.key, ready);
  const keys = stageOf(frame, key, stages.key, bytes.keyStage);
  wgmmaFence(b);
  for (let byte = 0; byte < config.qkRowBytes; byte += 32) {
    const [block, inBlock] = [Math.floor(byte / rowBytes), byte % rowBytes];
    const q = advanceDescriptor(b, query, block * bytes.queryBlock + inBlock);
    const k = advanceDescriptor(b, keys, block * bytes.keyBlock + inBlock);
    if (config.qkFormat === 's8') wgmma(b, WGMMA_BLOCK_K, 'k32.s32.s8.s8', integers, q, k, true);
    else wgmma(b, WGMMA_BLOCK_K, HALF_PRODUCTS[config.qkFormat], floats, q, k, byte > 0);
  }
  wgmmaCommitGroup(b);
}

/** Columns of P V that are summed at a time, and where. */
interface ValueColumns {
  readonly first: number;
  readonly count: number;
  readonly into: readonly Reg<'f32'>[];
}

export const allColumns = ({ output }: Item): ValueColumns => ({
  first: 0,
  count: output.columns,
  into: output.sums,
});

/**
 * Sends columns of P V of the stage at hand to the tensor cores.
 *
 * @param ready whether the stage is known to be full; `waited`: it is
 */
export function issueValues(
  { frame, output }: Item,
  { value }: Descriptors,
  stages: Stages,
  { first, count, into }: ValueColumns,
  ready?: Reg<'pred'> | 'waited',
): void {
  const { b, config, plan, bytes, fp8 } = frame;
  if (ready !== 'waited') frame.values.awaitFull(stages.value, ready);
  const values = stageOf(frame, value, stages.value, bytes.valueStage);
  wgmmaFence(b);
  output.weights.forEach((fragment, k) => {
    const accumulate = !config.promoted || k > 0;
    if (fp8) {
      const p = fragment.map((register) => b.as(register, 'e4m3x4'));
      const v = advanceDescriptor(b, values, first * 128 + k * 32);
      wgmma(b, count, 'k32.f32.e4m3.e4m3', into, p, v, accumulate);
    } else {
      const v = advanceDescriptor(b, values, k * 16 * plan.valueLayout.rowBytes);
      if (config.pvFormat === 'bf16') {
        const p = fragment.map((register) => b.as(register, 'bf16x2'));
        wgmma(b, count, HALF_PRODUCTS.bf16, into, p, v, accumulate, true);
      } else {
        const p = fragment.map((register) => b.as(register, 'f16x2'));
        wgmma(b, count, HALF_PRODUCTS.f16, into, p, v, accumulate, true);
      }
    }
  });
  wgmmaCommitGroup(b);
}

/** Adds what the tensor cores summed to the output, where they do not sum into the output itself. */
export function promote({ frame, output }: Item): void {
  const { b, config } = frame;
  if (!config.promoted) return;
  b.section('promotion to float32');
  for (const [i, register] of output.registers.entries()) {
    b.fma(register, output.factorOf(i), at(output.sums, i), register);
  }
}

/**
 * Where the output is not multiplied with every promotion: multiplies it now, if the maximum of a row of this warp
 * grew.
 */
export function rescale({ frame, state, output }: Item): void {
  const { b, config } = frame;
  if (config.promoted) return;
  const grown = b.orPred(b.setp('ne', at(state.factor, 0), 1), b.setp('ne', at(state.factor, 1), 1));
  b.if(b.voteAny(grown), () => {
    b.section('rescale the output to the new maximum');
    for (const [i, register] of output.registers.entries()) b.mul(register, output.factorOf(i), register);
  });
}

/** PV to its end, as many columns at a time as there are registers for. */
export function multiplyInChunks(item: Item, descriptors: Descriptors, stages: Stages): void {
  const { frame, output } = item;
  const { b, config } = frame;
  const { columns, registers } = output;
  if (config.valueChunk >= columns) {
    issueValues(item, descriptors, stages, allColumns(item));
    wgmmaWaitGroup(b, 0);
    promote(item);
    return;
  }
  for (let first = 0; first < columns; first += config.valueChunk) {
    const count = Math.min(config.valueChunk, columns - first);
    const into = b.regs('f32', count / 2);
    issueValues(item, descriptors, stages, { first, count, into }, first === 0 ? undefined : 'waited');
    wgmmaWaitGroup(b, 0);
    for (const [i, sum] of into.entries()) {
      const register = at(registers, first / 2 + i);
      b.fma(register, output.factorOf(first / 2 + i), sum, register);
    }
  }
}
