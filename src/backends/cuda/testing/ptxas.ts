/** Runs `ptxas`, NVIDIA's assembler, on a printed kernel. For tests and reports; the package itself never needs it. */
import { execFile, spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { printKernel } from '../ptx/printer.ts';
import type { Kernel } from '../ptx/types.ts';

/** Shares of the kernels that tests assemble (`test/support/sample.ts`). */
export const ASSEMBLED_SHARES = { byHand: 0.1, otherwise: 0.3 };

/** What `ptxas -v` says of a kernel. */
export interface PtxasReport {
  readonly registers: number;
  readonly stackBytes: number;
  readonly spillStoreBytes: number;
  readonly spillLoadBytes: number;
  /** What ptxas says of performance: `wgmma` serialized, `setmaxnreg` ignored. */
  readonly remarks: readonly string[];
}

const executable = process.env.PTXAS ?? 'ptxas';

/** The version line of `ptxas`, or undefined when there is none on this machine. `PTXAS` names another executable. */
export function ptxasVersion(): string | undefined {
  const { status, stdout } = spawnSync(executable, ['--version'], { encoding: 'utf8' });
  return status === 0 ? stdout.match(/release .*/)?.[0] : undefined;
}

const numberIn = (text: string, pattern: RegExp) => {
  const match = text.match(pattern);
  if (match === null) throw new Error(`ptxas printed no ${pattern}:\n${text}`);
  return Number(match[1]);
};

interface Job {
  readonly directory: string;
  readonly arguments: readonly string[];
  /** The report, from what ptxas printed. */
  finish(status: number | null, log: string): PtxasReport;
}

function prepare(kernel: Kernel): Job {
  const directory = mkdtempSync(join(tmpdir(), 'ptxas-'));
  const source = join(directory, 'kernel.ptx');
  const text = printKernel(kernel);
  writeFileSync(source, text);
  const output = process.env.PTXAS_KEEP ?? join(directory, 'kernel.cubin');
  return {
    directory,
    arguments: ['-v', `-arch=${kernel.target}`, source, '-o', output],
    finish(status, log) {
      if (status !== 0) {
        const lines = text.split('\n');
        const shown = [...log.matchAll(/line (\d+)/g)].slice(0, 5).map((match) => lines[Number(match[1]) - 1]);
        throw new Error(`ptxas refused ${kernel.name} for ${kernel.target}:\n${log}\n${shown.join('\n')}`);
      }
      return {
        registers: numberIn(log, /Used (\d+) registers/),
        stackBytes: numberIn(log, /(\d+) bytes stack frame/),
        spillStoreBytes: numberIn(log, /(\d+) bytes spill stores/),
        spillLoadBytes: numberIn(log, /(\d+) bytes spill loads/),
        remarks: log.split('\n').filter((line) => /\(C\d+\)|warning|setmaxnreg/.test(line)),
      };
    },
  };
}

/** @throws {Error} with ptxas's message and the offending lines when it refuses the kernel */
export function assemble(kernel: Kernel): PtxasReport {
  const job = prepare(kernel);
  try {
    const { status, stderr, stdout } = spawnSync(executable, job.arguments, { encoding: 'utf8' });
    return job.finish(status, stderr + stdout);
  } finally {
    rmSync(job.directory, { recursive: true, force: true });
  }
}

/** {@link assemble} in a process beside this one. */
export async function assembleAsync(kernel: Kernel): Promise<PtxasReport> {
  const job = prepare(kernel);
  try {
    return await new Promise((resolve, reject) => {
      execFile(executable, job.arguments, (error, stdout, stderr) => {
        try {
          resolve(job.finish(error === null ? 0 : 1, stderr + stdout));
        } catch (refusal) {
          reject(refusal);
        }
      });
    });
  } finally {
    rmSync(job.directory, { recursive: true, force: true });
  }
}
