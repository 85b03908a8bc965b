/** Dense layers: everything of the model that is not attention. */

/** `x W + b` for x `[rows,inputs]`, W `[inputs,outputs]`, b `[outputs]`; all row-major float32. */
export interface Dense {
  readonly inputs: number;
  readonly outputs: number;
  apply(x: Float32Array, rows: number): Float32Array;
}

/** Columns of W side by side in one panel. Two rows of x at a time make 12 sums, as many as V8 keeps in registers. */
const PANEL = 6;
/** Rows of x kept in float64 at a time, so that they stay in the second-level cache. */
const ROW_BLOCK = 64;

/**
 * W is stored once as float64 panels of six columns: V8 has only float64 arithmetic, and converting each element at
 * every use would take longer than the multiplication. Sums are in float64, results are rounded to float32.
 */
export function createDense(kernel: Float32Array, bias: Float32Array, inputs: number, outputs: number): Dense {
  const panels = Math.ceil(outputs / PANEL);
  const packed = new Float64Array(panels * inputs * PANEL);
  for (let row = 0; row < inputs; row++) {
    for (let column = 0; column < outputs; column++) {
      const panel = Math.floor(column / PANEL);
      packed[(panel * inputs + row) * PANEL + (column % PANEL)] = kernel[row * outputs + column] as number;
    }
  }

  function apply(x: Float32Array, rows: number): Float32Array {
    const result = new Float32Array(rows * outputs);
    // One row more than fits: an odd last row is computed together with a row of zeros.
    const block = new Float64Array((ROW_BLOCK + 1) * inputs);
    const sums = new Float64Array(2 * PANEL);
    for (let first = 0; first < rows; first += ROW_BLOCK) {
      const count = Math.min(ROW_BLOCK, rows - first);
      block.set(x.subarray(first * inputs, (first + count) * inputs));
      block.fill(0, count * inputs, (count + 1) * inputs);
      for (let panel = 0; panel < panels; panel++) {
        const column = panel * PANEL;
        for (let row = 0; row < count; row += 2) {
          multiplyTile(block, row * inputs, packed, panel * inputs * PANEL, inputs, sums);
          for (let r = 0; r < Math.min(2, count - row); r++) {
            const at = (first + row + r) * outputs + column;
            for (let c = 0; c < Math.min(PANEL, outputs - column); c++) {
              result[at + c] = (sums[r * PANEL + c] as number) + (bias[column + c] as number);
            }
          }
        }
      }
    }
    return result;
  }

  return { inputs, outputs, apply };
}

/** sums[r][c] = row r . column c, for two rows and six columns. */
function multiplyTile(
  block: Float64Array,
  rowAt: number,
  packed: Float64Array,
  panelAt: number,
  inputs: number,
  sums: Float64Array,
): void {
  const nextRowAt = rowAt + inputs;
  let s00 = 0;
  let s01 = 0;
  let s02 = 0;
  let s03 = 0;
  let s04 = 0;
  let s05 = 0;
  let s10 = 0;
  let s11 = 0;
  let s12 = 0;
  let s13 = 0;
  let s14 = 0;
  let s15 = 0;
  for (let i = 0, p = panelAt; i < inputs; i++, p += PANEL) {
    const x = block[rowAt + i] as number;
    const y = block[nextRowAt + i] as number;
    const w0 = packed[p] as number;
    const w1 = packed[p + 1] as number;
    const w2 = packed[p + 2] as number;
    const w3 = packed[p + 3] as number;
    const w4 = packed[p + 4] as number;
    const w5 = packed[p + 5] as number;
    s00 += x * w0;
    s01 += x * w1;
    s02 += x * w2;
    s03 += x * w3;
    s04 += x * w4;
    s05 += x * w5;
    s10 += y * w0;
    s11 += y * w1;
    s12 += y * w2;
    s13 += y * w3;
    s14 += y * w4;
    s15 += y * w5;
  }
  sums[0] = s00;
  sums[1] = s01;
  sums[2] = s02;
  sums[3] = s03;
  sums[4] = s04;
  sums[5] = s05;
  sums[6] = s10;
  sums[7] = s11;
  sums[8] = s12;
  sums[9] = s13;
  sums[10] = s14;
  sums[11] = s15;
}
