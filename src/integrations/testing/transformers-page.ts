/** transformers.js in a browser. It looks for an onnxruntime when it is loaded, so each page makes one call. */
import * as ort from 'onnxruntime-web/webgpu';
import { attentionReportOf, installSageAttention, withSageAttention } from '../onnxruntime/index.ts';
import type { AttentionReport } from '../onnxruntime/session/report.ts';

/**
 * `plain`: without SageAttention. `module`: `sageattention/transformers` is imported, behind transformers.js. `symbol`:
 * the two lines. `class`: `installSageAttention`.
 */
export type Way = 'plain' | 'module' | 'symbol' | 'class';

export interface Embedded {
  readonly embeddings: readonly number[];
  readonly report: readonly AttentionReport[] | undefined;
}

async function embed(way: Way, sentences: string[], options: object, minTokens?: number): Promise<Embedded> {
  ort.env.wasm.wasmPaths = `${location.origin}/onnxruntime-web/`;
  const sageOptions = minTokens === undefined ? {} : { minTokens };
  if (way === 'symbol') {
    (globalThis as Record<symbol, unknown>)[Symbol.for('onnxruntime')] = withSageAttention(ort, sageOptions);
  }
  if (way === 'class') installSageAttention(ort, sageOptions);
  const { env, pipeline } = await import('@huggingface/transformers');
  if (way === 'module') await import('../transformers/web.ts');
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = '/models/';
  const extract = await pipeline('feature-extraction', 'sentence-encoder', { dtype: 'fp32', ...options });
  const output = await extract(sentences, { pooling: 'mean', normalize: true });
  const session = (extract.model as unknown as { sessions: { model: object } }).sessions.model;
  const report = attentionReportOf(session);
  await extract.dispose();
  return { embeddings: Array.from(output.data as Float32Array), report };
}

/** What the test calls. */
export const page = { embed };
export type Page = typeof page;

(globalThis as { page?: Page }).page = page;
