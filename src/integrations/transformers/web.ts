/**
 * transformers.js with SageAttention, in browsers. Every model that it opens from then on runs its attention here,
 * whatever its `device` is called and in whichever order modules are imported.
 *
 * ```ts
 * import { pipeline } from '@huggingface/transformers';
 * import { installSageAttention } from 'sageattention/transformers';
 *
 * installSageAttention();
 * const extract = await pipeline('feature-extraction', 'Xenova/all-MiniLM-L6-v2', { device: 'webgpu' });
 * ```
 *
 * @module sageattention/transformers
 */
import { env } from '@huggingface/transformers';
import * as ort from 'onnxruntime-web/webgpu';
import { installUnder } from './install.ts';

export { attentionReportOf } from '../onnxruntime/index.ts';

/**
 * Installs SageAttention with options; importing this module has installed it with the default ones. Models that are
 * open stay as they are. A warning says so where transformers.js runs on another copy of onnxruntime.
 *
 * @returns a function that puts onnxruntime back as it was
 * @throws {InvalidArgumentError} a wrong option, or `already-installed` by the program itself
 */
export const installSageAttention = installUnder(ort, env);
