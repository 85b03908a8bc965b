/**
 * What tuning measures on this device and how long it takes, with empty caches.
 *
 *     npx tsx scripts/gpu-programs.ts && node .gpu/programs/bench-webgpu-tune.mjs
 */
import { createWebgpuBackend, tune } from '../../src/backends/webgpu/index.ts';
import { tuningText } from '../../src/backends/webgpu/tuning/record.ts';

const backend = createWebgpuBackend();
const { adapter } = (await backend.availability()).details;
console.log(adapter);
for (const how of ['compiling', 'compiled']) {
  const started = performance.now();
  const tuning = await tune(backend);
  console.log(`${how}: ${((performance.now() - started) / 1000).toFixed(2)} s`);
  console.log(tuningText(tuning));
  if (how === 'compiled') console.log(JSON.stringify(tuning, undefined, 1));
}
process.exit(0);
