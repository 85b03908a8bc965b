import { describe, expect, it } from 'vitest';
import { UnsupportedOptionError } from '../errors.ts';
import type { KernelDescriptor } from './backend.ts';
import { chooseOptions } from './choice.ts';

const descriptor: KernelDescriptor = {
  name: 'qk-int8-pv-fp16',
  summary: 'a kernel',
  qkQuantGran: ['per-block', 'per-warp'],
  pvAccumDtype: ['fp32'],
  smoothV: false,
  smoothQ: [false],
  maxHeadDim: 64,
};
const problem = { headDim: 64, valueDim: 64 };

describe('chooseOptions', () => {
  it("takes the value asked for, else the kernel's first", () => {
    expect(chooseOptions(descriptor, problem, {})).toMatchObject({ qkQuantGran: 'per-block', pvAccumDtype: 'fp32' });
    expect(chooseOptions(descriptor, problem, { qkQuantGran: 'per-warp' })).toMatchObject({ qkQuantGran: 'per-warp' });
  });

  it('leaves out an option that has no meaning for the kernel, and refuses every value of it', () => {
    const without = { ...descriptor, qkQuantGran: [], pvAccumDtype: [] };
    expect(chooseOptions(without, problem, {})).toEqual({
      descriptor: without,
      smoothK: true,
      smoothV: false,
      smoothQ: false,
    });
    for (const [name, value] of [
      ['qkQuantGran', 'per-block'],
      ['pvAccumDtype', 'fp32'],
    ] as const) {
      const choose = () => chooseOptions(without, problem, { [name]: value });
      expect(choose).toThrow(UnsupportedOptionError);
      expect(choose).toThrow(`options.${name}: kernel 'qk-int8-pv-fp16' takes no value, received '${value}'`);
    }
  });
});
