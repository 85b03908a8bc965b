import { spawnSync } from 'node:child_process';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import type { BenchReport } from './bench-report.ts';
import type { DemoReport } from './demo.ts';
import type { DoctorReport } from './doctor.ts';
import type { EncoderComparison } from './encoder-comparison.ts';
import { run } from './testing/run.ts';

const golden = (name: string) => fileURLToPath(new URL(`../../test/golden/${name}.safetensors`, import.meta.url));

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'sageattention-cli-'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

async function write(name: string, content: string | Uint8Array): Promise<string> {
  const file = path.join(folder, name);
  await writeFile(file, content);
  return file;
}

/** A safetensors file of float32 or integer tensors. */
function safetensors(tensors: Readonly<Record<string, { shape: readonly number[]; data: Float32Array | Int32Array }>>) {
  let end = 0;
  const header = Object.fromEntries(
    Object.entries(tensors).map(([name, { shape, data }]) => {
      const start = end;
      end += data.byteLength;
      return [name, { dtype: data instanceof Float32Array ? 'F32' : 'I32', shape, data_offsets: [start, end] }];
    }),
  );
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  const parts = Object.values(tensors).map(({ data }) => Buffer.from(data.buffer, data.byteOffset, data.byteLength));
  return Buffer.concat([length, json, ...parts]);
}

const random = (count: number) => Float32Array.from({ length: count }, () => Math.random() * 2 - 1);

describe('bad input ends with one message and exit code 1', () => {
  const cases: readonly (readonly [args: readonly string[], message: RegExp])[] = [
    [['frobnicate'], /unknown command 'frobnicate'/],
    [['demoo'], /Did you mean demo\?/],
    [['bench', '--lenght', '64'], /unknown option '--lenght'/],
    [['bench', '--length', '0'], /Expected an integer of at least 1/],
    [['bench', '--length', '64,x'], /Expected an integer of at least 1/],
    [['bench', '--length', ''], /Expected an integer/],
    [['bench', '--head-dim', '513'], /Expected an integer from 1 to 512/],
    [['bench', '--repetitions', '1.5'], /Expected an integer/],
    [['bench', '--kernel', 'fastest'], /Allowed choices are qk-int8-pv-fp16/],
    [['bench', '--backend', 'tpu'], /Allowed choices are wasm, webgpu, cuda/],
    [['bench', '--heads', '3', '--kv-heads', '2'], /--heads 3 is not a multiple of --kv-heads 2/],
    [['bench', '--backend', 'wasm', '--kernel', 'qk-int4-pv-fp8-cuda'], /is not one of backend wasm/],
    [['demo', '--text', '/nowhere/at all'], /cannot read \/nowhere\/at all: ENOENT/],
    [['demo', '--kernel', 'fastest'], /Allowed choices are auto, qk-int8-pv-fp16/],
    [['demo', '--max-tokens', '-3'], /Expected an integer of at least 1/],
    [['compare'], /missing required argument/],
    [['compare', '/nowhere.safetensors'], /cannot read \/nowhere.safetensors: ENOENT/],
    [['compare', golden('outlier-d64-causal'), '--q', 'query'], /no tensor named query; it has .*q.*choose with --q/],
    [['compare', golden('outlier-d64-causal'), '--sm-scale', 'small'], /Expected a number/],
    [['compare', fileURLToPath(import.meta.url)], /is not a safetensors file/],
  ];
  it.each(cases)('%j', async (args, message) => {
    const { code, err } = await run(...args);
    expect(code).toBe(1);
    expect(err).toMatch(message);
    expect(err).toMatch(/^error: /);
    expect(err).not.toMatch(/^\s+at /m);
  });

  it('a text that is none', async () => {
    const binary = await run('demo', '--text', await write('binary', Uint8Array.of(0xff, 0xfe, 0x00)));
    expect(binary).toMatchObject({ code: 1, err: expect.stringContaining('is not UTF-8 text') });
    const empty = await run('demo', '--text', await write('empty', ' \n\n'));
    expect(empty).toMatchObject({ code: 1, err: expect.stringContaining('has no words') });
  });

  it('tensors that are no q, k and v', async () => {
    const good = { shape: [1, 2, 8, 16], data: random(256) };
    const of = async (q: { shape: readonly number[]; data: Float32Array | Int32Array }, ...args: readonly string[]) =>
      run('compare', await write('bad.safetensors', safetensors({ q, k: good, v: good })), ...args);
    const integers = await of({ shape: [1, 2, 8, 16], data: new Int32Array(256) });
    expect(integers).toMatchObject({ code: 1, err: expect.stringContaining('tensor q is I32') });
    const flat = await of({ shape: [256], data: random(256) });
    expect(flat).toMatchObject({ code: 1, err: expect.stringContaining('four dimensions are needed') });
    const mismatch = await of({ shape: [1, 2, 16, 8], data: random(256) });
    expect(mismatch).toMatchObject({ code: 1, err: expect.stringMatching(/^error: k: expected head dim 8/) });
  });

  it('a report that cannot be written', async () => {
    const args = ['--length', '16', '--head-dim', '16', '--heads', '1', '--repetitions', '1', '--rows', '8'];
    const { code, err } = await run('bench', '--backend', 'wasm', ...args, '--json', path.join(folder, 'no', 'x.json'));
    expect(code).toBe(1);
    expect(err).toMatch(/cannot write .*x\.json: ENOENT/);
  });
});

