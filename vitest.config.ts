import { playwright } from '@vitest/browser-playwright';
import { configDefaults, defineConfig } from 'vitest/config';
import { BaseSequencer, type TestSpecification } from 'vitest/node';
import {
  CHROMIUM,
  CHROMIUM_FLAGS,
  locateSoftwareGpu,
  REMEDY,
  SOFTWARE_GPUS,
  type SoftwareGpu,
  softwareGpuEnvironment,
} from './scripts/software-gpu.ts';

/** Tests of the WebGPU backend on a software GPU, whose driver the environment names before Dawn loads. */
function softwareGpuProject(gpu: SoftwareGpu) {
  const manifest = locateSoftwareGpu(gpu);
  return {
    extends: true as const,
    test: {
      name: `webgpu-${gpu}`,
      setupFiles: ['test/support/dawn-polling.ts'],
      include: ['src/**/*.gpu.test.ts', 'test/**/*.gpu.test.ts'],
      // onnxruntime on one driver: what is tested is how we share its device, and it takes minutes.
      exclude: [...configDefaults.exclude, ...(gpu === 'swiftshader' ? ['src/integrations/**'] : [])],
      env: {
        SAGEATTENTION_SOFTWARE_GPU: gpu,
        ...(manifest === undefined
          ? { SAGEATTENTION_SOFTWARE_GPU_MISSING: REMEDY[gpu] }
          : softwareGpuEnvironment(manifest)),
      },
    },
  };
}

/**
 * Starts the longest files first, so that none runs on alone at the end. Vitest itself starts the files with most bytes
 * first where it has no times of an earlier run, but the slowest ones, the suites, are short.
 */
class LongestFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const isLong = ({ moduleId }: TestSpecification) => /\bconformance\b/.test(moduleId);
    const sorted = await super.sort(files);
    return [...sorted.filter(isLong), ...sorted.filter((file) => !isLong(file))];
  }
}

/** Integrations in a browser: minutes each, which they would take from tests beside them. */
const IN_BROWSERS = ['src/integrations/browser.test.ts', 'src/integrations/transformers/web.test.ts'];

export default defineConfig({
  test: {
    pool: 'forks',
    sequence: { sequencer: LongestFirst },
    globalSetup: './test/support/global-setup.ts',
    // Software GPUs compile some kernels for minutes where a machine is busy.
    testTimeout: 300_000,
    projects: [
      {
        extends: true,
        test: {
          name: 'unit',
          include: ['src/**/*.test.ts', 'test/**/*.test.ts'],
          exclude: [
            ...configDefaults.exclude,
            '**/*.gpu.test.ts',
            '**/*.browser.test.ts',
            'test/playground/**',
            'test/docs/**',
            'test/runtimes/**',
            'test/engines/**',
            ...IN_BROWSERS,
          ],
        },
      },
      { extends: true, test: { name: 'browsers', include: IN_BROWSERS } },
      { extends: true, test: { name: 'site', include: ['test/playground/*.test.ts', 'test/docs/*.test.ts'] } },
      { extends: true, test: { name: 'runtimes', include: ['test/runtimes/*.test.ts'] } },
      { extends: true, test: { name: 'engines', include: ['test/engines/*.test.ts'] } },
      ...SOFTWARE_GPUS.map(softwareGpuProject),
      {
        extends: true,
        // The example imports the package by its name.
        resolve: {
          alias: [{ find: /^sageattention$/, replacement: new URL('./src/index.ts', import.meta.url).pathname }],
        },
        test: {
          name: 'webgpu-chromium',
          include: ['test/**/*.browser.test.ts'],
          browser: {
            enabled: true,
            headless: true,
            screenshotFailures: false,
            provider: playwright({ launchOptions: { executablePath: CHROMIUM, args: [...CHROMIUM_FLAGS] } }),
            instances: [{ browser: 'chromium' }],
          },
        },
      },
    ],
    coverage: {
      provider: 'v8',
      include: ['src/**/*.ts'],
      exclude: ['src/**/*.test.ts', 'src/**/assembly/**', 'src/**/generated/**'],
      reporter: ['text-summary', 'json-summary', 'html'],
      thresholds: { lines: 90 },
    },
  },
});
