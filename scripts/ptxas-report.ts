/**
 * Assembles every CUDA kernel configuration with ptxas and writes registers, spills and shared memory to
 * bench/results/ptxas.json. Ends with status 1 when ptxas refuses one or remarks on a product, or a kernel spills more
 * than it may (a main kernel and every one on wgmma: nothing).
 */
import { writeFileSync } from 'node:fs';
import { opcodeCounts, registerPressure } from '../src/backends/cuda/ptx/inspect.ts';
import { configurations } from '../src/backends/cuda/testing/configurations.ts';
import { assembleAsync, ptxasVersion } from '../src/backends/cuda/testing/ptxas.ts';

const version = ptxasVersion();
if (version === undefined) throw new Error('no ptxas on this machine: install the CUDA toolkit, or set PTXAS');
const all = configurations(!process.argv.includes('--quick'));
const rows: Record<string, unknown>[] = [];
let failures = 0;
let next = 0;

async function worker(): Promise<void> {
  for (let i = next++; i < all.length; i = next++) {
    const { family, name, kernel, main, spillLimit } = all[i] as (typeof all)[number];
    const made = kernel();
    const report = await assembleAsync(made);
    const spills = report.spillStoreBytes + report.spillLoadBytes;
    const tooMany = report.spillStoreBytes > spillLimit;
    const remarked = family === 'wgmma' && report.remarks.length > 0;
    if (tooMany || remarked) failures++;
    if (remarked) console.log(name, report.remarks);
    const products = [...opcodeCounts(made)].filter(([opcode]) => opcode.startsWith('wgmma.mma_async'));
    if (spills > 0)
      console.log(
        `${tooMany ? 'SPILL' : 'spill'} ${name}: ${report.spillStoreBytes} B stored, ${report.spillLoadBytes} B loaded`,
      );
    rows[i] = {
      family,
      name,
      main,
      target: made.target,
      threads: made.threads,
      sharedBytes: made.sharedBytes,
      instructions: made.instructions.length,
      pressure: registerPressure(made).registers,
      ...(products.length === 0 ? {} : { products: Object.fromEntries(products) }),
      ...report,
    };
  }
}

await Promise.all([worker(), worker()]);
writeFileSync('bench/results/ptxas.json', `${JSON.stringify({ ptxas: version, kernels: rows }, undefined, 1)}\n`);
console.log(`${rows.length} kernels assembled, ${failures} spill more than they may or are remarked on`);
process.exitCode = failures === 0 ? 0 : 1;
