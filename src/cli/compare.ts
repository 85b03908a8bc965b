/** `sageattention compare`: accuracy of every kernel on the user's own tensors. */

import { accuracyOnRows, type ExactCall, queryLength, sampleRows } from '../measure/accuracy.ts';
import { notFinite } from '../measure/not-finite.ts';
import { readUserFile } from './arguments.ts';
import { availableBackends, offeredKernels } from './backends.ts';
import { isRefusal, UserError } from './errors.ts';
import {
  type Accuracy,
  type BackendName,
  createProblem,
  type KernelName,
  messageOf,
  parseSafetensors,
  type SafetensorsEntry,
  sageattn,
  type Tensor,
  type TensorLayout,
  tensor,
} from './library.ts';
import { writeReport } from './report-file.ts';
import { ACCURACY_HEADINGS, accuracyCells, bold, count, print, progress, small, table } from './terminal.ts';

export interface CompareOptions {
  readonly q: string;
  readonly k: string;
  readonly v: string;
  readonly layout: TensorLayout;
  readonly causal: boolean;
  readonly smScale?: number;
  readonly backend?: readonly BackendName[];
  readonly kernel?: readonly KernelName[];
  readonly rows: number;
  readonly json?: string;
}

interface CompareResult {
  readonly backend: BackendName;
  readonly kernel: KernelName;
  /** Why there are no figures. */
  readonly refused?: string;
  readonly accuracy?: Accuracy;
}

const DTYPES = { F32: 'float32', F16: 'float16', BF16: 'bfloat16' } as const;

function asTensor(name: string, entries: ReadonlyMap<string, SafetensorsEntry>): Tensor {
  const entry = entries.get(name);
  if (entry === undefined) {
    const names = [...entries.keys()];
    const shown = names.length > 12 ? `${names.slice(0, 12).join(', ')}, ...` : names.join(', ');
    throw new UserError(`the file has no tensor named ${name}; it has ${shown || 'none'} (choose with --q, --k, --v)`);
  }
  const { dtype, shape, bytes } = entry;
  if (!(dtype in DTYPES)) throw new UserError(`tensor ${name} is ${dtype}; attention takes F32, F16 or BF16`);
  if (shape.length !== 3 && shape.length !== 4) {
    throw new UserError(`tensor ${name} has shape [${shape}]; four dimensions are needed, or three without the batch`);
  }
  const data = dtype === 'F32' ? new Float32Array(bytes.buffer) : new Uint16Array(bytes.buffer);
  return tensor(data, shape.length === 3 ? [1, ...shape] : shape, { dtype: DTYPES[dtype as keyof typeof DTYPES] });
}

function openTensors(bytes: Uint8Array, file: string): ReadonlyMap<string, SafetensorsEntry> {
  try {
    return parseSafetensors(bytes).tensors;
  } catch (error) {
    throw new UserError(`${file} is not a safetensors file: ${messageOf(error)}`);
  }
}

export async function compareKernels(file: string, options: CompareOptions): Promise<void> {
  const entries = openTensors(await readUserFile(file), file);
  const [q, k, v] = [asTensor(options.q, entries), asTensor(options.k, entries), asTensor(options.v, entries)];
  const { layout: tensorLayout, causal: isCausal, smScale } = options;
  const call: ExactCall = { q, k, v, tensorLayout, isCausal, ...(smScale !== undefined && { smScale }) };
  const settings = { tensorLayout, isCausal, ...(smScale !== undefined && { smScale }) };
  // Tensors that do not fit together are reported before anything else is done.
  createProblem(q, k, v, settings);
  const kernels = offeredKernels(await availableBackends('auto', options.backend), options.kernel);

  const ranges = sampleRows(queryLength(call), options.rows);
  const rows = ranges.reduce((sum, { start, end }) => sum + end - start, 0);
  const bar = progress(`${kernels.length} kernels against float64`, kernels.length * rows);
  const results: CompareResult[] = [];
  try {
    for (const which of kernels) {
      try {
        const output = await sageattn(q, k, v, { ...settings, ...which });
        results.push({ ...which, accuracy: await accuracyOnRows(call, output, ranges, bar.advance) });
      } catch (error) {
        // What no kernel takes is the user's to mend; what one kernel does not take is a line of the table.
        if (!isRefusal(error)) throw error;
        results.push({ ...which, refused: messageOf(error) });
      }
    }
  } finally {
    bar.stop();
  }

  print(
    bold(`q [${q.shape}], k [${k.shape}], v [${v.shape}], ${q.dtype}, ${tensorLayout}${isCausal ? ', causal' : ''}`),
  );
  print(
    `Against exact attention in float64, on ${count(rows)} of ${count(queryLength(call))} query rows of each head\n(cosine similarity, relative L1, largest difference, root mean square):`,
  );
  print(
    table(
      ['backend', 'kernel', ...ACCURACY_HEADINGS, '>RMSE'],
      results.map(({ backend, kernel, accuracy }) =>
        accuracy === undefined
          ? [backend, kernel, 'refused', '', '', '']
          : [backend, kernel, ...accuracyCells(accuracy), small(accuracy.rmse)],
      ),
    ),
  );
  const spoiled = notFinite({ q, k, v });
  if (spoiled.length > 0) {
    print(
      `Rows that see them have no finite output to compare, and one such row makes every figure the worst: ${spoiled.join('; ')}.`,
    );
  }
  for (const { kernel, refused } of results) if (refused !== undefined) print(`${kernel}: ${refused}`);
  if (options.json !== undefined) {
    const shapes = { q: q.shape, k: k.shape, v: v.shape };
    const report = {
      schema: 'sageattention-compare/1',
      file,
      shapes,
      dtype: q.dtype,
      ...settings,
      rows,
      notFinite: spoiled,
      results,
    };
    await writeReport(options.json, JSON.stringify(report, null, 2));
  }
  if (results.every(({ accuracy }) => accuracy === undefined)) throw new UserError('no kernel took these tensors');
}
