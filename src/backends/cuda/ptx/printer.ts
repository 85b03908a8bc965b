/** A kernel as PTX text. */
import { requiredVersion } from './targets.ts';
import { type Instruction, type Kernel, KIND_BITS, type Operand, type Parameter, type Reg } from './types.ts';

const PREFIX = { 1: 'p', 8: 'b', 16: 'h', 32: 'r', 64: 'd' } as const;
const DECLARED = { 1: 'pred', 8: 'b8', 16: 'b16', 32: 'b32', 64: 'b64' } as const;

const registerName = (register: Reg) => `%${PREFIX[KIND_BITS[register.kind]]}${register.id}`;

const floatBits = new DataView(new ArrayBuffer(4));

function immediateText(kind: string, value: number): string {
  if (kind === 'f32') {
    floatBits.setFloat32(0, value);
    return `0f${floatBits.getUint32(0).toString(16).toUpperCase().padStart(8, '0')}`;
  }
  if (!Number.isSafeInteger(value)) throw new RangeError(`${value} is no ${kind} literal`);
  return String(value);
}

function memoryText(base: Reg, offset: number): string {
  return offset === 0
    ? `[${registerName(base)}]`
    : `[${registerName(base)}${offset > 0 ? '+' : '-'}${Math.abs(offset)}]`;
}

function operandText(operand: Operand): string {
  switch (operand.type) {
    case 'reg':
      return registerName(operand);
    case 'immediate':
      return immediateText(operand.kind, operand.value);
    case 'group':
      return `{${operand.registers.map(registerName).join(', ')}}`;
    case 'pair':
      return `${registerName(operand.first)}|${registerName(operand.second)}`;
    case 'memory':
      return memoryText(operand.base, operand.offset);
    case 'tensor':
      return `[${registerName(operand.map)}, {${operand.coordinates.map(registerName).join(', ')}}]`;
    case 'parameter':
      return operand.addressOf ? operand.name : `[${operand.name}]`;
    case 'sink':
      return '_';
    case 'scaleSelector':
      return `{${operand.byte}, ${operand.thread}}`;
    case 'special':
    case 'label':
      return operand.name;
  }
}

/** One instruction without its semicolon; labels end in a colon. */
export function printInstruction({ opcode, outputs, inputs, guard }: Instruction): string {
  const operands = [...outputs, ...inputs].map(operandText).join(', ');
  if (opcode === 'label') return `${operands}:`;
  const prefix = guard === undefined ? '' : `@${guard.negated ? '!' : ''}${registerName(guard.predicate)} `;
  return `${prefix}${opcode}${operands === '' ? '' : ` ${operands}`}`;
}

function parameterText({ name, kind }: Parameter): string {
  return kind === 'tensorMap' ? `.param .align 64 .b8 ${name}[128]` : `.param .${kind} ${name}`;
}

/** PTX of one kernel, a whole module by itself. */
export function printKernel(kernel: Kernel): string {
  const declarations = kernel.registerKinds.map(
    (kind, id) => `  .reg .${DECLARED[KIND_BITS[kind]]} %${PREFIX[KIND_BITS[kind]]}${id};`,
  );
  const lines: string[] = [];
  let section = '';
  for (const instruction of kernel.instructions) {
    if (instruction.section !== section) {
      section = instruction.section;
      lines.push(`  // ${section.replaceAll(/[^\x20-\x7e]/g, '?')}`); // PTX is ASCII
    }
    const text = printInstruction(instruction);
    lines.push(instruction.opcode === 'label' ? text : `  ${text};`);
  }
  return [
    `.version ${requiredVersion(kernel).toFixed(1)}`,
    `.target ${kernel.target}`,
    '.address_size 64',
    '.extern .shared .align 1024 .b8 sharedMemory[];',
    `.visible .entry ${kernel.name}(`,
    kernel.parameters.map((parameter) => `  ${parameterText(parameter)}`).join(',\n'),
    ')',
    ...(kernel.clusterSize > 1 ? [`.reqnctapercluster ${kernel.clusterSize}, 1, 1`] : []),
    `.reqntid ${kernel.threads}, 1, 1`,
    `.minnctapersm ${kernel.minBlocksPerMultiprocessor}`,
    '{',
    ...declarations,
    ...lines,
    '}',
    '',
  ].join('\n');
}
