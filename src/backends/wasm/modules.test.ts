import { expect, test } from 'vitest';
import { BackendUnavailableError } from '../../attention/errors.ts';
import { computesExactly, loadModule } from './modules.ts';

test('the probe tells a wrong dot product from a right one', async () => {
  // Its stand-in multiplies 16-bit integers, so that its sums are not those of 8-bit integers.
  const { module, simd } = await loadModule('simd128');
  expect(simd).toBe('simd128');
  expect(await computesExactly(module)).toBe(false);
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
