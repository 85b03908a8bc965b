/** Launches of the kernel that quantizes nothing: one, on `wgmma` where that takes the operands as they lie. */
import { EXACT_HEAD_DIM } from '../kernels/wgmma/table.ts';
import type { Context, FamilyLaunches } from './context.ts';
import { MMA_SYNC } from './mma-sync.ts';
import { takesAsTheyLie, WGMMA } from './wgmma.ts';

function onWgmma(context: Context): boolean {
  const { device, scheme } = context;
  const widest = Math.max(scheme.paddedDim, scheme.paddedValueDim);
  return device.target === 'sm_90a' && widest <= EXACT_HEAD_DIM && takesAsTheyLie(context);
}

export const EXACT: FamilyLaunches = {
  mostSmScale: WGMMA.mostSmScale,
  keyValue: () => [],
  attend: (context) => (onWgmma(context) ? WGMMA : MMA_SYNC).attend(context),
};