describe('as a process', () => {
  const main = fileURLToPath(new URL('./main.ts', import.meta.url));
  const spawn = (...args: readonly string[]) =>
    spawnSync(process.execPath, ['--import', 'tsx', main, ...args], { encoding: 'utf8', timeout: 60_000 });

  it('exits by itself, with the code that scripts look at', () => {
    const { status, stderr } = spawn('frobnicate');
    expect(status).toBe(1);
    expect(stderr).toMatch(/^error: unknown command/m);
    const bench = spawn('bench', '--backend', 'wasm', '-l', '32', '-d', '16', '--heads', '1', '-r', '1');
    expect(bench.stderr).not.toMatch(/error/i);
    expect(bench.status).toBe(0);
    expect(bench.stdout).toMatch(/FLOP\/s[\s\S]*\d [GT] /);
    expect(bench.stdout).toMatch(/Verdict\n32 tokens, head dim 16: [\s\S]* times\s+as\s+fast\s+as\s+exact\s+float32/);
  });
});

/** Tables fit a terminal of 80 columns. A line that is longer is a sentence, of which the terminal makes two. */
function expectNarrow(out: string): void {
  for (const line of out.split('\n')) {
    const unbreakable = line.split(' ').some((word) => word.length > 40);
    if (!unbreakable) expect(line.length, line).toBeLessThanOrEqual(80);
  }
}

/** FP4 keeps less than the others. */
const leastCosine = ({ kernel }: { readonly kernel: string }) => (kernel.includes('fp4') ? 0.95 : 0.99);

it('says its version and what it can do', async () => {
  const { version } = JSON.parse(await readFile(new URL('../../package.json', import.meta.url), 'utf8'));
  expect(await run('--version')).toMatchObject({ code: 0, out: `${version}\n` });
  const help = await run('--help');
  expect(help.code).toBe(0);
  for (const command of ['demo', 'doctor', 'bench', 'compare']) expect(help.out).toContain(command);
});

it('doctor tells of every backend and tests every kernel that can run', async () => {
  const { code, out } = await run('doctor');
  expect(code).toBe(0);
  for (const name of ['wasm: available', 'webgpu:', 'cuda:', 'demo model']) expect(out).toContain(name);
  const cosines = [...out.matchAll(/cosine (\d\.\d+)/g)].map(([, value]) => Number(value));
  expect(cosines.length).toBeGreaterThanOrEqual(2);
  // Far below what the weakest kernel (FP4) reaches and far above anything that is not attention.
  expect(Math.min(...cosines)).toBeGreaterThan(0.95);
  for (const line of out.split('\n')) {
    // A path has no place to break: it stays whole, so that it can be copied, and then is all that its line holds beside the name.
    const found = line.trim().split(/ {2,}/).at(-1) ?? '';
    if (found.includes(' ')) expect(line.length, line).toBeLessThanOrEqual(80);
  }
});

it('doctor --json says the same, to stdout or to a file', async () => {
  const { code, out } = await run('doctor', '--json');
  expect(code).toBe(0);
  const report = JSON.parse(out) as DoctorReport;
  expect(report).toMatchObject({ schema: 'sageattention-doctor/1', chosen: expect.any(String) });
  expect(report.backends.map(({ name }) => name)).toEqual(['wasm', 'webgpu', 'cuda']);
  const [wasm] = report.backends as [DoctorReport['backends'][number]];
  expect(wasm.availability?.available).toBe(true);
  for (const { name, accuracy } of wasm.kernels) {
    expect(accuracy?.cosineSimilarity).toBeGreaterThan(leastCosine({ kernel: name }));
  }
  expect(Object.values(wasm.defaults)).toContain('qk-int8-pv-int8');
  const file = path.join(folder, 'doctor.json');
  expect(await run('doctor', '--json', file)).toMatchObject({ code: 0, out: `Wrote ${file}\n` });
  expect(JSON.parse(await readFile(file, 'utf8'))).toMatchObject({ schema: report.schema, chosen: report.chosen });
});

