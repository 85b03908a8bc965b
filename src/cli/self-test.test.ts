import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { KERNEL_NAMES } from '../attention/kernels.ts';
import { BACKEND_NAMES } from './arguments.ts';
import { UserError } from './errors.ts';
import { printFindings } from './self-test.ts';
import { decodeFindings, encodeFindings, type Findings } from './self-test-code.ts';

const figure = fc.double({ min: 1e-6, max: 1e6, noNaN: true }).map((x) => Number(x.toPrecision(3)));
const kernels = fc.record(
  {
    kernel: fc.constantFrom(...KERNEL_NAMES),
    errors: fc.array(figure, { minLength: 2, maxLength: 2 }),
    digest: fc.constant('0123abcd'),
    gflops: figure,
    length: fc.constantFrom(256, 1024),
    failure: fc.constant('execution-failed'),
  },
  { requiredKeys: ['kernel'] },
);
const findings: fc.Arbitrary<Findings> = fc.record({
  version: fc.constant('1.2.3'),
  machine: fc.string(),
  seconds: figure,
  backends: fc.array(
    fc.record({
      backend: fc.constantFrom(...BACKEND_NAMES),
      device: fc.string(),
      kernels: fc.array(kernels, { maxLength: 12 }),
    }),
    { maxLength: 3 },
  ),
});

describe('codes of doctor --self-test', () => {
  it('say what was found, whatever a mail does to their lines', () => {
    fc.assert(
      fc.property(findings, fc.integer({ min: 1, max: 80 }), (found, width) => {
        const code = encodeFindings(found);
        const broken = code.match(new RegExp(`.{1,${width}}`, 'g'))?.join('\n ') as string;
        expect(decodeFindings(broken)).toEqual(JSON.parse(JSON.stringify(found)));
      }),
    );
  });

  it('with a character changed, lost or added are refused', () => {
    fc.assert(
      fc.property(findings, fc.nat(), fc.constantFrom('', 'A', 'AA', '.'), (found, at, by) => {
        const code = encodeFindings(found);
        const index = at % code.length;
        const other = code.slice(0, index) + by + code.slice(index + 1);
        fc.pre(other !== code);
        expect(() => decodeFindings(other)).toThrow(UserError);
      }),
    );
    for (const none of ['', 'SA1', 'SA1..', 'SA2.AAAA.AAAA', 'hello'])
      expect(() => decodeFindings(none)).toThrow(UserError);
  });

  it('whose kernel lost too much are printed, and an error', () => {
    const of = (error: number): Findings => ({
      ...{ version: '1.2.3', machine: 'a machine', seconds: 3 },
      backends: [
        { backend: 'cuda', device: 'a card', kernels: [{ kernel: 'qk-fp4-pv-fp4-cuda', errors: [0.15, error] }] },
      ],
    });
    expect(() => printFindings(of(0.16))).not.toThrow();
    expect(() => printFindings(of(0.5))).toThrow(/not right: qk-fp4-pv-fp4-cuda/);
  });
});
