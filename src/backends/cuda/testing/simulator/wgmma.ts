/**
 * `wgmma` in the simulator, from matrix descriptors and swizzled tiles. Products read their operands and write their
 * sums only when they are waited for; the sums hold nonsense until then.
 *
 * FP8 sums keep 13 mantissa bits and cut off what lies below, see `accumulateTile` of the reference.
 */
import { BRAIN, E4M3, HALF } from './arithmetic.ts';
import { swizzled } from './async-memory.ts';
import type { AsyncUnits } from './mbarrier.ts';
import { SHARED_BASE, SimulationError } from './memory.ts';

/** Mantissa bits that FP8 products are aligned and cut to. */
const FP8_BITS = 13;
const POISON = 0x7fc0dead;

interface Product {
  readonly n: number;
  readonly type: 's8' | 'e4m3' | 'f16' | 'bf16';
  /** Row of A's descriptor, or of its registers. */
  readonly aDescriptor: readonly [low: number, high: number] | undefined;
  readonly aRows: readonly number[];
  readonly bDescriptor: readonly [low: number, high: number];
  readonly transposeB: boolean;
  readonly accumulate: boolean;
  readonly sums: Sums;
  readonly what: string;
}

/** Accumulator registers under way: their values, and how many products still write them. */
interface Sums {
  readonly rows: readonly number[];
  readonly values: Float64Array;
  products: number;
}

interface Registers {
  readonly index: number;
  readonly active: number;
  readonly u: Uint32Array;
  readonly i: Int32Array;
  readonly f: Float32Array;
  readonly h: Uint16Array;
  readonly bytes: Uint8Array;
}

/** Elements that a step of a product sums over: 32 bytes. */
const depthOf = (type: Product['type']) => (type === 'f16' || type === 'bf16' ? 16 : 32);

const floatBits = new Float32Array(1);
const floatWords = new Uint32Array(floatBits.buffer);

/** Products that a warp has under way, and the groups that it waits for. */
export class AsyncWarp {
  readonly #warp: Registers;
  readonly units: AsyncUnits;
  readonly #groups: Product[][] = [[]];
  readonly #sums = new Map<number, Sums>();
  /** Why it does not run. */
  blocked: string | undefined;
  /** It stopped of its own accord, not at a barrier of the CTA. */
  yielded = false;
  /** It waits for an mbarrier since this count of events. */
  failedAt = -1;
  /** The instruction that it last waited at. */
  waitsFor = 'the start';

  constructor(warp: Registers, units: AsyncUnits) {
    this.#warp = warp;
    this.units = units;
  }

  #whole(what: string): void {
    if (this.#warp.active !== 32) throw new SimulationError(`${what}: ${this.#warp.active} lanes`);
  }

  tryWait(address: number, parity: number, what: string): number {
    this.yielded = true;
    this.waitsFor = what;
    const done = this.units.test(address, parity, this.#warp.index, what);
    this.failedAt = done ? -1 : this.units.progress;
    return done ? 1 : 0;
  }

  named(id: number, threads: number, waits: boolean, what: string): void {
    this.#whole(what);
    this.yielded = true;
    this.units.named(id, threads, this, waits);
  }

  issue(
    type: Product['type'],
    n: number,
    d: readonly number[],
    a: readonly number[],
    bRow: number,
    accumulate: boolean,
    transposeB: boolean,
    what: string,
  ): void {
    this.#whole(what);
    const { u } = this.#warp;
    const descriptor = (row: number) => [u[row] as number, u[row + 32] as number] as const;
    const key = d[0] as number;
    let sums = this.#sums.get(key);
    if (sums === undefined) {
      sums = { rows: d, values: new Float64Array(d.length * 32), products: 0 };
      const from = type === 's8' ? this.#warp.i : this.#warp.f;
      d.forEach((row, r) => {
        (sums as Sums).values.set(from.subarray(row, row + 32), r * 32);
        u.fill(POISON, row, row + 32);
      });
      this.#sums.set(key, sums);
    }
    sums.products++;
    (this.#groups.at(-1) as Product[]).push({
      n,
      type,
      aDescriptor: a.length === 1 ? descriptor(a[0] as number) : undefined,
      aRows: a,
      bDescriptor: descriptor(bRow),
      transposeB,
      accumulate,
      sums,
      what,
    });
  }

  commit(): void {
    this.#groups.push([]);
  }

  wait(pending: number): void {
    while (this.#groups.length - 1 > pending) {
      for (const product of this.#groups.shift() as Product[]) this.#execute(product);
    }
  }

  /** Elements of a shared operand, `rows` x 32 bytes of k. */
  #operand(
    [low, high]: readonly [number, number],
    type: Product['type'],
    firstRow: number,
    rows: number,
    what: string,
  ) {
    const { shared } = this.units;
    const start = (low & 0x3fff) << 4;
    const stride = (high & 0x3fff) << 4;
    const swizzle = [0, 128, 64, 32][high >>> 30] as number;
    const k = depthOf(type);
    const matrix = new Float64Array(rows * k);
    for (let r = 0; r < rows; r++) {
      const row = firstRow + r;
      for (let chunk = 0; chunk < 2; chunk++) {
        const address = swizzled(start + (row >> 3) * stride + (row & 7) * swizzle + chunk * 16, swizzle);
        const at = address - SHARED_BASE;
        shared.productReads(at, what);
        for (let e = 0; e < k / 2; e++) matrix[r * k + chunk * (k / 2) + e] = this.#element(at, e, type);
      }
    }
    return matrix;
  }

