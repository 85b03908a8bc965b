/** onnxruntime-web's WebGPU provider in Node over Dawn, where a Vulkan driver is installed: what tests on it have in common, a file each. */
import { afterAll } from 'vitest';
import { enableNodeWebgpu } from '../index.ts';

// The event loop has a handle while WebAssembly loads: see docs/integrations.md.
const handle = setInterval(() => {}, 1e9);
afterAll(() => clearInterval(handle));
const gpu = await enableNodeWebgpu().catch(() => undefined);
const adapter = await gpu?.requestAdapter();

/** Why nothing can run; undefined where it can. */
export const missing =
  adapter == null ? 'no Vulkan driver is installed (npx tsx scripts/software-gpu.ts lavapipe)' : undefined;
const ort = missing === undefined ? await import('onnxruntime-web/webgpu') : undefined;
if (ort !== undefined) ort.env.wasm.numThreads = 1;

/** It is there wherever a test runs. */
export const runtime = ort as NonNullable<typeof ort>;
export const adapterName = adapter?.info.description;

/** A device of the program, with the features that attention uses. */
export async function newDevice(): Promise<GPUDevice> {
  const own = await gpu?.requestAdapter();
  const wanted = ['shader-f16', 'subgroups'] as GPUFeatureName[];
  const device = await own?.requestDevice({ requiredFeatures: wanted.filter((feature) => own.features.has(feature)) });
  if (device === undefined) throw new Error('no device');
  return device;
}
