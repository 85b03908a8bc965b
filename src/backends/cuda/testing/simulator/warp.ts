/**
 * A warp of the simulator: its registers, and the instructions that need more than one lane or a memory. A register is
 * 32 consecutive words, one for each lane; 64-bit registers are two such rows, low words first. Predicates are words 0
 * and 1, 16-bit values words below 65536.
 *
 * Tensor-core products are summed exactly (in float64) and rounded once to the accumulator's type. Real tensor cores
 * align the terms and keep fewer bits (about 22 for FP8 on sm_89 and sm_90), so sums here are at least as accurate.
 */

import { E2M1_VALUES } from '../../../../tensor/formats/float4.ts';
import { float16FromNumber } from '../../../../tensor/formats/float16.ts';
import { ue8m0ToNumber } from '../../../../tensor/formats/ue8m0.ts';
import { BRAIN, E4M3, HALF } from './arithmetic.ts';
import { type DeviceAddresses, requireWritten, SHARED_BASE, type SharedMemory, SimulationError } from './memory.ts';
import type { AsyncWarp } from './wgmma.ts';

interface PendingCopy {
  readonly shared: number;
  readonly source: Uint8Array;
}

/** Where a block-scaled product finds its scales: the register's row, its first byte, and the lane of each four. */
interface ScaleRow {
  readonly row: number;
  readonly byte: number;
  readonly thread: number;
}

export interface Cta {
  readonly shared: SharedMemory;
  readonly global: DeviceAddresses;
  readonly block: number;
  readonly gridBlocks: number;
  /** Two words for each parameter, see `parameterWords`. */
  readonly parameters: Uint32Array;
  /** Number of a tensor map among the kernel's parameters. */
  readonly tensorMapIndex: (name: string) => number;
}

export class Warp {
  readonly index: number;
  readonly cta: Cta;
  readonly u: Uint32Array;
  readonly i: Int32Array;
  readonly f: Float32Array;
  readonly h: Uint16Array;
  readonly bytes: Uint8Array;
  /** Next basic block of each lane; -1 when it has ended. */
  readonly pc = new Int32Array(32);
  /** Lanes that execute the block at hand. */
  readonly lanes = new Uint8Array(32);
  active = 0;
  /** Set for a kernel that {@link isAsynchronous}. */
  asynchronous: AsyncWarp | undefined;
  /** Copies of each lane, by group; the last is not committed yet. */
  readonly #copies: PendingCopy[][][];

  constructor(index: number, cta: Cta, words: number) {
    this.index = index;
    this.cta = cta;
    const buffer = new ArrayBuffer(words * 4);
    this.u = new Uint32Array(buffer);
    // A register that nothing has set holds nonsense, not zeros.
    this.u.fill(0xffbadbad);
    this.i = new Int32Array(buffer);
    this.f = new Float32Array(buffer);
    this.h = new Uint16Array(buffer);
    this.bytes = new Uint8Array(buffer);
    this.#copies = Array.from({ length: 32 }, () => [[]]);
  }

  requireAll(what: string): void {
    let alive = 0;
    for (const pc of this.pc) if (pc >= 0) alive++;
    if (this.active !== alive) {
      throw new SimulationError(`${what}: ${this.active} of ${alive} lanes of warp ${this.index} arrive together`);
    }
  }

  requireWhole(what: string): void {
    if (this.active !== 32)
      throw new SimulationError(`${what}: executed by ${this.active} lanes of warp ${this.index}`);
  }

  loadGlobal(
    row: number,
    lane: number,
    base: number,
    offset: number,
    length: number,
    count: number,
    what: string,
  ): void {
    const { global } = this.cta;
    const address = (this.u[base + lane] as number) + (this.u[base + 32 + lane] as number) * 2 ** 32 + offset;
    const allocation = global.at(address, length * count, what);
    const at = address - allocation.address;
    requireWritten(allocation, at, length * count, what);
    for (let n = 0; n < count; n++) this.#store(row, n, lane, allocation.view, at + n * length, length);
  }

  /** Rows of a vector's destination are not always neighbours: `rows` gives each. */
  rows: number[] = [];

