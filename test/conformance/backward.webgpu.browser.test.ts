/** Gradients in a browser, so that the files that browsers load are tested. */
import { afterAll, beforeAll, describe, it } from 'vitest';
import { setBackend } from '../../src/backends/registry.ts';
import { createWebgpuBackend, type WebgpuBackend } from '../../src/backends/webgpu/index.ts';
import { runSeed } from '../support/random.ts';
import { backwardTests } from './backward-suite.ts';
import { WEBGPU_BACKWARD_TARGET, WEBGPU_INT8_BACKWARD_TARGET } from './backward-webgpu-target.ts';

const TESTS = ['dtype and layout: float16 HND', 'varlen: window', 'calls: again'];

const seed = runSeed();

describe(`WebGPU gradients in ${navigator.userAgent} (SAGEATTENTION_SEED=${seed})`, () => {
  let backend: WebgpuBackend;
  beforeAll(async () => {
    backend = createWebgpuBackend();
    await setBackend(backend);
  });
  afterAll(() => backend.dispose());
  for (const { name, run } of backwardTests(WEBGPU_BACKWARD_TARGET, seed)) {
    if (TESTS.some((text) => name.includes(text))) it(name, run);
  }
  for (const { name, run } of backwardTests(WEBGPU_INT8_BACKWARD_TARGET, seed)) {
    if (name.includes('head dim: 15')) it(`INT8: ${name}`, run);
  }
});
