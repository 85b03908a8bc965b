/** Settles a kernel's options: what the caller asked for, checked against what the kernel honours. */

import type { AttentionOptions } from '../attention/options.ts';
import type { AttentionProblem } from '../attention/problem.ts';
import { UnsupportedOptionError } from '../errors.ts';
import type { KernelChoice, KernelDescriptor } from './backend.ts';

function pick<T extends string>(kernel: string, argument: string, honoured: readonly T[], asked: T | undefined): T {
  if (asked !== undefined && !honoured.includes(asked)) {
    const taken = honoured.map((value) => `'${value}'`).join(' or ');
    throw new UnsupportedOptionError(kernel, argument, taken, `'${asked}'`);
  }
  return asked ?? (honoured[0] as T);
}

/**
 * @throws {UnsupportedOptionError} naming the option that the kernel does not honour
 */
export function chooseOptions(
  descriptor: KernelDescriptor,
  problem: Pick<AttentionProblem, 'headDim' | 'valueDim'>,
  options: AttentionOptions,
): KernelChoice {
  const { name, smoothV, smoothQ, maxHeadDim } = descriptor;
  for (const [argument, size] of [
    ['q', problem.headDim],
    ['v', problem.valueDim],
  ] as const) {
    if (size > maxHeadDim) {
      throw new UnsupportedOptionError(name, argument, `head dims up to ${maxHeadDim}`, String(size));
    }
  }
  if (options.smoothV === true && !smoothV) {
    throw new UnsupportedOptionError(name, 'options.smoothV', 'false', 'true');
  }
  if (options.smoothQ === true && smoothQ === false) {
    throw new UnsupportedOptionError(name, 'options.smoothQ', 'false', 'true');
  }
  if (options.smoothQ === false && smoothQ === 'always') {
    throw new UnsupportedOptionError(name, 'options.smoothQ', 'true', 'false');
  }
  return {
    descriptor,
    qkQuantGran: pick(name, 'options.qkQuantGran', descriptor.qkQuantGran, options.qkQuantGran),
    pvAccumDtype: pick(name, 'options.pvAccumDtype', descriptor.pvAccumDtype, options.pvAccumDtype),
    smoothK: options.smoothK ?? true,
    smoothV: options.smoothV ?? false,
    smoothQ: options.smoothQ ?? smoothQ === 'always',
  };
}
