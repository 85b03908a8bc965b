/** Turns basic blocks of a kernel into JavaScript functions over a warp's registers. */
import v8 from 'node:v8';
import { printInstruction } from '../../ptx/printer.ts';
import { type Instruction, type Kernel, KIND_BITS, type Operand, type Parameter, type Reg } from '../../ptx/types.ts';
import * as runtime from './arithmetic.ts';
import { asyncCollective, asyncLaneWise, endsTurn, isNamedBarrier } from './compile-async.ts';
import { SHARED_BASE } from './memory.ts';
import type { Warp } from './warp.ts';

/** What ends a basic block. */
export type Terminator =
  /** `turn`: another warp may run. */
  | { readonly kind: 'fallthrough' | 'barrier' | 'turn' }
  | { readonly kind: 'exit'; readonly guard?: { readonly row: number; readonly when: number } }
  | {
      readonly kind: 'branch';
      readonly target: number;
      readonly guard?: { readonly row: number; readonly when: number };
    };

export interface Block {
  readonly run: (warp: Warp) => void;
  readonly terminator: Terminator;
}

export interface Program {
  readonly blocks: readonly Block[];
  /** Words of a warp's register file. */
  readonly words: number;
}

export type ParameterValues = Readonly<Record<string, number | bigint>>;

const INSTRUCTIONS_PER_FUNCTION = 64;

/*
 * The functions generated here are long and run a few dozen times each: optimizing them takes longer than all their runs, and
 * interpreting them is slow. V8's baseline compiler from the first call on, and no optimizer for what has more bytecode than any
 * function written by hand, make a simulated test three times as fast (processor time of conformance-sm80.test.ts).
 */
for (const flag of ['--always-sparkplug', '--max-optimized-bytecode-size=1500']) v8.setFlagsFromString(flag);

class Emitter {
  readonly rows: readonly number[];
  readonly parameters: readonly Parameter[];

  constructor(rows: readonly number[], parameters: readonly Parameter[]) {
    this.rows = rows;
    this.parameters = parameters;
  }

  row(register: Reg): number {
    return this.rows[register.id] as number;
  }

