import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { ExecutionError } from '../errors.ts';
import { sageattn, sageattnVarlen } from './sageattn.ts';
import { type Call, type FakeBackend, installFakes, restoreBackends, t } from './testing/fake-backend.ts';

const call = (length: number, options = {}) =>
  sageattn(t(1, 2, length, 8), t(1, 2, length, 8), t(1, 2, length, 8), { backend: 'wasm', ...options });

let wasm: FakeBackend;

beforeEach(async () => {
  ({ wasm } = await installFakes());
});
afterEach(restoreBackends);

describe('the plan cache', () => {
  it('plans once for a shape, and again for another option', async () => {
    await Promise.all([call(3), call(3), call(3)]);
    await call(3, { windowSize: [5, -1] });
    await call(3, { windowSize: [-1, -1] });
    expect(wasm.plans).toHaveLength(2);
  });

  it('tells varlen calls apart by their sequences', async () => {
    const [q, k, v] = [t(6, 1, 8), t(6, 1, 8), t(6, 1, 8)];
    for (const cu of [
      [0, 6],
      [0, 2, 6],
      [0, 3, 6],
      [0, 2, 6],
    ])
      await sageattnVarlen(q, k, v, cu, cu, { backend: 'wasm' });
    expect(wasm.plans).toHaveLength(3);
  });

  it('keeps the plans used last, and disposes the others when no run holds them', async () => {
    let open = () => {};
    wasm.gates.push(
      new Promise<void>((resolve) => {
        open = resolve;
      }),
    );
    const running = call(1);
    // The first run must have taken the gate.
    await vi.waitFor(() => expect(wasm.gates).toHaveLength(0));
    for (let length = 2; length <= 66; length++) await call(length);
    expect(wasm.plans.filter(({ disposed }) => disposed).map(({ problem }) => problem.queryLength)).toEqual([2]);
    open();
    await running;
    await vi.waitFor(() => expect(wasm.plans[0]?.disposed).toBe(true));
    await call(66);
    expect(wasm.plans).toHaveLength(66);
  });

  it('drops a plan that failed', async () => {
    wasm.failures.push(new Error('lost'));
    await expect(call(3)).rejects.toThrow('lost');
    expect(wasm.plans[0]?.disposed).toBe(true);
    await expect(call(3)).resolves.toBeDefined();
    expect(wasm.plans).toHaveLength(2);
  });

  it('plans again when the kept plan has ended with its backend, but not what was running then', async () => {
    await call(3);
    (wasm.plans[0] as Call).ended = true;
    await expect(call(3)).resolves.toBeDefined();
    expect([wasm.plans.length, wasm.plans[0]?.disposed]).toEqual([2, true]);
    wasm.failures.push(new ExecutionError('disposed', 'gone while it ran'));
    await expect(call(3)).rejects.toThrow('gone while it ran');
    expect(wasm.plans).toHaveLength(2);
  });
});
