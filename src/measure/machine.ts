/** What a measurement was made on. */
import { readFileSync } from 'node:fs';
import { availableParallelism, cpus, totalmem } from 'node:os';

export interface Machine {
  /** Name and version: 'Node 24.1.0', 'Deno 2.9.6', 'Bun 1.4.5'. */
  readonly runtime: string;
  readonly platform: string;
  readonly cpu: string;
  /** Family and model by number, where the system says: names repeat ("AMD EPYC"). */
  readonly cpuFamily?: number;
  readonly cpuModel?: number;
  /** Which of the vector instructions it has that speed depends on, where the system says. */
  readonly cpuFlags?: readonly string[];
  readonly cores: number;
  readonly memoryGiB: number;
}

/** Deno and Bun also say which Node they are compatible with. */
function thisRuntime(): string {
  const { deno, bun, node } = process.versions;
  if (deno !== undefined) return `Deno ${deno}`;
  return bun === undefined ? `Node ${node}` : `Bun ${bun}`;
}

const VECTOR_FLAGS = [
  'avx2',
  'fma',
  'f16c',
  'avx_vnni',
  'avx512f',
  'avx512_vnni',
  'avx512_fp16',
  'amx_int8',
  'asimddp',
  'sve',
];

/** Of the first processor in Linux' list. */
function processor(): Pick<Machine, 'cpuFamily' | 'cpuModel' | 'cpuFlags'> {
  let text: string;
  try {
    text = readFileSync('/proc/cpuinfo', 'utf8');
  } catch {
    return {};
  }
  const field = (name: string) => new RegExp(`^${name}\\s*: *(.*)$`, 'm').exec(text)?.[1];
  const [family, model] = [Number(field('cpu family')), Number(field('model'))];
  const flags = (field('flags') ?? field('Features'))?.split(' ');
  return {
    ...(Number.isInteger(family) && { cpuFamily: family }),
    ...(Number.isInteger(model) && { cpuModel: model }),
    ...(flags && { cpuFlags: VECTOR_FLAGS.filter((flag) => flags.includes(flag)) }),
  };
}

export function thisMachine(): Machine {
  return {
    runtime: thisRuntime(),
    platform: `${process.platform} ${process.arch}`,
    cpu: cpus()[0]?.model.trim() ?? 'unknown',
    ...processor(),
    cores: availableParallelism(),
    memoryGiB: Math.round((totalmem() / 2 ** 30) * 10) / 10,
  };
}
