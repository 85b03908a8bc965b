/** The stream that the calls of a `capture` take where they name none. */
import type { AsyncLocalStorage } from 'node:async_hooks';
import type { CudaStream } from '../driver/stream.ts';

let storage: AsyncLocalStorage<CudaStream> | undefined;

/** Runs a function, and all that it awaits, with this stream in place of the device's own one. */
export function withCapturingStream<T>(stream: CudaStream, use: () => Promise<T>): Promise<T> {
  storage ??= new (process.getBuiltinModule('node:async_hooks').AsyncLocalStorage)<CudaStream>();
  return storage.run(stream, use);
}

/** Undefined outside of a capture on this device. What goes on after the capture has ended is outside of it. */
export function capturingStream(device: { readonly ordinal: number }): CudaStream | undefined {
  const stream = storage?.getStore();
  return stream?.capture !== undefined && stream.device === device.ordinal ? stream : undefined;
}
