/** transformers.js end to end on local files: with the module, and with a patched class. */
import { mkdtemp, rm } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import * as ortNode from 'onnxruntime-node';
import * as ortWeb from 'onnxruntime-web';
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import { writeSentenceEncoder } from '../../../scripts/sentence-encoder-onnx.ts';
import { disposeBackends } from '../../backends/registry.ts';
import { InvalidArgumentError } from '../../errors.ts';
import { attentionReportOf, installSageAttention, withSageAttention } from '../onnxruntime/index.ts';
import { strangerTo } from './install.ts';

type Transformers = typeof import('@huggingface/transformers');

const SENTENCES = [
  'A cat sat on the mat.',
  'A kitten was resting on a rug, as it did on every other day of that long summer.',
];
const NAME = 'sentence-encoder';
let models: string;

beforeAll(async () => {
  models = await mkdtemp(path.join(tmpdir(), 'models-'));
  await writeSentenceEncoder(path.join(models, NAME));
});
afterAll(async () => {
  await rm(models, { recursive: true });
  await disposeBackends();
});

/** A copy of transformers.js of its own: it looks for an onnxruntime once, when it is loaded. */
async function loadTransformers(copy: string): Promise<Transformers> {
  const file = createRequire(import.meta.url).resolve('@huggingface/transformers');
  const url = pathToFileURL(file.replace(/\.node\.cjs$/, '.node.mjs')).href;
  const transformers = (await import(/* @vite-ignore */ `${url}?${copy}`)) as Transformers;
  transformers.env.allowRemoteModels = false;
  transformers.env.localModelPath = models;
  return transformers;
}

async function embed(transformers: Transformers, options: object) {
  const extract = await transformers.pipeline('feature-extraction', NAME, { dtype: 'fp32', ...options });
  const output = await extract(SENTENCES, { pooling: 'mean', normalize: true });
  const session = (extract.model as unknown as { sessions: { model: object } }).sessions.model;
  return { output, session, dispose: () => extract.dispose() };
}

const difference = (a: ArrayLike<number>, b: ArrayLike<number>) =>
  Array.from(a).reduce((most, value, i) => Math.max(most, Math.abs(value - (b[i] as number))), 0);

/** By name: so few tokens would not be quantized, and nothing would show that SageAttention ran. */
const QUANTIZED = 'qk-int8-pv-int8';

describe('feature-extraction', () => {
  it('gives the same embeddings with the module and without, whatever the device is called and whenever it is imported', async () => {
    const warn = vi.spyOn(console, 'warn').mockImplementation(() => undefined);
    const transformers = await loadTransformers('module');
    const plain = await embed(transformers, {});
    expect(attentionReportOf(plain.session)).toBeUndefined();
    expect(warn.mock.calls.flat()).toEqual([expect.stringContaining('opened without SageAttention')]);
    warn.mockClear();

    const { installSageAttention: install } = await import('./node.ts');
    const left = await embed(transformers, {});
    expect(attentionReportOf(left.session)?.[0]?.reason).toContain('faster on a CPU');
    expect(() => install({ minTokens: -1 })).toThrow(InvalidArgumentError);
    let uninstall = install({ minTokens: 0, kernel: QUANTIZED });
    for (const device of ['cpu', undefined]) {
      const sage = await embed(transformers, device === undefined ? {} : { device });
      const report = attentionReportOf(sage.session);
      expect(report?.map(({ form, taken }) => [form, taken])).toEqual(
        new Array(2).fill(['MatMul-Softmax-MatMul', true]),
      );
      for (const { kernel, milliseconds } of report ?? []) {
        expect(kernel).toMatch(/^qk-int8/);
        expect(milliseconds).toBeGreaterThan(0);
      }
      expect(sage.output.dims).toEqual(plain.output.dims);
      expect(difference(sage.output.data as Float32Array, plain.output.data as Float32Array)).toBeLessThan(5e-3);
      await sage.dispose();
    }
    uninstall = install({ minTokens: 0, kernel: QUANTIZED });
    uninstall();
    expect(warn).not.toHaveBeenCalled();
    warn.mockRestore();
    await plain.dispose();
    await left.dispose();
  });

  it('says so where transformers.js runs on another onnxruntime', async () => {
    const { env } = await loadTransformers('another');
    expect(strangerTo(ortNode, env)).toBeUndefined();
    expect(strangerTo(ortWeb as never, env)).toContain(
      `transformers.js runs on another copy of onnxruntime (${ortNode.env.versions.node}) than the one installed beside ` +
        `sageattention (${ortWeb.env.versions.web})`,
    );
    expect(strangerTo(ortNode, { backends: {} })).toContain('another copy of onnxruntime (of unknown version)');
    const scope = globalThis as { [key: symbol]: unknown };
    scope[Symbol.for('onnxruntime')] = ortWeb;
    try {
      const provided = await loadTransformers('given');
      expect(strangerTo(ortNode, provided.env)).toContain("Symbol.for('onnxruntime')");
    } finally {
      delete scope[Symbol.for('onnxruntime')];
    }
  });

  it('replaces attention in an onnxruntime that the program provides', async () => {
    const scope = globalThis as { [key: symbol]: unknown };
    const plain = await embed(await loadTransformers('plain'), {});
    scope[Symbol.for('onnxruntime')] = withSageAttention(ortNode, { minTokens: 0, kernel: QUANTIZED });
    try {
      const transformers = await loadTransformers('provided');
      await expect(embed(transformers, { device: 'cpu' })).rejects.toThrow(/Unsupported device/);
      const sage = await embed(transformers, { device: 'auto', session_options: { executionProviders: ['cpu'] } });
      expect(attentionReportOf(sage.session)?.map(({ taken }) => taken)).toEqual([true, true]);
      const largest = difference(sage.output.data as Float32Array, plain.output.data as Float32Array);
      expect(largest).toBeLessThan(5e-3);
      expect(largest).toBeGreaterThan(0);
      await sage.dispose();
    } finally {
      delete scope[Symbol.for('onnxruntime')];
    }
    await plain.dispose();
  });

  it('runs on a patched class under any device, and as before once the patch is undone', async () => {
    const transformers = await loadTransformers('patched');
    const uninstall = installSageAttention(ortNode, { minTokens: 0, kernel: QUANTIZED });
    expect(() => installSageAttention(ortNode)).toThrow(expect.objectContaining({ code: 'already-installed' }));
    const sage = await embed(transformers, { device: 'cpu' });
    expect(attentionReportOf(sage.session)?.map(({ taken }) => taken)).toEqual([true, true]);
    uninstall();
    uninstall();
    const plain = await embed(transformers, { device: 'cpu' });
    expect(attentionReportOf(plain.session)).toBeUndefined();
    expect(difference(sage.output.data as Float32Array, plain.output.data as Float32Array)).toBeLessThan(5e-3);
    await sage.dispose();
    await plain.dispose();
  });
});
