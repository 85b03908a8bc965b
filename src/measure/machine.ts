/** What a measurement was made on. */
import { availableParallelism, cpus, totalmem } from 'node:os';

export interface Machine {
  /** Name and version: 'Node 24.1.0', 'Deno 2.9.6', 'Bun 1.4.5'. */
  readonly runtime: string;
  readonly platform: string;
  readonly cpu: string;
  readonly cores: number;
  readonly memoryGiB: number;
}

/** Deno and Bun also say which Node they are compatible with. */
function thisRuntime(): string {
  const { deno, bun, node } = process.versions;
  if (deno !== undefined) return `Deno ${deno}`;
  return bun === undefined ? `Node ${node}` : `Bun ${bun}`;
}

export function thisMachine(): Machine {
  return {
    runtime: thisRuntime(),
    platform: `${process.platform} ${process.arch}`,
    cpu: cpus()[0]?.model.trim() ?? 'unknown',
    cores: availableParallelism(),
    memoryGiB: Math.round((totalmem() / 2 ** 30) * 10) / 10,
  };
}
