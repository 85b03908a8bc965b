import { expect, it } from 'vitest';
import { chooseOptions } from '../choice.ts';
import {
  CUDA_KERNELS,
  DEFAULT_KERNELS,
  defaultKernelFor,
  descriptorOf,
  lackedBy,
  MINIMUM_COMPUTE_CAPABILITY,
  targetFor,
} from './kernel-table.ts';

it.each([
  [75, undefined],
  [80, 'qk-int8-pv-fp16-cuda'],
  [86, 'qk-int8-pv-fp16-cuda'],
  [87, 'qk-int8-pv-fp16-cuda'],
  [89, 'qk-int8-pv-fp8-cuda'],
  [90, 'qk-int8-pv-fp8-cuda-sm90'],
  [100, 'qk-int8-pv-fp8-cuda'],
  [120, 'qk-int8-pv-fp8-cuda'],
] as const)('compute capability %i runs %s by default', (capability, name) => {
  expect(defaultKernelFor(capability)?.name).toBe(name);
});

it('has rows from the newest device to the minimum, each of a kernel that exists', () => {
  const from = DEFAULT_KERNELS.map((row) => row.from);
  expect(from).toEqual([...from].sort((a, b) => b - a));
  expect(from.at(-1)).toBe(MINIMUM_COMPUTE_CAPABILITY);
  for (const { kernel } of DEFAULT_KERNELS) expect(descriptorOf(kernel).name).toBe(kernel);
  expect(new Set(CUDA_KERNELS.map(({ name }) => name)).size).toBe(CUDA_KERNELS.length);
  expect(() => descriptorOf('qk-int8-pv-int8')).toThrow(/no CUDA kernel/);
});

it.each([
  [75, undefined],
  [80, 'sm_80'],
  [86, 'sm_86'],
  [87, 'sm_80'],
  [89, 'sm_89'],
  [90, 'sm_90a'],
  [100, 'sm_89'],
  [103, 'sm_89'],
  [120, 'sm_120a'],
  [121, 'sm_120f'],
  [130, 'sm_89'],
] as const)('compute capability %i gets PTX for %s', (capability, target) => {
  expect(targetFor(capability)).toBe(target);
});

it('a kernel says which devices it needs', () => {
  expect(lackedBy('qk-int8-pv-fp16-cuda', 80)).toBeUndefined();
  expect(lackedBy('qk-int8-pv-fp16', 75)).toBe('compute capability 8.0 or later');
  expect(lackedBy('qk-int8-pv-fp8-cuda', 86)).toBe('compute capability 8.9 or later');
  expect(lackedBy('qk-int8-pv-fp8-cuda', 120)).toBeUndefined();
  expect(lackedBy('qk-fp4-pv-fp4-cuda', 90)).toBe('compute capability 12.0 to below 13.0');
  expect(lackedBy('qk-fp4-pv-fp4-cuda', 121)).toBeUndefined();
  expect(lackedBy('qk-int8-pv-fp8-cuda-sm90', 90)).toBeUndefined();
  expect(lackedBy('qk-int8-pv-fp8-cuda-sm90', 100)).toBe('compute capability 9.0');
  for (const { from, kernel } of DEFAULT_KERNELS) expect(lackedBy(kernel, from)).toBeUndefined();
});

it('the exact kernel takes 16 bits, and names what it was given otherwise', () => {
  const size = { headDim: 64, valueDim: 64 };
  for (const dtype of ['float16', 'bfloat16'] as const) {
    expect(chooseOptions(descriptorOf('exact'), { ...size, dtype }, {}).descriptor.name).toBe('exact');
  }
  expect(() => chooseOptions(descriptorOf('exact'), { ...size, dtype: 'float32' }, {})).toThrow(
    expect.objectContaining({ argument: 'q', expected: 'float16 or bfloat16', received: 'float32' }),
  );
});
