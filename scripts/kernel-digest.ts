/**
 * SHA-256 of every generated kernel: PTX of every configuration that is assembled, WGSL of every one that is compiled.
 * Code that only moves changes none of them.
 *
 *     npx tsx scripts/kernel-digest.ts > before.txt
 *     npx tsx scripts/kernel-digest.ts --check before.txt
 *
 * `--check` names the kernels that changed, appeared or went, and ends with status 1 if there are any.
 */
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { printKernel } from '../src/backends/cuda/ptx/printer.ts';
import { configurations, gradientConfigurations } from '../src/backends/cuda/testing/configurations.ts';
import { webgpuKernels } from '../src/backends/webgpu/testing/configurations.ts';

export interface GeneratedKernel {
  readonly name: string;
  readonly source: () => string;
}

/** @param thorough all; otherwise every WGSL kernel and a choice of the CUDA kernels */
export const generatedKernels = (thorough: boolean): GeneratedKernel[] => [
  ...[...configurations(thorough), ...gradientConfigurations(thorough)].map(({ name, kernel }) => ({
    name: `cuda ${name}`,
    source: () => printKernel(kernel()),
  })),
  ...webgpuKernels().map(({ name, source }) => ({ name: `webgpu ${name}`, source })),
];

/** Digests by name. */
export type Digests = ReadonlyMap<string, string>;

/** @throws {Error} two kernels of one name: a change of either would be reported as one of the other */
export function digestsOf(kernels: readonly GeneratedKernel[]): Digests {
  const digests = new Map<string, string>();
  for (const { name, source } of kernels) {
    if (digests.has(name)) throw new Error(`two kernels are called '${name}'`);
    digests.set(name, createHash('sha256').update(source()).digest('hex'));
  }
  return digests;
}

/** A line per kernel: digest, two spaces, name. */
export const formatDigests = (digests: Digests): string =>
  [...digests].map(([name, digest]) => `${digest}  ${name}\n`).join('');

export const parseDigests = (text: string): Digests =>
  new Map(
    text
      .split('\n')
      .filter((line) => line !== '')
      .map((line) => [line.slice(66), line.slice(0, 64)]),
  );

/** A line for each kernel that differs: `changed NAME`, `new NAME` or `gone NAME`. */
export function differences(before: Digests, after: Digests): string[] {
  const found: string[] = [];
  for (const [name, digest] of after) {
    const earlier = before.get(name);
    if (earlier === undefined) found.push(`new ${name}`);
    else if (earlier !== digest) found.push(`changed ${name}`);
  }
  for (const name of before.keys()) if (!after.has(name)) found.push(`gone ${name}`);
  return found;
}

function main([flag, file]: readonly string[]): void {
  if (flag !== undefined && (flag !== '--check' || file === undefined)) {
    throw new Error('usage: kernel-digest.ts [--check FILE]');
  }
  const after = digestsOf(generatedKernels(true));
  if (file === undefined) {
    process.stdout.write(formatDigests(after));
    return;
  }
  const found = differences(parseDigests(readFileSync(file, 'utf8')), after);
  for (const line of found) console.log(line);
  console.log(`${after.size} kernels, ${found.length} differ`);
  process.exitCode = found.length === 0 ? 0 : 1;
}

if (import.meta.url === new URL(process.argv[1] ?? '', 'file:').href) main(process.argv.slice(2));