it('doctor --self-test gives a table, and a code that says the same', async () => {
  const { code, out } = await run('doctor', '--self-test');
  expect(code).toBe(0);
  const [sent = ''] = out.match(/^SA1\.\S+$/m) ?? [];
  const decoded = await run('doctor', '--decode', sent);
  expect(decoded.code).toBe(0);
  const right = /^wasm {2}.*\n(?:.*\n)+qk-fp4-pv-fp4 +0\.1\d+ +0\.1\d+ +right +[\d.]+ [GT] /m;
  for (const text of [out, decoded.out]) expect(text).toMatch(right);
  for (const text of [out, decoded.out]) expectNarrow(text);
  expect(out.trimEnd().endsWith(decoded.out.trimEnd())).toBe(true);
  expect((await run('doctor', '--decode', sent.slice(0, -1))).code).not.toBe(0);
});

describe('bench', () => {
  it('writes time and accuracy of every case, as JSON and as a page of its own', async () => {
    const [json, html] = [path.join(folder, 'bench.json'), path.join(folder, 'bench.html')];
    const { code, out } = await run(
      ...['bench', '--backend', 'wasm', '--length', '64,200', '--head-dim', '16,40', '--heads', '4', '--kv-heads', '2'],
      ...['--causal', 'both', '--repetitions', '2', '--rows', '32', '--seed', '7', '--json', json, '--html', html],
    );
    expect(code).toBe(0);
    const report = JSON.parse(await readFile(json, 'utf8')) as BenchReport;
    expect(report).toMatchObject({
      schema: 'sageattention-bench/2',
      version: expect.any(String),
      dtype: 'float32',
      repetitions: 2,
      seed: 7,
      machine: { runtime: `Node ${process.versions.node}`, cores: expect.any(Number) },
    });
    expect(Date.parse(report.date)).toBeGreaterThan(Date.parse('2025-01-01'));
    const kernels = new Set(report.results.map(({ kernel }) => kernel));
    expect(report.results).toHaveLength(kernels.size * 2 * 2 * 2);
    for (const result of report.results) {
      const { medianMs, fastestMs, gflops, accuracy, length, headDim, isCausal } = result as Required<typeof result>;
      expect(result).toMatchObject({ backend: 'wasm', batch: 1, heads: 4, kvHeads: 2, rows: 32 });
      expect(fastestMs).toBeGreaterThan(0);
      expect(medianMs).toBeGreaterThanOrEqual(fastestMs);
      expect(gflops).toBeCloseTo((4 * 4 * length ** 2 * headDim) / (isCausal ? 2 : 1) / medianMs / 1e6, 9);
      expect(accuracy.cosineSimilarity).toBeGreaterThan(leastCosine(result));
      expect(accuracy.relativeL1).toBeGreaterThan(0);
    }
    const [first] = report.results as [Required<BenchReport['results'][number]>];
    expect(out).toContain(first.accuracy.cosineSimilarity.toFixed(6));
    expectNarrow(out);

    const page = await readFile(html, 'utf8');
    expect(page).toMatch(/^<!doctype html>/);
    // Four facets, each with a chart of speed and one of accuracy.
    expect(page.match(/<svg /g)).toHaveLength(8);
    expect(page).toContain('prefers-color-scheme: dark');
    expect(page.replaceAll('http://www.w3.org/', '')).not.toMatch(/https?:\/\/|<script|<link|@import/);
  });

  it('draws bars where there is one length', async () => {
    const html = path.join(folder, 'one.html');
    const shape = ['--length', '32', '--head-dim', '16', '--heads', '1', '--repetitions', '1', '--rows', '8'];
    expect((await run('bench', '--backend', 'wasm', ...shape, '--html', html)).code).toBe(0);
    expect(await readFile(html, 'utf8')).toContain('<rect');
  });
});

