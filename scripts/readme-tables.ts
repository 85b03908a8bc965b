/**
 * Fills the tables of README.md and of the documentation from the raw results under bench/results/ (the table of
 * exporters from the graphs of the tests): between `<!-- table NAME -->` and `<!-- /table -->`. With
 * `<!-- table NAME short -->` it has the rows that the README shows. With `--check` it writes nothing and fails if a table is not what the results say.
 */
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import type { AccuracyRow } from '../bench/accuracy.ts';
import type { Fp4Row } from '../bench/fp4.ts';
import { predictSharded, type Rates, type Topology } from '../src/distributed/index.ts';
import { exporterRows, topologyRows } from './exporters-table.ts';

const RESULTS = new URL('../bench/results/', import.meta.url);
const PAGES = [
  'README.md',
  ...['index', 'choosing-a-kernel', 'distributed', 'fp4', 'integrations', 'sparse', 'training'].map(
    (name) => `docs/${name}.md`,
  ),
];
const read = <T>(name: string): T => JSON.parse(readFileSync(new URL(name, RESULTS), 'utf8')) as T;

interface Table {
  readonly header: readonly string[];
  readonly rows: readonly (readonly string[])[];
}

const markdown = ({ header, rows }: Table): string =>
  [header, header.map((_, i) => (i === 0 ? '---' : '---:')), ...rows]
    .map((cells) => `| ${cells.join(' | ')} |`)
    .join('\n');

/** Official kernels that a user of the Python library would be running, and ours. */
const ACCURACY_KERNELS: readonly [source: AccuracyRow['source'], kernel: string, label: string][] = [
  ['official', 'qk_int8_pv_fp16_triton', 'official, Triton INT8 + FP16'],
  ['official', 'qk_int8_pv_fp16_cuda.fp32', 'official, CUDA INT8 + FP16 (fp32)'],
  ['official', 'qk_int8_pv_fp8_cuda.per_thread.fp32+fp16', 'official, CUDA INT8 + FP8 (SageAttention2++)'],
  ['official', 'qk_int8_pv_fp8_cuda_sm90.per_thread', 'official, Hopper INT8 + FP8'],
  ['wasm', 'qk-int8-pv-int8 (simd128)', '`qk-int8-pv-int8` on WASM (default), SIMD128'],
  ['wasm', 'qk-int8-pv-int8 (relaxed)', '`qk-int8-pv-int8` on WASM (default), relaxed SIMD'],
  ['wasm', 'qk-int8-pv-fp16 (simd128)', '`qk-int8-pv-fp16` on WASM'],
];

function accuracy(): Table {
  const { rows } = read<{ rows: AccuracyRow[] }>('accuracy.json');
  const golden = [...new Set(rows.map((row) => row.golden))];
  return {
    header: ['relative L1 / cosine similarity', ...golden.map((name) => `\`${name}\``)],
    rows: ACCURACY_KERNELS.map(([source, kernel, label]) => [
      label,
      ...golden.map((name) => {
        const row = rows.find((entry) => entry.golden === name && entry.source === source && entry.kernel === kernel);
        if (row === undefined) throw new Error(`accuracy.json has no ${source} ${kernel} for ${name}`);
        return `${row.accuracy.relativeL1.toFixed(4)} / ${row.accuracy.cosineSimilarity.toFixed(5)}`;
      }),
    ]),
  };
}

/** FP4: the official arithmetic and ours. */
function fp4(): Table {
  const { rows } = read<{ rows: Fp4Row[] }>('fp4.json');
  return {
    header: ['input', 'official', 'ours', 'ours, FP8 PV', 'our kernel on WASM'],
    rows: rows.map(({ input, errors: { official, ours, oursFp8, wasm } }) => [
      input,
      official.toFixed(3),
      `**${ours.toFixed(3)}**`,
      oursFp8.toFixed(3),
      wasm.toFixed(3),
    ]),
  };
}

interface WasmReport {
  readonly node: string;
  readonly threads: number;
  readonly rows: readonly {
    readonly tokens: number;
    readonly headDim: number;
    readonly contender: string;
    readonly error?: string;
    readonly medianMilliseconds?: number;
    readonly accuracy?: AccuracyRow['accuracy'];
  }[];
}

