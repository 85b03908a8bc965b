/**
 * No matrix can be loaded or stored misaligned: drivers access matrices 16 bytes at a time, and a misaligned one is a
 * fast wrong answer. Read off all generated code: the lengths of arrays in workgroup memory, and every matrix access's
 * offset and stride.
 */
import { describe, expect, it } from 'vitest';
import { matrixProbeKernel } from './families/matrix-dialect.ts';
import { APPLE, DIALECT, EXTENSION, H200, webgpuKernels } from './testing/configurations.ts';

const ELEMENT_BYTES: Readonly<Record<string, number>> = {
  f16: 2,
  f32: 4,
  i32: 4,
  u32: 4,
  'atomic<u32>': 4,
  'vec4<f32>': 16,
};

const gcd = (a: number, b: number): number => (b === 0 ? a : gcd(b, a % b));

/**
 * The largest number known to divide an expression of `+ - * /`, names and numbers; 0 for zero, which all numbers
 * divide.
 */
function divisorOf(text: string): number {
  const tokens = text.match(/[A-Za-z_][\w.]*|\d+u?|[()+\-*/]/g) ?? [];
  let at = 0;
  const primary = (): number => {
    const token = tokens[at++] as string;
    if (token === '(') {
      const inner = sum();
      at++;
      return inner;
    }
    if (/^\d/.test(token)) return Number.parseInt(token, 10);
    if (tokens[at] !== '(') return 1;
    // A call: nothing is known of its result.
    let depth = 0;
    do {
      if (tokens[at] === '(') depth++;
      if (tokens[at] === ')') depth--;
      at++;
    } while (depth > 0);
    return 1;
  };
  const product = (): number => {
    let known = primary();
    while (tokens[at] === '*' || tokens[at] === '/') {
      const operator = tokens[at++];
      const other = primary();
      known = operator === '*' ? known * other : other !== 0 && known % other === 0 ? known / other : 1;
    }
    return known;
  };
  const sum = (): number => {
    let known = product();
    while (tokens[at] === '+' || tokens[at] === '-') {
      at++;
      known = gcd(known, product());
    }
    return known;
  };
  return sum();
}

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

/** Accesses of a kernel that are or may be misaligned. */
function misaligned(code: string): string[] {
  const faults: string[] = [];
  const elements = new Map<string, number>();
  for (const [, workgroup, name, type, count] of code.matchAll(
    /var<(workgroup|storage[^>]*)> (\w+): array<((?:[^<>,]|<[^>]*>)+)(?:, (\d+))?>/g,
  )) {
    const bytes = ELEMENT_BYTES[type as string];
    if (bytes === undefined) faults.push(`${name}: elements of ${type}`);
    else elements.set(name as string, bytes);
    if (workgroup === 'workgroup' && ((bytes ?? 1) * Number(count)) % 16 !== 0)
      faults.push(`${name}: ${count} of ${type}`);
  }
  for (const call of code.matchAll(/subgroupMatrix(Load|Store)(?:<[^(]*>)?\(/g)) {
    const parts = argumentsAt(code, call.index + call[0].length - 1);
    const bytes = elements.get((parts[0] as string).replace('&', '')) ?? 0;
    const [offset, stride] = [parts[1] as string, parts.at(-1) as string];
    for (const expression of [offset, stride]) {
      const known = divisorOf(expression) * bytes;
      if (known % 16 !== 0 || bytes === 0) faults.push(`${parts[0]} at ${offset}, stride ${stride}`);
    }
  }
  return faults;
}

describe('matrices in memory', () => {
  it('the check finds what is misaligned', () => {
    const kernel = (
      moved: number,
      offset: string,
      stride: string,
    ) => `var<workgroup> moved: array<atomic<u32>, ${moved}>;
var<workgroup> p: array<f16, 640>;
let a = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&p, ${offset}, ${stride});`;
    expect(misaligned(kernel(4, 'subgroup * 640u + 16u', '40u'))).toEqual([]);
    expect(misaligned(kernel(2, '0u', '40u'))).toEqual(['moved: 2 of atomic<u32>']);
    expect(misaligned(kernel(4, 'subgroup * 4u', '40u'))).toHaveLength(1);
    expect(misaligned(kernel(4, '(row + 1u) * 16u - P.base * 8u', '36u'))).toHaveLength(1);
  });

  it('are aligned in every kernel of the tables', () => {
    const kernels = webgpuKernels().filter(({ name }) => name.startsWith('matrix'));
    expect(kernels.length).toBeGreaterThan(20);
    for (const { name, source } of kernels) {
      const code = source();
      expect(code).toContain('subgroupMatrixLoad');
      expect(misaligned(code), name).toEqual([]);
    }
  });

  it('are aligned in the probe', () => {
    for (const product of [...H200, ...APPLE]) {
      for (const subgroupId of [false, true]) {
        const code = matrixProbeKernel(product, EXTENSION, DIALECT, 32, subgroupId);
        expect(misaligned(code), JSON.stringify(product)).toEqual([]);
      }
    }
  });
});