describe('compare', () => {
  it('gives the accuracy of every kernel on tensors of a file', async () => {
    const json = path.join(folder, 'compare.json');
    const { code, out } = await run(
      'compare',
      golden('outlier-d64-causal'),
      '--causal',
      '--rows',
      '64',
      '--json',
      json,
    );
    expect(code).toBe(0);
    expect(out).toContain('on 64 of 257 query rows');
    expectNarrow(out);
    const report = JSON.parse(await readFile(json, 'utf8'));
    expect(report).toMatchObject({ schema: 'sageattention-compare/1', rows: 64, isCausal: true, dtype: 'bfloat16' });
    expect(report.results.length).toBeGreaterThanOrEqual(2);
    for (const result of report.results) {
      expect(result.accuracy.cosineSimilarity).toBeGreaterThan(leastCosine(result));
    }
  });

  it('takes other names, another layout, no batch and other lengths of keys', async () => {
    const tensors = {
      query: { shape: [10, 2, 16], data: random(320) },
      key: { shape: [70, 2, 16], data: random(2240) },
      value: { shape: [70, 2, 16], data: random(2240) },
    };
    const file = await write('other.safetensors', safetensors(tensors));
    const names = ['--q', 'query', '--k', 'key', '--v', 'value'];
    const options = ['--layout', 'NHD', '--causal', '--sm-scale', '0.5', '--backend', 'wasm'];
    const { code, out } = await run('compare', file, ...names, ...options);
    expect(code).toBe(0);
    expect(out).toContain('q [1,10,2,16], k [1,70,2,16], v [1,70,2,16], float32, NHD, causal');
    const cosines = [...out.matchAll(/ (0\.\d{6}|1\.0{6}) /g)].map(([, value]) => Number(value));
    expect(Math.min(...cosines)).toBeGreaterThan(0.99);
  });
});

it('demo compares exact attention and SageAttention on a text, in pieces and as one sequence', async () => {
  const text = 'The sea was calm. A ship came slowly into the harbour, and nobody on the quay said a word. '.repeat(8);
  const json = path.join(folder, 'demo.json');
  const file = await write('text.txt', text);
  const { code, out } = await run('demo', '--text', file, '--backend', 'wasm', '--max-tokens', '150', '--json', json);
  expect(code).toBe(0);
  expect(out).toContain('Beyond what the model was trained for');
  expect(out).toMatch(
    /Verdict\nAccuracy: the same answers\. [\s\S]*\nSpeed: attention over 150 tokens takes [\s\S]*exact\s+float32/,
  );
  expectNarrow(out);
  const report = JSON.parse(await readFile(json, 'utf8')) as DemoReport;
  expect(report).toMatchObject({ schema: 'sageattention-demo/1', backend: 'wasm', text: file });
  const { sentences, pieces, oneSequence } = report;
  expect(report.textTokens).toBeGreaterThan(150);
  expect(pieces).toMatchObject({ sequences: 2, tokens: 150, longest: 128 });
  expect(oneSequence).toMatchObject({ sequences: 1, tokens: 150, longest: 150 });
  expect(sentences.exactSimilarity).toHaveLength(sentences.texts.length);
  for (const [i, row] of sentences.exactSimilarity.entries()) expect(row[i]).toBeCloseTo(1, 6);
  expect(sentences.largestDifference).toBeLessThan(0.05);
  for (const comparison of [sentences, pieces, oneSequence] as EncoderComparison[]) {
    expect(comparison.reference).toBe('float64');
    expect(comparison.layers.map(({ heads, headDim }) => [heads, headDim])).toEqual([
      [4, 64],
      [4, 128],
    ]);
    expect(comparison.worstEmbeddingCosine).toBeGreaterThan(0.99);
    for (const { kernel, attention, hidden, exactMs, sageMs } of comparison.layers) {
      expect(attention.cosineSimilarity).toBeGreaterThan(0.99);
      // Float32 roundings are a thousandth of this. Without quantization it would be the same attention twice.
      expect(kernel).toBe('qk-int8-pv-int8');
      expect(attention.relativeL1).toBeGreaterThan(3e-4);
      expect(hidden.cosineSimilarity).toBeGreaterThan(0.99);
      expect(exactMs).toBeGreaterThan(0);
      expect(sageMs).toBeGreaterThan(0);
    }
  }
});

it('names the package to install when the model is missing', async () => {
  vi.resetModules();
  vi.doMock('./library.ts', async (original) => ({
    ...(await original<typeof import('./library.ts')>()),
    MODEL_PACKAGE: { name: 'a-model-that-is-not-installed', folder: 'dist' },
  }));
  const { openSentenceModel } = await import('./model.ts');
  await expect(openSentenceModel()).rejects.toMatchObject({
    code: 'missing-package',
    message: 'the demo needs the npm package a-model-that-is-not-installed: npm install a-model-that-is-not-installed',
  });
  vi.doUnmock('./library.ts');
  vi.resetModules();
});
