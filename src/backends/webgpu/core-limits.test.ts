/**
 * Every kernel that a device with WebGPU's core limits may be given asks for no more than they allow: 16 KiB of workgroup memory and
 * 256 threads. Read off all generated code; what the tables choose by a device's own limits is measured by the same reading.
 */
import { describe, expect, it } from 'vitest';
import { TILED_VARIANTS } from './families/tiled.ts';
import { tiledWorkgroupBytes } from './kernels/attention-tiled.ts';
import { padDim } from './kernels/layout.ts';
import { webgpuKernels } from './testing/configurations.ts';

const CORE_WORKGROUP_BYTES = 16384;
const CORE_THREADS = 256;

const BYTES: Readonly<Record<string, number>> = {
  bool: 4,
  f32: 4,
  i32: 4,
  u32: 4,
  'atomic<u32>': 4,
  'vec2<f32>': 8,
  'vec2<u32>': 8,
  'vec4<f32>': 16,
  'vec4<u32>': 16,
};

/** Bytes of a WGSL type, arrays of arrays among them. */
function bytesOf(type: string): number {
  const array = /^array<(.*), (\d+)>$/.exec(type);
  if (array !== null) return bytesOf(array[1] as string) * Number(array[2]);
  const bytes = BYTES[type];
  if (bytes === undefined) throw new Error(`the size of ${type} is not known here`);
  return bytes;
}

/** Each variable begins at a multiple of 16 bytes at most. */
const workgroupBytes = (code: string): number =>
  [...code.matchAll(/var<workgroup> \w+: ([^;]+);/g)].reduce(
    (sum, [, type]) => sum + Math.ceil(bytesOf((type as string).trim()) / 16) * 16,
    0,
  );

const threadsOf = (code: string): number => Number(/@workgroup_size\((\d+)\)/.exec(code)?.[1]);

describe('a device with the core limits', () => {
  it('the reading counts arrays of arrays', () => {
    expect(workgroupBytes('var<workgroup> a: array<array<vec4<u32>, 3>, 5>;\nvar<workgroup> b: atomic<u32>;')).toBe(
      256,
    );
  });

  const kernels = webgpuKernels().filter(({ name }) => !name.startsWith('matrix') && !name.startsWith('FP4'));
  // Tiles and gradients are chosen by what a device has.
  const fixed = kernels.filter(({ group }) => !/^(tiles|gradient)/.test(group));

  it(`can run all ${fixed.length} kernels that it is given whatever its limits`, () => {
    expect(fixed.length).toBeGreaterThan(100);
    const faults = fixed
      .map(({ name, source }) => ({ name, bytes: workgroupBytes(source()), threads: threadsOf(source()) }))
      .filter(({ bytes, threads }) => bytes > CORE_WORKGROUP_BYTES || !(threads <= CORE_THREADS));
    expect(faults).toEqual([]);
  });

  it('has a tile for every head dim, which takes what the table says', () => {
    for (const dim of [32, 64, 128, 256, 320, 512]) {
      const least = TILED_VARIANTS.map((variant) => tiledWorkgroupBytes(variant, dim, dim));
      expect(Math.min(...least), `D ${dim}`).toBeLessThanOrEqual(CORE_WORKGROUP_BYTES);
    }
    for (const variant of TILED_VARIANTS) {
      for (const { name, source } of kernels.filter((kernel) => kernel.name.startsWith(`base ${variant.name} `))) {
        const [headDim = 0, valueDim = 0] = (/D(\d+)\/(\d+)/.exec(name) ?? []).slice(1).map(Number);
        const format = name.includes('FP4') ? 'fp4' : name.includes('V in INT8') ? 'int8' : 'fp16';
        const said = tiledWorkgroupBytes(variant, headDim, padDim(valueDim), format);
        const taken = workgroupBytes(source());
        expect(taken - said, name).toBeLessThan(64);
        // Of FP4 the table counts weights that are rounded, which not every call has.
        if (format !== 'fp4') expect(said - taken, name).toBeLessThan(64);
      }
    }
  });
});
