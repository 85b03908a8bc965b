// A transformers.js pipeline with SageAttention: node main.mjs [model] [folder of local models]
import { env, pipeline } from '@huggingface/transformers';
import { attentionReportOf, installSageAttention } from 'sageattention/transformers';

// On a CPU onnxruntime-node's own attention is the faster one, so it has to be asked for; a browser needs no options.
installSageAttention({ minTokens: 0 });

const [model = 'Xenova/all-MiniLM-L6-v2', folder] = process.argv.slice(2);
if (folder !== undefined) {
  env.localModelPath = folder;
  env.allowRemoteModels = false;
}

const extract = await pipeline('feature-extraction', model, { device: 'cpu', dtype: 'fp32' });
const sentences = ['A cat sat on the mat.', 'A kitten was resting on a rug.', 'The market fell sharply on Monday.'];
const { data, dims } = await extract(sentences, { pooling: 'mean', normalize: true });
const row = (i) => Array.from(data.subarray(i * dims[1], (i + 1) * dims[1]));
const similarity = (a, b) => row(a).reduce((sum, x, i) => sum + x * row(b)[i], 0);
console.log(`cat, kitten: ${similarity(0, 1).toFixed(4)}   cat, market: ${similarity(0, 2).toFixed(4)}`);
console.table(attentionReportOf(extract.model.sessions.model));
process.exit(0);
