import { expect, test } from 'vitest';
import { type OperandLayout, tensor } from '../../tensor/tensor.ts';
import { keep, stageOperand } from './staging.ts';

const extent = { batch: 2, heads: 3, tokens: 4, dim: 5 };

function check(layout: OperandLayout, elements: number): { gathered: boolean } {
  const data = Float32Array.from({ length: elements }, (_, i) => i + 1);
  const view = tensor(data, [elements]);
  const staged = stageOperand('q', view, layout, extent);
  const kept = keep(staged);
  expect(kept.runs).toBeUndefined();
  const values = new Float32Array(kept.bytes.buffer);
  for (let b = 0; b < extent.batch; b++) {
    for (let h = 0; h < extent.heads; h++) {
      for (let t = 0; t < extent.tokens; t++) {
        for (let c = 0; c < extent.dim; c++) {
          const at = ({ offset, batchStride, headStride, tokenStride }: OperandLayout) =>
            offset + b * batchStride + h * headStride + t * tokenStride + c;
          expect(values[at(staged.layout)]).toBe(data[at(layout)]);
        }
      }
    }
  }
  expect(staged.bytes.buffer).toBe(data.buffer);
  return { gathered: staged.runs !== undefined };
}

test('operands that lie close together are not gathered', () => {
  expect(check({ offset: 0, batchStride: 60, headStride: 20, tokenStride: 5 }, 120).gathered).toBe(false);
  expect(check({ offset: 7, batchStride: 60, headStride: 5, tokenStride: 15 }, 130).gathered).toBe(false);
  // Broadcast over heads and batch.
  expect(check({ offset: 2, batchStride: 0, headStride: 0, tokenStride: 5 }, 30).gathered).toBe(false);
});

test('a part of a packed QKV tensor is gathered', () => {
  expect(check({ offset: 15, batchStride: 180, headStride: 5, tokenStride: 45 }, 400).gathered).toBe(true);
  expect(check({ offset: 15, batchStride: 600, headStride: 15, tokenStride: 60 }, 1300).gathered).toBe(true);
});
