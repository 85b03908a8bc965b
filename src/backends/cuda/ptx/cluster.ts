/** CTAs of a cluster, which reach each other's shared memory, and the election of a lane. For sm_90 and later. */
import type { KernelBuilder } from './builder.ts';
import { immediate } from './operands.ts';
import type { Reg } from './types.ts';

/** True in one lane of the warp. */
export function electSync(b: KernelBuilder): Reg<'pred'> {
  const [lane, elected] = [b.reg('u32'), b.reg('pred')];
  // `elect.sync d|p, mask` writes two registers joined by a bar.
  b.emit('elect.sync', [{ type: 'pair', first: lane, second: elected }], [immediate(0xffffffff)]);
  return elected;
}

/** The address of the same place in shared memory of another CTA of the cluster. */
export function mapa(b: KernelBuilder, address: Reg<'shared'>, rank: Reg<'u32'>): Reg<'u32'> {
  const mapped = b.reg('u32');
  b.emit('mapa.shared::cluster.u32', [mapped], [address, rank]);
  return mapped;
}

export function clusterArrive(b: KernelBuilder): void {
  b.emit('barrier.cluster.arrive.aligned', [], []);
}

export function clusterWait(b: KernelBuilder): void {
  b.emit('barrier.cluster.wait.aligned', [], []);
}