/** Heading of what kernels compute wrong, in every table of speeds. */
const ACCURACY = 'relative L1 / cosine';

/** The build that a Node takes by itself. */
const WASM_BUILDS: Readonly<Record<string, string>> = { 'Node 20': 'simd128', 'Node 24': 'relaxed' };

/**
 * Every kernel against both peers, each with its error.
 *
 * @param short two threads and D = 64 only, the build that each Node takes
 */
function wasmSpeed(short: boolean): Table {
  const files = readdirSync(RESULTS).filter((name) => /^wasm-node\d+-threads\d+\.json$/.test(name));
  const rows = files.sort().flatMap((name) => {
    const report = read<WasmReport>(name);
    const node = `${report.node.split('.')[0]?.replace('v', 'Node ')}`;
    return report.rows
      .filter(({ contender }) => !contender.startsWith('onnxruntime'))
      .filter(
        ({ headDim, contender }) =>
          !short || (report.threads === 2 && headDim === 64 && contender.includes(`${WASM_BUILDS[node]}`)),
      )
      .map(({ tokens, headDim, contender, medianMilliseconds = Number.NaN, accuracy }) => {
        const ratio = (peer: string) => {
          const row = report.rows.find(
            (entry) => entry.tokens === tokens && entry.headDim === headDim && entry.contender.startsWith(peer),
          );
          if (row === undefined) return '';
          return row.medianMilliseconds === undefined
            ? 'peer fails'
            : `${(row.medianMilliseconds / medianMilliseconds).toFixed(2)}x`;
        };
        return [
          `${tokens}, D=${headDim}`,
          `${node}, ${report.threads}`,
          `\`${contender.replace(' (', '` (')}`,
          ((4 * 8 * tokens * tokens * headDim) / medianMilliseconds / 1e6).toFixed(0),
          ratio('onnxruntime-web'),
          ratio('onnxruntime-node'),
          `${accuracy?.relativeL1.toFixed(4)} / ${accuracy?.cosineSimilarity.toFixed(5)}`,
        ];
      });
  });
  return {
    header: ['tokens', 'engine, threads', 'kernel', 'GFLOP/s', 'to onnxruntime-web', 'to onnxruntime-node', ACCURACY],
    rows,
  };
}

interface ShortReport {
  readonly runtime: string;
  readonly cpu: string;
  readonly threads: number;
  readonly rows: readonly {
    readonly batch: number;
    readonly heads: number;
    readonly headDim: number;
    readonly queries: number;
    readonly tokens: number;
    readonly contenders: Readonly<Record<string, { readonly median: number; readonly relativeL1: number }>>;
  }[];
}

/** Whole calls of one token and more: onnxruntime-web's time over ours, a column for each shape. */
function wasmShort(): Table {
  const reports = readdirSync(RESULTS)
    .filter((name) => /^wasm-short-.*\.json$/.test(name))
    .map((name) => read<ShortReport>(name));
  const shapeOf = ({ batch, heads, headDim }: ShortReport['rows'][0]) => `${batch} x ${heads} of ${headDim}`;
  const shapes = [...new Set(reports.flatMap(({ rows }) => rows.map(shapeOf)))];
  // A bench may have been run in parts.
  const engineOf = ({ runtime, threads }: ShortReport) => `${runtime.split('.')[0]}, ${threads}`;
  const rows = [...new Set(reports.map(engineOf))].flatMap((engine) => {
    const measured = reports.filter((report) => engineOf(report) === engine).flatMap((report) => report.rows);
    return [...new Set(measured.map(({ tokens }) => tokens))].map((tokens) => {
      const found = measured.filter((row) => row.tokens === tokens);
      const errors = found.map(({ contenders: { ours } }) => ours?.relativeL1 ?? Number.NaN);
      const ratios = shapes.map((shape) => {
        const contenders = found.find((row) => shapeOf(row) === shape)?.contenders;
        const [, peer] = Object.entries(contenders ?? {}).find(([name]) => name.startsWith('onnxruntime-web')) ?? [];
        const ours = contenders?.ours?.median;
        return peer === undefined || ours === undefined ? '' : `${(peer.median / ours).toFixed(2)}x`;
      });
      return [`${tokens}`, engine, ...ratios, Math.max(...errors).toExponential(1)];
    });
  });
  return { header: ['tokens', 'engine, threads', ...shapes, 'relative L1'], rows };
}

interface Shape {
  readonly batch: number;
  readonly tokens: number;
  readonly headDim: number;
  readonly isCausal: boolean;
}
type Measured = Partial<AccuracyRow['accuracy']>;
interface CudaReport {
  readonly torch?: {
    readonly results: readonly (Shape & { readonly backend: string; readonly milliseconds: number })[];
  };
}
interface WgmmaReport extends CudaReport {
  readonly outcomes: readonly (Measured & {
    readonly task: { readonly kind: string; readonly kernel: string; readonly variant: string; readonly shape: Shape };
    readonly milliseconds?: number;
    readonly aloneMilliseconds?: number;
  })[];
}
interface MmaReport extends CudaReport {
  readonly results: readonly (Shape &
    Measured & {
      readonly kernel: string;
      readonly options: Readonly<Record<string, string>>;
      readonly milliseconds: number;
      readonly attentionMilliseconds: number;
    })[];
}

const CUDA_HEADS = 32;
const sameShape = (a: Shape, b: Shape) =>
  a.batch === b.batch && a.tokens === b.tokens && a.headDim === b.headDim && a.isCausal === b.isCausal;
const accuracyText = ({ relativeL1, cosineSimilarity }: Measured) =>
  `${relativeL1?.toFixed(4)} / ${cosineSimilarity?.toFixed(5)}`;

/**
 * The CUDA kernels, each case once: alone and with quantization, against cuDNN in the same run.
 *
 * @param short the kernels that were made for the card that was measured, D = 128
 */
function cudaSpeed(short: boolean): Table {
  const hopper = read<WgmmaReport>('hopper-h200.json');
  const mma = read<MmaReport>('cuda-h200.json');
  const row = (
    report: CudaReport,
    kernel: string,
    shape: Shape,
    alone: number,
    whole: number,
    accuracy: Measured,
  ): string[] => {
    const peer = report.torch?.results.find(
      (entry) => entry.backend === 'CUDNN_ATTENTION' && sameShape(entry, shape),
    )?.milliseconds;
    const { batch, tokens, headDim, isCausal } = shape;
    const work = (4 * batch * CUDA_HEADS * tokens * tokens * headDim) / (isCausal ? 2 : 1) / 1e9;
    const speed = (milliseconds: number) =>
      `${(work / milliseconds).toFixed(0)}${peer === undefined ? '' : ` (${(peer / milliseconds).toFixed(2)}x)`}`;
    return [
      `${tokens}${batch > 1 ? `, batch ${batch}` : ''}, D=${headDim}${isCausal ? ', causal' : ''}`,
      kernel,
      peer === undefined ? '' : (work / peer).toFixed(0),
      speed(alone),
      speed(whole),
      accuracyText(accuracy),
    ];
  };
  const timed = hopper.outcomes.filter(({ task }) => task.kind === 'time' && task.variant === 'base');
  const once = timed.filter(
    ({ task }, i) =>
      timed.findIndex((other) => other.task.kernel === task.kernel && sameShape(other.task.shape, task.shape)) === i,
  );
  const rows = once.flatMap((outcome) => {
    const { task, milliseconds, aloneMilliseconds } = outcome;
    if (milliseconds === undefined || aloneMilliseconds === undefined) return [];
    if (short && !(task.kernel.endsWith('sm90') && task.shape.headDim === 128)) return [];
    return [row(hopper, `\`${task.kernel}\``, task.shape, aloneMilliseconds, milliseconds, outcome)];
  });
  const others = mma.results
    .filter(({ kernel }) => !kernel.endsWith('sm90'))
    .map((result) =>
      row(
        mma,
        `\`${result.kernel}\`${result.options.pvAccumDtype === undefined ? '' : `, ${result.options.pvAccumDtype}`}`,
        result,
        result.attentionMilliseconds,
        result.milliseconds,
        result,
      ),
    );
  return {
    header: ['tokens', 'kernel', 'cuDNN', 'kernel alone', 'with quantization', ACCURACY],
    rows: short ? rows : [...rows, ...others],
  };
}

interface WebgpuReport {
  readonly rows: readonly (Omit<Shape, 'batch'> & {
    readonly onnxruntime?: { readonly milliseconds?: number; readonly tflops?: number };
    readonly timings: readonly {
      readonly family: string;
      readonly variant: string;
      readonly milliseconds?: number;
      readonly tflops?: number;
      readonly accuracy?: AccuracyRow['accuracy'];
    }[];
  })[];
}

/**
 * The best variant of each family, against onnxruntime's attention on the same device in the same run.
 *
 * @param short without the cases that have no peer
 */
function webgpuSpeed(short: boolean): Table {
  const { rows: all } = read<WebgpuReport>('webgpu-h200.json');
  const rows = all.filter(({ onnxruntime }) => !short || onnxruntime !== undefined);
  return {
    header: ['tokens', 'family', 'TFLOP/s', 'onnxruntime', 'to onnxruntime', ACCURACY],
    rows: rows.flatMap(({ tokens, headDim, isCausal, onnxruntime, timings }) =>
      [...new Set(timings.map(({ family }) => family))].flatMap((family) => {
        const measured = timings.filter((timing) => timing.family === family && timing.milliseconds !== undefined);
        const best = measured.sort((a, b) => (a.milliseconds ?? 0) - (b.milliseconds ?? 0))[0];
        if (best?.milliseconds === undefined) return [];
        const peer = onnxruntime?.milliseconds;
        return [
          [
            `${tokens}, D=${headDim}${isCausal ? ', causal' : ''}`,
            `${family} (\`${best.variant}\`)`,
            best.tflops?.toFixed(1) ?? '',
            onnxruntime === undefined ? 'not timed' : (onnxruntime.tflops?.toFixed(1) ?? 'fails'),
            peer === undefined ? '' : `${(peer / best.milliseconds).toFixed(1)}x`,
            accuracyText(best.accuracy ?? {}),
          ],
        ];
      }),
    ),
  };
}

interface OnnxruntimeReport {
  readonly results: readonly {
    readonly length: number;
    /** How attention was taken; without it as in all runs before there were markers: by a cut. */
    readonly paths?: readonly string[];
    readonly without?: number;
    readonly with?: number;
    readonly cutOnly?: number;
    readonly accuracy?: AccuracyRow['accuracy'];
  }[];
}

/** Lengths that the README shows: where the kernel gains nothing, where it begins to, and where it gains most. */
const SHORT_LENGTHS = [1024, 2048, 8192, 32768];

/** A stack of DiT blocks, the whole model. */
function onnxruntimeSpeed(short: boolean): Table {
  // Of runs of the same length the newest.
  const results = readdirSync(RESULTS)
    .filter((name) => /^onnxruntime-h200-\d\.json$/.test(name))
    .sort()
    .reverse()
    .flatMap((name) => read<OnnxruntimeReport>(name).results);
  const milliseconds = (value: number | undefined) => value?.toFixed(1) ?? '';
  return {
    header: [
      'tokens',
      'path',
      'without (ms)',
      'with (ms)',
      'speedup',
      'cut, attention by onnxruntime (ms)',
      'output against without: cosine',
    ],
    rows: results
      .filter(({ length }) => !short || SHORT_LENGTHS.includes(length))
      .filter(({ length }, i, those) => those.findIndex((other) => other.length === length) === i)
      .sort((a, b) => a.length - b.length)
      .map((row) => [
        String(row.length),
        row.paths?.join(', ') ?? 'cut',
        milliseconds(row.without),
        milliseconds(row.with),
        row.without === undefined || row.with === undefined ? '' : `${(row.without / row.with).toFixed(2)}x`,
        milliseconds(row.cutOnly),
        row.accuracy?.cosineSimilarity.toFixed(5) ?? '',
      ]),
  };
}

/**
 * The most telling row of each kind of device: the text in its first cells, and its name.
 */
const SUMMARY: readonly {
  readonly where: string;
  readonly make: (short: boolean) => Table;
  readonly row: readonly string[];
  readonly peer: string;
  readonly faster: string;
}[] = [
  {
    where: 'CUDA, one H200',
    make: cudaSpeed,
    row: ['16384, D=128', '`qk-int8-pv-fp8-cuda-sm90`'],
    peer: 'cuDNN, bfloat16',
    faster: 'with quantization',
  },
  ...(['matrix (`4s128r16k-qk4-pv2`)', 'subgroup (`64x16n`)'] as const).map((family) => ({
    where: `WebGPU, the same card, ${family.startsWith('matrix') ? 'its matrix units' : 'without them'}`,
    make: webgpuSpeed,
    row: ['8192, D=64', family],
    peer: "onnxruntime-web's WebGPU, float16",
    faster: 'to onnxruntime',
  })),
  ...Object.entries(WASM_BUILDS).map(([node, build]) => ({
    where: `WebAssembly, two CPU cores, ${node}`,
    make: wasmSpeed,
    row: ['1024, D=64', `${node}, 2`, `\`qk-int8-pv-int8\` (${build})`],
    peer: "onnxruntime-web's WebAssembly, float32",
    faster: 'to onnxruntime-web',
  })),
];

/** One row of each table, in one. */
function summary(): Table {
  return {
    header: ['where', 'tokens', 'against', 'times as fast', ACCURACY],
    rows: SUMMARY.map(({ where, make, row, peer, faster }) => {
      const { header, rows } = make(false);
      const found = rows.find((cells) => row.every((cell, i) => cells[i] === cell));
      if (found === undefined) throw new Error(`no row ${row.join(', ')} among the results`);
      const cell = (heading: string) => found[header.indexOf(heading)] ?? '';
      return [where, row[0] ?? '', peer, /[\d.]+x/.exec(cell(faster))?.[0] ?? '', cell(ACCURACY)];
    }),
  };
}

const EXPORTERS_HEADER = ['models', 'exporter', 'found', 'taken', 'since'];
const exporters = (): Table => ({ header: EXPORTERS_HEADER, rows: exporterRows() });
const topologies = (): Table => ({ header: EXPORTERS_HEADER, rows: topologyRows() });

interface DistributedReport {
  readonly rows: readonly {
    readonly tokens: number;
    readonly isCausal: boolean;
    readonly ulysses: number;
    readonly ring: number;
    readonly milliseconds: number;
    readonly oneDevice: { readonly milliseconds: number; readonly relativeL1: number };
    readonly relativeL1: number;
    readonly sentBytes: number;
    readonly predictedMilliseconds?: number;
    readonly aloneMilliseconds?: number;
  }[];
}

const grouped = (value: number) => value.toLocaleString('en-US');

/** Of one process for each card, connected by NCCL. */
interface NcclReport {
  readonly rows: readonly (Topology & {
    readonly tokens: number;
    readonly isCausal: boolean;
    readonly milliseconds: number;
  })[];
}

/** torch's ring attention on the same cards: the fastest of its kernels and ways to pass keys on. */
interface TorchRingReport {
  readonly rows: readonly {
    readonly tokens: number;
    readonly isCausal: boolean;
    readonly milliseconds?: number;
  }[];
}

const milliseconds = (value: number | undefined) => (value === undefined ? '' : `${value.toFixed(1)} ms`);

function distributedSpeed(): Table {
  const { rows } = read<DistributedReport>('distributed-h200-x2.json');
  const nccl = read<NcclReport>('distributed-nccl-h200-x2.json').rows;
  const torch = read<TorchRingReport>('distributed-torch-h200-x2.json').rows;
  type Row = (typeof rows)[number];
  const sameCall = (row: Row) => (other: { readonly tokens: number; readonly isCausal: boolean }) =>
    other.tokens === row.tokens && other.isCausal === row.isCausal;
  const torchTime = (row: Row) => {
    const times = torch.filter(sameCall(row)).flatMap((other) => other.milliseconds ?? []);
    return row.ring > 1 && times.length > 0 ? Math.min(...times) : undefined;
  };
  return {
    header: [
      'tokens',
      'ulysses × ring',
      'one device',
      'two devices',
      'gain',
      'predicted',
      'without links',
      'two processes, NCCL',
      "torch's ring",
      'a rank sends',
      'relative L1, one and two',
    ],
    rows: rows.map((row) => [
      `${grouped(row.tokens)}${row.isCausal ? ' causal' : ''}`,
      `${row.ulysses} × ${row.ring}`,
      milliseconds(row.oneDevice.milliseconds),
      milliseconds(row.milliseconds),
      `${(row.oneDevice.milliseconds / row.milliseconds).toFixed(2)}×`,
      milliseconds(row.predictedMilliseconds),
      milliseconds(row.aloneMilliseconds),
      milliseconds(nccl.filter(sameCall(row)).find((other) => other.ulysses === row.ulysses)?.milliseconds),
      milliseconds(torchTime(row)),
      `${(row.sentBytes / 1e6).toFixed(0)} MB`,
      `${row.oneDevice.relativeL1.toFixed(4)}, ${row.relativeL1.toFixed(4)}`,
    ]),
  };
}

interface ModelsReport {
  readonly models: readonly {
    readonly name: string;
    readonly tokens: number;
    readonly heads: number;
    readonly headDim: number;
  }[];
  readonly exact: readonly {
    readonly name: string;
    readonly exact: readonly { readonly backend: string; readonly milliseconds: number }[];
  }[];
  readonly results: readonly {
    readonly model: string;
    readonly kernel: string;
    readonly milliseconds: number;
    readonly tflops: number;
    readonly relativeL1: number;
    readonly cosineSimilarity: number;
  }[];
}

/** Attention of public models at their real sizes, on activations of their own blocks. */
function modelsSpeed(short: boolean): Table {
  const { models, exact, results } = read<ModelsReport>('cuda-models-h200.json');
  return {
    header: ['model: tokens, heads of channels', 'kernel', 'ms', 'TFLOP/s', 'cuDNN (ms)', 'to cuDNN', ACCURACY],
    rows: models.flatMap(({ name, tokens, heads, headDim }) => {
      const cudnn = exact
        .find((one) => one.name === name)
        ?.exact.find(({ backend }) => backend === 'CUDNN_ATTENTION')?.milliseconds;
      if (cudnn === undefined) throw new Error(`no time of cuDNN for ${name}`);
      return results
        .filter(({ model, kernel }) => model === name && (!short || kernel.endsWith('-sm90')))
        .map((row) => [
          `${name}: ${grouped(tokens)}, ${heads} of ${headDim}`,
          `\`${row.kernel}\``,
          row.milliseconds.toFixed(2),
          row.tflops.toFixed(0),
          cudnn.toFixed(2),
          `${(cudnn / row.milliseconds).toFixed(2)}x`,
          `${row.relativeL1.toFixed(4)} / ${row.cosineSimilarity.toFixed(5)}`,
        ]);
    }),
  };
}

interface WasmGradientsReport {
  readonly runtime: string;
  readonly results: readonly {
    readonly heads: number;
    readonly tokens: number;
    readonly headDim: number;
    readonly isCausal: boolean;
    readonly milliseconds: Readonly<Record<'fp16' | 'int8', number>>;
    readonly ratio: number;
    readonly relativeL2: Readonly<Record<'fp16' | 'int8', readonly number[]>>;
  }[];
}

/** Backward passes in WASM: the last three products in float32 and in integers. */
function wasmGradients(): Table {
  const builds = ['20', '24'].map((version) => read<WasmGradientsReport>(`wasm-gradients-node${version}.json`));
  const errors = (values: readonly number[]) => values.map((value) => value.toFixed(4)).join(' / ');
  return {
    header: ['', 'heads x tokens x D', '`fp16`', '`int8`', 'ratio', 'relative L2, `fp16`', '`int8`'],
    rows: builds.flatMap(({ runtime, results }) =>
      results.map(({ heads, tokens, headDim, isCausal, milliseconds, ratio, relativeL2 }) => [
        runtime.replace(/\..*/, ''),
        `${heads} x ${grouped(tokens)} x ${headDim}${isCausal ? ', causal' : ''}`,
        `${milliseconds.fp16.toFixed(1)} ms`,
        `${milliseconds.int8.toFixed(1)} ms`,
        ratio.toFixed(2),
        errors(relativeL2.fp16),
        errors(relativeL2.int8),
      ]),
    ),
  };
}

interface WebgpuBackwardReport {
  readonly rows: readonly {
    readonly dim: number;
    readonly length: number;
    readonly milliseconds: Readonly<Record<string, number>>;
    readonly relativeL2: readonly number[];
  }[];
}

/** Forward and backward on WebGPU: of the tiles the one that is chosen now, which is not the default of that run at D = 128. */
function webgpuBackward(): Table {
  const { rows } = read<WebgpuBackwardReport>('webgpu-backward-h200.json');
  return {
    header: [
      'D, tokens',
      'tfjs WebGPU, float32',
      'ours',
      'with `reuseOutputs`',
      'tfjs / ours',
      'relative L2 of dQ / dK / dV',
    ],
    rows: rows.map(({ dim, length, milliseconds, relativeL2 }) => {
      const tfjs = milliseconds['tfjs WebGPU, float32'];
      const [ours, reusing] = [milliseconds.sageattnTrainable, milliseconds['sageattnTrainable, reuseOutputs']];
      if (tfjs === undefined || ours === undefined || reusing === undefined)
        throw new Error(`D ${dim}, ${length} tokens: no time of all`);
      return [
        `${dim}, ${grouped(length)}`,
        `${tfjs.toFixed(2)} ms`,
        `${ours.toFixed(2)} ms`,
        `${reusing.toFixed(2)} ms`,
        `${(tfjs / ours).toFixed(1)}× / ${(tfjs / reusing).toFixed(1)}×`,
        relativeL2.map((value) => value.toFixed(4)).join(' / '),
      ];
    }),
  };
}

/** One way, bytes a second: NVLink as measured between two H200s, PCIe 5 and a 400 Gb/s network at nine tenths of their rate. */
const LINKS = [
  ['NVLink', 394e9, 5e-6],
  ['PCIe 5', 55e9, 10e-6],
  ['400 Gb/s', 45e9, 20e-6],
] as const;
/** Of one H200: the kernel's rate and a copy's bandwidth, as measured. */
const [H200_ATTENTION, H200_MEMORY] = [930e12, 4.2e12];

/** Predictions, not measurements: the virtual clock over the schedules that the ranks carry out. */
function distributedPredictions(): Table {
  const ranks = [2, 4, 8, 16, 64];
  const efficiency = (topology: Topology, tokens: number, kvHeads: number, rates: Rates, keyValueBytes = 1) => {
    const options = { tokens, heads: 64, kvHeads, headDim: 128, keyValueBytes };
    const one = predictSharded(options, { ulysses: 1, ring: 1 }, rates).total;
    return one / predictSharded(options, topology, rates).total / (topology.ulysses * topology.ring);
  };
  const percent = (value: number) => `${Math.round(100 * value)}%`;
  return {
    header: ['link, tokens, heads of K', 'way', ...ranks.map((count) => `${count} GPUs`)],
    rows: LINKS.flatMap(([link, bytes, latency]) =>
      (
        [
          [32768, 8],
          [131072, 64],
        ] as const
      ).flatMap(([tokens, kvHeads]) => {
        const rates = { attention: H200_ATTENTION, memory: H200_MEMORY, link: bytes, latency };
        const ways = [
          ['ring', (count: number) => percent(efficiency({ ulysses: 1, ring: count }, tokens, kvHeads, rates))],
          [
            'ring, K and V in 16 bits',
            (count: number) => percent(efficiency({ ulysses: 1, ring: count }, tokens, kvHeads, rates, 2)),
          ],
          ['Ulysses', (count: number) => percent(efficiency({ ulysses: count, ring: 1 }, tokens, kvHeads, rates))],
          [
            'Ulysses 8 × ring',
            (count: number) =>
              count <= 8 ? '' : percent(efficiency({ ulysses: 8, ring: count / 8 }, tokens, kvHeads, rates)),
          ],
        ] as const;
        return ways.map(([way, cell]) => [`${link}, ${grouped(tokens)}, ${kvHeads} of 64`, way, ...ranks.map(cell)]);
      }),
    ),
  };
}

interface SparseReport {
  readonly choosing: readonly { readonly sparsity: object; readonly milliseconds: number }[];
  readonly results: readonly {
    readonly kernel: string;
    readonly dense: { readonly times: { readonly attention: number; readonly whole: number } };
    readonly sparse: readonly {
      readonly kind: string;
      readonly fraction: number;
      readonly block: readonly [rows: number, keys: number];
      readonly times: { readonly attention: number; readonly whole: number };
    }[];
  }[];
}

/** Block masks on CUDA: the kernel alone, and all that a call with `topK` takes. */
function sparseSpeed(): Table {
  const { choosing, results } = read<SparseReport>('cuda-sparse-h200.json');
  const choice = choosing.find(({ sparsity }) => 'topK' in sparsity)?.milliseconds;
  if (choice === undefined) throw new Error('cuda-sparse-h200.json has no time of choosing by topK');
  const rows = results.flatMap(({ kernel, dense, sparse }) =>
    sparse
      // Without tiles of 128 keys both sizes of blocks take the same time.
      .filter(({ fraction, block }) => fraction === 0.5 && (block[1] === 64 || kernel.endsWith('sm90')))
      .map(({ kind, block }) => {
        const gains = [0.5, 0.25].flatMap((fraction) => {
          const found = sparse.find(
            (other) => other.kind === kind && other.fraction === fraction && other.block[1] === block[1],
          );
          if (found === undefined) throw new Error(`${kernel}: no ${kind} map of ${fraction}`);
          const { attention, whole } = found.times;
          return [dense.times.attention / attention, dense.times.whole / (whole + choice)];
        });
        return [
          `\`${kernel}\``,
          `${kind === 'band' ? 'bands' : kind}, ${block.join(' by ')}`,
          ...gains.map((gain) => `${gain.toFixed(2)}x`),
        ];
      }),
  );
  return {
    header: ['kernel', 'map', 'half', 'half, all included', 'a quarter', 'a quarter, all included'],
    rows,
  };
}

interface TrainedReport {
  readonly results: readonly {
    readonly engine: string;
    readonly model: string;
    readonly tokens: number;
    readonly processorMilliseconds: { readonly without: number; readonly with: number };
    readonly memory: Readonly<Record<'without' | 'with', { readonly wasmMiB: number }>>;
    readonly sameAnswer: boolean;
  }[];
}

/** Whole trained models, with the answer of their task. */
function trainedModels(): Table {
  const results = readdirSync(RESULTS)
    .filter((name) => name.startsWith('onnxruntime-trained-'))
    .sort()
    .flatMap((name) => read<TrainedReport>(name).results);
  return {
    header: ['model', 'tokens', 'engine', 'without (ms)', 'with (ms)', 'speedup', 'memory (MiB)', 'answer'],
    rows: results.map(({ engine, model, tokens, processorMilliseconds: time, memory, sameAnswer }) => [
      model,
      String(tokens),
      engine.split('.')[0] as string,
      time.without.toFixed(0),
      time.with.toFixed(0),
      `${(time.without / time.with).toFixed(2)}x`,
      `${memory.without.wasmMiB.toFixed(0)}, with ${memory.with.wasmMiB.toFixed(0)}`,
      sameAnswer ? 'the same' : 'another',
    ]),
  };
}

const TABLES: Readonly<Record<string, (short: boolean) => Table>> = {
  summary,
  accuracy,
  fp4,
  'wasm-speed': wasmSpeed,
  'wasm-short': wasmShort,
  'cuda-speed': cudaSpeed,
  'webgpu-speed': webgpuSpeed,
  'onnxruntime-speed': onnxruntimeSpeed,
  exporters,
  'tfjs-exporters': topologies,
  'distributed-speed': distributedSpeed,
  'wasm-gradients': wasmGradients,
  'webgpu-backward': webgpuBackward,
  'models-speed': modelsSpeed,
  'sparse-speed': sparseSpeed,
  'trained-models': trainedModels,
  'distributed-predictions': distributedPredictions,
};

/** The formatter pads the cells of tables. */
const plain = (text: string) =>
  text
    .replaceAll(/ +/g, ' ')
    .replaceAll(/-{3,}/g, '---')
    .replaceAll(/\s*\n\s*/g, '\n');

for (const page of PAGES) {
  const file = new URL(`../${page}`, import.meta.url);
  const before = readFileSync(file, 'utf8');
  const after = before.replace(
    /(<!-- table (\S+)( short)? -->\n)[\s\S]*?(<!-- \/table -->)/g,
    (_, open, name, short, close) => {
      const make = TABLES[name as string];
      if (make === undefined) throw new Error(`${page} asks for table '${name}'; there are ${Object.keys(TABLES)}`);
      return `${open}\n${markdown(make(short !== undefined))}\n\n${close}`;
    },
  );
  if (!process.argv.includes('--check')) writeFileSync(file, after);
  else if (plain(before) !== plain(after)) {
    console.error(`${page}: a table is not what bench/results/ and the tests say; run \`npm run readme:tables\``);
    process.exitCode = 1;
  }
}
