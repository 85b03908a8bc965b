// A transformers.js pipeline with SageAttention: node main.mjs [model] [folder of local models]
// The two lines. Set the runtime first: transformers.js looks for it once, when it is loaded.
import * as ort from 'onnxruntime-node';
import { attentionReportOf, withSageAttention } from 'sageattention/onnxruntime';

// On a CPU onnxruntime-node's own attention is the faster one, so it has to be asked for; a browser needs no options.
globalThis[Symbol.for('onnxruntime')] = withSageAttention(ort, { minTokens: 0 });

const { env, pipeline } = await import('@huggingface/transformers');
const [model = 'Xenova/all-MiniLM-L6-v2', folder] = process.argv.slice(2);
if (folder !== undefined) {
  env.localModelPath = folder;
  env.allowRemoteModels = false;
}

// With a runtime of one's own transformers.js knows no device names: `auto`, and the provider by its own name.
const extract = await pipeline('feature-extraction', model, {
  device: 'auto',
  dtype: 'fp32',
  session_options: { executionProviders: ['cpu'] },
});
const sentences = ['A cat sat on the mat.', 'A kitten was resting on a rug.', 'The market fell sharply on Monday.'];
const { data, dims } = await extract(sentences, { pooling: 'mean', normalize: true });
const row = (i) => Array.from(data.subarray(i * dims[1], (i + 1) * dims[1]));
const similarity = (a, b) => row(a).reduce((sum, x, i) => sum + x * row(b)[i], 0);
console.log(`cat, kitten: ${similarity(0, 1).toFixed(4)}   cat, market: ${similarity(0, 2).toFixed(4)}`);
console.table(attentionReportOf(extract.model.sessions.model));
process.exit(0);
