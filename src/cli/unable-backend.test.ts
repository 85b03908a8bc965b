/** How the commands treat a backend that cannot do what they ask. */
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { attentionOutputs } from '../attention/outputs.ts';
import { type Availability, type Backend, ExecutionError, type KernelDescriptor, setBackend } from './library.ts';
import { run } from './testing/run.ts';

const golden = fileURLToPath(new URL('../../test/golden/outlier-d64-causal.safetensors', import.meta.url));

const descriptor = (name: KernelDescriptor['name'], maxHeadDim: number): KernelDescriptor => ({
  name,
  summary: 'a kernel for this test',
  qkQuantGran: ['per-block'],
  pvAccumDtype: ['fp32'],
  smoothV: false,
  smoothQ: [false],
  maxHeadDim,
});

/** One kernel takes small heads only, the other loses the device. */
function unable(availability: Availability): Backend {
  const [small, broken] = [descriptor('qk-int8-pv-int8', 32), descriptor('qk-int8-pv-fp16', 256)];
  return {
    name: 'webgpu',
    kernels: [small, broken],
    availability: async () => availability,
    defaultKernel: async () => broken,
    plan: async (problem, kernel) => ({
      kernel,
      outputs: attentionOutputs(problem),
      run: async () => {
        throw new ExecutionError('device-lost', 'the device was lost');
      },
      dispose: () => {},
    }),
    prepareKeyValue: async () => {
      throw new ExecutionError('device-lost', 'the device was lost');
    },
    dispose: async () => {},
  };
}

const AVAILABLE = { available: true, accelerated: true, details: { adapter: 'one for tests' } };

async function runWith(availability: Availability, ...args: readonly string[]) {
  await setBackend(unable(availability));
  return await run(...args);
}

describe('a backend that is not available', () => {
  const absent = { available: false, accelerated: false, reason: 'no adapter', remedy: 'Buy one', details: {} };
  it('is named with its reason and its remedy', async () => {
    for (const command of [['bench'], ['demo'], ['compare', golden]]) {
      const { code, err } = await runWith(absent, ...command, '--backend', 'webgpu');
      expect(code).toBe(1);
      expect(err).toBe('error: backend webgpu is not available: no adapter. Buy one\n');
    }
  });

  it('does not stop doctor', async () => {
    const { code, out } = await runWith(absent, 'doctor');
    expect(code).toBe(0);
    expect(out).toMatch(/webgpu: not available\n\s+why not\s+no adapter\n\s+what to do\s+Buy one/);
  });
});

describe('kernels that refuse or fail', () => {
  const shape = ['--length', '32', '--head-dim', '64', '--heads', '1', '--repetitions', '1'];

  it('leave the other measurements of bench standing, and make its exit code 1', async () => {
    const folder = await mkdtemp(path.join(tmpdir(), 'sageattention-cli-'));
    const json = path.join(folder, 'bench.json');
    const { code, out, err } = await runWith(AVAILABLE, 'bench', '--backend', 'webgpu,wasm', ...shape, '--json', json);
    const { results } = JSON.parse(await readFile(json, 'utf8'));
    await rm(folder, { recursive: true });
    expect(code).toBe(1);
    expect(err).toContain('error: 1 of 6 measurements failed');
    expect(out).toMatch(/refused/);
    expect(out).toContain('the device was lost');
    const of = (backend: string) => results.filter((result: { backend: string }) => result.backend === backend);
    expect(of('webgpu')).toMatchObject([
      { kernel: 'qk-int8-pv-int8', refused: expect.stringContaining('head dims up to 32') },
      { kernel: 'qk-int8-pv-fp16', failed: 'the device was lost' },
    ]);
    for (const { kernel, accuracy } of of('wasm')) {
      expect(accuracy.cosineSimilarity).toBeGreaterThan(kernel === 'qk-fp4-pv-fp4' ? 0.96 : 0.99);
    }
  });

  it('end bench when no kernel takes the shape', async () => {
    const { code, err } = await runWith(AVAILABLE, 'bench', '-b', 'webgpu', '-k', 'qk-int8-pv-int8', ...shape);
    expect(code).toBe(1);
    expect(err).toContain('error: no kernel took any of these shapes');
  });

  it('are told apart by compare', async () => {
    const refusing = await runWith(AVAILABLE, 'compare', golden, '-b', 'webgpu', '-k', 'qk-int8-pv-int8');
    expect(refusing).toMatchObject({ code: 1, err: expect.stringContaining('no kernel took these tensors') });
    expect(refusing.out).toContain('head dims up to 32');
    const failing = await runWith(AVAILABLE, 'compare', golden, '-b', 'webgpu', '-k', 'qk-int8-pv-fp16');
    expect(failing).toMatchObject({ code: 1, err: expect.stringContaining('error: the device was lost') });
  });

  it('are shown by doctor', async () => {
    const { code, out } = await runWith(AVAILABLE, 'doctor');
    expect(code).toBe(0);
    expect(out).toContain('webgpu: available, accelerated');
    expect(out.match(/cannot run here/g)).toHaveLength(2);
    expect(out).toContain('Tensors in CPU memory go to webgpu.');
  });
});
