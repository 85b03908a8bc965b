/** Exact attention for comparison, in parts, so that progress can be shown and long lengths can be sampled. */

import type { TensorLayout } from '../attention/options.ts';
import { createProblem } from '../attention/problem.ts';
import { attentionExact } from '../reference/exact.ts';
import { type Accuracy, compare } from '../reference/metrics.ts';
import { toFloat32 } from '../tensor/access.ts';
import { slice, type Tensor } from '../tensor/tensor.ts';

/** A call in the terms of `sageattn`, causal aligned at the top left. */
export interface ExactCall {
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly tensorLayout: TensorLayout;
  readonly isCausal?: boolean;
  readonly smScale?: number;
  /** `[B,1,1,Lk]` */
  readonly attnMask?: Tensor | undefined;
}

/** Query rows from `start` to before `end`. */
export interface RowRange {
  readonly start: number;
  readonly end: number;
}

/** Rows computed between two looks at the event loop. */
const ROWS_AT_A_TIME = 64;

const tokenAxis = ({ tensorLayout }: ExactCall) => (tensorLayout === 'HND' ? 2 : 1);
export const queryLength = (call: ExactCall) => call.q.shape[tokenAxis(call)] as number;

/** All rows, or, of many, `sample` rows in short runs spread evenly from the first to the last. */
export function sampleRows(length: number, sample: number): RowRange[] {
  if (length <= sample) return [{ start: 0, end: length }];
  const run = Math.min(8, sample);
  const runs = Math.floor(sample / run);
  return Array.from({ length: runs }, (_, i) => {
    const start = runs === 1 ? 0 : Math.round((i * (length - run)) / (runs - 1));
    return { start, end: start + run };
  });
}

function exactRange(call: ExactCall, { start, end }: RowRange): Float64Array {
  const { k, v, attnMask, tensorLayout, smScale } = call;
  const q = slice(call.q, tokenAxis(call), start, end);
  const problem = createProblem(q, k, v, {
    tensorLayout,
    // Row `start + i` of a causal call is row i here, and may look `start` keys further to the right.
    ...(call.isCausal && { windowSize: [-1, start] }),
    ...(smScale !== undefined && { smScale }),
    ...(attnMask && { attnMask }),
  });
  return attentionExact(problem, { q, k, v, attnMask }).output;
}

/** Splits ranges into short ones and computes them in turn; `onRows` hears of the rows done. */
async function* exactParts(call: ExactCall, ranges: readonly RowRange[], onRows: (rows: number) => void) {
  for (const { start, end } of ranges) {
    for (let row = start; row < end; row += ROWS_AT_A_TIME) {
      const range = { start: row, end: Math.min(end, row + ROWS_AT_A_TIME) };
      yield { range, output: exactRange(call, range) };
      onRows(range.end - range.start);
      // Not setImmediate: the playground runs this in a browser.
      await new Promise((resolve) => setTimeout(resolve));
    }
  }
}

/** The whole output, `[B,L,H,Dv]` row-major, of a call in NHD layout with one value width. */
export async function exactOutput(call: ExactCall, onRows: (rows: number) => void): Promise<Float32Array> {
  const [batch, length, heads, dim] = [...call.q.shape.slice(0, 3), call.v.shape[3]] as [
    number,
    number,
    number,
    number,
  ];
  const width = heads * dim;
  const result = new Float32Array(batch * length * width);
  for await (const { range, output } of exactParts(call, [{ start: 0, end: length }], onRows)) {
    const size = (range.end - range.start) * width;
    for (let b = 0; b < batch; b++) {
      result.set(output.subarray(b * size, (b + 1) * size), (b * length + range.start) * width);
    }
  }
  return result;
}

/** Accuracy of `output` on some query rows, against float64. */
export async function accuracyOnRows(
  call: ExactCall,
  output: Tensor,
  ranges: readonly RowRange[],
  onRows: (rows: number) => void = () => {},
): Promise<Accuracy> {
  const actual: Float32Array[] = [];
  const expected: Float64Array[] = [];
  for await (const part of exactParts(call, ranges, onRows)) {
    expected.push(part.output);
    actual.push(toFloat32(slice(output, tokenAxis(call), part.range.start, part.range.end)));
  }
  return compare(concatenate(Float32Array, actual), concatenate(Float64Array, expected));
}

function concatenate<T extends Float32Array | Float64Array>(type: new (length: number) => T, parts: readonly T[]): T {
  const whole = new type(parts.reduce((total, part) => total + part.length, 0));
  let end = 0;
  for (const part of parts) {
    whole.set(part, end);
    end += part.length;
  }
  return whole;
}