  #store(row: number, n: number, lane: number, view: DataView, at: number, length: number): void {
    const target = (n === 0 ? row : (this.rows[n] as number)) + lane;
    if (length === 1) this.u[target] = view.getUint8(at);
    else if (length === 2) this.u[target] = view.getUint16(at, true);
    else this.u[target] = view.getUint32(at, true);
    if (length === 8) this.u[target + 32] = view.getUint32(at + 4, true);
  }

  loadShared(
    row: number,
    lane: number,
    base: number,
    offset: number,
    length: number,
    count: number,
    what: string,
  ): void {
    const { shared } = this.cta;
    const at = (this.u[base + lane] as number) + offset - SHARED_BASE;
    shared.reads(at, length * count, this.index, what);
    for (let n = 0; n < count; n++) this.#store(row, n, lane, shared.view, at + n * length, length);
  }

  #put(source: number, view: DataView, at: number, length: number): void {
    const value = this.u[source] as number;
    if (length === 1) view.setUint8(at, value & 255);
    else if (length === 2) view.setUint16(at, value & 65535, true);
    else view.setUint32(at, value, true);
    if (length === 8) view.setUint32(at + 4, this.u[source + 32] as number, true);
  }

  storeGlobal(rows: readonly number[], lane: number, base: number, offset: number, length: number, what: string): void {
    const { global } = this.cta;
    const address = (this.u[base + lane] as number) + (this.u[base + 32 + lane] as number) * 2 ** 32 + offset;
    const allocation = global.at(address, length * rows.length, what);
    const at = address - allocation.address;
    allocation.written?.fill(1, at, at + length * rows.length);
    rows.forEach((row, n) => {
      this.#put(row + lane, allocation.view, at + n * length, length);
    });
  }

  storeShared(rows: readonly number[], lane: number, base: number, offset: number, length: number, what: string): void {
    const { shared } = this.cta;
    const at = (this.u[base + lane] as number) + offset - SHARED_BASE;
    shared.writes(at, length * rows.length, this.index, what);
    rows.forEach((row, n) => {
      this.#put(row + lane, shared.view, at + n * length, length);
    });
  }

  redOr(value: number, lane: number, base: number, offset: number, what: string): void {
    const { global } = this.cta;
    const address = (this.u[base + lane] as number) + (this.u[base + 32 + lane] as number) * 2 ** 32 + offset;
    const allocation = global.at(address, 4, what);
    const at = address - allocation.address;
    requireWritten(allocation, at, 4, what);
    allocation.view.setUint32(at, (allocation.view.getUint32(at, true) | value) >>> 0, true);
  }

  atomInc(target: number, lane: number, most: number, base: number, offset: number, what: string): void {
    const { global } = this.cta;
    const address = (this.u[base + lane] as number) + (this.u[base + 32 + lane] as number) * 2 ** 32 + offset;
    const allocation = global.at(address, 4, what);
    const at = address - allocation.address;
    requireWritten(allocation, at, 4, what);
    const before = allocation.view.getUint32(at, true);
    allocation.view.setUint32(at, before >= most ? 0 : before + 1, true);
    this.u[target + lane] = before;
  }

  copyAsync(lane: number, to: number, toOffset: number, from: number, fromOffset: number, what: string): void {
    const { shared, global } = this.cta;
    const address = (this.u[from + lane] as number) + (this.u[from + 32 + lane] as number) * 2 ** 32 + fromOffset;
    const allocation = global.at(address, 16, what);
    const at = address - allocation.address;
    requireWritten(allocation, at, 16, what);
    const target = (this.u[to + lane] as number) + toOffset - SHARED_BASE;
    shared.writes(target, 16, this.index, what, 2);
    (this.#copies[lane] as PendingCopy[][])
      .at(-1)
      ?.push({ shared: target, source: allocation.bytes.slice(at, at + 16) });
  }

  commitCopies(lane: number): void {
    (this.#copies[lane] as PendingCopy[][]).push([]);
  }

  waitCopies(lane: number, pending: number): void {
    const groups = this.#copies[lane] as PendingCopy[][];
    while (groups.length - 1 > pending) {
      for (const { shared, source } of groups.shift() as PendingCopy[])
        this.cta.shared.land(shared, source, this.index);
    }
  }

  ldmatrix(rows: readonly number[], base: number, offset: number, trans: boolean, what: string): void {
    this.requireWhole(what);
    const { shared } = this.cta;
    rows.forEach((row, matrix) => {
      for (let r = 0; r < 8; r++) {
        const at = (this.u[base + matrix * 8 + r] as number) + offset - SHARED_BASE;
        shared.reads(at, 16, this.index, what);
        for (let c = 0; c < 8; c++) {
          const value = shared.view.getUint16(at + 2 * c, true);
          const [lane, half] = trans ? [c * 4 + (r >> 1), r & 1] : [r * 4 + (c >> 1), c & 1];
          this.h[(row + lane) * 2 + half] = value;
        }
      }
    });
  }

  shflBfly(to: number, from: number, mask: number, what: string): void {
    this.requireWhole(what);
    const values = this.u.slice(from, from + 32);
    for (let lane = 0; lane < 32; lane++) this.u[to + lane] = values[lane ^ mask] as number;
  }

  voteAny(to: number, from: number, what: string): void {
    this.requireWhole(what);
    let any = 0;
    for (let lane = 0; lane < 32; lane++) any |= this.u[from + lane] as number;
    this.u.fill(any, to, to + 32);
  }

  /** Elements of A, 16 x k, from registers a0..a3 of `size`-bit elements; rows of the result are k long. */
  #fragment(
    rows: readonly number[],
    k: number,
    isA: boolean,
    decode: (row: number, lane: number, element: number) => number,
  ) {
    const per = k / 8; // elements of a register: k / 8 columns by 4 threads by 2 halves
    const matrix = new Float64Array((isA ? 16 : 8) * k);
    rows.forEach((row, register) => {
      const lower = isA ? (register & 1) * 8 : 0;
      const half = isA ? register >> 1 : register;
      for (let lane = 0; lane < 32; lane++) {
        const outer = (lane >> 2) + lower;
        const inner = half * (k / 2) + (lane & 3) * per;
        for (let e = 0; e < per; e++) matrix[outer * k + inner + e] = decode(row, lane, e);
      }
    });
    return matrix;
  }

  mma(
    shape: string,
    d: readonly number[],
    a: readonly number[],
    bb: readonly number[],
    c: readonly number[],
    what: string,
  ): void {
    this.requireWhole(what);
    const [, kText, accumulator, type] = shape.match(/^m16n8k(\d+)\.row\.col\.(\w+)\.(\w+)/) as RegExpMatchArray;
    const k = Number(kText);
    const decode = this.#decoder(type as string);
    const left = this.#fragment(a, k, true, decode);
    const right = this.#fragment(bb, k, false, decode);
    const sums = new Float64Array(128);
    for (let m = 0; m < 16; m++) {
      for (let n = 0; n < 8; n++) {
        let sum = 0;
        for (let i = 0; i < k; i++) sum += (left[m * k + i] as number) * (right[n * k + i] as number);
        sums[m * 8 + n] = sum;
      }
    }
    for (let lane = 0; lane < 32; lane++) {
      for (let i = 0; i < 4; i++) {
        const sum = sums[((lane >> 2) + 8 * (i >> 1)) * 8 + 2 * (lane & 3) + (i & 1)] as number;
        if (accumulator === 'f16') {
          const at = ((c[i >> 1] as number) + lane) * 2 + (i & 1);
          const to = ((d[i >> 1] as number) + lane) * 2 + (i & 1);
          this.h[to] = float16FromNumber((HALF[this.h[at] as number] as number) + sum);
        } else if (accumulator === 'f32') {
          this.f[(d[i] as number) + lane] = (this.f[(c[i] as number) + lane] as number) + sum;
        } else {
          this.i[(d[i] as number) + lane] = (this.i[(c[i] as number) + lane] as number) + sum;
        }
      }
    }
  }

  /**
   * A block-scaled product: `4X` has four UE4M3 scales of 16 elements for each row and column, `2X` two UE8M0 ones of
   * 32. Products and sums are exact in float64 up to one rounding; scales of lanes that the selectors do not name are
   * not looked at.
   */
  mmaBlockScaled(
    opcode: string,
    d: readonly number[],
    a: readonly number[],
    bb: readonly number[],
    c: readonly number[],
    aScale: ScaleRow,
    bScale: ScaleRow,
    what: string,
  ): void {
    this.requireWhole(what);
    const k = 64;
    const fine = opcode.endsWith('.ue4m3');
    const block = fine ? 16 : 32;
    const decode = this.#decoder('e2m1');
    const scaled = (matrix: Float64Array, lane: (outer: number) => number, { row, byte }: ScaleRow) =>
      matrix.map((value, at) => {
        const [outer, inner] = [Math.floor(at / k), at % k];
        const code = this.bytes[(row + lane(outer)) * 4 + byte + Math.floor(inner / block)] as number;
        // UE4M3 has no sign.
        return value * (fine ? (E4M3[code & 127] as number) : ue8m0ToNumber(code));
      });
    const laneOfRow = (m: number) => 4 * (m % 8) + 2 * aScale.thread + (m >> 3);
    const laneOfColumn = (n: number) => 4 * n + bScale.thread;
    const left = scaled(this.#fragment(a, k, true, decode), laneOfRow, aScale);
    const right = scaled(this.#fragment(bb, k, false, decode), laneOfColumn, bScale);
    for (let lane = 0; lane < 32; lane++) {
      // C is read before D is written: they may share registers in another order.
      const before = c.map((row) => this.f[row + lane] as number);
      for (let i = 0; i < 4; i++) {
        const [m, n] = [(lane >> 2) + 8 * (i >> 1), 2 * (lane & 3) + (i & 1)];
        let sum = 0;
        for (let j = 0; j < k; j++) sum += (left[m * k + j] as number) * (right[n * k + j] as number);
        this.f[(d[i] as number) + lane] = (before[i] as number) + sum;
      }
    }
  }

  #decoder(type: string): (row: number, lane: number, element: number) => number {
    switch (type) {
      case 's8':
        return (row, lane, e) => ((this.bytes[(row + lane) * 4 + e] as number) << 24) >> 24;
      case 's4':
        return (row, lane, e) => ((this.u[row + lane] as number) << (28 - 4 * e)) >> 28;
      case 'e2m1':
        return (row, lane, e) => E2M1_VALUES[((this.u[row + lane] as number) >>> (4 * e)) & 15] as number;
      case 'f16':
        return (row, lane, e) => HALF[this.h[(row + lane) * 2 + e] as number] as number;
      case 'bf16':
        return (row, lane, e) => BRAIN[this.h[(row + lane) * 2 + e] as number] as number;
      case 'e4m3':
        return (row, lane, e) => E4M3[this.bytes[(row + lane) * 4 + e] as number] as number;
      default:
        throw new SimulationError(`mma of ${type}`);
    }
  }
}