  #is64(operand: Operand): boolean {
    return operand.type === 'reg' && KIND_BITS[operand.kind] === 64;
  }

  /** An operand of the lane at hand as unsigned, signed or float. */
  value(operand: Operand, as: 'u' | 'i' | 'f'): string {
    if (operand.type === 'reg') return `${as}[${this.row(operand)}+l]`;
    if (operand.type === 'immediate') {
      const { value } = operand;
      if (as === 'f') {
        return Number.isNaN(value)
          ? 'NaN'
          : value === Infinity
            ? 'Infinity'
            : value === -Infinity
              ? '(-Infinity)'
              : `(${value})`;
      }
      return as === 'i' ? `(${value | 0})` : `(${value >>> 0})`;
    }
    throw new Error(`operand ${operand.type}`);
  }

  /** High word of a 64-bit operand. */
  high(operand: Operand): string {
    if (operand.type === 'reg') return this.#is64(operand) ? `u[${this.row(operand) + 32}+l]` : '0';
    if (operand.type === 'immediate') return `(${Math.floor(operand.value / 2 ** 32) >>> 0})`;
    throw new Error(`operand ${operand.type}`);
  }

  /** Sets a 64-bit register to two words, each an expression of the constants that `names` declares before. */
  set64(target: Operand, names: string, low: string, high: string): string {
    const row = this.row(target as Reg);
    return `{const ${names};u[${row}+l]=${low};u[${row + 32}+l]=${high};}`;
  }

  /** The statements of a lane-wise instruction, or undefined when it needs the whole warp or a memory. */
  laneWise(instruction: Instruction): string | undefined {
    const asynchronous = asyncLaneWise(this, instruction);
    if (asynchronous !== undefined) return asynchronous;
    const { opcode, outputs, inputs } = instruction;
    const [name, mode] = opcode.split('.');
    const [d] = outputs as [Operand];
    const [a, b] = inputs as [Operand, Operand];
    switch (name) {
      case 'mov':
        return this.#move(instruction, opcode.split('.').at(-1) as string);
      case 'cvt':
        return this.#convert(opcode, d, a, b);
      case 'ld':
        return mode === 'param' ? this.#loadParameter(d as Reg, a) : undefined;
      default:
        return this.#sums(instruction) ?? this.#functions(instruction) ?? this.#logic(instruction);
    }
  }

  /** What the operands of an arithmetic or logic instruction are called in its statements. */
  #named({ opcode, outputs, inputs }: Instruction) {
    const [name, mode, ...rest] = opcode.split('.') as [string, string, ...string[]];
    const type = rest.at(-1) ?? mode;
    const [d] = outputs as [Operand];
    const [a, b, c] = inputs as [Operand, Operand, Operand];
    const view: 'u' | 'i' | 'f' = type === 'f32' ? 'f' : type.startsWith('s') ? 'i' : 'u';
    const [x, y, z] = [a, b, c].map((operand) =>
      operand?.type === 'reg' || operand?.type === 'immediate' ? this.value(operand, view) : '',
    ) as [string, string, string];
    return { name, mode, type, d, a, b, c, view, x, y, z, out: (as: 'u' | 'i' | 'f') => this.value(d, as) };
  }

  /** Sums and products. */
  #sums(instruction: Instruction): string | undefined {
    const { name, mode, type, d, a, b, view, x, y, z, out } = this.#named(instruction);
    const directed = { rp: 'roundUp', rm: 'roundDown' }[mode];
    switch (name) {
      case 'add':
      case 'sub': {
        const sign = name === 'add' ? '+' : '-';
        if (type === 'u64') {
          const [low, high] = [this.row(d as Reg), this.row(d as Reg) + 32];
          return `{const s=${x}${sign}${y};const c=Math.floor(s/4294967296);u[${high}+l]=${this.high(a)}${sign}${this.high(b)}+c;u[${low}+l]=s;}`;
        }
        if (type === 'f16x2') return `${out('u')}=R.halves((p,q)=>p${sign}q,${x},${y});`;
        // A float64 sum, rounded again by the store, is the float32 sum; directed roundings also need the part that was
        // rounded off.
        if (directed !== undefined) return `${out('f')}=R.${directed}(R.fusedSum(1,${x},${sign}${y}));`;
        return `${out(view)}=${x}${sign}${y};`;
      }
      case 'mul':
        // A product of float32 values is exact in float64.
        if (type === 'f32') return `${out('f')}=${directed === undefined ? '' : `R.${directed}`}(${x}*${y});`;
        if (type === 'f16x2') return `${out('u')}=R.halves((p,q)=>p*q,${x},${y});`;
        if (mode === 'wide') return this.set64(d, `p=${x},q=${y}`, 'Math.imul(p,q)', 'R.mulHigh(p,q)');
        if (mode === 'hi') return `${out('u')}=R.mulHigh(${x},${y});`;
        if (type === 'u64') {
          const words = `p=${x},q=${y},ph=${this.high(a)},qh=${this.high(b)}`;
          return this.set64(d, words, 'Math.imul(p,q)', 'R.mulHigh(p,q)+Math.imul(ph,q)+Math.imul(p,qh)');
        }
        return `${out('i')}=Math.imul(${x},${y});`;
      case 'fma':
        if (type === 'f32')
          return `${out('f')}=${directed === undefined ? '' : `R.${directed}`}(R.fusedSum(${x},${y},${z}));`;
        if (type === 'f16x2') return `${out('u')}=R.halves((p,q,r)=>p*q+r,${x},${y},${z});`;
        return undefined;
      case 'mad':
        return `${out('i')}=Math.imul(${x},${y})+${z};`;
      default:
        return undefined;
    }
  }

  /** Arithmetic that is no sum or product. */
  #functions(instruction: Instruction): string | undefined {
    const { name, mode, type, view, x, y, out } = this.#named(instruction);
    switch (name) {
      case 'div':
        if (type === 'f32') return `${out('f')}=${x}/${y};`;
        return `${out('u')}=Math.floor(${x}/${y});`;
      case 'rem':
        return `${out('u')}=${x}%${y};`;
      case 'min':
      case 'max': {
        if (instruction.opcode.includes('.xorsign.abs.')) {
          return `${out('u')}=R.maxMagnitudes(${type === 'bf16x2' ? 'R.BRAIN' : 'R.HALF'},${this.#bits(instruction.inputs[0] as Operand)},${this.#bits(instruction.inputs[1] as Operand)});`;
        }
        if (mode === 'NaN') {
          if (type === 'f16x2') return `${out('u')}=R.halves(Math.max,${x},${y});`;
          return `${out('f')}=Math.max(${x},${y});`;
        }
        const of = type === 'f32' || type === 'f16x2' ? `R.${name}Number` : `Math.${name}`;
        if (type === 'f16x2') return `${out('u')}=R.halves(${of},${x},${y});`;
        return `${out(view)}=${of}(${x},${y});`;
      }
      case 'abs':
        return `${out(view)}=Math.abs(${x});`;
      case 'neg':
        return `${out(view)}=-${x};`;
      case 'ex2':
        return `${out('f')}=R.flush(2**${x});`;
      case 'lg2':
        return `${out('f')}=Math.log2(R.flush(${x}));`;
      case 'rcp':
        return `${out('f')}=${mode === 'approx' ? `R.flush(1/${x})` : `1/${x}`};`;
      default:
        return undefined;
    }
  }

  /** Bits, predicates and comparisons. */
  #logic(instruction: Instruction): string | undefined {
    const { name, mode, type, d, a, b, c, view, x, y, z, out } = this.#named(instruction);
    switch (name) {
      case 'and':
      case 'or':
      case 'xor': {
        const sign = { and: '&', or: '|', xor: '^' }[name];
        const low = `${out('u')}=${x}${sign}${y};`;
        return type === 'b64' ? `${low}u[${this.row(d as Reg) + 32}+l]=${this.high(a)}${sign}${this.high(b)};` : low;
      }
      case 'not':
        return type === 'pred' ? `${out('u')}=1-${x};` : `${out('u')}=~${x};`;
      case 'shl':
        if (type === 'b64') {
          const high = 'n>63?0:n>31?p<<(n-32):n===0?h:(h<<n)|(p>>>(32-n))';
          return this.set64(
            d,
            `p=${this.value(a, 'u')},h=${this.high(a)},n=${this.value(b, 'u')}`,
            'n>31?0:p<<n',
            high,
          );
        }
        return `{const n=${this.value(b, 'u')};${out('u')}=n>31?0:${x}<<n;}`;
      case 'shr':
        if (type === 'u64') {
          const low = 'n>63?0:n>31?h>>>(n-32):n===0?p:(p>>>n)|(h<<(32-n))';
          return this.set64(
            d,
            `p=${this.value(a, 'u')},h=${this.high(a)},n=${this.value(b, 'u')}`,
            low,
            'n>31?0:h>>>n',
          );
        }
        return `{const n=${this.value(b, 'u')};${out(view)}=n>31?${view === 'i' ? `${x}>>31` : '0'}:${x}${view === 'i' ? '>>' : '>>>'}n;}`;
      case 'prmt':
        return `${out('u')}=R.prmt(${x},${y},${z});`;
      case 'lop3': {
        const { value: table } = instruction.inputs[3] as Operand & { value: number };
        // A term for each row of the truth table that is 1.
        const terms = Array.from({ length: 8 }, (_, row) => row).filter((row) => (table >> row) & 1);
        const term = (row: number) =>
          [x, y, z].map((value, i) => `${(row >> (2 - i)) & 1 ? '' : '~'}(${value})`).join('&');
        return `${out('u')}=${terms.map((row) => `(${term(row)})`).join('|') || '0'};`;
      }
      case 'setp': {
        const sign = { eq: '===', ne: '!==', lt: '<', le: '<=', gt: '>', ge: '>=' }[mode as 'eq'];
        // High words decide unless they are equal.
        if (type === 'u64') {
          const [p, q] = [this.high(a), this.high(b)];
          return `${out('u')}=(${p}===${q}?${x}${sign}${y}:${p}${sign}${q})?1:0;`;
        }
        // Comparisons with NaN are false, `ne` too.
        if (mode === 'ne' && type === 'f32') return `${out('u')}=(${x}<${y}||${x}>${y})?1:0;`;
        return `${out('u')}=${x}${sign}${y}?1:0;`;
      }
      case 'selp':
        return `${out('u')}=${this.value(c, 'u')}?${this.#bits(a)}:${this.#bits(b)};`;
      default:
        return undefined;
    }
  }

  /** The 32 bits of an operand, whatever its kind. */
  #bits(operand: Operand): string {
    if (operand.type === 'immediate' && operand.kind === 'f32') {
      return String(new Uint32Array(new Float32Array([operand.value]).buffer)[0]);
    }
    return this.value(operand, 'u');
  }

  #move({ outputs, inputs }: Instruction, type: string): string {
    const [d] = outputs as [Operand];
    const [a] = inputs as [Operand];
    if (a.type === 'special') return `u[${this.row(d as Reg)}+l]=${this.#special(a.name)};`;
    if (a.type === 'parameter') return `u[${this.row(d as Reg)}+l]=${SHARED_BASE};`;
    if (a.type === 'group') {
      const [low, high] = a.registers as [Reg, Reg];
      const row = this.row(d as Reg);
      if (a.registers.length === 4) {
        const bytes = a.registers.map((register, i) => `((u[${this.row(register)}+l]&255)<<${8 * i})`);
        return `u[${row}+l]=${bytes.join('|')};`;
      }
      if (type === 'b64') return `u[${row}+l]=u[${this.row(low)}+l];u[${row + 32}+l]=u[${this.row(high)}+l];`;
      return `u[${row}+l]=(u[${this.row(low)}+l]&65535)|(u[${this.row(high)}+l]<<16);`;
    }
    if (d.type === 'group') {
      const [low, high] = d.registers as [Reg, Reg];
      const row = this.row(a as Reg);
      if (d.registers.length === 4) {
        const bytes = d.registers.map((register, i) => `u[${this.row(register)}+l]=(w>>>${8 * i})&255;`);
        return `{const w=u[${row}+l];${bytes.join('')}}`;
      }
      if (type === 'b64') return `u[${this.row(low)}+l]=u[${row}+l];u[${this.row(high)}+l]=u[${row + 32}+l];`;
      return `{const w=u[${row}+l];u[${this.row(low)}+l]=w&65535;u[${this.row(high)}+l]=w>>>16;}`;
    }
    const row = this.row(d as Reg);
    const low = `u[${row}+l]=${this.#bits(a)};`;
    return this.#is64(d) ? `${low}u[${row + 32}+l]=${this.high(a)};` : low;
  }

  #special(name: string): string {
    switch (name) {
      case '%tid.x':
        return 'W.index*32+l';
      case '%laneid':
        return 'l';
      case '%ctaid.x':
        return 'W.cta.block';
      case '%nctaid.x':
        return 'W.cta.gridBlocks';
      default:
        return '0';
    }
  }

  #loadParameter(d: Reg, parameter: Operand): string {
    if (parameter.type !== 'parameter') throw new Error('ld.param of no parameter');
    const index = this.parameters.findIndex(({ name }) => name === parameter.name);
    if (index < 0) throw new Error(`no parameter ${parameter.name}`);
    const row = this.row(d);
    const low = `u[${row}+l]=P[${2 * index}];`;
    return KIND_BITS[d.kind] === 64 ? `${low}u[${row + 32}+l]=P[${2 * index + 1}];` : low;
  }

  #convert(opcode: string, d: Operand, a: Operand, b: Operand): string {
    const out = (as: 'u' | 'i' | 'f') => this.value(d, as);
    const [u, i, f] = [this.value(a, 'u'), this.value(a, 'i'), this.value(a, 'f')];
    switch (opcode) {
      case 'cvt.rn.f32.s32':
        return `${out('f')}=${i};`;
      case 'cvt.rn.f32.u32':
        return `${out('f')}=${u};`;
      case 'cvt.f32.f16':
        return `${out('f')}=R.halfTo(${u});`;
      case 'cvt.rn.f16.f32':
        return `${out('u')}=R.halfFrom(${f});`;
      case 'cvt.rn.bf16.f32':
        return `${out('u')}=R.bfloat16From(${f});`;
      case 'cvt.rni.s32.f32':
        return `${out('i')}=R.roundEven(${f});`;
      case 'cvt.u64.u32':
        return `${out('u')}=${u};u[${this.row(d as Reg) + 32}+l]=0;`;
      case 'cvt.s64.s32':
        return `${out('u')}=${u};i[${this.row(d as Reg) + 32}+l]=${i}>>31;`;
      case 'cvt.u32.u64':
        return `${out('u')}=${u};`;
      case 'cvt.u32.u16':
      case 'cvt.u16.u32':
        return `${out('u')}=${u}&65535;`;
      case 'cvt.rn.f16x2.e4m3x2':
        return `${out('u')}=R.unpackE4m3(${u});`;
      case 'cvt.rn.satfinite.e4m3x2.f32':
        return `${out('u')}=R.packE4m3(${f},${this.value(b, 'f')});`;
      case 'cvt.rn.f16x2.e2m1x2':
        return `${out('u')}=R.unpackE2m1(${u});`;
      case 'cvt.rn.satfinite.e2m1x2.f32':
        return `${out('u')}=R.packE2m1(${f},${this.value(b, 'f')});`;
      case 'cvt.rn.f16x2.f32':
        return `${out('u')}=(R.halfFrom(${f})<<16)|R.halfFrom(${this.value(b, 'f')});`;
      case 'cvt.rn.bf16x2.f32':
        return `${out('u')}=(R.bfloat16From(${f})<<16)|R.bfloat16From(${this.value(b, 'f')});`;
      default:
        throw new Error(`the simulator has no ${opcode}`);
    }
  }

  /** An instruction of the whole warp or of a memory: statements for all lanes; `guarded` wraps the statements of one lane. */
  collective(instruction: Instruction, guarded: (statement: string) => string): string {
    const { opcode, outputs, inputs } = instruction;
    const parts = opcode.split('.');
    const what = JSON.stringify(`${instruction.section}: ${printInstruction(instruction)}`);
    const rows = (operand: Operand): number[] =>
      operand.type === 'group' ? operand.registers.map((register) => this.row(register)) : [this.row(operand as Reg)];
    const memory = (operand: Operand | undefined) => {
      if (operand?.type !== 'memory') throw new Error(`${opcode}: no address`);
      return `${this.row(operand.base)},${operand.offset}`;
    };
    const list = (values: readonly number[]) => `[${values}]`;
    const space = parts[1] === 'shared' ? 'Shared' : 'Global';
    const length = Number((parts.at(-1) as string).slice(1)) / 8;
    if (opcode.startsWith('ld.')) {
      const targets = rows(outputs[0] as Operand);
      return `W.rows=${list(targets)};${guarded(`W.load${space}(${targets[0]},l,${memory(inputs[0])},${length},${targets.length},${what});`)}`;
    }
    if (opcode.startsWith('st.')) {
      return guarded(`W.store${space}(${list(rows(inputs[1] as Operand))},l,${memory(inputs[0])},${length},${what});`);
    }
    if (opcode === 'red.global.or.b32') {
      return guarded(`W.redOr(${this.value(inputs[1] as Operand, 'u')},l,${memory(inputs[0])},${what});`);
    }
    if (opcode === 'atom.global.inc.u32') {
      const [address, most] = inputs as [Operand, Operand];
      return guarded(
        `W.atomInc(${this.row(outputs[0] as Reg)},l,${this.value(most, 'u')},${memory(address)},${what});`,
      );
    }
    if (opcode === 'cp.async.cg.shared.global') {
      return guarded(`W.copyAsync(l,${memory(inputs[0])},${memory(inputs[1])},${what});`);
    }
    if (opcode === 'cp.async.commit_group') return guarded('W.commitCopies(l);');
    const first = inputs[0] as Operand;
    if (opcode === 'cp.async.wait_group')
      return guarded(`W.waitCopies(l,${first.type === 'immediate' ? first.value : 0});`);
    if (opcode.startsWith('ldmatrix')) {
      return `W.ldmatrix(${list(rows(outputs[0] as Operand))},${memory(first)},${opcode.includes('.trans')},${what});`;
    }
    if (opcode.includes('.block_scale.')) {
      const [a, b, c, aScale, aSelector, bScale, bSelector] = inputs as [Operand, ...Operand[]];
      const groups = [outputs[0], a, b, c].map((operand) => list(rows(operand as Operand))).join(',');
      const scale = (register: Operand | undefined, selector: Operand | undefined) => {
        if (selector?.type !== 'scaleSelector') throw new Error(`${opcode}: no selector`);
        return `{row:${this.row(register as Reg)},byte:${selector.byte},thread:${selector.thread}}`;
      };
      const scales = `${scale(aScale, aSelector)},${scale(bScale, bSelector)}`;
      return `W.mmaBlockScaled(${JSON.stringify(opcode)},${groups},${scales},${what});`;
    }
    if (opcode.startsWith('mma.sync.aligned.')) {
      const groups = [outputs[0], ...inputs].map((operand) => list(rows(operand as Operand))).join(',');
      return `W.mma(${JSON.stringify(opcode.slice('mma.sync.aligned.'.length))},${groups},${what});`;
    }
    if (opcode === 'shfl.sync.bfly.b32') {
      const mask = inputs[1] as Operand & { value: number };
      return `W.shflBfly(${this.row(outputs[0] as Reg)},${this.row(first as Reg)},${mask.value},${what});`;
    }
    if (opcode === 'vote.sync.any.pred') {
      return `W.voteAny(${this.row(outputs[0] as Reg)},${this.row(first as Reg)},${what});`;
    }
    const asynchronous = asyncCollective(this, instruction, guarded, what);
    if (asynchronous !== undefined) return asynchronous;
    throw new Error(`the simulator has no ${opcode}`);
  }
}

