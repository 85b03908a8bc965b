/** Times of work on a stream, by events of the driver. */
import type { CudaDevice } from '../backends/cuda/index.ts';
import { median, quantile } from './statistics.ts';

/** Milliseconds that a repetition takes at most: long enough for events, short enough for many cases. */
const REPETITION = 40;
const REPETITIONS = 5;
const MOST_CALLS = 200;

/** Milliseconds of one call of `enqueue` on the device: the median of repetitions, each of as many calls as fill it. */
export function timeOnDevice(device: CudaDevice, enqueue: () => void): number {
  using start = device.createEvent();
  using end = device.createEvent();
  const timed = (calls: number) => {
    start.record(device.stream);
    for (let i = 0; i < calls; i++) enqueue();
    end.record(device.stream);
    end.synchronize();
    return start.millisecondsTo(end) / calls;
  };
  for (let i = 0; i < 3; i++) enqueue();
  const calls = Math.max(1, Math.min(MOST_CALLS, Math.floor(REPETITION / timed(1))));
  timed(calls);
  return median(Array.from({ length: REPETITIONS }, () => timed(calls)));
}

/** Microseconds that the host takes for one call, which leaves its work to the device: median and 95th percentile. */
export async function timeOnHost(
  device: CudaDevice,
  call: () => unknown,
  count = 2000,
): Promise<{ median: number; p95: number }> {
  const times: number[] = [];
  for (let i = 0; i < count + 200; i++) {
    const start = process.hrtime.bigint();
    await call();
    const taken = Number(process.hrtime.bigint() - start) / 1000;
    if (i >= 200) times.push(taken);
    // A full queue would make the driver wait, which is not the cost of a call.
    if (i % 50 === 49) device.stream.synchronize();
  }
  return { median: median(times), p95: quantile(times, 0.95) };
}
