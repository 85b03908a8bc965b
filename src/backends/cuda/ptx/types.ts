/** The values and instructions of a kernel, as data. */

/**
 * Kinds of register values and their width in bits. PTX checks only widths; the kinds keep a predicate from being added
 * to a float and a shared address from being loaded as a global one. Packed kinds name the elements from the low bits
 * up.
 */
export const KIND_BITS = {
  pred: 1,
  e2m1x2: 8,
  b16: 16,
  f16: 16,
  bf16: 16,
  e4m3x2: 16,
  b32: 32,
  s32: 32,
  u32: 32,
  f32: 32,
  f16x2: 32,
  bf16x2: 32,
  e4m3x4: 32,
  s8x4: 32,
  s4x8: 32,
  e2m1x8: 32,
  /** Byte address in the CTA's shared memory. */
  shared: 32,
  b64: 64,
  u64: 64,
  /** Byte address in global memory. */
  global: 64,
} as const;

export type Kind = keyof typeof KIND_BITS;

/** The kinds as wide as `K`, which a register of kind `K` may be reinterpreted as. */
export type SameWidth<K extends Kind> = {
  [Other in Kind]: (typeof KIND_BITS)[Other] extends (typeof KIND_BITS)[K] ? Other : never;
}[Kind];

/** A virtual register. Two `Reg`s with one `id` are one register seen as two kinds. */
export interface Reg<K extends Kind = Kind> {
  readonly type: 'reg';
  readonly kind: K;
  readonly id: number;
}

/** A register or a literal of its kind; `pred` and packed kinds other than raw bits have no literals. */
export type Value<K extends Kind> = K extends NumericKind ? Reg<K> | number : Reg<K>;

export type IntegerKind = 's32' | 'u32' | 'u64';
export type FloatKind = 'f32' | 'f16x2' | 'bf16x2';
export type BitsKind = 'b16' | 'b32' | 'b64';
export type NumericKind = IntegerKind | 'f32' | BitsKind | 'shared' | 'global';

/** Address registers by state space. */
export type AddressKind = 'shared' | 'global';

export type Operand =
  | Reg
  | { readonly type: 'immediate'; readonly kind: Kind; readonly value: number }
  /** `{a, b, c, d}`: a fragment or a vector. */
  | { readonly type: 'group'; readonly registers: readonly Reg[] }
  /** `first|second`: two results of one instruction. */
  | { readonly type: 'pair'; readonly first: Reg; readonly second: Reg }
  /** `[base + offset]` */
  | { readonly type: 'memory'; readonly base: Reg; readonly offset: number }
  /** `[map, {c0, c1, ...}]`: a box of a tensor map. */
  | { readonly type: 'tensor'; readonly map: Reg<'global'>; readonly coordinates: readonly Reg<'s32'>[] }
  /** `{byte, thread}`: which byte of which lane's register scales a row or column of a block-scaled product. */
  | { readonly type: 'scaleSelector'; readonly byte: number; readonly thread: number }
  /** `[name]` of a kernel parameter, or with `addressOf` the parameter's own address. */
  | { readonly type: 'parameter'; readonly name: string; readonly addressOf?: boolean }
  | { readonly type: 'special'; readonly name: SpecialRegister }
  | { readonly type: 'label'; readonly name: string }
  /** `_`: a result that nobody needs. */
  | { readonly type: 'sink' };

export type SpecialRegister =
  | '%tid.x'
  | '%ctaid.x'
  | '%ctaid.y'
  | '%ctaid.z'
  | '%nctaid.x'
  | '%laneid'
  | '%cluster_ctarank';

/** One instruction, or a label (opcode `label`). Outputs come first in PTX text, inputs after them. */
export interface Instruction {
  readonly opcode: string;
  readonly outputs: readonly Operand[];
  readonly inputs: readonly Operand[];
  /** The outputs are read as well: accumulators of `wgmma`. */
  readonly accumulates?: boolean;
  /** Executed only by threads for which the predicate is true (or false, when negated). */
  readonly guard?: { readonly predicate: Reg<'pred'>; readonly negated: boolean };
  /** The part of the kernel that it belongs to, in the kernel author's words. */
  readonly section: string;
}

/** Types of kernel parameters. `tensorMap` is a CUtensorMap passed by value (`__grid_constant__`). */
export type ParameterKind = 'u64' | 'u32' | 's32' | 'f32' | 'tensorMap';

export interface Parameter<K extends ParameterKind = ParameterKind> {
  readonly name: string;
  readonly kind: K;
}

/** A kernel ready to be printed, inspected or simulated. */
export interface Kernel {
  readonly name: string;
  /** `sm_80`, `sm_90a`, ... */
  readonly target: string;
  readonly parameters: readonly Parameter[];
  readonly instructions: readonly Instruction[];
  /** Number of virtual registers; ids are below it. */
  readonly registers: number;
  /** Kind under which each register was first made, by id. */
  readonly registerKinds: readonly Kind[];
  /** Threads of a CTA. */
  readonly threads: number;
  /** CTAs that must fit on one multiprocessor; bounds the registers of a thread. */
  readonly minBlocksPerMultiprocessor: number;
  /** Dynamic shared memory of a CTA. */
  readonly sharedBytes: number;
  readonly clusterSize: number;
}
