/** The tensor memory accelerator: bulk copies through tensor maps. For sm_90 and later. */
import type { KernelBuilder } from './builder.ts';
import { memory } from './operands.ts';
import type { Reg } from './types.ts';

export interface BulkCopyOptions {
  /** CTAs of the cluster that receive the box, one bit each, as a 16-bit register. */
  readonly multicast?: Reg<'b16'>;
}

/** Copies a box of a tensor map into shared memory; `barrier` learns of its bytes. One thread issues it. */
export function tensorLoad(
  b: KernelBuilder,
  into: Reg<'shared'>,
  map: Reg<'global'>,
  coordinates: readonly Reg<'s32'>[],
  barrier: Reg<'shared'>,
  {
    intoOffset = 0,
    barrierOffset = 0,
    multicast,
  }: BulkCopyOptions & { intoOffset?: number; barrierOffset?: number } = {},
): void {
  const mode = multicast === undefined ? '' : '.multicast::cluster';
  b.emit(
    `cp.async.bulk.tensor.${coordinates.length}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes${mode}`,
    [],
    [
      memory(into, intoOffset),
      { type: 'tensor', map, coordinates },
      memory(barrier, barrierOffset),
      ...(multicast === undefined ? [] : [multicast]),
    ],
  );
}

export function prefetchTensorMap(b: KernelBuilder, map: Reg<'global'>): void {
  b.emit('prefetch.tensormap', [], [memory(map)]);
}

/** Makes this thread's shared writes visible to TMA and to warpgroup products. */
export function fenceProxyAsync(b: KernelBuilder): void {
  b.emit('fence.proxy.async.shared::cta', [], []);
}
