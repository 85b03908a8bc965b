/** The suite in a browser, so that what browsers load is what is tested: one whole family on Chromium's software GPU. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { setBackend } from '../../src/backends/registry.ts';
import { createWebgpuBackend, type WebgpuBackend } from '../../src/backends/webgpu/index.ts';
import { PORTABLE_ALGORITHM } from '../../src/reference/quantized.ts';
import { runSeed } from '../support/random.ts';
import { conformanceTests, type Target } from './suite.ts';

/** What a browser could do differently from Dawn in Node: layouts, dtypes, masks, errors, concurrent calls, caches. */
const TESTS = [
  'dtype and layout',
  'heads',
  'mask: bool [B',
  'additive float16',
  'varlen: 5',
  'strides: views',
  'empty',
  'not a number: in one',
  'same call',
  'at the same time',
  'a plan is reused',
  'one key at a time',
];

const TARGET: Target = {
  name: 'browser',
  backend: 'webgpu',
  kernel: 'qk-int8-pv-fp16',
  relativeL1: 0.02,
  algorithm: PORTABLE_ALGORITHM,
};

const seed = runSeed();

describe(`WebGPU in ${navigator.userAgent} (SAGEATTENTION_SEED=${seed})`, () => {
  let backend: WebgpuBackend;
  beforeAll(async () => {
    backend = createWebgpuBackend();
    await setBackend(backend);
  });
  afterAll(() => backend.dispose());

  it('finds the software GPU', async () => {
    expect(await backend.availability()).toMatchObject({ available: true, accelerated: false });
  });
  for (const { name, run } of conformanceTests(TARGET, seed)) {
    if (TESTS.some((text) => name.includes(text))) it(name, run);
  }
});
