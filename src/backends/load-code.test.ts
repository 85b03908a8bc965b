import { afterEach, describe, expect, it, vi } from 'vitest';
import { BackendUnavailableError, ExecutionError } from '../errors.ts';
import { loadCode, unavailable } from './load-code.ts';

const refusing = () => Promise.reject(new TypeError('import() is disallowed on ServiceWorkerGlobalScope'));

afterEach(() => vi.unstubAllGlobals());

describe('loadCode', () => {
  it('gives what was loaded', async () => {
    expect(await loadCode('wasm', async () => 1)).toBe(1);
  });

  it('in a service worker says what to import instead, for each backend that a browser has', async () => {
    vi.stubGlobal('ServiceWorkerGlobalScope', Object);
    await expect(loadCode('wasm', refusing)).rejects.toThrow(/service worker.*sageattention\/wasm\/embedded/);
    await expect(loadCode('webgpu', refusing)).rejects.toThrow(/service worker.*sageattention\/webgpu/);
  });

  it('elsewhere says that a file did not come, with the reason', async () => {
    const error = await loadCode('wasm', () => Promise.reject(new TypeError('Failed to fetch'))).catch((e) => e);
    expect(error).toBeInstanceOf(BackendUnavailableError);
    expect(error.message).toMatch(/'wasm'.*Failed to fetch/);
    expect(error.cause).toBeInstanceOf(TypeError);
  });

  it("leaves this package's errors as they are", async () => {
    const own = new ExecutionError('disposed', 'gone');
    await expect(loadCode('wasm', () => Promise.reject(own))).rejects.toBe(own);
  });

  it('what is unavailable has the reason apart from the remedy', async () => {
    const { reason, remedy } = unavailable(new BackendUnavailableError('wasm', 'why', 'do this'));
    expect([reason, remedy]).toEqual(['why', 'do this']);
    expect(unavailable(new Error('other')).reason).toBe('other');
  });
});
