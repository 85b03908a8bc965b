import { expect, it } from 'vitest';
import { InvalidArgumentError } from '../../../errors.ts';
import { validateSageAttentionOptions } from '../options.ts';
import { withValidationMode } from './validation-mode.ts';

it('gives the WebGPU provider a mode, and no other provider, and none that has one', () => {
  const device = {};
  const options = {
    executionProviders: ['webgpu', { name: 'webgpu', device }, { name: 'webgpu', validationMode: 'full' }, 'wasm'],
    logSeverityLevel: 3,
  };
  expect(withValidationMode(options, 'wgpuOnly')).toEqual({
    executionProviders: [
      { name: 'webgpu', validationMode: 'wgpuOnly' },
      { name: 'webgpu', device, validationMode: 'wgpuOnly' },
      { name: 'webgpu', validationMode: 'full' },
      'wasm',
    ],
    logSeverityLevel: 3,
  });
  expect(withValidationMode(options, undefined)).toBe(options);
  expect(withValidationMode({}, 'basic')).toEqual({});
});

it('is one of four', () => {
  expect(() => validateSageAttentionOptions({ validationMode: 'wgpuOnly' })).not.toThrow();
  expect(() => validateSageAttentionOptions({ validationMode: 'none' as 'basic' })).toThrow(InvalidArgumentError);
});
