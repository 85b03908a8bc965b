/** Copies in the memory of a device, and between devices. */
import { CU_MEMORYTYPE_DEVICE, CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED, CUDA_SUCCESS, STRUCTS } from './api.ts';
import type { DeviceContext } from './context.ts';
import type { CudaStream, StreamDevice } from './stream.ts';

/** `cuMemcpy2D` takes pitches below this. */
const MAX_PITCH = 2 ** 31;

export interface Rows {
  readonly pointer: bigint;
  /** Bytes between rows. */
  readonly pitch: number;
}

/** Enqueues a copy of `height` rows of `width` bytes. */
export function copyRows(
  device: DeviceContext,
  from: Rows,
  to: Rows,
  width: number,
  height: number,
  stream: CudaStream,
): void {
  if (width === 0 || height === 0) return;
  const what = `copying ${height} rows of ${width} bytes on ${device}`;
  const together = (from.pitch === width && to.pitch === width) || height === 1;
  if (together) {
    device.call('cuMemcpyDtoDAsync', what, to.pointer, from.pointer, width * height, stream.handle);
    return;
  }
  if (Math.min(from.pitch, to.pitch) < width || Math.max(from.pitch, to.pitch) >= MAX_PITCH) {
    // Rows that overlap, as of a broadcast tensor, or lie too far apart for one call.
    for (let row = 0; row < height; row++) {
      const [source, target] = [from, to].map(({ pointer, pitch }) => pointer + BigInt(row * pitch)) as [
        bigint,
        bigint,
      ];
      device.call('cuMemcpyDtoDAsync', what, target, source, width, stream.handle);
    }
    return;
  }
  const layout = STRUCTS.CUDA_MEMCPY2D;
  const parameters = new DataView(new ArrayBuffer(layout.size));
  parameters.setUint32(layout.srcMemoryType, CU_MEMORYTYPE_DEVICE, true);
  parameters.setBigUint64(layout.srcDevice, from.pointer, true);
  parameters.setBigUint64(layout.srcPitch, BigInt(from.pitch), true);
  parameters.setUint32(layout.dstMemoryType, CU_MEMORYTYPE_DEVICE, true);
  parameters.setBigUint64(layout.dstDevice, to.pointer, true);
  parameters.setBigUint64(layout.dstPitch, BigInt(to.pitch), true);
  parameters.setBigUint64(layout.WidthInBytes, BigInt(width), true);
  parameters.setBigUint64(layout.Height, BigInt(height), true);
  device.call('cuMemcpy2DAsync', what, parameters, stream.handle);
}

/** Where the tokens of heads lie: bytes from one batch entry, head and token to the next. */
export interface Heads {
  readonly pointer: bigint;
  readonly batchPitch: number;
  readonly headPitch: number;
  readonly tokenPitch: number;
}

/** Enqueues a copy of `[B,H,L]` rows of `rowBytes` bytes: a call of the driver for each batch entry where a head's tokens are neighbours, else for each head. */
export function copyHeads(
  device: DeviceContext,
  from: Heads,
  to: Heads,
  [batch, heads, tokens]: readonly [batch: number, heads: number, tokens: number],
  rowBytes: number,
  stream: CudaStream,
): void {
  const at = ({ pointer, batchPitch, headPitch }: Heads, b: number, h: number) =>
    pointer + BigInt(b * batchPitch + h * headPitch);
  const together = tokens === 1 || [from, to].every(({ tokenPitch }) => tokenPitch === rowBytes);
  for (let b = 0; b < batch; b++) {
    if (together) {
      const [source, target] = [from, to].map((side) => ({ pointer: at(side, b, 0), pitch: side.headPitch })) as [
        Rows,
        Rows,
      ];
      copyRows(device, source, target, tokens * rowBytes, heads, stream);
      continue;
    }
    for (let h = 0; h < heads; h++) {
      const [source, target] = [from, to].map((side) => ({ pointer: at(side, b, h), pitch: side.tokenPitch })) as [
        Rows,
        Rows,
      ];
      copyRows(device, source, target, rowBytes, tokens, stream);
    }
  }
}

/** Pairs of devices that have been asked; whether the first reaches the memory of the second. */
const reached = new WeakMap<DeviceContext, Map<DeviceContext, boolean>>();

/**
 * Lets a device reach another's memory over NVLink or PCIe, where the machine can. Where it cannot the driver takes copies through the
 * host's memory.
 *
 * @returns whether it can
 */
export function reachPeer(device: StreamDevice, peer: StreamDevice): boolean {
  let known = reached.get(device);
  if (known === undefined) {
    known = new Map();
    reached.set(device, known);
  }
  const before = known.get(peer);
  if (before !== undefined) return before;
  const can = new Int32Array(1);
  device.call('cuDeviceCanAccessPeer', `asking for access to ${peer}`, can, device.deviceHandle, peer.deviceHandle);
  const found = can[0] !== 0;
  known.set(peer, found);
  if (found) {
    const status = device.inContext(() => device.api.cuCtxEnablePeerAccess(peer.contextHandle, 0));
    if (status !== CUDA_SUCCESS && status !== CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED) {
      throw device.error(status, 'cuCtxEnablePeerAccess', `reaching ${peer}`);
    }
    peer.memoryPool.shareWith(device);
  }
  return found;
}

interface PeerBytes {
  readonly device: StreamDevice;
  readonly pointer: bigint;
}

/** Enqueues a copy between devices on a stream of the target's. */
export function copyPeer(from: PeerBytes, to: PeerBytes, byteLength: number, stream: CudaStream): void {
  if (byteLength === 0) return;
  reachPeer(to.device, from.device);
  to.device.call(
    'cuMemcpyPeerAsync',
    `copying ${byteLength} bytes from ${from.device} to ${to.device}`,
    to.pointer,
    to.device.contextHandle,
    from.pointer,
    from.device.contextHandle,
    byteLength,
    stream.handle,
  );
}
