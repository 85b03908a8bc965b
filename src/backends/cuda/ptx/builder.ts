/**
 * Writes a kernel instruction by instruction. Methods carry PTX's names and return the register they wrote; `into`
 * writes an existing one instead (accumulators, loop counters). TypeScript loops unroll; `loop`, `if` and `when` are
 * the run-time constructs.
 */
import type { Layout, SharedTile } from './layouts.ts';
import { BLOCK_SCALED_MMA, type BlockScaledShape, MMA, type MmaShape, type ScaleWord } from './mma.ts';
import { immediate, memory } from './operands.ts';
import type { Target } from './targets.ts';
import type {
  AddressKind,
  FloatKind,
  Instruction,
  IntegerKind,
  Kernel,
  Kind,
  NumericKind,
  Operand,
  Parameter,
  ParameterKind,
  Reg,
  SameWidth,
  SpecialRegister,
  Value,
} from './types.ts';
import { KIND_BITS } from './types.ts';

/** The type that PTX instructions name for a kind. */
const PTX_TYPE: Readonly<Record<Kind, string>> = {
  pred: 'pred',
  b16: 'b16',
  f16: 'f16',
  bf16: 'bf16',
  e4m3x2: 'b16',
  b32: 'b32',
  s32: 's32',
  u32: 'u32',
  f32: 'f32',
  f16x2: 'f16x2',
  bf16x2: 'bf16x2',
  e4m3x4: 'b32',
  e2m1x2: 'b8',
  e2m1x8: 'b32',
  s8x4: 'b32',
  s4x8: 'b32',
  shared: 'u32',
  b64: 'b64',
  u64: 'u64',
  global: 'u64',
};

/** Rounding of float arithmetic: to nearest even, up (towards +Infinity), down. */
export type Rounding = 'rn' | 'rp' | 'rm';

type Comparison = 'eq' | 'ne' | 'lt' | 'le' | 'gt' | 'ge';
type Bitwise = 's32' | 'u32' | 'u64' | 'b16' | 'b32' | 'b64' | 'shared' | 'global';

/** Conversions that kernels use: `cvt` with the rounding that belongs to it. */
const CONVERSIONS = {
  's32->f32': 'cvt.rn.f32.s32',
  'u32->f32': 'cvt.rn.f32.u32',
  'f16->f32': 'cvt.f32.f16',
  'f32->f16': 'cvt.rn.f16.f32',
  'f32->bf16': 'cvt.rn.bf16.f32',
  'f32->s32': 'cvt.rni.s32.f32',
  'u32->u64': 'cvt.u64.u32',
  's32->u64': 'cvt.s64.s32',
  'u64->u32': 'cvt.u32.u64',
  'b16->u32': 'cvt.u32.u16',
  'u32->b16': 'cvt.u16.u32',
  'e4m3x2->f16x2': 'cvt.rn.f16x2.e4m3x2',
  'e2m1x2->f16x2': 'cvt.rn.f16x2.e2m1x2',
} as const;

type Conversion = keyof typeof CONVERSIONS;
type ConversionSource = Conversion extends `${infer From}->${string}` ? From : never;
type ConversionTarget<From extends string> = Conversion extends infer C
  ? C extends `${From}->${infer To}`
    ? To
    : never
  : never;

/**
 * Two floats packed into one register of a smaller format, round to nearest even; E4M3 saturates to +-448, E2M1 to +-6
 * (NaN to +6).
 */
const PACKINGS = {
  f16x2: 'cvt.rn.f16x2.f32',
  bf16x2: 'cvt.rn.bf16x2.f32',
  e4m3x2: 'cvt.rn.satfinite.e4m3x2.f32',
  e2m1x2: 'cvt.rn.satfinite.e2m1x2.f32',
} as const;

export interface KernelOptions {
  readonly name: string;
  readonly target: Target;
  /** Threads of a CTA, a multiple of 32. */
  readonly threads: number;
  /** Default 1. */
  readonly minBlocksPerMultiprocessor?: number;
  /** CTAs of a cluster along x; default 1. */
  readonly clusterSize?: number;
}

export class KernelBuilder {
  readonly #options: KernelOptions;
  readonly #instructions: Instruction[] = [];
  readonly #registerKinds: Kind[] = [];
  readonly #parameters: Parameter[] = [];
  readonly #tiles: SharedTile[] = [];
  #sharedBytes = 0;
  #labels = 0;
  #section = '';
  #guard: Instruction['guard'];