  /** The same where rows of shared memory run along n. */
  #transposed([low, high]: readonly [number, number], type: Product['type'], n: number, what: string): Float64Array {
    const { shared } = this.units;
    const start = (low & 0x3fff) << 4;
    const leading = ((low >>> 16) & 0x3fff) << 4;
    const stride = (high & 0x3fff) << 4;
    const swizzle = [0, 128, 64, 32][high >>> 30] as number;
    const perRow = swizzle / 2;
    const matrix = new Float64Array(n * 16);
    for (let k = 0; k < 16; k++) {
      for (let first = 0; first < n; first += 8) {
        const line = start + Math.floor(first / perRow) * leading + (k >> 3) * stride + (k & 7) * swizzle;
        const at = swizzled(line + (first % perRow) * 2, swizzle) - SHARED_BASE;
        shared.productReads(at, what);
        for (let e = 0; e < 8; e++) matrix[(first + e) * 16 + k] = this.#element(at, e, type);
      }
    }
    return matrix;
  }

  #element(at: number, e: number, type: Product['type']): number {
    const { bytes, view } = this.units.shared;
    if (type === 's8') return view.getInt8(at + e);
    if (type === 'e4m3') return E4M3[bytes[at + e] as number] as number;
    return (type === 'bf16' ? BRAIN : HALF)[view.getUint16(at + 2 * e, true)] as number;
  }

  #fragment(rows: readonly number[], type: Product['type']): Float64Array {
    const { bytes, h } = this.#warp;
    const k = depthOf(type);
    const per = k / 8;
    const matrix = new Float64Array(16 * k);
    rows.forEach((row, register) => {
      for (let lane = 0; lane < 32; lane++) {
        const at = ((lane >> 2) + 8 * (register & 1)) * k + (register >> 1) * (k / 2) + (lane & 3) * per;
        for (let e = 0; e < per; e++) {
          matrix[at + e] =
            k === 16
              ? ((type === 'bf16' ? BRAIN : HALF)[h[(row + lane) * 2 + e] as number] as number)
              : type === 's8'
                ? ((bytes[(row + lane) * 4 + e] as number) << 24) >> 24
                : (E4M3[bytes[(row + lane) * 4 + e] as number] as number);
        }
      }
    });
    return matrix;
  }

  #execute({ n, type, aDescriptor, aRows, bDescriptor, transposeB, accumulate, sums, what }: Product): void {
    const k = depthOf(type);
    const warpInGroup = this.#warp.index & 3;
    const left =
      aDescriptor === undefined
        ? this.#fragment(aRows, type)
        : this.#operand(aDescriptor, type, warpInGroup * 16, 16, what);
    const right = transposeB
      ? this.#transposed(bDescriptor, type, n, what)
      : this.#operand(bDescriptor, type, 0, n, what);
    const { values, rows } = sums;
    for (let lane = 0; lane < 32; lane++) {
      for (let r = 0; r < rows.length; r++) {
        const row = (lane >> 2) + 8 * ((r >> 1) & 1);
        const column = 8 * (r >> 2) + 2 * (lane & 3) + (r & 1);
        const at = r * 32 + lane;
        const before = accumulate ? (values[at] as number) : 0;
        values[at] =
          type === 'e4m3'
            ? alignedSum(before, left, row * k, right, column * k)
            : plainSum(before, left, row * k, right, column * k, k, type === 's8');
      }
    }
    if (--sums.products > 0) return;
    const into = type === 's8' ? this.#warp.i : this.#warp.f;
    rows.forEach((row, r) => {
      for (let lane = 0; lane < 32; lane++) into[row + lane] = values[r * 32 + lane] as number;
    });
    this.#sums.delete(rows[0] as number);
  }

  /** At its end a warp must have nothing under way. */
  finish(): void {
    if (this.#sums.size > 0) throw new SimulationError(`warp ${this.#warp.index} ends with products under way`);
  }
}

function plainSum(
  before: number,
  a: Float64Array,
  aStart: number,
  b: Float64Array,
  bStart: number,
  k: number,
  integers: boolean,
): number {
  let sum = before;
  for (let i = 0; i < k; i++) sum += (a[aStart + i] as number) * (b[bStart + i] as number);
  return integers ? sum | 0 : Math.fround(sum);
}

/** 32 products and the sum, aligned to the largest of them and cut off FP8_BITS below it. */
function alignedSum(before: number, a: Float64Array, aStart: number, b: Float64Array, bStart: number): number {
  let largest = Math.abs(before);
  let sum = before;
  for (let i = 0; i < 32; i++) {
    const product = (a[aStart + i] as number) * (b[bStart + i] as number);
    sum += product;
    const magnitude = Math.abs(product);
    if (magnitude > largest) largest = magnitude;
  }
  if (!Number.isFinite(sum) || largest === 0) return sum;
  floatBits[0] = largest;
  const exponent = ((floatWords[0] as number) >>> 23) - 127;
  const steps = 2 ** (FP8_BITS - exponent);
  let aligned = Math.trunc(before * steps);
  for (let i = 0; i < 32; i++) aligned += Math.trunc((a[aStart + i] as number) * (b[bStart + i] as number) * steps);
  const magnitude = Math.abs(aligned);
  // Carries past the leading bit cost the lowest ones.
  const excess = magnitude < 2 ** (FP8_BITS + 1) ? 1 : 2 ** (Math.floor(Math.log2(magnitude)) - FP8_BITS);
  return (Math.trunc(aligned / excess) * excess) / steps;
}
