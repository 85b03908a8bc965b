/** What can be known of a kernel without running it: liveness, register pressure, a listing by section. */
import { printInstruction } from './printer.ts';
import { type Instruction, type Kernel, KIND_BITS, type Operand, type Reg } from './types.ts';

function registersIn(operand: Operand): readonly Reg[] {
  switch (operand.type) {
    case 'reg':
      return [operand];
    case 'group':
      return operand.registers;
    case 'pair':
      return [operand.first, operand.second];
    case 'memory':
      return [operand.base];
    case 'tensor':
      return [operand.map, ...operand.coordinates];
    default:
      return [];
  }
}

/** Registers that an instruction reads (its guard included). */
export function readsOf({ inputs, outputs, guard, accumulates }: Instruction): Reg[] {
  const reads = inputs.flatMap(registersIn);
  if (accumulates) reads.push(...outputs.flatMap(registersIn));
  // Addresses among the outputs are read, not written.
  for (const output of outputs)
    if (output.type === 'memory' || output.type === 'tensor') reads.push(...registersIn(output));
  if (guard !== undefined) reads.push(guard.predicate);
  return reads;
}

/** Registers that an instruction writes. */
export function writesOf({ outputs }: Instruction): Reg[] {
  return outputs.flatMap((output) =>
    output.type === 'reg' || output.type === 'group' || output.type === 'pair' ? registersIn(output) : [],
  );
}

/** For each instruction, the indices of those that may follow it. */
function successors(instructions: readonly Instruction[]): number[][] {
  const labels = new Map<string, number>();
  instructions.forEach(({ opcode, inputs }, i) => {
    const [target] = inputs;
    if (opcode === 'label' && target?.type === 'label') labels.set(target.name, i);
  });
  return instructions.map(({ opcode, inputs, guard }, i) => {
    const next = guard !== undefined || (opcode !== 'bra' && opcode !== 'ret') ? [i + 1] : [];
    const [target] = inputs;
    if (opcode === 'bra' && target?.type === 'label') {
      const at = labels.get(target.name);
      if (at === undefined) throw new Error(`no label ${target.name}`);
      next.push(at);
    }
    return next.filter((index) => index < instructions.length);
  });
}

/** For each instruction, the ids of the registers that are live after it. */
export function liveAfter(kernel: Pick<Kernel, 'instructions' | 'registers'>): Set<number>[] {
  const { instructions } = kernel;
  const next = successors(instructions);
  const before: Set<number>[] = instructions.map(() => new Set());
  const after: Set<number>[] = instructions.map(() => new Set());
  for (let changed = true; changed; ) {
    changed = false;
    for (let i = instructions.length - 1; i >= 0; i--) {
      const instruction = instructions[i] as Instruction;
      const out = after[i] as Set<number>;
      for (const successor of next[i] as number[]) for (const id of before[successor] as Set<number>) out.add(id);
      const live = new Set(out);
      // A guarded write leaves the old value in the other threads.
      if (instruction.guard === undefined) for (const { id } of writesOf(instruction)) live.delete(id);
      for (const { id } of readsOf(instruction)) live.add(id);
      if (live.size !== (before[i] as Set<number>).size) {
        before[i] = live;
        changed = true;
      }
    }
  }
  return after;
}

export interface RegisterPressure {
  /** Most 32-bit registers live at once: a bound on what ptxas needs without spilling, scheduling apart. */
  readonly registers: number;
  /** Most predicates live at once. */
  readonly predicates: number;
  /** Live registers at that point, by kind. */
  readonly byKind: Readonly<Record<string, number>>;
  /** The section in which that is. */
  readonly section: string;
}

/** Where the most registers are live, and which. */
export function registerPressure(kernel: Kernel): RegisterPressure {
  let registers = 0;
  let predicates = 0;
  let byKind: Record<string, number> = {};
  let section = '';
  liveAfter(kernel).forEach((live, i) => {
    let bits = 0;
    let predicateCount = 0;
    const kinds: Record<string, number> = {};
    for (const id of live) {
      const kind = kernel.registerKinds[id] ?? 'b32';
      kinds[kind] = (kinds[kind] ?? 0) + 1;
      if (kind === 'pred') predicateCount++;
      else bits += Math.max(32, KIND_BITS[kind]);
    }
    predicates = Math.max(predicates, predicateCount);
    if (bits / 32 > registers) {
      registers = bits / 32;
      byKind = kinds;
      section = (kernel.instructions[i] as Instruction).section;
    }
  });
  return { registers, predicates, byKind, section };
}

/** Instructions of a kernel by opcode, most frequent first; counts instructions as written, not as executed. */
export function opcodeCounts(kernel: Kernel): Map<string, number> {
  const counts = new Map<string, number>();
  for (const { opcode } of kernel.instructions) counts.set(opcode, (counts.get(opcode) ?? 0) + 1);
  return new Map([...counts].sort((a, b) => b[1] - a[1]));
}

/** A listing with the kernel's section titles and, before each line, how many 32-bit registers are live after it. */
export function listing(kernel: Kernel): string {
  const live = liveAfter(kernel);
  const lines: string[] = [];
  let section = '';
  kernel.instructions.forEach((instruction, i) => {
    if (instruction.section !== section) {
      section = instruction.section;
      lines.push(`-- ${section}`);
    }
    let bits = 0;
    for (const id of live[i] as Set<number>) {
      const kind = kernel.registerKinds[id] ?? 'b32';
      if (kind !== 'pred') bits += Math.max(32, KIND_BITS[kind]);
    }
    lines.push(`${String(bits / 32).padStart(4)}  ${printInstruction(instruction)}`);
  });
  return lines.join('\n');
}
