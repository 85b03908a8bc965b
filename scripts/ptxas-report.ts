/**
 * Assembles every CUDA kernel configuration with ptxas and writes registers, spills and shared memory to
 * bench/results/ptxas.json. Ends with status 1 when ptxas refuses one, or a kernel spills more than it may (a main kernel: nothing).
 */
import { writeFileSync } from 'node:fs';
import { registerPressure } from '../src/backends/cuda/ptx/inspect.ts';
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
    const { name, kernel, main, spillLimit } = all[i] as (typeof all)[number];
    const made = kernel();
    const report = await assembleAsync(made);
    const spills = report.spillStoreBytes + report.spillLoadBytes;
    const tooMany = report.spillStoreBytes > spillLimit;
    if (tooMany) failures++;
    if (spills > 0)
      console.log(
        `${tooMany ? 'SPILL' : 'spill'} ${name}: ${report.spillStoreBytes} B stored, ${report.spillLoadBytes} B loaded`,
      );
    rows[i] = {
      name,
      main,
      target: made.target,
      threads: made.threads,
      sharedBytes: made.sharedBytes,
      instructions: made.instructions.length,
      pressure: registerPressure(made).registers,
      ...report,
    };
  }
}

await Promise.all([worker(), worker()]);
writeFileSync('bench/results/ptxas.json', `${JSON.stringify({ ptxas: version, kernels: rows }, undefined, 1)}\n`);
console.log(`${rows.length} kernels assembled, ${failures} spill more than they may`);
process.exitCode = failures === 0 ? 0 : 1;
