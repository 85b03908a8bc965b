/** Which kernel family a device and a problem get. */
import type { AttentionProblem } from '../../../attention/problem.ts';
import { UnsupportedOptionError } from '../../../errors.ts';
import type { KernelChoice } from '../../backend.ts';
import type { Capabilities } from '../capabilities.ts';
import { valueFormatOf } from '../kernel-table.ts';
import { type KeyValueLayout, padDim } from '../kernels/layout.ts';
import type { AttentionVariant, Family, HeadDims, KernelFamily } from './family.ts';
import { type Emulation, matrixFamily } from './matrix.ts';
import { BASE_FAMILY, SUBGROUP_FAMILY } from './tiled.ts';

/** Fastest first; the last one runs everywhere. */
const KERNEL_FAMILIES: readonly KernelFamily[] = [matrixFamily(), SUBGROUP_FAMILY, BASE_FAMILY];

/** What tests and tuning settle beforehand. */
export interface Forced {
  readonly family?: Family;
  /** A variant of the family's table by name. Default: the best that fits. */
  readonly variant?: string;
  /** The same of the gradient kernels' table. */
  readonly gradientVariant?: string;
  /**
   * Runs the matrix kernel with its matrix operations replaced by plain WGSL, on any device with subgroups: slow, and
   * for tests of everything else in it. The products are as on an H200 (`int8`) or on Apple's GPUs (`float32`).
   */
  readonly emulateMatrices?: Emulation;
}

/** The variants of a family's table. */
export const variantsOf = (family: Family): KernelFamily['variants'] =>
  KERNEL_FAMILIES.find(({ name }) => name === family)?.variants ?? [];

/** The families that a device can run, best first, and why the others are not among them. */
export function familiesOf(capabilities: Capabilities): { readonly offered: Family[]; readonly missing: string[] } {
  const offered: Family[] = [];
  const missing: string[] = [];
  for (const { name, support } of KERNEL_FAMILIES) {
    const reason = support(capabilities);
    if (reason === undefined) offered.push(name);
    else missing.push(`${name}: ${reason}`);
  }
  return { offered, missing };
}

/** @throws {UnsupportedOptionError} a forced family that the device or its matrices cannot run */
function familyOf(
  capabilities: Capabilities,
  dims: HeadDims,
  kernel: Pick<KernelChoice, 'descriptor'>,
  { family: name, emulateMatrices }: Forced,
): KernelFamily {
  const families = emulateMatrices === undefined ? KERNEL_FAMILIES : [matrixFamily(emulateMatrices)];
  const reasons: string[] = [];
  for (const family of families) {
    if (name !== undefined && family.name !== name && emulateMatrices === undefined) continue;
    const reason =
      family.support(capabilities) ??
      (family.values.includes(valueFormatOf(kernel.descriptor.name)) ? undefined : `no ${kernel.descriptor.name}`) ??
      family.unfit(capabilities, dims);
    if (reason === undefined) return family;
    reasons.push(`${family.name}: ${reason}`);
  }
  const others = familiesOf(capabilities).offered.filter((other) => other !== 'matrix');
  throw new UnsupportedOptionError(
    kernel.descriptor.name,
    'options.family',
    `'${others.join("' or '")}' on this device and for D ${dims.headDim}, Dv ${dims.valueDim}`,
    reasons.join('; ') || `'${name}'`,
  );
}

/** How the kernels of the family that a problem gets on a device read K and V. */
export const keyValueLayoutOf = (
  capabilities: Capabilities,
  dims: HeadDims,
  kernel: Pick<KernelChoice, 'descriptor'>,
  forced: Forced,
): KeyValueLayout => familyOf(capabilities, dims, kernel, forced).layout;

/**
 * The attention kernel for a problem on a device.
 *
 * @throws {UnsupportedOptionError} a forced family or variant that the device cannot run
 */
export function chooseVariant(
  capabilities: Capabilities,
  problem: AttentionProblem,
  choice: Pick<KernelChoice, 'descriptor' | 'pvAccumDtype'>,
  forced: Forced,
): AttentionVariant {
  return familyOf(capabilities, problem, choice, forced).kernel(capabilities, {
    kernel: choice.descriptor.name,
    headDimPadded: padDim(problem.headDim),
    valueDimPadded: padDim(problem.valueDim),
    queryLength: problem.queryLength,
    pvAccumDtype: choice.pvAccumDtype,
    variant: forced.variant,
  });
}
