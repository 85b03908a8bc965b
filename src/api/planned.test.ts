import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { createAttention } from './planned.ts';
import { type FakeBackend, installFakes, PORTABLE, restoreBackends, t } from './testing/fake-backend.ts';

let wasm: FakeBackend;

beforeEach(async () => {
  ({ wasm } = await installFakes());
});
afterEach(restoreBackends);

describe('createAttention', () => {
  it('runs only what it was planned for, until disposed', async () => {
    const inputs = { q: t(1, 1, 3, 8), k: t(1, 1, 3, 8), v: t(1, 1, 3, 8) };
    const attention = await createAttention(inputs, { backend: 'wasm', returnLse: true });
    expect(attention.kernel.descriptor).toBe(PORTABLE);
    expect((await attention.run(inputs)).lse).toBeDefined();
    await expect(attention.run({ ...inputs, k: t(1, 1, 4, 8) })).rejects.toMatchObject({ argument: 'k' });
    await expect(attention.run({ ...inputs, attnMask: t(3, 3) })).rejects.toMatchObject({ argument: 'attnMask' });
    await expect(attention.run({ ...inputs, q: { ...inputs.q, offset: 1 } })).rejects.toMatchObject({ argument: 'q' });
    await expect(attention.run(inputs, { tag: 1 } as object)).rejects.toMatchObject({ code: 'unknown-option' });
    await expect(attention.run(undefined as unknown as typeof inputs)).rejects.toMatchObject({ argument: 'inputs' });
    attention[Symbol.dispose]();
    attention.dispose();
    expect(wasm.plans[0]?.disposed).toBe(true);
    await expect(attention.run(inputs)).rejects.toMatchObject({ code: 'disposed' });
  });
});
