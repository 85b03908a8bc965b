import { describe, expect, it } from 'vitest';
import { emptyTensor, tensor } from '../tensor/tensor.ts';
import { NO_LIMIT } from './band.ts';
import {
  createProblem,
  createVarlenProblem,
  lseShapeOf,
  outputLayoutOf,
  outputShapeOf,
  sequencesOf,
} from './problem.ts';

const t = (...shape: number[]) => emptyTensor(shape, 'float16');
const hnd = createProblem(t(2, 6, 5, 32), t(2, 3, 7, 32), t(2, 3, 7, 8), {});

describe('createProblem', () => {
  it('fills in every default', () => {
    expect(hnd).toEqual({
      batch: 2,
      queryHeads: 6,
      kvHeads: 3,
      queryLength: 5,
      keyLength: 7,
      headDim: 32,
      valueDim: 8,
      dtype: 'float16',
      location: 'cpu',
      device: 0,
      q: { offset: 0, batchStride: 960, headStride: 160, tokenStride: 32 },
      k: { offset: 0, batchStride: 672, headStride: 224, tokenStride: 32 },
      v: { offset: 0, batchStride: 168, headStride: 56, tokenStride: 8 },
      tensorLayout: 'HND',
      sequences: undefined,
      mask: undefined,
      band: { lower: -NO_LIMIT, upper: NO_LIMIT, align: 0 },
      softcap: 0,
      smScale: 1 / Math.sqrt(32),
      returnLse: false,
    });
  });

  it('reads NHD as the same problem with other strides', () => {
    const nhd = createProblem(t(2, 5, 6, 32), t(2, 7, 3, 32), t(2, 7, 3, 8), { tensorLayout: 'NHD' });
    expect(nhd).toMatchObject({ batch: 2, queryHeads: 6, kvHeads: 3, queryLength: 5, keyLength: 7 });
    expect(nhd.k).toEqual({ offset: 0, batchStride: 672, headStride: 32, tokenStride: 96 });
  });

  it.each([
    [[7], [0, 0, 0, 1]],
    [
      [5, 1],
      [0, 0, 1, 0],
    ],
    [
      [2, 1, 1, 7],
      [7, 0, 0, 1],
    ],
    [
      [6, 5, 7],
      [0, 35, 7, 1],
    ],
    [[], [0, 0, 0, 0]],
  ])('a mask of shape %j has strides %j', (shape, strides) => {
    const mask = tensor(new Uint8Array(500), shape);
    expect(createProblem(t(2, 6, 5, 32), t(2, 3, 7, 32), t(2, 3, 7, 8), { attnMask: mask }).mask).toEqual({
      kind: 'boolean',
      dtype: 'bool',
      offset: 0,
      strides,
    });
  });
});

describe('shapes of results', () => {
  it('are contiguous in the layout of the operands', () => {
    expect(outputShapeOf(hnd)).toEqual([2, 6, 5, 8]);
    expect(outputLayoutOf(hnd)).toEqual({ offset: 0, batchStride: 240, headStride: 40, tokenStride: 8 });
    expect(lseShapeOf(hnd)).toEqual([2, 6, 5]);
    const nhd = { ...hnd, tensorLayout: 'NHD' as const };
    expect(outputShapeOf(nhd)).toEqual([2, 5, 6, 8]);
    expect(outputLayoutOf(nhd)).toEqual({ offset: 0, batchStride: 240, headStride: 8, tokenStride: 48 });
  });

  it('follow the packed sequences of varlen', () => {
    const problem = createVarlenProblem(t(12, 6, 32), t(20, 3, 32), t(20, 3, 8), [0, 4, 4, 9], [0, 5, 11, 20], {});
    expect(problem).toMatchObject({ batch: 3, queryLength: 5, keyLength: 9 });
    expect(outputShapeOf(problem)).toEqual([9, 6, 8]);
    expect(outputLayoutOf(problem)).toEqual({ offset: 0, batchStride: 0, headStride: 8, tokenStride: 48 });
    expect(lseShapeOf(problem)).toEqual([6, 9]);
    expect(sequencesOf(problem)).toEqual([
      { index: 0, queryStart: 0, queryLength: 4, keyStart: 0, keyLength: 5 },
      { index: 1, queryStart: 4, queryLength: 0, keyStart: 5, keyLength: 6 },
      { index: 2, queryStart: 4, queryLength: 5, keyStart: 11, keyLength: 9 },
    ]);
  });

  it('count every batch entry of a dense problem as a sequence', () => {
    expect(sequencesOf(hnd)).toHaveLength(2);
    expect(sequencesOf(hnd)[1]).toEqual({ index: 1, queryStart: 0, queryLength: 5, keyStart: 0, keyLength: 7 });
  });
});
