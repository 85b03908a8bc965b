/**
 * No matrix can be loaded or stored misaligned: drivers access matrices 16 bytes at a time, and a misaligned one is a
 * fast wrong answer. Read off all generated code: matrices lie in workgroup memory, in arrays of four 32-bit words,
 * with constant strides, and every array there is a multiple of 16 bytes long.
 */
import { describe, expect, it } from 'vitest';
import { matrixProbeKernel } from './families/matrix-dialect.ts';
import { nativeMatrices } from './kernels/matrix-operations.ts';
import { APPLE, DIALECT, EXTENSION, H200, webgpuKernels } from './testing/configurations.ts';

const ELEMENT_BYTES: Readonly<Record<string, number>> = {
  f16: 2,
  f32: 4,
  i32: 4,
  u32: 4,
  'atomic<u32>': 4,
  'vec2<u32>': 8,
  'vec4<f32>': 16,
  'vec4<u32>': 16,
};

/** Arguments of a call whose opening parenthesis is at `open`. */
function argumentsAt(code: string, open: number): string[] {
  const parts: string[] = [];
  let depth = 0;
  let start = open + 1;
  for (let i = open; i < code.length; i++) {
    const c = code[i];
    if (c === '(') depth++;
    if (c === ')') depth--;
    if ((c === ',' && depth === 1) || (c === ')' && depth === 0)) {
      parts.push(code.slice(start, i).trim());
      start = i + 1;
    }
    if (depth === 0) return parts;
  }
  throw new Error('a call does not end');
}

/** Accesses of a kernel that are or may be misaligned, or of which the compiler does not know the stride. */
function misaligned(code: string, { lengths = true } = {}): string[] {
  const faults: string[] = [];
  const elements = new Map<string, number>();
  for (const [, name, type, count] of code.matchAll(
    /var<workgroup> (\w+): array<((?:[^<>,]|<[^>]*>)+)(?:, (\d+))?>/g,
  )) {
    const bytes = ELEMENT_BYTES[type as string];
    if (bytes === undefined) faults.push(`${name}: elements of ${type}`);
    else elements.set(name as string, bytes);
    if (lengths && ((bytes ?? 1) * Number(count)) % 16 !== 0) faults.push(`${name}: ${count} of ${type}`);
  }
  for (const call of code.matchAll(/subgroupMatrix(Load|Store)(?:<[^(]*>)?\(/g)) {
    const parts = argumentsAt(code, call.index + call[0].length - 1);
    const bytes = elements.get((parts[0] as string).replace('&', ''));
    const stride = parts.at(-1) as string;
    if (bytes !== 16 || !/^\d+u$/.test(stride)) faults.push(`${parts[0]} of ${bytes} bytes, stride ${stride}`);
  }
  return faults;
}

describe('matrices in memory', () => {
  it('the check finds what is misaligned', () => {
    const kernel = (moved: number, element: string, stride: string) => `
var<workgroup> moved: array<atomic<u32>, ${moved}>;
@group(0) @binding(0) var<storage, read> stored: array<vec4<u32>>;
var<workgroup> p: array<${element}, 640>;
let a = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&p, (subgroup + 1u) * 4u, ${stride});`;
    expect(misaligned(kernel(4, 'vec4<u32>', '5u'))).toEqual([]);
    expect(misaligned(kernel(2, 'vec4<u32>', '5u'))).toEqual(['moved: 2 of atomic<u32>']);
    expect(misaligned(kernel(4, 'f16', '40u'))).toHaveLength(1);
    expect(misaligned(kernel(4, 'vec4<u32>', 'P.stride'))).toHaveLength(1);
    expect(misaligned(kernel(4, 'vec4<u32>', '5u').replace('&p', '&stored'))).toHaveLength(1);
  });

  it('are aligned in every kernel of the tables', () => {
    const kernels = webgpuKernels().filter(({ name }) => /^matrix|^gradients with matrices/.test(name));
    expect(kernels.length).toBeGreaterThan(20);
    for (const { name, source } of kernels) {
      const code = source();
      expect(code).toContain('subgroupMatrixLoad');
      expect(misaligned(code), name).toEqual([]);
    }
  });

  it('are aligned in the probe, beside an array that is not', () => {
    for (const product of [...H200, ...APPLE]) {
      const code = matrixProbeKernel(product, nativeMatrices(EXTENSION, DIALECT), 32);
      expect(misaligned(code)).toEqual(['counters: 2 of atomic<u32>']);
      expect(misaligned(code, { lengths: false }), JSON.stringify(product)).toEqual([]);
    }
  });
});
