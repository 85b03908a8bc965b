/**
 * The suite in a browser, so that the files that browsers load are tested: one whole family on Chromium's software GPU.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { setBackend } from '../../src/backends/registry.ts';
import { createWebgpuBackend, type WebgpuBackend } from '../../src/backends/webgpu/index.ts';
import { engineName, readTuning, writeTuning } from '../../src/backends/webgpu/tuning/store.ts';
import { runSeed } from '../support/random.ts';
import { conformanceTests } from './suite.ts';
import { WEBGPU_INT8_TARGET, WEBGPU_TARGET } from './webgpu-target.ts';

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

/** What only INT8 PV has: other products, other rows of V. */
const INT8_TESTS = ['dtype and layout: float16 HND', 'additive float16', 'one key at a time'];

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
  for (const { name, run } of conformanceTests(WEBGPU_TARGET, seed)) {
    if (TESTS.some((text) => name.includes(text))) it(name, run);
  }
  for (const { name, run } of conformanceTests(WEBGPU_INT8_TARGET, seed)) {
    if (INT8_TESTS.some((text) => name.includes(text))) it(`INT8 PV, ${name}`, run);
  }

  it('keeps records of tuning', async () => {
    expect(await readTuning('a test')).toBeUndefined();
    expect(await writeTuning('a test', 'first')).toBe(true);
    expect(await writeTuning('a test', 'second')).toBe(true);
    expect(await readTuning('a test')).toBe('second');
    expect(engineName()).toBe(navigator.userAgent);
  });
});
