/** The checks that a GPU must pass, where they are small enough, on kernels run by the simulator. */
import { it } from 'vitest';
import { captureCheck, followingChecks, kernelChecks } from '../../../test/cuda/checks.ts';
import { CUDA_TARGETS } from '../../../test/cuda/targets.ts';
import { runSeed } from '../../../test/support/random.ts';
import { sampled } from '../../../test/support/sample.ts';
import { setBackend } from '../registry.ts';
import { createSimulatedBackend } from './testing/simulator/backend.ts';

const seed = runSeed();

/** One kernel of each kind of V, on the device that it is for. */
const KERNELS = [
  { capability: 80, name: 'qk-int8-pv-fp16-cuda' },
  { capability: 89, name: 'qk-int8-pv-fp8-cuda' },
  { capability: 90, name: 'qk-int4-pv-fp8-cuda' },
  { capability: 90, name: 'qk-int8-pv-fp16-cuda-sm90' },
  { capability: 90, name: 'qk-int8-pv-fp8-cuda-sm90' },
] as const;

for (const { capability, name: kernel } of sampled(KERNELS, seed, { byHand: 0.4, otherwise: 0.6 })) {
  const target = CUDA_TARGETS.find((candidate) => candidate.kernel === kernel);
  if (target === undefined) throw new Error(`no target of ${kernel}`);
  it(`${target.name} on a simulated device of ${capability / 10} (SAGEATTENTION_SEED=${seed})`, async () => {
    const backend = createSimulatedBackend(capability);
    await setBackend(backend);
    const device = (await backend.cuda()).device();
    const sizes = { tokens: 34, headDim: 32 };
    const checks = kernelChecks(target, device, sizes, seed, 1);
    // Its tensor maps are what a graph could hold wrongly; the others' arguments are a part of these.
    if (kernel === 'qk-int8-pv-fp8-cuda-sm90') {
      checks.push(captureCheck(target, device, sizes, seed), ...followingChecks(target, device, 32, seed));
    }
    for (const { name, run } of checks) {
      await run().catch((cause: unknown) => {
        throw new Error(name, { cause });
      });
    }
    await backend.dispose();
  });
}
