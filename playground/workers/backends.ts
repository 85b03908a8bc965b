/** The backends of one worker, and what happens when its GPU is lost. */

import type { WebgpuBackend } from '../../src/backends/webgpu/index.ts';
import { type BackendName, setBackend } from '../../src/index.ts';

/** The backends that a browser can have. */
export const BROWSER_BACKENDS = ['webgpu', 'wasm'] as const satisfies readonly BackendName[];
export type BrowserBackend = (typeof BROWSER_BACKENDS)[number];

/** Loaded as the library loads it, so that it is one chunk of the page. */
export const webgpuModule = () => import('../../src/backends/webgpu/index.ts');

let webgpu: Promise<WebgpuBackend> | undefined;

/** Makes the WebGPU backend of this worker, once; to be called before anything else of the library. */
export function useBrowserBackends(): Promise<WebgpuBackend> {
  webgpu ??= webgpuModule().then(async ({ createWebgpuBackend }) => {
    const backend = createWebgpuBackend();
    await setBackend(backend);
    return backend;
  });
  return webgpu;
}

/** The device that the WebGPU backend runs on, with its features. */
export async function gpuContext() {
  return (await useBrowserBackends()).context();
}

export const isLoss = (error: unknown): error is Error =>
  error instanceof Error && 'code' in error && error.code === 'device-lost';

/** Runs `work`, and once more if the GPU device is lost meanwhile: the backend opens a new one. */
export async function survivingLoss<T>(work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    if (!isLoss(error)) throw error;
    return work();
  }
}

/** What a call of the page's comes to: it has its own channel, and may be heard after the result of what made it. */
export type Told = void | Promise<void>;

/** Tells of each loss of the GPU device, whether something runs on it or not, and opens the next one. */
export async function watchDevice(tell: (text: string) => Told): Promise<void> {
  let context = await gpuContext().catch(() => undefined);
  while (context !== undefined) {
    await context.device.lost;
    await tell(`The GPU was taken away; what ran on it is done again on a new device. (${context.lost?.message})`);
    context = await gpuContext().catch(async (error: Error) => {
      await tell(`The GPU was taken away, and no other could be had: ${error.message}`);
      return undefined;
    });
  }
}

/** For tests: takes the device away, as a driver's reset would. */
export async function loseDevice(): Promise<void> {
  (await gpuContext()).device.destroy();
}
