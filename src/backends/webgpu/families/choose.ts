/** Which kernel family a device and a problem get. */
import { UnsupportedOptionError } from '../../../errors.ts';
import type { KernelChoice } from '../../backend.ts';
import type { Capabilities } from '../capabilities.ts';
import { valueFormatOf } from '../kernel-table.ts';
import { type KeyValueLayout, padDim } from '../kernels/layout.ts';
import { entryFor, type TunedProblem } from '../tuning/record.ts';
import type { AttentionVariant, HeadDims, KernelFamily, VariantRequest } from './family.ts';
import { type Emulation, matrixFamily } from './matrix.ts';
import type { Family } from './names.ts';
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

type Choice = Pick<KernelChoice, 'descriptor' | 'pvAccumDtype'>;

/** Why a family cannot run a kernel for these head dims; undefined where it can. */
const obstacle = (family: KernelFamily, capabilities: Capabilities, dims: HeadDims, { descriptor: { name } }: Choice) =>
  family.support(capabilities) ??
  (family.values.includes(valueFormatOf(name)) ? undefined : `no ${name}`) ??
  family.unfit(capabilities, dims);

/**
 * @param layout of keys and values that are quantized already
 * @throws {UnsupportedOptionError} a forced family that the device or its matrices cannot run
 */
function familyOf(
  capabilities: Capabilities,
  dims: HeadDims,
  kernel: Choice,
  { family: name, emulateMatrices }: Forced,
  layout: KeyValueLayout | undefined,
): KernelFamily {
  const families = emulateMatrices === undefined ? KERNEL_FAMILIES : [matrixFamily(emulateMatrices)];
  const reasons: string[] = [];
  for (const family of families) {
    if (name !== undefined && family.name !== name && emulateMatrices === undefined) continue;
    const reason =
      obstacle(family, capabilities, dims, kernel) ??
      (layout === undefined || layout === family.layout ? undefined : `keys are in ${layout}`);
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

type Problem = TunedProblem & HeadDims;

const requestOf = (problem: Problem, choice: Choice, variant: string | undefined): VariantRequest => ({
  kernel: choice.descriptor.name,
  headDimPadded: padDim(problem.headDim),
  valueDimPadded: padDim(problem.valueDim),
  queryLength: problem.queryLength,
  pvAccumDtype: choice.pvAccumDtype,
  variant,
});

/** The fastest family and variant of those measured for a problem's kind that can be had; undefined: none was measured. */
function tunedVariant(
  capabilities: Capabilities,
  problem: Problem,
  choice: Choice,
  { family: asked, variant: named, emulateMatrices }: Forced,
  layout: KeyValueLayout | undefined,
): { readonly family: KernelFamily; readonly variant: AttentionVariant } | undefined {
  if (asked !== undefined || named !== undefined || emulateMatrices !== undefined) return undefined;
  const times = entryFor(capabilities.tuning ?? [], problem)?.times ?? [];
  for (const { kernel, family: name, variant } of times) {
    const family = KERNEL_FAMILIES.find((one) => one.name === name);
    if (kernel !== choice.descriptor.name || family === undefined) continue;
    if (layout !== undefined && layout !== family.layout) continue;
    if (obstacle(family, capabilities, problem, choice) !== undefined) continue;
    const request = requestOf(problem, choice, variant);
    if (!family.fitting(capabilities, request).includes(variant)) continue;
    return { family, variant: family.kernel(capabilities, request) };
  }
  return undefined;
}

/** How the kernels of the family that a problem gets on a device read K and V. */
export const keyValueLayoutOf = (
  capabilities: Capabilities,
  problem: Problem,
  kernel: Choice,
  forced: Forced,
): KeyValueLayout =>
  (
    tunedVariant(capabilities, problem, kernel, forced, undefined)?.family ??
    familyOf(capabilities, problem, kernel, forced, undefined)
  ).layout;

/**
 * The attention kernel for a problem on a device.
 *
 * @param layout of keys and values that are quantized already; default: any
 * @throws {UnsupportedOptionError} a forced family or variant that the device cannot run
 */
export function chooseVariant(
  capabilities: Capabilities,
  problem: Problem,
  choice: Choice,
  forced: Forced,
  layout?: KeyValueLayout,
): AttentionVariant {
  const tuned = tunedVariant(capabilities, problem, choice, forced, layout);
  if (tuned !== undefined) return tuned.variant;
  const family = familyOf(capabilities, problem, choice, forced, layout);
  return family.kernel(capabilities, requestOf(problem, choice, forced.variant));
}

/** Variants of a family that are worth a measurement: the table's first. */
const CANDIDATES = 3;

/** What the tables offer for a problem: the first of each family. Family `base` only where no device runs more. */
export function candidatesFor(
  capabilities: Capabilities,
  problem: Problem,
  choice: Choice,
): { readonly family: Family; readonly variant: string }[] {
  const able = KERNEL_FAMILIES.filter((family) => obstacle(family, capabilities, problem, choice) === undefined);
  const useful = able.filter(({ name }) => name !== 'base' || !able.some((other) => other.name === 'subgroup'));
  return useful.flatMap((family) =>
    family
      .fitting(capabilities, requestOf(problem, choice, undefined))
      .slice(0, capabilities.isSoftware ? 1 : CANDIDATES)
      .map((variant) => ({ family: family.name, variant })),
  );
}
