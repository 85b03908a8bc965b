/** Operands as files that add a family of instructions write them. */
import type { Kind, Operand, Reg } from './types.ts';

export const immediate = (value: number, kind: Kind = 'u32'): Operand => ({ type: 'immediate', kind, value });
export const memory = (base: Reg, offset = 0): Operand => ({ type: 'memory', base, offset });
export const SINK: Operand = { type: 'sink' };