/** A loop over the lanes at hand. */
const eachLane = (body: string) => `for(let j=0;j<n;j++){const l=L[j];${body}}`;

function compileFunction(statements: readonly string[]): (warp: Warp) => void {
  const header = 'const u=W.u,i=W.i,f=W.f,L=W.lanes,n=W.active,P=W.cta.parameters;';
  // Names are fixed and numbers are register rows: this is a code generator for tests, with no input from outside.
  const make = new Function('R', `return function(W){${header}${statements.join('\n')}}`) as (
    library: typeof runtime,
  ) => (warp: Warp) => void;
  return make(runtime);
}

/** Values of a kernel's parameters as its functions read them: two words each, low word or float first. */
export function parameterWords(kernel: Kernel, values: ParameterValues): Uint32Array {
  const words = new DataView(new ArrayBuffer(8 * kernel.parameters.length));
  kernel.parameters.forEach(({ name, kind }, i) => {
    const value = values[name];
    if (kind === 'tensorMap') return;
    if (value === undefined) throw new Error(`no value for parameter ${name}`);
    if (kind === 'f32') words.setFloat32(8 * i, Number(value), true);
    else words.setBigUint64(8 * i, BigInt.asUintN(64, BigInt(value)), true);
  });
  return new Uint32Array(words.buffer);
}

