/** WebGPU under onnxruntime-web in Node: Dawn, from the package `webgpu`, where a browser has `navigator.gpu`. */

import { DAWN_FLAGS } from '../../backends/webgpu/device.ts';
import { BackendUnavailableError, MissingPackageError } from '../../errors.ts';
import { importOptional, loadFailure, REINSTALL } from '../../optional-package.ts';

interface Dawn {
  create(flags: readonly string[]): GPU;
  readonly globals: Record<string, unknown>;
}

type WriteBuffer = (
  buffer: GPUBuffer,
  bufferOffset: number,
  data: AllowSharedBufferSource,
  offset?: number,
  size?: number,
) => void;

/** `GPU` in programs that have types of WebGPU; the others need none to compile. */
export type NodeGpu = typeof globalThis extends { GPU: { prototype: infer G } } ? G : object;

/**
 * Makes `navigator.gpu` and WebGPU's classes available to onnxruntime-web in Node, and `require`, which its WebGPU build asks for.
 * Call it before onnxruntime-web is imported. Where `navigator.gpu` exists it changes nothing.
 *
 * ```ts
 * await enableNodeWebgpu();
 * const ort = await import('onnxruntime-web/webgpu');
 * ```
 *
 * @param flags for Dawn
 * @throws {MissingPackageError | BackendUnavailableError} when the package `webgpu` is not installed, or does not load
 */
export async function enableNodeWebgpu(flags: readonly string[] = DAWN_FLAGS): Promise<NodeGpu> {
  const scope = globalThis as { navigator?: { gpu?: NodeGpu } };
  if (scope.navigator?.gpu !== undefined) return scope.navigator.gpu;
  const dawn = await (importOptional('webgpu') as Promise<Dawn>).catch((cause: unknown) => {
    const failure = loadFailure('webgpu', cause);
    throw failure === undefined
      ? new MissingPackageError('webgpu', 'WebGPU in Node', cause)
      : new BackendUnavailableError('webgpu', failure, REINSTALL, cause);
  });
  Object.assign(globalThis, dawn.globals);
  const gpu = dawn.create(flags);
  if (scope.navigator === undefined) {
    Object.defineProperty(globalThis, 'navigator', { value: { gpu, userAgent: 'Node.js' }, configurable: true });
  } else Object.defineProperty(scope.navigator, 'gpu', { value: gpu, configurable: true });
  provideRequire();
  copySharedMemory(
    (globalThis as unknown as { GPUQueue: { prototype: { writeBuffer: WriteBuffer } } }).GPUQueue.prototype,
  );
  return gpu;
}

/** The WebGPU build of onnxruntime-web is made for browsers, yet asks Node for its own modules with `require`. */
function provideRequire(): void {
  const scope = globalThis as { require?: unknown };
  if (scope.require !== undefined) return;
  scope.require = globalThis.process?.getBuiltinModule?.('node:module').createRequire(import.meta.url);
}

/** onnxruntime-web writes out of its WebAssembly memory, which is shared between threads; Dawn takes unshared memory only. */
function copySharedMemory(queue: { writeBuffer: WriteBuffer }): void {
  const { writeBuffer } = queue;
  queue.writeBuffer = function (buffer, bufferOffset, data, offset = 0, size) {
    const memory = ArrayBuffer.isView(data) ? data.buffer : data;
    if (memory instanceof ArrayBuffer) {
      if (size === undefined) writeBuffer.call(this, buffer, bufferOffset, data, offset);
      else writeBuffer.call(this, buffer, bufferOffset, data, offset, size);
      return;
    }
    // Offset and size count elements of a typed array, and bytes of anything else.
    const unit = (data as { BYTES_PER_ELEMENT?: number }).BYTES_PER_ELEMENT ?? 1;
    const start = (ArrayBuffer.isView(data) ? data.byteOffset : 0) + offset * unit;
    const length = size === undefined ? data.byteLength - offset * unit : size * unit;
    writeBuffer.call(this, buffer, bufferOffset, new Uint8Array(memory, start, length).slice());
  };
}
