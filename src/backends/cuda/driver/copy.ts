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
