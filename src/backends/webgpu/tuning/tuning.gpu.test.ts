/** Tuning on a device: what it measures, that it is kept, and that outputs stay right. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { Random, runSeed } from '../../../../test/support/random.ts';
import { itNeeds } from '../../../../test/support/requirement.ts';
import { createProblem } from '../../../attention/problem.ts';
import { attentionExact } from '../../../reference/exact.ts';
import { compare } from '../../../reference/metrics.ts';
import { fromFloat32, toFloat32 } from '../../../tensor/access.ts';
import type { Tensor } from '../../../tensor/tensor.ts';
import { createWebgpuBackend, tune } from '../index.ts';

const it = itNeeds(process.env.SAGEATTENTION_SOFTWARE_GPU_MISSING);
const seed = runSeed();

// lavapipe takes a minute to compile what SwiftShader does in seconds.
describe.skipIf(process.env.SAGEATTENTION_SOFTWARE_GPU === 'lavapipe')(`tuning (SAGEATTENTION_SEED=${seed})`, () => {
  const folder = mkdtempSync(join(tmpdir(), 'tuning-'));
  const before = process.env.XDG_CACHE_HOME;
  beforeAll(() => {
    process.env.XDG_CACHE_HOME = folder;
  });
  afterAll(() => {
    if (before === undefined) delete process.env.XDG_CACHE_HOME;
    else process.env.XDG_CACHE_HOME = before;
    rmSync(folder, { recursive: true });
  });

  it('times the candidates, prefers the fastest, and a backend on the device finds the record', async () => {
    const backend = createWebgpuBackend();
    const shape = { headDim: 32, queries: 40, keys: 70, heads: 1 };
    const tuning = await tune(backend, [shape]);
    const [entry] = tuning.entries;
    expect(tuning.entries).toHaveLength(1);
    expect(entry).toMatchObject({ headDim: 32, queries: 'short', measured: { heads: 1, queries: 40, keys: 70 } });
    const times = entry?.times ?? [];
    expect(new Set(times.map(({ kernel }) => kernel))).toEqual(new Set(['qk-int8-pv-fp16', 'qk-int8-pv-int8']));
    expect(times.map(({ milliseconds }) => milliseconds)).toEqual(
      times.map(({ milliseconds }) => milliseconds).sort((a, b) => a - b),
    );
    const random = new Random(seed);
    // In float16, as what was measured: a software driver takes long to compile more kernels.
    const made = (tokens: number) => fromFloat32(random.normals(tokens * 32), [1, 1, tokens, 32], 'float16');
    const inputs = { q: made(50), k: made(90), v: made(90) };
    const plan = await backend.createPlan(inputs);
    const best = times.find(({ kernel }) => kernel === 'qk-int8-pv-fp16');
    expect([plan.details.family, plan.details.variant]).toEqual([best?.family, best?.variant]);
    const { output } = await plan.run(inputs);
    const exact = attentionExact(createProblem(inputs.q, inputs.k, inputs.v, {}), inputs).output;
    expect(compare(toFloat32(output as Tensor), exact).relativeL1).toBeLessThan(0.02);
    const { details } = await backend.availability();
    expect(details.tuning).toMatch(/D 32, up to 1024 queries: qk-int8-pv-/);
    await backend.dispose();
    // Taken for a GPU: software is not tuned by itself.
    const next = createWebgpuBackend({ tune: 'auto', capabilities: { isSoftware: false } });
    expect((await next.context()).capabilities.tuning).toEqual(tuning.entries);
    await next.dispose();
    const off = createWebgpuBackend();
    expect((await off.availability()).details.tuning).toMatch(/off, although there is a record/);
    await off.dispose();
  });
});
