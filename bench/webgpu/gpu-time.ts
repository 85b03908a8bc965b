/** Time of recorded launches on a WebGPU device, by the device's own clock. */
import { median } from '../../src/measure/statistics.ts';

const TIMINGS = 9;
/** Milliseconds of work before the first timing: an idle GPU lowers its clock, several times over. */
const WARM_UP = 150;

/**
 * Microseconds of what `record` records, of `repetitions` in a row in one pass, each after the one before: the median of
 * {@link TIMINGS} passes. The device has feature `timestamp-query`.
 */
export async function gpuMicroseconds(
  device: GPUDevice,
  record: (pass: GPUComputePassEncoder) => void,
  repetitions: number,
): Promise<number> {
  const querySet = device.createQuerySet({ type: 'timestamp', count: 2 });
  const resolved = device.createBuffer({ size: 16, usage: GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC });
  const staging = device.createBuffer({ size: 16, usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST });
  const times: number[] = [];
  const started = performance.now();
  while (times.length < TIMINGS) {
    const encoder = device.createCommandEncoder();
    const pass = encoder.beginComputePass({
      timestampWrites: { querySet, beginningOfPassWriteIndex: 0, endOfPassWriteIndex: 1 },
    });
    for (let n = 0; n < repetitions; n++) record(pass);
    pass.end();
    encoder.resolveQuerySet(querySet, 0, 2, resolved, 0);
    encoder.copyBufferToBuffer(resolved, 0, staging, 0, 16);
    device.queue.submit([encoder.finish()]);
    await staging.mapAsync(GPUMapMode.READ);
    const [start, end] = new BigUint64Array(staging.getMappedRange().slice(0)) as unknown as [bigint, bigint];
    staging.unmap();
    if (performance.now() - started >= WARM_UP) times.push(Number(end - start) / 1e3 / repetitions);
  }
  for (const made of [querySet, resolved, staging]) made.destroy();
  return median(times);
}