const programs = new WeakMap<Kernel, Program>();

/** Compiles a kernel, once. */
export function compileKernel(kernel: Kernel): Program {
  const known = programs.get(kernel);
  if (known !== undefined) return known;
  const program = compile(kernel);
  programs.set(kernel, program);
  return program;
}

function compile(kernel: Kernel): Program {
  const rows: number[] = [];
  let words = 0;
  for (const kind of kernel.registerKinds) {
    rows.push(words);
    words += KIND_BITS[kind] === 64 ? 64 : 32;
  }
  const emitter = new Emitter(rows, kernel.parameters);

  const starts = new Set<number>([0]);
  kernel.instructions.forEach((instruction, at) => {
    const { opcode } = instruction;
    if (opcode === 'label') starts.add(at);
    if (opcode === 'bra' || opcode === 'ret' || opcode === 'bar.sync' || endsTurn(instruction)) starts.add(at + 1);
  });
  const order = [...starts].filter((at) => at < kernel.instructions.length).sort((x, y) => x - y);
  const blockOfLabel = new Map<string, number>();
  order.forEach((at, index) => {
    const instruction = kernel.instructions[at] as Instruction;
    const [label] = instruction.inputs;
    if (instruction.opcode === 'label' && label?.type === 'label') blockOfLabel.set(label.name, index);
  });

  const blocks = order.map((at, index): Block => {
    const instructions = kernel.instructions.slice(at, order[index + 1] ?? kernel.instructions.length);
    const last = instructions.at(-1) as Instruction;
    const guard =
      last.guard === undefined
        ? {}
        : { guard: { row: emitter.row(last.guard.predicate), when: last.guard.negated ? 0 : 1 } };
    let terminator: Terminator = { kind: 'fallthrough' };
    const [target] = last.inputs;
    if (last.opcode === 'bra' && target?.type === 'label') {
      terminator = { kind: 'branch', target: blockOfLabel.get(target.name) as number, ...guard };
    } else if (last.opcode === 'ret') terminator = { kind: 'exit', ...guard };
    else if (endsTurn(last)) terminator = { kind: 'turn' };
    else if (last.opcode === 'bar.sync') terminator = { kind: 'barrier' };
    const body = instructions.filter(
      (instruction) =>
        isNamedBarrier(instruction) ||
        !['label', 'bra', 'ret', 'bar.sync', 'bar.warp.sync', 'fence.acq_rel.gpu'].includes(instruction.opcode),
    );
    const functions: ((warp: Warp) => void)[] = [];
    for (let first = 0; first < body.length; first += INSTRUCTIONS_PER_FUNCTION) {
      functions.push(compileFunction(statementsOf(emitter, body.slice(first, first + INSTRUCTIONS_PER_FUNCTION))));
    }
    return {
      terminator,
      run: (warp) => {
        for (const run of functions) run(warp);
      },
    };
  });
  return { blocks, words };
}

/** Statements of consecutive instructions; neighbours that are lane-wise share one loop over the lanes. */
function statementsOf(emitter: Emitter, instructions: readonly Instruction[]): string[] {
  const statements: string[] = [];
  let fused: string[] = [];
  const flush = () => {
    if (fused.length > 0) statements.push(eachLane(fused.join('')));
    fused = [];
  };
  for (const instruction of instructions) {
    const { guard } = instruction;
    const guarded = (statement: string) =>
      guard === undefined
        ? statement
        : `if(u[${emitter.row(guard.predicate)}+l]===${guard.negated ? 0 : 1}){${statement}}`;
    const laneWise = emitter.laneWise(instruction);
    if (laneWise !== undefined) {
      fused.push(guarded(laneWise));
      continue;
    }
    flush();
    statements.push(emitter.collective(instruction, (statement) => eachLane(guarded(statement))));
  }
  flush();
  return statements;
}
