/** Tuning on request. */
import { InvalidArgumentError } from '../../../errors.ts';
import { WebgpuBackend } from '../backend.ts';
import { MAX_HEAD_DIM } from '../kernel-table.ts';
import { DEFAULT_SHAPES, type TuningShape } from './measure.ts';
import type { Tuning } from './record.ts';
import { measureAndKeep } from './tuner.ts';

/** Largest number of elements of an operand: 256 MiB. */
const MOST_ELEMENTS = 2 ** 27;

function check({ headDim, queries, keys, heads }: TuningShape, index: number): void {
  const sizes = { headDim, queries, keys, heads };
  for (const [name, size] of Object.entries(sizes)) {
    if (!Number.isInteger(size) || size < 1) {
      throw new InvalidArgumentError('invalid-option', `shapes[${index}].${name}`, 'a positive integer', String(size));
    }
  }
  if (headDim > MAX_HEAD_DIM || heads * Math.max(queries, keys) * headDim > MOST_ELEMENTS) {
    const expected = `a head dim up to ${MAX_HEAD_DIM} and at most ${MOST_ELEMENTS} elements of an operand`;
    throw new InvalidArgumentError('unsupported-size', `shapes[${index}]`, expected, JSON.stringify(sizes));
  }
}

/**
 * Times what the tables offer on a device: families, tiles, and P and V in INT8 where there are no matrices. What is fastest is
 * kept by adapter, browser and version, in IndexedDB or in a file; backends with `tune: 'auto'` take it from there, a backend given here
 * at once. GPU time is below a second for the default shapes; compiling comes on top.
 *
 * @param target a device, or a backend whose device is meant
 * @param shapes what to time, float16, batch 1; default: D 64 and 128, 1024 and 4096 tokens. Each serves all problems of its kind:
 *   its head dim as padded, and up to 32, up to 1024 or more queries
 * @throws {InvalidArgumentError} a shape that is none
 * @throws {ExecutionError} `device-lost`, `out-of-memory`
 *
 * @example
 * const tuning = await tune(device);
 * await setBackend(createWebgpuBackend({ device, tune: 'auto' }));
 */
export async function tune(
  target: GPUDevice | WebgpuBackend,
  shapes: readonly TuningShape[] = DEFAULT_SHAPES,
): Promise<Tuning> {
  shapes.forEach(check);
  if (target instanceof WebgpuBackend) return measureAndKeep(await target.context(), shapes);
  const backend = new WebgpuBackend({ device: target });
  try {
    return await measureAndKeep(await backend.context(), shapes);
  } finally {
    await backend.dispose();
  }
}
