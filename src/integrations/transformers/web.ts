/**
 * transformers.js with SageAttention, in browsers: import it before `@huggingface/transformers`. It puts an onnxruntime
 * with replaced attention where transformers.js looks for one when it is loaded.
 *
 * ```ts
 * import 'sageattention/transformers';
 * import { pipeline } from '@huggingface/transformers';
 * const extract = await pipeline('feature-extraction', 'Xenova/all-MiniLM-L6-v2', { device: 'auto' });
 * ```
 *
 * `device: 'auto'` is needed: transformers.js keeps no list of devices for an onnxruntime that it is given. It means
 * WebGPU where there is one, else WASM.
 *
 * @packageDocumentation
 */
import * as ort from 'onnxruntime-web/webgpu';
import { provideOnnxruntime } from './provide.ts';

export { attentionReportOf } from '../onnxruntime/index.ts';

provideOnnxruntime(ort, async () => {
  const { gpu } = (globalThis as { navigator?: { gpu?: GPU } }).navigator ?? {};
  return (await gpu?.requestAdapter()) ? ['webgpu', 'wasm'] : ['wasm'];
});
