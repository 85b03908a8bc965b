/** Assembles every configuration and variant of the Hopper kernel and writes what ptxas says to bench/results/ptxas-hopper.json. */
import { writeFileSync } from 'node:fs';
import { opcodeCounts, registerPressure } from '../src/backends/cuda/ptx/inspect.ts';
import { hopperConfigurations } from '../src/backends/cuda/testing/configurations-wgmma.ts';
import { assemble, ptxasVersion } from '../src/backends/cuda/testing/ptxas.ts';

const version = ptxasVersion();
if (version === undefined) throw new Error('no ptxas on this machine: install the CUDA toolkit, or set PTXAS');
const rows = hopperConfigurations(true).map(({ name, kernel }) => {
  const made = kernel();
  const report = assemble(made);
  const products = [...opcodeCounts(made)].filter(([opcode]) => opcode.startsWith('wgmma.mma_async'));
  if (report.spillStoreBytes + report.spillLoadBytes > 0 || report.remarks.length > 0) console.log(name, report);
  return {
    name,
    threads: made.threads,
    sharedBytes: made.sharedBytes,
    instructions: made.instructions.length,
    pressure: registerPressure(made).registers,
    products: Object.fromEntries(products),
    ...report,
  };
});
writeFileSync(
  'bench/results/ptxas-hopper.json',
  `${JSON.stringify({ ptxas: version, kernels: rows }, undefined, 1)}\n`,
);
const bad = rows.filter(({ spillStoreBytes, remarks }) => spillStoreBytes > 0 || remarks.length > 0).length;
console.log(`${rows.length} kernels assembled, ${bad} spill or are remarked on`);
process.exitCode = bad === 0 ? 0 : 1;
