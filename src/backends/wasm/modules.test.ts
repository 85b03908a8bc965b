import { expect, test } from 'vitest';
import { BackendUnavailableError } from '../../errors.ts';
import { computesExactly, instantiate, kernelsComputeExactly, loadModule, othersAreExact } from './modules.ts';

test('the probe tells a wrong dot product from a right one', async () => {
  // Its stand-in multiplies 16-bit integers, so that its sums differ from sums of 8-bit products.
  const { module, simd } = await loadModule('simd128');
  expect(simd).toBe('simd128');
  expect(await computesExactly(module)).toBe(false);
});

test('the dot product gives the same sums in one step and in two', async () => {
  const { module, simd, dotProduct } = await loadModule('auto');
  const memory = new WebAssembly.Memory({ initial: 1, maximum: 1, shared: true });
  const kernels = await instantiate(module, memory);
  expect(dotProduct).toBe(simd === 'simd128' ? '16-bit' : kernels.twoSteps() ? 'two-steps' : 'one-step');
  for (const twoSteps of simd === 'relaxed' ? [0, 1] : []) {
    kernels.setTwoSteps(twoSteps);
    expect(kernels.twoSteps()).toBe(twoSteps);
    expect(kernelsComputeExactly(kernels, memory), `in ${twoSteps + 1} steps`).toBe(true);
  }
});

test('each of the other relaxed instructions is compared by value', async () => {
  const { module } = await loadModule('auto');
  const memory = new WebAssembly.Memory({ initial: 1, maximum: 1, shared: true });
  const { probeOthers } = await instantiate(module, memory);
  expect(othersAreExact(probeOthers, memory)).toBe(true);
  for (let lane = 0; lane < 64; lane++) {
    const wrong: typeof probeOthers = (input, out) => {
      probeOthers(input, out);
      const bytes = new Uint8Array(memory.buffer, out, 64);
      bytes[lane] = (bytes[lane] as number) ^ 1;
    };
    expect(othersAreExact(wrong, memory), `byte ${lane}`).toBe(false);
  }
});

test('relaxed SIMD is taken where it is exact, and only there', async () => {
  const { simd, relaxed } = await loadModule('auto');
  if (simd === 'relaxed') {
    expect(relaxed).toBe('exact');
    expect((await loadModule('relaxed')).simd).toBe('relaxed');
  } else {
    await expect(loadModule('relaxed')).rejects.toThrow(BackendUnavailableError);
  }
  // Node 24 computes it rightly; Node 20 does not accept it, or with its flag computes it wrongly.
  expect(simd).toBe(Number(process.versions.node.split('.')[0]) >= 24 ? 'relaxed' : 'simd128');
});
