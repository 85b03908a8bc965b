/** The examples for onnxruntime, transformers.js and a video transformer, each in a fresh project. */
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { cp, mkdir, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, expect } from 'vitest';
import { writeSentenceEncoder } from '../../scripts/sentence-encoder-onnx.ts';
import { GraphBuilder } from '../support/graph-builder.ts';
import { buildDiT } from '../support/models.ts';
import { Random } from '../support/random.ts';
import { itNeeds } from '../support/requirement.ts';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const missing = existsSync(path.join(ROOT, 'dist/integrations/onnxruntime/index.js'))
  ? undefined
  : 'the built package (npm run build)';
let folder: string;

beforeAll(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'examples-'));
});
afterAll(() => rm(folder, { recursive: true }));

/**
 * A copy of an example with this repository's dependencies, in which `sageattention` is the built package.
 */
async function project(name: string): Promise<string> {
  const copy = path.join(folder, name);
  if (existsSync(copy)) return copy;
  await cp(path.join(ROOT, 'examples', name), copy, { recursive: true });
  const modules = path.join(copy, 'node_modules');
  await mkdir(path.join(modules, '@huggingface'), { recursive: true });
  for (const dependency of ['onnxruntime-web', 'onnxruntime-node', 'webgpu', '@huggingface/transformers']) {
    await symlink(path.join(ROOT, 'node_modules', dependency), path.join(modules, dependency));
  }
  await symlink(ROOT, path.join(modules, 'sageattention'));
  return copy;
}

function run(cwd: string, ...args: string[]): string {
  const { status, stdout, stderr } = spawnSync(process.execPath, args, { cwd, encoding: 'utf8', timeout: 100_000 });
  expect(status, stderr).toBe(0);
  return stdout;
}

async function ditFile(type: 'float32' | 'float16' = 'float32'): Promise<string> {
  const g = new GraphBuilder(new Random(1), type);
  buildDiT(g, { heads: 2, headDim: 32, blocks: 2 });
  const file = path.join(folder, `dit-${type}.onnx`);
  await writeFile(file, g.build());
  return file;
}

itNeeds(missing)('onnxruntime: a model of any kind, and what became of its attention', async () => {
  const output = run(await project('onnxruntime'), 'main.mjs', await ditFile(), 'tokens=1100');
  expect(output).toContain('y: float32 [1,1100,64]');
  expect(output.match(/MatMul-Softmax-MatMul.*\btrue\b/g)).toHaveLength(2);
});

itNeeds(missing)('onnxruntime: a model in float16', async () => {
  const output = run(await project('onnxruntime'), 'main.mjs', await ditFile('float16'), 'tokens=1100');
  expect(output).toContain('y: float16 [1,1100,64]');
  expect(output.match(/MatMul-Softmax-MatMul.*\btrue\b/g)).toHaveLength(2);
});

itNeeds(missing)('transformers: the two lines', async () => {
  const models = path.join(folder, 'models');
  await writeSentenceEncoder(path.join(models, 'sentence-encoder'));
  const output = run(await project('transformers'), 'main.mjs', 'sentence-encoder', models);
  const [, near, far] = /cat, kitten: (\S+)\s+cat, market: (\S+)/.exec(output) ?? [];
  expect(Number(near)).toBeGreaterThan(Number(far) + 0.1);
  expect(output.match(/MatMul-Softmax-MatMul.*\btrue\b/g)).toHaveLength(2);
});

itNeeds(missing)('video-dit: speed and output before and after', async () => {
  const file = await ditFile();
  const args = ['compare.mjs', file, '--provider', 'wasm', '--dim', 'tokens=1100', '--runs', '2'];
  const output = run(await project('video-dit'), ...args);
  expect(output).toMatch(/without: [\d.]+ ms {3}with: [\d.]+ ms {3}[\d.]+x/);
  expect(Number(/cosine similarity ([\d.]+)/.exec(output)?.[1])).toBeGreaterThan(0.999);
  expect(output.match(/MatMul-Softmax-MatMul.*\btrue\b/g)).toHaveLength(2);
});

itNeeds(missing)('distributed: ranks give what one gives', async () => {
  const output = run(await project('distributed'), 'main.mjs', '--frames', '1', '--heads', '2', '--ulysses', '2');
  expect(output).toContain('1560 video and 226 text tokens, 2 heads of 128, 4 ranks, backend wasm');
  expect(Number(/relative L1 between them: ([\d.]+)/.exec(output)?.[1])).toBeLessThan(0.02);
});
