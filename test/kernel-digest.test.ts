import { expect, it, vi } from 'vitest';
import { differences, digestsOf, formatDigests, parseDigests } from '../scripts/kernel-digest.ts';

/** Digests from modules that were loaded anew: planning keeps the kernels that it has made. */
async function digestsOfNewModules() {
  vi.resetModules();
  const { generatedKernels } = await import('../scripts/kernel-digest.ts');
  return digestsOf(generatedKernels(false));
}

it('generating every kernel twice gives the same text', async () => {
  const digests = await digestsOfNewModules();
  expect(digests.size).toBeGreaterThan(100);
  expect(differences(digests, await digestsOfNewModules())).toEqual([]);
});

it('names what changed, appeared and went, also after a way through a file', () => {
  const kernel = (name: string, text: string) => ({ name, source: () => text });
  const before = digestsOf([kernel('same', 'a'), kernel('other, D128', 'b'), kernel('old', 'c')]);
  const after = digestsOf([kernel('same', 'a'), kernel('other, D128', 'x'), kernel('young', 'c')]);
  expect(differences(parseDigests(formatDigests(before)), after)).toEqual([
    'changed other, D128',
    'new young',
    'gone old',
  ]);
  expect(() => digestsOf([kernel('twice', 'a'), kernel('twice', 'b')])).toThrow("'twice'");
});
