/** What a thread holds in registers from tile to tile. */
import type { Reg } from '../../ptx/types.ts';
import { MAGIC_BITS } from '../parts/constants.ts';
import { at } from '../parts/lists.ts';
import type { EachScore } from '../parts/scores.ts';
import { BLOCK_K } from './config.ts';
import type { Frame } from './frame.ts';

/** The online softmax of the thread's rows. */
export interface SoftmaxState {
  /** -Infinity before a row's first key. */
  readonly max: readonly Reg<'f32'>[];
  /** This thread's part of P's sums; with P in NVFP4 whole sums of the rounded P. */
  readonly sum: readonly Reg<'f32'>[];
  /** With P in NVFP4 where the logsumexp is asked for: this thread's part of P's sums before it is rounded. */
  readonly exactSum: readonly Reg<'f32'>[];
}

/** Sums of PV by 16-row tile and 8-channel tile: in FP32, or in FP16 throughout. */
export interface Output {
  readonly floats: readonly (readonly (readonly Reg<'f32'>[])[])[];
  readonly halves: readonly (readonly (readonly Reg<'f16x2'>[])[])[];
  /** What V's tile was divided by whose sums these are, with V in NVFP4; 0 before the first that is not zeros. */
  readonly unit: Reg<'f32'> | undefined;
}

/** What products start from. */
export interface Seeds {
  /** The bits of 1.5 * 2^23. */
  readonly magic: readonly Reg<'s32'>[];
  readonly zeros: readonly Reg<'f32'>[];
  /** The same registers, as scores are kept. */
  readonly zeroScores: readonly Reg<'s32'>[];
  readonly zeroHalves: readonly Reg<'f16x2'>[];
}

export function makeState({ b, config, rowTiles, threadRows, channelTiles, fp4Values }: Frame) {
  const times = <T>(count: number, make: () => T) => Array.from({ length: count }, make);
  const max = times(threadRows, () => b.constant('f32', Number.NEGATIVE_INFINITY));
  const sum = times(threadRows, () => b.constant('f32', 0));
  const exactSum = times(config.quantizedWeights && config.lse ? threadRows : 0, () => b.constant('f32', 0));
  const halfSums = config.accumulate === 'f16';
  const output: { floats: Reg<'f32'>[][][]; halves: Reg<'f16x2'>[][][] } = { floats: [], halves: [] };
  for (let m = 0; m < rowTiles; m++) {
    output.floats.push(times(halfSums ? 0 : channelTiles, () => times(4, () => b.constant('f32', 0))));
    output.halves.push(times(halfSums ? channelTiles : 0, () => times(2, () => b.as(b.constant('b32', 0), 'f16x2'))));
  }
  const magic = times(4, () => b.constant('s32', MAGIC_BITS));
  const zeros = times(4, () => b.constant('f32', 0));
  const zeroScores = zeros.map((zero) => b.as(zero, 's32'));
  const zeroHalves = zeros.slice(0, 2).map((zero) => b.as(zero, 'f16x2'));
  const unit = fp4Values ? b.constant('f32', 0) : undefined;
  return {
    softmax: { max, sum, exactSum },
    output: { ...output, unit },
    seeds: { magic, zeros, zeroScores, zeroHalves },
  };
}

/**
 * Scores of a tile by 16-row tile and 8-key tile. Index i of a fragment: row g + 8 * (i >> 1), column 2t + (i & 1), or
 * with V in NVFP4 where {@link Frame.columnOf} says. As floats they are 1.5 * 2^23 + q . k, or in base 2 once they are
 * finished.
 */
export interface Scores {
  readonly integers: readonly (readonly (readonly Reg<'s32'>[])[])[];
  readonly floats: readonly (readonly (readonly Reg<'f32'>[])[])[];
  readonly each: EachScore;
  /** With P in NVFP4: for each row of the thread and 32 keys, the largest score of the thread's 16, then their scale. */
  readonly blocks: readonly (readonly Reg<'f32'>[])[];
}

export function makeScores({ b, config, rowTiles, threadRows, columnOf }: Frame): Scores {
  const keyTiles = BLOCK_K / 8;
  const integers = Array.from({ length: rowTiles }, () => Array.from({ length: keyTiles }, () => b.regs('s32', 4)));
  const floats = integers.map((tiles) => tiles.map((fragment) => fragment.map((register) => b.as(register, 'f32'))));
  const each: EachScore = (body) => {
    for (let m = 0; m < rowTiles; m++) {
      for (let n = 0; n < keyTiles; n++) {
        for (let i = 0; i < 4; i++) {
          const row = 2 * m + (i >> 1);
          if (row < threadRows) body(at(at(at(floats, m), n), i), row, columnOf(n, i & 1));
        }
      }
    }
  };
  const blocks = Array.from({ length: config.quantizedWeights ? threadRows : 0 }, () => b.regs('f32', BLOCK_K / 32));
  return { integers, floats, each, blocks };
}
