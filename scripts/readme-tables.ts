/**
 * Fills the tables of README.md and of the documentation from the raw results under bench/results/: between `<!-- table NAME -->` and
 * `<!-- /table -->`. With `--check` it writes nothing and fails if a table is not what the results say.
 */
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import type { AccuracyRow } from '../bench/accuracy.ts';

const RESULTS = new URL('../bench/results/', import.meta.url);
const PAGES = ['README.md', 'docs/choosing-a-kernel.md'];
const read = <T>(name: string): T => JSON.parse(readFileSync(new URL(name, RESULTS), 'utf8')) as T;

const table = (header: readonly string[], rows: readonly (readonly string[])[]) =>
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

function accuracy(): string {
  const { rows } = read<{ rows: AccuracyRow[] }>('accuracy.json');
  const golden = [...new Set(rows.map((row) => row.golden))];
  return table(
    ['relative L1 / cosine similarity', ...golden.map((name) => `\`${name}\``)],
    ACCURACY_KERNELS.map(([source, kernel, label]) => [
      label,
      ...golden.map((name) => {
        const row = rows.find((entry) => entry.golden === name && entry.source === source && entry.kernel === kernel);
        if (row === undefined) throw new Error(`accuracy.json has no ${source} ${kernel} for ${name}`);
        return `${row.accuracy.relativeL1.toFixed(4)} / ${row.accuracy.cosineSimilarity.toFixed(5)}`;
      }),
    ]),
  );
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

/** Every kernel against both peers, each with what it computes wrong. */
function wasmSpeed(): string {
  const files = readdirSync(RESULTS).filter((name) => /^wasm-node\d+-threads\d+\.json$/.test(name));
  const rows = files.sort().flatMap((name) => {
    const report = read<WasmReport>(name);
    return report.rows
      .filter(({ contender }) => !contender.startsWith('onnxruntime'))
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
          `${report.node.split('.')[0]?.replace('v', 'Node ')}, ${report.threads}`,
          `\`${contender.replace(' (', '` (')}`,
          ((4 * 8 * tokens * tokens * headDim) / medianMilliseconds / 1e6).toFixed(0),
          ratio('onnxruntime-web'),
          ratio('onnxruntime-node'),
          `${accuracy?.relativeL1.toFixed(4)} / ${accuracy?.cosineSimilarity.toFixed(5)}`,
        ];
      });
  });
  return table(
    [
      'tokens',
      'engine, threads',
      'kernel',
      'GFLOP/s',
      'to onnxruntime-web',
      'to onnxruntime-node',
      'relative L1 / cosine',
    ],
    rows,
  );
}

const TABLES: Readonly<Record<string, () => string>> = { accuracy, 'wasm-speed': wasmSpeed };

/** The formatter pads the cells of tables. */
const plain = (text: string) =>
  text
    .replaceAll(/ +/g, ' ')
    .replaceAll(/-{3,}/g, '---')
    .replaceAll(/\s*\n\s*/g, '\n');

for (const page of PAGES) {
  const file = new URL(`../${page}`, import.meta.url);
  const before = readFileSync(file, 'utf8');
  const after = before.replace(/(<!-- table (\S+) -->\n)[\s\S]*?(<!-- \/table -->)/g, (_, open, name, close) => {
    const make = TABLES[name as string];
    if (make === undefined) throw new Error(`${page} asks for table '${name}'; there are ${Object.keys(TABLES)}`);
    return `${open}\n${make()}\n\n${close}`;
  });
  if (!process.argv.includes('--check')) writeFileSync(file, after);
  else if (plain(before) !== plain(after)) {
    console.error(`${page}: a table is not what bench/results/ says; run \`npm run readme:tables\``);
    process.exitCode = 1;
  }
}
