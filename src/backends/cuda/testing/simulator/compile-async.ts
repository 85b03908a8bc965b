/** Code of the instructions of asynchronous kernels: products of warpgroups, `mbarrier`, TMA, named barriers. */
import type { Instruction, Operand, Reg } from '../../ptx/types.ts';

/** What the compiler of instructions gives. */
interface Emitting {
  row(register: Reg): number;
  value(operand: Operand, as: 'u' | 'i' | 'f'): string;
}

/** A barrier of some of the CTA's warps. */
export const isNamedBarrier = ({ opcode, inputs }: Instruction) =>
  opcode === 'bar.arrive' || (opcode === 'bar.sync' && inputs.length === 2);

/** Instructions after which another warp may run. */
export const endsTurn = (instruction: Instruction) =>
  instruction.opcode.startsWith('mbarrier.try_wait') || isNamedBarrier(instruction);

export const isAsynchronous = (instructions: readonly Instruction[]) =>
  instructions.some(({ opcode }) => opcode.startsWith('mbarrier.init'));

/** Like the compiler's `laneWise`, for asynchronous instructions. */
export function asyncLaneWise(emitter: Emitting, { opcode, outputs, inputs }: Instruction): string | undefined {
  const [d] = outputs;
  const [a, b] = inputs;
  if (opcode === 'cvta.param.u64' && d?.type === 'reg' && a?.type === 'reg') {
    return `u[${emitter.row(d)}+l]=u[${emitter.row(a)}+l];u[${emitter.row(d) + 32}+l]=0;`;
  }
  if (opcode === 'mov.b64' && d?.type === 'reg' && a?.type === 'parameter') {
    return `u[${emitter.row(d)}+l]=W.cta.tensorMapIndex(${JSON.stringify(a.name)});u[${emitter.row(d) + 32}+l]=0;`;
  }
  if (opcode === 'max.NaN.f16x2' && d !== undefined && a !== undefined && b !== undefined) {
    return `${emitter.value(d, 'u')}=R.halves(Math.max,${emitter.value(a, 'u')},${emitter.value(b, 'u')});`;
  }
  if (opcode === 'cvt.rn.satfinite.e4m3x2.f16x2' && d !== undefined && a !== undefined) {
    const pair = emitter.value(a, 'u');
    return `${emitter.value(d, 'u')}=R.packE4m3(R.halfTo(${pair}>>>16),R.halfTo(${pair}));`;
  }
  return undefined;
}

/** Like the compiler's `collective`; undefined for instructions that are not asynchronous. */
export function asyncCollective(
  emitter: Emitting,
  { opcode, outputs, inputs }: Instruction,
  guarded: (statement: string) => string,
  what: string,
): string | undefined {
  const address = (operand: Operand | undefined) => {
    if (operand?.type !== 'memory') throw new Error(`${opcode}: no address`);
    return `u[${emitter.row(operand.base)}+l]+${operand.offset}`;
  };
  const rows = (operand: Operand | undefined): number[] => {
    if (operand?.type === 'group') return operand.registers.map((register) => emitter.row(register));
    if (operand?.type === 'reg') return [emitter.row(operand)];
    throw new Error(`${opcode}: no registers`);
  };
  const value = (operand: Operand | undefined) => emitter.value(operand as Operand, 'u');
  const [first, second, third] = inputs;
  if (opcode.startsWith('wgmma.mma_async')) {
    const match = opcode.match(/m64n(\d+)k\d+\.\w+\.(\w+)\./);
    const [, n, type] = match as RegExpMatchArray;
    const last = inputs.at(-1);
    const transposed = (type === 'f16' || type === 'bf16') && last?.type === 'immediate' && last.value === 1;
    const [b] = rows(second);
    const accumulate = third?.type === 'reg' ? `u[${emitter.row(third)}]===1` : `${value(third)}===1`;
    return `W.asynchronous.issue('${type}',${n},[${rows(outputs[0])}],[${rows(first)}],${b},${accumulate},${transposed},${what});`;
  }
  switch (opcode) {
    case 'wgmma.fence.sync.aligned':
    case 'fence.mbarrier_init.release.cluster':
    case 'prefetch.tensormap':
      return '';
    case 'wgmma.commit_group.sync.aligned':
      return 'W.asynchronous.commit();';
    case 'wgmma.wait_group.sync.aligned':
      return `W.asynchronous.wait(${first?.type === 'immediate' ? first.value : 0});`;
    case 'mbarrier.init.shared::cta.b64':
      return guarded(`W.asynchronous.units.init(${address(first)},${value(second)});`);
    case 'mbarrier.arrive.shared::cta.b64':
      return guarded(`W.asynchronous.units.arrive(${address(first)},0,W.index,${what});`);
    case 'mbarrier.arrive.expect_tx.shared::cta.b64':
      return guarded(`W.asynchronous.units.arrive(${address(first)},${value(second)},W.index,${what});`);
    case 'mbarrier.test_wait.parity.shared::cta.b64':
    case 'mbarrier.try_wait.parity.shared::cta.b64':
      return guarded(`${value(outputs[0])}=W.asynchronous.tryWait(${address(first)},${value(second)},${what});`);
    case 'fence.proxy.async.shared::cta':
      return 'W.asynchronous.units.shared.fence(W.index);';
    case 'bar.sync':
    case 'bar.arrive': {
      const id = first?.type === 'reg' ? `u[${emitter.row(first)}]` : value(first);
      return `W.asynchronous.named(${id},${value(second)},${opcode === 'bar.sync'},${what});`;
    }
    case 'shfl.sync.idx.b32': {
      const [from] = rows(first);
      const [to] = rows(outputs[0]);
      const lane = second?.type === 'immediate' ? second.value : 0;
      return `u.fill(u[${(from as number) + lane}],${to},${(to as number) + 32});`;
    }
    default:
      break;
  }
  if (opcode.startsWith('setmaxnreg.')) return '';
  if (opcode.startsWith('cp.async.bulk.tensor.') && second?.type === 'tensor') {
    const coordinates = second.coordinates.map((register) => `i[${emitter.row(register)}+l]`);
    return guarded(
      `W.asynchronous.units.copy(u[${emitter.row(second.map)}+l],${address(first)},[${coordinates}],${address(third)},${what});`,
    );
  }
  return undefined;
}
