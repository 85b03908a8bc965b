/**
 * Assembles every CUDA kernel configuration with ptxas and writes registers, spills and shared memory to
 * bench/results/ptxas.json. Ends with status 1 when ptxas refuses one or remarks on a product, or a kernel spills more
 * than it may (a main kernel and every one on wgmma: nothing).
 *
 * A row keeps the SHA-256 of its kernel's PTX, so that only kernels that changed are assembled again, and what an
 * interrupted run assembled is kept in .tools/. `--all` assembles each; `--quick` takes a choice of the configurations
 * and writes no report.
 */
import { createHash } from 'node:crypto';
import { appendFileSync, existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { opcodeCounts, registerPressure } from '../src/backends/cuda/ptx/inspect.ts';
import { printKernel } from '../src/backends/cuda/ptx/printer.ts';
import type { Kernel } from '../src/backends/cuda/ptx/types.ts';
import {
  type Configuration,
  configurations,
  gradientConfigurations,
} from '../src/backends/cuda/testing/configurations.ts';
import { assembleAsync, type PtxasReport, ptxasVersion } from '../src/backends/cuda/testing/ptxas.ts';

const FILE = 'bench/results/ptxas.json';
/** Rows as they are assembled, a line each, with the version of ptxas. */
const KEPT = '.tools/ptxas.jsonl';

interface Row extends PtxasReport {
  /** First half of the SHA-256 of the PTX. */
  readonly digest: string;
}

interface Report {
  readonly ptxas: string;
  readonly kernels: readonly Row[];
}

const version = ptxasVersion();
if (version === undefined) throw new Error('no ptxas on this machine: install the CUDA toolkit, or set PTXAS');
const quick = process.argv.includes('--quick');
const all = [...configurations(!quick), ...gradientConfigurations(!quick)];
const known = process.argv.includes('--all') ? new Map<string, Row>() : knownRows();
const rows: unknown[] = [];
let failures = 0;
let assembled = 0;
let next = 0;

/** Rows by digest, of the last report and of later runs, that this ptxas made. */
function knownRows(): ReadonlyMap<string, Row> {
  const last = JSON.parse(readFileSync(FILE, 'utf8')) as Report;
  const rows = last.ptxas === version ? [...last.kernels] : [];
  const kept = existsSync(KEPT) ? readFileSync(KEPT, 'utf8').trimEnd().split('\n') : [];
  for (const line of kept) {
    const { ptxas, ...row } = JSON.parse(line) as Row & { readonly ptxas: string };
    if (ptxas === version) rows.push(row);
  }
  return new Map(rows.map((row) => [row.digest, row]));
}

async function reportOf(kernel: Kernel, digest: string): Promise<PtxasReport> {
  const row = known.get(digest);
  if (row === undefined) {
    const report = await assembleAsync(kernel);
    assembled++;
    appendFileSync(KEPT, `${JSON.stringify({ ptxas: version, digest, ...report })}\n`);
    return report;
  }
  const { registers, stackBytes, spillStoreBytes, spillLoadBytes, remarks } = row;
  return { registers, stackBytes, spillStoreBytes, spillLoadBytes, remarks };
}

/** Says what is wrong with a kernel, or worth knowing. */
function judge({ family, name, spillLimit, mayDraw }: Configuration, report: PtxasReport): void {
  const { spillStoreBytes, spillLoadBytes } = report;
  const remarks = family === 'wgmma' ? report.remarks.filter((remark) => mayDraw?.test(remark) !== true) : [];
  const tooMany = spillStoreBytes > spillLimit;
  if (tooMany || remarks.length > 0) failures++;
  if (remarks.length > 0) console.log(name, remarks);
  if (spillStoreBytes + spillLoadBytes > 0) {
    console.log(`${tooMany ? 'SPILL' : 'spill'} ${name}: ${spillStoreBytes} B stored, ${spillLoadBytes} B loaded`);
  }
}

async function worker(): Promise<void> {
  for (let i = next++; i < all.length; i = next++) {
    const configuration = all[i] as Configuration;
    const { family, name, main } = configuration;
    const kernel = configuration.kernel();
    const digest = createHash('sha256').update(printKernel(kernel)).digest('hex').slice(0, 32);
    const report = await reportOf(kernel, digest);
    judge(configuration, report);
    const products = [...opcodeCounts(kernel)].filter(([opcode]) => opcode.startsWith('wgmma.mma_async'));
    rows[i] = {
      family,
      name,
      digest,
      main,
      target: kernel.target,
      threads: kernel.threads,
      sharedBytes: kernel.sharedBytes,
      instructions: kernel.instructions.length,
      pressure: registerPressure(kernel).registers,
      ...(products.length === 0 ? {} : { products: Object.fromEntries(products) }),
      ...report,
    };
  }
}

mkdirSync('.tools', { recursive: true });
await Promise.all(Array.from({ length: availableParallelism() }, worker));
if (!quick) writeFileSync(FILE, `${JSON.stringify({ ptxas: version, kernels: rows }, undefined, 1)}\n`);
console.log(`${rows.length} kernels, ${assembled} assembled; ${failures} spill more than they may or are remarked on`);
process.exitCode = failures === 0 ? 0 : 1;
