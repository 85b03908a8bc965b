/**
 * Subgroups of more lanes than a row has threads: lavapipe with 8 lanes, which it compiles for 2.4 times as long as 4. What a kernel
 * leaves to its subgroup is tested here; everything else runs with 4 (`webgpu.gpu.test.ts`).
 */
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { locateSoftwareGpu, softwareGpuEnvironment } from '../../scripts/software-gpu.ts';
import { setBackend } from '../../src/backends/registry.ts';
import { createWebgpuBackendOn } from '../../src/backends/webgpu/backend.ts';
import type { WebgpuBackend } from '../../src/backends/webgpu/index.ts';
import { runSeed } from '../support/random.ts';
import { itNeeds } from '../support/requirement.ts';
import { sampled } from '../support/sample.ts';
import { conformanceTests } from './suite.ts';
import { WEBGPU_TARGET } from './webgpu-target.ts';

const MISSING = process.env.SAGEATTENTION_SOFTWARE_GPU_MISSING;
const seed = runSeed();
const test = itNeeds(MISSING);

/** Short and long rows, rows and keys left over, hidden keys, values that are not numbers, sinks. */
const TESTS = ['length', 'mask: bool [Lq', 'causal, window and softcap', 'not a number', 'varlen: 5', 'sinks, few'];

const SHARES = { byHand: 0.03, otherwise: 0.06 };

describe.runIf(process.env.SAGEATTENTION_SOFTWARE_GPU === 'lavapipe')(
  `WebGPU in subgroups of 8 (SAGEATTENTION_SEED=${seed})`,
  () => {
    let backend: WebgpuBackend | undefined;
    beforeAll(async () => {
      const manifest = locateSoftwareGpu('lavapipe');
      if (MISSING !== undefined || manifest === undefined) return;
      Object.assign(process.env, softwareGpuEnvironment(manifest, 8));
      backend = createWebgpuBackendOn({ family: 'subgroup' });
      await setBackend(backend);
    });
    afterAll(() => backend?.dispose());

    test('has them', async () => {
      expect((await backend?.context())?.capabilities.subgroupSize).toEqual([8, 8]);
    });
    const target = { ...WEBGPU_TARGET, name: 'subgroups of 8' };
    const chosen = conformanceTests(target, seed).filter(({ name }) => TESTS.some((text) => name.includes(text)));
    for (const { name, run } of sampled(chosen, seed, SHARES, target.name)) test(name, run);
  },
);
