// Loaded before the tests pretend to be elsewhere: it looks for its own library by platform.
import 'koffi';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { BackendUnavailableError } from '../../../errors.ts';
import { FakeCuda } from '../testing/fake-cuda.ts';
import { loadDriver } from './load.ts';
import { cudaError, describeStatus } from './status.ts';

afterEach(() => vi.unstubAllGlobals());

/** The error of loading in such a process, or undefined where this machine has a driver. */
async function failureOf(process: unknown): Promise<unknown> {
  vi.stubGlobal('process', process);
  try {
    await loadDriver();
  } catch (error) {
    return error;
  } finally {
    vi.unstubAllGlobals();
  }
  return undefined;
}

describe('loading the driver', () => {
  it.each([
    [undefined, /not on this platform/],
    [{ platform: 'linux', arch: 'x64', versions: {} }, /runs in Node/],
    [{ platform: 'darwin', arch: 'arm64', versions: { node: '22' } }, /not on darwin/],
    [{ platform: 'linux', arch: 'ia32', versions: { node: '22' } }, /64-bit and this process is ia32/],
  ])('in %o is refused with the reason', async (process, reason) => {
    const error = await failureOf(process);
    expect(error).toBeInstanceOf(BackendUnavailableError);
    expect((error as Error).message).toMatch(reason);
  });

  it('names the library that is missing and what to do', async () => {
    const error = await failureOf({ platform: 'win32', arch: 'x64', versions: { node: '22' } });
    if (process.platform === 'win32') return;
    expect((error as Error).message).toMatch(/nvcuda.dll could not be loaded .* Install the NVIDIA driver/);
  });
});

describe('errors of the driver', () => {
  const { api } = new FakeCuda();

  it("have the driver's words, and a way out where those have none", () => {
    expect(describeStatus(api, 700)).toEqual({
      name: 'CUDA_ERROR_ILLEGAL_ADDRESS',
      text: 'an illegal memory access was encountered',
    });
    expect(describeStatus(api, 12345).name).toBe('CUresult 12345');
    expect(cudaError(api, 222, 'cuModuleLoadDataEx', 'compiling').message).toMatch(/install a newer one$/);
    expect(cudaError(api, 34, 'cuInit', 'starting').message).toMatch(/stub, not the driver$/);
  });

  it('tell a lost device, want of memory and other failures apart', () => {
    expect(cudaError(api, 2, 'cuMemAlloc', 'allocating').code).toBe('out-of-memory');
    expect(cudaError(api, 1, 'cuMemAlloc', 'allocating').code).toBe('execution-failed');
    const lost = cudaError(api, 719, 'cuStreamSynchronize', 'waiting');
    expect(lost.code).toBe('device-lost');
    expect(lost.message).toContain('no kernel of this library was under way');
  });
});