  constructor(options: KernelOptions) {
    if (options.threads % 32 !== 0 || options.threads < 32 || options.threads > 1024) {
      throw new RangeError(`${options.name}: ${options.threads} threads are not 1 to 32 whole warps`);
    }
    this.#options = options;
  }

  get target(): Target {
    return this.#options.target;
  }

  get tiles(): readonly SharedTile[] {
    return this.#tiles;
  }

  /** The finished kernel; ends with `ret`. */
  build(): Kernel {
    this.emit('ret', [], []);
    const { name, target, threads, minBlocksPerMultiprocessor = 1, clusterSize = 1 } = this.#options;
    return {
      name,
      target,
      threads,
      minBlocksPerMultiprocessor,
      clusterSize,
      parameters: this.#parameters,
      instructions: this.#instructions,
      registers: this.#registerKinds.length,
      registerKinds: this.#registerKinds,
      sharedBytes: this.#sharedBytes,
    };
  }

  // ---- structure

  /** Names the part of the kernel that follows, for listings. */
  section(title: string): void {
    this.#section = title;
  }

  parameter<K extends ParameterKind>(name: string, kind: K): Parameter<K> {
    const parameter = { name, kind };
    this.#parameters.push(parameter);
    return parameter;
  }

  /** Reserves shared memory for `rows` rows of a layout. */
  shared(name: string, rows: number, layout: Layout): SharedTile {
    const base = Math.ceil(this.#sharedBytes / layout.alignment) * layout.alignment;
    const tile = { name, layout, rows, base, bytes: rows * layout.rowBytes };
    this.#tiles.push(tile);
    this.#sharedBytes = base + tile.bytes;
    return tile;
  }

  /** Makes parts of which a CTA runs one only: their tiles lie over each other. */
  alternatives<C, T>(parts: readonly C[], make: (part: C, index: number) => T): T[] {
    const from = this.#sharedBytes;
    let most = from;
    const made = parts.map((part, index) => {
      this.#sharedBytes = from;
      const result = make(part, index);
      most = Math.max(most, this.#sharedBytes);
      return result;
    });
    this.#sharedBytes = most;
    return made;
  }

  /** The run-time address of the CTA's dynamic shared memory plus `offset`. */
  sharedAddress(offset = 0): Reg<'shared'> {
    const address = this.reg('shared');
    this.emit('mov.u32', [address], [{ type: 'parameter', name: 'sharedMemory', addressOf: true }]);
    return offset === 0 ? address : this.add(address, offset);
  }

  /** A new register without a value. */
  reg<K extends Kind>(kind: K): Reg<K> {
    this.#registerKinds.push(kind);
    return { type: 'reg', kind, id: this.#registerKinds.length - 1 };
  }

  regs<K extends Kind>(kind: K, count: number): Reg<K>[] {
    return Array.from({ length: count }, () => this.reg(kind));
  }

  /** The same register seen as another kind of its width; no instruction. */
  as<K extends Kind, To extends SameWidth<K>>(register: Reg<K>, kind: To): Reg<To> {
    return { type: 'reg', kind, id: register.id };
  }

  /** Appends an instruction verbatim. For this class and for files that add a family of instructions. */
  emit(opcode: string, outputs: readonly Operand[], inputs: readonly Operand[], accumulates = false): void {
    const plain = { opcode, outputs, inputs, section: this.#section };
    const instruction = accumulates ? { ...plain, accumulates } : plain;
    this.#instructions.push(this.#guard === undefined ? instruction : { ...instruction, guard: this.#guard });
  }

  /** Predicates the instructions of `body`: no branch. Best for a few instructions. */
  when(predicate: Reg<'pred'>, body: () => void, negated = false): void {
    if (this.#guard !== undefined) throw new Error('when: a guarded instruction cannot be guarded again');
    this.#guard = { predicate, negated };
    body();
    this.#guard = undefined;
  }

  /** Branches: threads for which `predicate` is false jump over `then` (to `otherwise`). */
  if(predicate: Reg<'pred'>, then: () => void, otherwise?: () => void): void {
    const end = this.#newLabel();
    const elseLabel = otherwise === undefined ? end : this.#newLabel();
    this.when(predicate, () => this.#branch(elseLabel), true);
    then();
    if (otherwise !== undefined) {
      this.#branch(end);
      this.#label(elseLabel);
      otherwise();
    }
    this.#label(end);
  }

  /** Repeats `body` while the predicate that `condition` computes is true; tested first. */
  loop(condition: () => Reg<'pred'>, body: () => void): void {
    const start = this.#newLabel();
    const end = this.#newLabel();
    this.when(condition(), () => this.#branch(end), true);
    this.#label(start);
    body();
    this.when(condition(), () => this.#branch(start));
    this.#label(end);
  }

  /** Repeats `body` until the predicate that it computes is true. */
  repeatUntil(body: () => Reg<'pred'>): void {
    const start = this.#newLabel();
    this.#label(start);
    this.when(body(), () => this.#branch(start), true);
  }

  /** Ends the thread. */
  exit(): void {
    this.emit('ret', [], []);
  }

  #newLabel(): string {
    return `L${this.#labels++}`;
  }

  #label(name: string): void {
    this.emit('label', [], [{ type: 'label', name }]);
  }

  #branch(name: string): void {
    this.emit('bra', [], [{ type: 'label', name }]);
  }

  // ---- moves and values

  special(name: SpecialRegister): Reg<'u32'> {
    const register = this.reg('u32');
    this.emit('mov.u32', [register], [{ type: 'special', name }]);
    return register;
  }

  constant<K extends NumericKind>(kind: K, value: number): Reg<K> {
    const register = this.reg(kind);
    this.emit(`mov.${PTX_TYPE[kind]}`, [register], [{ type: 'immediate', kind, value }]);
    return register;
  }

  mov<K extends Kind>(value: Reg<K>, into: Reg<NoInfer<K>> = this.reg(value.kind)): Reg<K> {
    this.emit(`mov.${PTX_TYPE[value.kind]}`, [into], [value]);
    return into;
  }

  /** Sets an existing register to a literal. */
  set<K extends NumericKind>(into: Reg<K>, value: number): void {
    this.emit(`mov.${PTX_TYPE[into.kind]}`, [into], [{ type: 'immediate', kind: into.kind, value }]);
  }

  /** `mov.b64 d, {low, high}` or `mov.b32 d, {low, high}` of 16-bit halves. */
  pack<K extends 'b32' | 'b64' | 'f16x2' | 'e4m3x4' | 'u64'>(
    kind: K,
    low: Reg,
    high: Reg,
    into = this.reg(kind),
  ): Reg<K> {
    this.emit(`mov.b${KIND_BITS[kind]}`, [into], [{ type: 'group', registers: [low, high] }]);
    return into;
  }

  /** `mov.b32 {low, high}, a`: the halves of a register. */
  unpack<K extends Kind>(value: Reg, kind: K): [low: Reg<K>, high: Reg<K>] {
    const halves: [Reg<K>, Reg<K>] = [this.reg(kind), this.reg(kind)];
    this.emit(`mov.b${KIND_BITS[value.kind]}`, [{ type: 'group', registers: halves }], [value]);
    return halves;
  }

  /** `mov.b32 d, {a, b, c, d}` of four bytes, the first lowest. */
  packBytes<K extends 'b32' | 'e2m1x8'>(kind: K, bytes: readonly Reg<'e2m1x2'>[]): Reg<K> {
    if (bytes.length !== 4) throw new RangeError(`packBytes: ${bytes.length} bytes`);
    const d = this.reg(kind);
    this.emit('mov.b32', [d], [{ type: 'group', registers: bytes }]);
    return d;
  }

  /** `mov.b32 {a, b, c, d}, value`: the bytes of a register, the lowest first. */
  unpackBytes(value: Reg<'b32' | 'e2m1x8'>): Reg<'e2m1x2'>[] {
    const registers = this.regs('e2m1x2', 4);
    this.emit('mov.b32', [{ type: 'group', registers }], [value]);
    return registers;
  }

  // ---- arithmetic

  #operand<K extends Kind>(kind: K, value: Reg<K> | number): Operand {
    return typeof value === 'number' ? { type: 'immediate', kind, value } : value;
  }

  /**
   * What stands between the name and the type of an arithmetic instruction. Floats always name their rounding: ptxas
   * fuses a `mul` and an `add` that name none, and then rounds once where the kernel's author counted on twice.
   */
  #rounded(kind: Kind, rounding: Rounding): string {
    if (rounding !== 'rn' && kind !== 'f32')
      throw new RangeError(`${kind} arithmetic rounds to nearest, not .${rounding}`);
    return kind === 'f32' || kind === 'f16x2' || kind === 'bf16x2' ? `.${rounding}` : '';
  }

  #binary<K extends Kind>(opcode: string, a: Reg<K>, b: Reg<K> | number, into: Reg<K> | undefined): Reg<K> {
    const d = into ?? this.reg(a.kind);
    this.emit(opcode, [d], [a, this.#operand(a.kind, b)]);
    return d;
  }

  add<K extends IntegerKind | FloatKind | AddressKind>(
    a: Reg<K>,
    b: Value<NoInfer<K>>,
    into?: Reg<NoInfer<K>>,
    rounding: Rounding = 'rn',
  ): Reg<K> {
    const opcode = `add${this.#rounded(a.kind, rounding)}.${PTX_TYPE[a.kind]}`;
    return this.#binary(opcode, a, b as Reg<K> | number, into);
  }

  sub<K extends IntegerKind | FloatKind | AddressKind>(
    a: Reg<K>,
    b: Value<NoInfer<K>>,
    into?: Reg<NoInfer<K>>,
    rounding: Rounding = 'rn',
  ): Reg<K> {
    const opcode = `sub${this.#rounded(a.kind, rounding)}.${PTX_TYPE[a.kind]}`;
    return this.#binary(opcode, a, b as Reg<K> | number, into);
  }

  /** Floats: rounded. Integers: the low half of the product. */
  mul<K extends IntegerKind | FloatKind>(
    a: Reg<K>,
    b: Value<NoInfer<K>>,
    into?: Reg<NoInfer<K>>,
    rounding: Rounding = 'rn',
  ): Reg<K> {
    const how = a.kind === 's32' || a.kind === 'u32' || a.kind === 'u64' ? '.lo' : this.#rounded(a.kind, rounding);
    return this.#binary(`mul${how}.${PTX_TYPE[a.kind]}`, a, b as Reg<K> | number, into);
  }

  /** a * b + c, rounded once. */
  fma<K extends FloatKind>(
    a: Reg<K>,
    b: Value<NoInfer<K>>,
    c: Value<NoInfer<K>>,
    into?: Reg<NoInfer<K>>,
    rounding: Rounding = 'rn',
  ): Reg<K> {
    const d = into ?? this.reg(a.kind);
    const [bOperand, cOperand] = [this.#operand(a.kind, b as Reg<K>), this.#operand(a.kind, c as Reg<K>)];
    this.emit(`fma${this.#rounded(a.kind, rounding)}.${PTX_TYPE[a.kind]}`, [d], [a, bOperand, cOperand]);
    return d;
  }

  /** a * b + c, low 32 bits. */
  mad<K extends 's32' | 'u32'>(a: Reg<K>, b: Value<NoInfer<K>>, c: Value<NoInfer<K>>, into?: Reg<NoInfer<K>>): Reg<K> {
    const d = into ?? this.reg(a.kind);
    const [bOperand, cOperand] = [this.#operand(a.kind, b as Reg<K>), this.#operand(a.kind, c as Reg<K>)];
    this.emit(`mad.lo.${PTX_TYPE[a.kind]}`, [d], [a, bOperand, cOperand]);
    return d;
  }

  /** The whole 64-bit product of two unsigned 32-bit values. */
  mulWide(a: Reg<'u32'>, b: Value<'u32'>): Reg<'u64'> {
    const d = this.reg('u64');
    this.emit('mul.wide.u32', [d], [a, this.#operand('u32', b)]);
    return d;
  }

  /** The high half of the 64-bit product: division by constants. */
  mulHi(a: Reg<'u32'>, b: Value<'u32'>): Reg<'u32'> {
    return this.#binary('mul.hi.u32', a, b, undefined);
  }

  div(a: Reg<'u32'>, b: Value<'u32'>): Reg<'u32'> {
    return this.#binary('div.u32', a, b, undefined);
  }

  rem(a: Reg<'u32'>, b: Value<'u32'>): Reg<'u32'> {
    return this.#binary('rem.u32', a, b, undefined);
  }

  min<K extends 's32' | 'u32' | 'f32' | 'f16x2'>(a: Reg<K>, b: Value<NoInfer<K>>, into?: Reg<NoInfer<K>>): Reg<K> {
    return this.#binary(`min.${PTX_TYPE[a.kind]}`, a, b as Reg<K> | number, into);
  }

  /** The larger one; if one is NaN, the other. */
  max<K extends 's32' | 'u32' | 'f32' | 'f16x2'>(a: Reg<K>, b: Value<NoInfer<K>>, into?: Reg<NoInfer<K>>): Reg<K> {
    return this.#binary(`max.${PTX_TYPE[a.kind]}`, a, b as Reg<K> | number, into);
  }

  /** NaN when either is. */
  maxNaN<K extends 'f32' | 'f16x2'>(a: Reg<K>, b: Value<NoInfer<K>>, into?: Reg<NoInfer<K>>): Reg<K> {
    return this.#binary(`max.NaN.${PTX_TYPE[a.kind]}`, a, b as Reg<K> | number, into);
  }

  /** The larger magnitudes of two halves each, NaN where either is; the sign is that of their product. From sm_86 on. */
  maxMagnitude(kind: 'f16x2' | 'bf16x2', a: Reg<'b32'>, b: Reg<'b32'>, into: Reg<'b32'>): void {
    this.emit(`max.NaN.xorsign.abs.${kind}`, [into], [a, b]);
  }

  abs<K extends 'f32' | 's32'>(a: Reg<K>, into?: Reg<NoInfer<K>>): Reg<K> {
    const d = into ?? this.reg(a.kind);
    this.emit(`abs.${PTX_TYPE[a.kind]}`, [d], [a]);
    return d;
  }

  neg<K extends 'f32' | 's32'>(a: Reg<K>, into?: Reg<NoInfer<K>>): Reg<K> {
    const d = into ?? this.reg(a.kind);
    this.emit(`neg.${PTX_TYPE[a.kind]}`, [d], [a]);
    return d;
  }

  #unaryF32(opcode: string, a: Reg<'f32'>, into: Reg<'f32'> | undefined): Reg<'f32'> {
    const d = into ?? this.reg('f32');
    this.emit(opcode, [d], [a]);
    return d;
  }

  /** 2^a on the special-function unit: 2 ulp; subnormal results are 0. */
  ex2(a: Reg<'f32'>, into?: Reg<'f32'>): Reg<'f32'> {
    return this.#unaryF32('ex2.approx.ftz.f32', a, into);
  }

  /** log2(a), absolute error 2^-22. */
  lg2(a: Reg<'f32'>, into?: Reg<'f32'>): Reg<'f32'> {
    return this.#unaryF32('lg2.approx.ftz.f32', a, into);
  }

  /** 1/a, correctly rounded. */
  rcp(a: Reg<'f32'>, into?: Reg<'f32'>): Reg<'f32'> {
    return this.#unaryF32('rcp.rn.f32', a, into);
  }

  /** 1/a within 1 ulp. */
  rcpApprox(a: Reg<'f32'>, into?: Reg<'f32'>): Reg<'f32'> {
    return this.#unaryF32('rcp.approx.ftz.f32', a, into);
  }

  /** a/b, correctly rounded. */
  divF32(a: Reg<'f32'>, b: Value<'f32'>): Reg<'f32'> {
    return this.#binary('div.rn.f32', a, b, undefined);
  }

  // ---- bits

  and<K extends Bitwise>(a: Reg<K>, b: Reg<NoInfer<K>> | number, into?: Reg<NoInfer<K>>): Reg<K> {
    return this.#binary(`and.b${KIND_BITS[a.kind]}`, a, b, into);
  }

  or<K extends Bitwise>(a: Reg<K>, b: Reg<NoInfer<K>> | number, into?: Reg<NoInfer<K>>): Reg<K> {
    return this.#binary(`or.b${KIND_BITS[a.kind]}`, a, b, into);
  }

  xor<K extends Bitwise>(a: Reg<K>, b: Reg<NoInfer<K>> | number, into?: Reg<NoInfer<K>>): Reg<K> {
    return this.#binary(`xor.b${KIND_BITS[a.kind]}`, a, b, into);
  }

  #shift<K extends Bitwise>(opcode: string, a: Reg<K>, amount: Value<'u32'>): Reg<K> {
    const d = this.reg(a.kind);
    this.emit(opcode, [d], [a, this.#operand('u32', amount)]);
    return d;
  }

  shl<K extends Bitwise>(a: Reg<K>, amount: Value<'u32'>): Reg<K> {
    return this.#shift(`shl.b${KIND_BITS[a.kind]}`, a, amount);
  }

  /** Arithmetic for `s32`, logical otherwise. */
  shr<K extends Bitwise>(a: Reg<K>, amount: Value<'u32'>): Reg<K> {
    return this.#shift(a.kind === 's32' ? 'shr.s32' : `shr.u${KIND_BITS[a.kind]}`, a, amount);
  }

  /** Four bytes picked from the eight of a (0..3) and b (4..7) by the nibbles of a selector, low byte first. */
  prmt(a: Reg<'b32'>, b: Reg<'b32'>, selector: Value<'b32'>, into: Reg<'b32'> = this.reg('b32')): Reg<'b32'> {
    this.emit('prmt.b32', [into], [a, b, this.#operand('b32', selector)]);
    return into;
  }

  /** Any bitwise function of three values, by its truth table: `f(0xf0, 0xcc, 0xaa)`. */
  lop3(a: Reg<'b32'>, b: Reg<'b32'>, c: Reg<'b32'> | number, table: number): Reg<'b32'> {
    const d = this.reg('b32');
    this.emit('lop3.b32', [d], [a, b, this.#operand('b32', c), immediate(table, 'b32')]);
    return d;
  }

  // ---- predicates

  setp<K extends IntegerKind | 'f32' | 'b32' | 'shared' | 'global'>(
    comparison: Comparison,
    a: Reg<K>,
    b: Value<NoInfer<K>>,
    into: Reg<'pred'> = this.reg('pred'),
  ): Reg<'pred'> {
    this.emit(`setp.${comparison}.${PTX_TYPE[a.kind]}`, [into], [a, this.#operand(a.kind, b as Reg<K>)]);
    return into;
  }

  andPred(a: Reg<'pred'>, b: Reg<'pred'>, into?: Reg<'pred'>): Reg<'pred'> {
    return this.#binary('and.pred', a, b, into);
  }

  orPred(a: Reg<'pred'>, b: Reg<'pred'>, into?: Reg<'pred'>): Reg<'pred'> {
    return this.#binary('or.pred', a, b, into);
  }

  notPred(a: Reg<'pred'>): Reg<'pred'> {
    const d = this.reg('pred');
    this.emit('not.pred', [d], [a]);
    return d;
  }

  /** predicate ? a : b */
  selp<K extends NumericKind>(a: Value<K>, b: Reg<K>, predicate: Reg<'pred'>, into?: Reg<NoInfer<K>>): Reg<K> {
    const d = into ?? this.reg(b.kind);
    const type = PTX_TYPE[b.kind];
    this.emit(`selp.${type}`, [d], [this.#operand(b.kind, a as Reg<K>), b, predicate]);
    return d;
  }

  // ---- conversions

  cvt<From extends ConversionSource & Kind, To extends ConversionTarget<From> & Kind>(
    kind: To,
    value: Reg<From>,
    into: Reg<NoInfer<To>> = this.reg(kind),
  ): Reg<To> {
    this.emit(CONVERSIONS[`${value.kind}->${kind}` as Conversion], [into], [value]);
    return into;
  }

  /** Packs two floats, `low` into the low bits. */
  cvtPack<K extends keyof typeof PACKINGS>(
    kind: K,
    low: Reg<'f32'>,
    high: Reg<'f32'>,
    into: Reg<NoInfer<K>> = this.reg(kind),
  ): Reg<K> {
    this.emit(PACKINGS[kind], [into], [high, low]);
    return into;
  }

  // ---- memory

  loadParameter<K extends Exclude<ParameterKind, 'tensorMap'>>(parameter: Parameter<K>): Reg<K> {
    const d = this.reg(parameter.kind as K);
    this.emit(`ld.param.${PTX_TYPE[parameter.kind as K]}`, [d], [{ type: 'parameter', name: parameter.name }]);
    return d;
  }

  /** A pointer parameter, as a global address. */
  loadPointer(parameter: Parameter<'u64'>): Reg<'global'> {
    return this.as(this.loadParameter(parameter), 'global');
  }

  /** The generic address of a tensor map parameter. */
  tensorMapAddress(parameter: Parameter<'tensorMap'>): Reg<'global'> {
    const [inParameters, generic] = [this.reg('u64'), this.reg('global')];
    this.emit('mov.b64', [inParameters], [{ type: 'parameter', name: parameter.name, addressOf: true }]);
    this.emit('cvta.param.u64', [generic], [inParameters]);
    return generic;
  }

  #memoryType(kind: Kind): string {
    return `b${KIND_BITS[kind]}`;
  }

  /** One value; `ld.global` goes through the read-only path when `readOnly`. */
  ld<K extends Kind>(
    kind: K,
    base: Reg<AddressKind>,
    offset = 0,
    options: { readOnly?: boolean; into?: Reg<K> } = {},
  ): Reg<K> {
    const d = options.into ?? this.reg(kind);
    const cache = options.readOnly ? '.nc' : '';
    this.emit(`ld.${base.kind}${cache}.${this.#memoryType(kind)}`, [d], [memory(base, offset)]);
    return d;
  }

  /** 2 or 4 consecutive values, aligned to their whole size. */
  ldVector<K extends Kind>(
    kind: K,
    count: 2 | 4,
    base: Reg<AddressKind>,
    offset = 0,
    options: { readOnly?: boolean; into?: readonly Reg<K>[] } = {},
  ): Reg<K>[] {
    const registers = options.into === undefined ? this.regs(kind, count) : [...options.into];
    const cache = options.readOnly ? '.nc' : '';
    this.emit(
      `ld.${base.kind}${cache}.v${count}.${this.#memoryType(kind)}`,
      [{ type: 'group', registers }],
      [memory(base, offset)],
    );
    return registers;
  }

  st(value: Reg, base: Reg<AddressKind>, offset = 0): void {
    this.emit(`st.${base.kind}.${this.#memoryType(value.kind)}`, [], [memory(base, offset), value]);
  }

  /** One byte, zero-extended. */
  ldByte(base: Reg<AddressKind>, offset = 0, into: Reg<'u32'> = this.reg('u32')): Reg<'u32'> {
    this.emit(`ld.${base.kind}.u8`, [into], [memory(base, offset)]);
    return into;
  }

  /** The low byte of a register. */
  stByte(value: Reg<'b32' | 'u32'>, base: Reg<AddressKind>, offset = 0): void {
    this.emit(`st.${base.kind}.b8`, [], [memory(base, offset), value]);
  }

  stVector(values: readonly Reg[], base: Reg<AddressKind>, offset = 0): void {
    const [first] = values;
    if (first === undefined || (values.length !== 2 && values.length !== 4)) {
      throw new RangeError(`stVector: ${values.length} values`);
    }
    this.emit(
      `st.${base.kind}.v${values.length}.${this.#memoryType(first.kind)}`,
      [],
      [memory(base, offset), { type: 'group', registers: values }],
    );
  }

  /** Sets bits in global memory, atomically. */
  redOr(base: Reg<'global'>, bits: Reg<'b32'>, offset = 0): void {
    this.emit('red.global.or.b32', [], [memory(base, offset), bits]);
  }

  /** Adds 1 atomically, or goes back to 0 from `most` on; returns the number before. */
  atomInc(base: Reg<'global'>, most: Reg<'u32'>, offset = 0): Reg<'u32'> {
    const before = this.reg('u32');
    this.emit('atom.global.inc.u32', [before], [memory(base, offset), most]);
    return before;
  }

  /** What this thread wrote before is seen by whoever on the device sees what it writes behind, and the other way round. */
  fenceDevice(): void {
    this.emit('fence.acq_rel.gpu', [], []);
  }

  /** Copies 16 bytes from global to shared memory without registers; complete after `cpAsyncWaitGroup`. */
  cpAsync16(shared: Reg<'shared'>, global: Reg<'global'>, sharedOffset = 0, globalOffset = 0): void {
    this.emit(
      'cp.async.cg.shared.global',
      [],
      [memory(shared, sharedOffset), memory(global, globalOffset), immediate(16)],
    );
  }

  cpAsyncCommitGroup(): void {
    this.emit('cp.async.commit_group', [], []);
  }

  /** Waits until at most `pending` of this thread's groups are under way. */
  cpAsyncWaitGroup(pending: number): void {
    this.emit('cp.async.wait_group', [], [immediate(pending)]);
  }

  /**
   * Loads `count` 8x8 matrices of 16-bit elements. Lanes 8i..8i+7 give the addresses of matrix i's rows; lane l
   * receives elements 2(l%4) and 2(l%4)+1 of row l/4 of each matrix (of its transpose with `.trans`).
   */
  ldmatrix<K extends 'b32' | 's8x4' | 's4x8' | 'e2m1x8' | 'e4m3x4' | 'f16x2' | 'bf16x2'>(
    kind: K,
    count: 1 | 2 | 4,
    address: Reg<'shared'>,
    offset = 0,
    trans = false,
  ): Reg<K>[] {
    const registers = this.regs(kind, count);
    this.emit(
      `ldmatrix.sync.aligned.m8n8.x${count}${trans ? '.trans' : ''}.shared.b16`,
      [{ type: 'group', registers }],
      [{ type: 'memory', base: address, offset }],
    );
    return registers;
  }

  // ---- warp and CTA

  /** d = a * b + c on the warp's tensor core. `c` may be other registers than `d`: constants that seed the sum. */
  mma<S extends MmaShape>(
    shape: S,
    d: readonly Reg<(typeof MMA)[S]['d']>[],
    a: readonly Reg<(typeof MMA)[S]['a']>[],
    b: readonly Reg<(typeof MMA)[S]['b']>[],
    c: readonly Reg<(typeof MMA)[S]['d']>[] = d,
  ): void {
    const [aCount, bCount, dCount] = MMA[shape].registers;
    if (a.length !== aCount || b.length !== bCount || d.length !== dCount || c.length !== dCount) {
      throw new RangeError(`mma.${shape}: fragments of ${a.length}, ${b.length}, ${c.length}, ${d.length} registers`);
    }
    const group = (registers: readonly Reg[]): Operand => ({ type: 'group', registers });
    this.emit(`mma.sync.aligned.${shape}`, [group(d)], [group(a), group(b), group(c)]);
  }

  /**
   * d = (a * scales of a) * (b * scales of b) + d on the warp's tensor core: A and B in E2M1, 64 deep, a scale for each
   * 16 (`4X`, UE4M3) or 32 (`2X`, UE8M0) elements of a row of A and of a column of B. Scales of a row or column are
   * consecutive bytes of a register.
   *
   * @param aScale of lanes 4g + 2 * `thread` (row g) and 4g + 2 * `thread` + 1 (row g + 8); other lanes' are not
   *     read
   * @param bScale of lanes 4g + `thread` (column g); other lanes' are not read
   */
  mmaBlockScaled(
    shape: BlockScaledShape,
    d: readonly Reg<'f32'>[],
    a: readonly Reg<'e2m1x8'>[],
    b: readonly Reg<'e2m1x8'>[],
    aScale: ScaleWord,
    bScale: ScaleWord,
    c: readonly Reg<'f32'>[] = d,
  ): void {
    const byteIds: readonly number[] = BLOCK_SCALED_MMA[shape].byteIds;
    const bad = (scale: ScaleWord, threads: number) =>
      !byteIds.includes(scale.byte ?? 0) || !(scale.thread >= 0 && scale.thread < threads);
    if (a.length !== 4 || b.length !== 2 || d.length !== 4 || c.length !== 4 || bad(aScale, 2) || bad(bScale, 4)) {
      throw new RangeError(`mma.${shape}: fragments or selectors that it does not have`);
    }
    const group = (registers: readonly Reg[]): Operand => ({ type: 'group', registers });
    const selector = ({ byte = 0, thread }: ScaleWord): Operand => ({ type: 'scaleSelector', byte, thread });
    this.emit(
      `mma.sync.aligned.${shape}`,
      [group(d)],
      [group(a), group(b), group(c), aScale.register, selector(aScale), bScale.register, selector(bScale)],
    );
  }

  /** The value of the lane whose number differs by `mask`. */
  shflBfly<K extends 'b32' | 'f32' | 'u32' | 's32'>(value: Reg<K>, mask: number): Reg<K> {
    const d = this.reg(value.kind);
    this.emit(
      'shfl.sync.bfly.b32',
      [d],
      [value, immediate(mask, 'b32'), immediate(31, 'b32'), immediate(0xffffffff, 'b32')],
    );
    return d;
  }

  /** True in every lane when true in any. */
  voteAny(predicate: Reg<'pred'>): Reg<'pred'> {
    const d = this.reg('pred');
    this.emit('vote.sync.any.pred', [d], [predicate, immediate(0xffffffff, 'b32')]);
    return d;
  }

  /** Waits for all lanes of the warp; their shared writes before it are seen after it. */
  warpSync(): void {
    this.emit('bar.warp.sync', [], [immediate(0xffffffff, 'b32')]);
  }

  /** Waits for all threads of the CTA; their shared writes before it are seen after it. */
  barSync(): void {
    this.emit('bar.sync', [], [immediate(0)]);
  }

  /**
   * A barrier of `threads` threads, some of the CTA's warps: `bar.sync` waits for all of them, `bar.arrive` does not
   * wait.
   *
   * @param barrier 1 to 15; in a register, the same in all lanes
   */
  namedBarrier(opcode: 'bar.sync' | 'bar.arrive', barrier: Value<'u32'>, threads: number): void {
    this.emit(opcode, [], [this.#operand('u32', barrier), immediate(threads)]);
  }
}
