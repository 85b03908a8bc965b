import { describe, expect, it } from 'vitest';
import { CUDA_KERNELS, lackedBy } from '../backends/cuda/kernel-table.ts';
import { TARGETS } from '../backends/cuda/ptx/targets.ts';
import { run } from './testing/run.ts';

const kernel = (...args: readonly string[]) => run('kernel', ...args);

describe('sageattention kernel', () => {
  it.each(CUDA_KERNELS.map(({ name }) => name))('lists the launches of %s', async (name) => {
    const target = TARGETS.find((one) => lackedBy(name, Number(one.replace(/\D/g, ''))) === undefined) as string;
    const { code, out, err } = await kernel(name, '--target', target, '--causal');
    expect(err).toBe('');
    expect(code).toBe(0);
    expect(out).toMatch(/launch +entry +grid +block +shared +regs +instr/);
    for (const line of out.split('\n')) expect(line.length).toBeLessThanOrEqual(80);
    expect(out).toMatch(/\nattention +\w+ +\d+ +\d+ +\d+ +\d+ +\d+/);
  });

  it('prints PTX of the attention kernel, or of another launch', async () => {
    const ptx = await kernel('qk-int8-pv-fp8-cuda-sm90', '--target', 'sm_90a', '--head-dim', '64', '--ptx');
    expect(ptx.out).toMatch(/^\.version[\s\S]*\.target sm_90a[\s\S]*wgmma\.mma_async/m);
    const query = await kernel('qk-int8-pv-fp16-cuda', '--target', 'sm_80', '--launch', 'quantize Q', '--ptx');
    expect(query.out).toMatch(/\.target sm_80[\s\S]*\.entry quantizeQuery/);
  });

  it('prints a listing and the pressure of registers', async () => {
    const of = ['qk-int8-pv-fp16-cuda', '--target', 'sm_89', '--head-dim', '64'] as const;
    const { out } = await kernel(...of, '--listing');
    expect(out).toMatch(/^-- /m);
    expect(out).toMatch(/^ *\d+ {2}mma\.sync/m);
    const pressure = await kernel(...of, '--pressure');
    expect(pressure.out).toMatch(/^\d+ registers and \d+ predicates at most\nin section '.+': \d+ \w+/);
  });

  it('prints FP4 for compute capability 12 in every form', async () => {
    const of = ['qk-fp4-pv-fp4-cuda', '--target', 'sm_120f', '--head-dim', '128'] as const;
    expect((await kernel(...of, '--ptx')).out).toMatch(/\.target sm_120f[\s\S]*kind::mxf4nvf4/);
    expect((await kernel(...of, '--listing')).out).toMatch(/^ *\d+ {2}mma\.sync.*mxf4nvf4/m);
    expect((await kernel(...of, '--pressure')).out).toMatch(/^\d+ registers and \d+ predicates at most/);
  });

  it.each(['base', 'subgroup'])('prints WGSL of FP4, family %s', async (family) => {
    const { code, out, err } = await kernel('qk-fp4-pv-fp4', '--wgsl', '--family', family);
    expect([code, err]).toEqual([0, '']);
    expect(out).toMatch(/fn rounded_weights/);
  });

  it.each(['base', 'subgroup'])('prints WGSL of INT8 PV, family %s', async (family) => {
    const { code, out, err } = await kernel('qk-int8-pv-int8', '--wgsl', '--family', family);
    expect([code, err]).toEqual([0, '']);
    expect(out).toMatch(/fn dot_uint8/);
  });

  it.each(['base', 'subgroup', 'matrix'])('prints WGSL of family %s', async (family) => {
    const { code, out, err } = await kernel('qk-int8-pv-fp16', '--wgsl', '--family', family, '--causal');
    expect([code, err]).toEqual([0, '']);
    expect(out).toMatch(/@compute @workgroup_size/);
    expect(out.includes('enable subgroups')).toBe(family !== 'base');
    expect(out.includes('enable subgroup_matrix')).toBe(family === 'matrix');
  });

  it.each([
    [['nonsense'], /Allowed choices are qk-int8-pv-fp16/],
    [['qk-int8-pv-fp16', '--target', 'sm_70'], /Allowed choices are sm_80/],
    [['qk-int8-pv-fp8-cuda', '--target', 'sm_86'], /which needs compute capability 8.9 or later/],
    [['qk-int8-pv-int8'], /kernel of WebAssembly.*wasm2wat/],
    [['exact', '--wgsl'], /the kernels of WebGPU are qk-int8-pv-fp16, qk-int8-pv-int8 and qk-fp4-pv-fp4, not/],
    [['qk-int8-pv-fp16', '--ptx', '--listing'], /choose one of --ptx, --listing/],
    [['qk-int8-pv-fp16', '--ptx', '--launch', 'softmax'], /no launch 'softmax'; there are .*'attention'/],
    [['qk-int8-pv-fp16', '--accumulate', 'fp8'], /takes 'fp32', received 'fp8'/],
    [['qk-int8-pv-fp16', '--heads', '6', '--kv-heads', '4'], /--heads 6 is not a multiple of --kv-heads 4/],
    [['qk-int8-pv-fp16', '--head-dim', '600'], /from 1 to 512/],
    [['qk-int8-pv-fp16', '--head-dim', '300'], /takes head dims up to 256/],
  ] as const)('%o is refused', async (args, message) => {
    const { code, err } = await kernel(...args);
    expect(code).toBe(1);
    expect(err).toMatch(message);
  });
});
