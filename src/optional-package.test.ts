import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { describe, expect, it } from 'vitest';
import { importOptional, loadFailure } from './optional-package.ts';

describe('an optional package', () => {
  it('is said not to be installed only where it is not', async () => {
    const error = await importOptional('sageattention-has-no-such-package').catch((reason: unknown) => reason);
    expect(loadFailure('sageattention-has-no-such-package', error)).toBeUndefined();
  });

  it.each([
    [
      "throw new Error('libvulkan.so.1: cannot open shared object file\\nmore');",
      /does not load: libvulkan.so.1: cannot open shared object file$/,
    ],
    ["import 'sageattention-has-no-such-package';", /'broken'.*does not load: .*sageattention-has-no-such-package/],
  ])('that fails with %j is said to be broken', async (code, said) => {
    const folder = mkdtempSync(path.join(tmpdir(), 'optional-'));
    try {
      const file = path.join(folder, 'index.mjs');
      writeFileSync(file, code);
      const error = await importOptional(pathToFileURL(file).href).catch((reason: unknown) => reason);
      expect(loadFailure('broken', error)).toMatch(said);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
});
