import type { OrtSessionOptions } from '../ort.ts';

export const VALIDATION_MODES = ['disabled', 'wgpuOnly', 'basic', 'full'] as const;

/** How much onnxruntime-web checks of what it asks of WebGPU. */
export type ValidationMode = (typeof VALIDATION_MODES)[number];

/** The options with a mode for the WebGPU provider, where they have none. */
export function withValidationMode(options: OrtSessionOptions, mode: ValidationMode | undefined): OrtSessionOptions {
  const { executionProviders } = options;
  if (mode === undefined || executionProviders === undefined) return options;
  return {
    ...options,
    executionProviders: executionProviders.map((provider) => {
      const given = typeof provider === 'string' ? { name: provider } : provider;
      return given.name === 'webgpu' ? { validationMode: mode, ...given } : provider;
    }),
  };
}
