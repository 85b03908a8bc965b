/**
 * Barriers in shared memory, of 8 bytes each: they count arrivals, and bytes that copies bring. For sm_90 and later.
 */
import type { KernelBuilder } from './builder.ts';
import { immediate, memory, SINK } from './operands.ts';
import type { Reg } from './types.ts';

/** Makes a barrier that a phase of `arrivals` arrivals (and the bytes announced to it) completes. */
export function mbarrierInit(b: KernelBuilder, barrier: Reg<'shared'>, arrivals: number, offset = 0): void {
  b.emit('mbarrier.init.shared::cta.b64', [], [memory(barrier, offset), immediate(arrivals)]);
}

/** Makes initialized barriers known to the cluster and to TMA. */
export function fenceMbarrierInit(b: KernelBuilder): void {
  b.emit('fence.mbarrier_init.release.cluster', [], []);
}

export function mbarrierArrive(b: KernelBuilder, barrier: Reg<'shared'>, offset = 0): void {
  b.emit('mbarrier.arrive.shared::cta.b64', [SINK], [memory(barrier, offset)]);
}

/** Arrives, and announces `bytes` more that copies will bring in this phase. */
export function mbarrierArriveExpectTx(b: KernelBuilder, barrier: Reg<'shared'>, bytes: number, offset = 0): void {
  b.emit('mbarrier.arrive.expect_tx.shared::cta.b64', [SINK], [memory(barrier, offset), immediate(bytes)]);
}

/** Arrives at a barrier of another CTA of the cluster, an address from {@link mapa}. */
export function mbarrierArriveRemote(b: KernelBuilder, barrier: Reg<'u32'>, offset = 0): void {
  b.emit('mbarrier.arrive.release.cluster.shared::cluster.b64', [SINK], [memory(barrier, offset)]);
}

/** Whether the phase of this parity is over. Does not wait. */
export function mbarrierTest(
  b: KernelBuilder,
  barrier: Reg<'shared'>,
  parity: Reg<'u32'>,
  offset: number,
  into: Reg<'pred'>,
): void {
  b.emit('mbarrier.test_wait.parity.shared::cta.b64', [into], [memory(barrier, offset), parity]);
}

/** Waits until the phase of this parity has completed. */
export function mbarrierWait(b: KernelBuilder, barrier: Reg<'shared'>, parity: Reg<'u32'>, offset = 0): void {
  b.repeatUntil(() => {
    const done = b.reg('pred');
    b.emit('mbarrier.try_wait.parity.shared::cta.b64', [done], [memory(barrier, offset), parity]);
    return done;
  });
}
