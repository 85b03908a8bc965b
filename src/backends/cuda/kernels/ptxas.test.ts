/**
 * Every kernel is accepted by ptxas for its targets, and what must be fast does not spill. `scripts/ptxas-report.ts`
 * does all of it.
 */
import { describe, expect, test } from 'vitest';
import { runSeed } from '../../../../test/support/random.ts';
import { sampled } from '../../../../test/support/sample.ts';
import { createProblem } from '../../../attention/problem.ts';
import { emptyTensor } from '../../../tensor/tensor.ts';
import { chooseOptions } from '../../choice.ts';
import { descriptorOf } from '../kernel-table.ts';
import type { SimulatableModule } from '../launches/arguments.ts';
import { PAGE_PLANNER } from '../launches/pages.ts';
import { configurations } from '../testing/configurations.ts';
import { ASSEMBLED_SHARES, assemble, ptxasVersion } from '../testing/ptxas.ts';
import { attentionSharedBytes, chooseTile } from './mma-sync/tiles.ts';

const version = ptxasVersion();

describe('ptxas', () => {
  test('is there where it must be', () => {
    if (version === undefined) {
      console.warn('ptxas: not run, there is none on this machine (CUDA toolkit, or PTXAS=/path/to/ptxas)');
      expect(process.env.CI, 'CI must have ptxas').toBeUndefined();
    }
  });

  const quick = configurations(false, 'mma-sync').filter(
    ({ name }) => /D128 (full|causal)/.test(name) || !name.startsWith('attention'),
  );
  test.skipIf(version === undefined).each(sampled(quick, runSeed(), ASSEMBLED_SHARES))(
    '$name',
    ({ kernel, spillLimit }) => {
      const made = kernel();
      const { registers, spillStoreBytes } = assemble(made);
      expect(spillStoreBytes).toBeLessThanOrEqual(spillLimit);
      // Registers and shared memory leave room for the CTAs that the configuration wants on a multiprocessor.
      expect(registers * made.threads * made.minBlocksPerMultiprocessor).toBeLessThanOrEqual(65536);
    },
  );
});

describe('16-bit operands', () => {
  const quick = sampled(configurations(false, 'exact'), runSeed(), ASSEMBLED_SHARES);
  test.skipIf(version === undefined).each(quick)('$name', ({ kernel }) => {
    const made = kernel();
    const report = assemble(made);
    expect(report).toMatchObject({ spillStoreBytes: 0, spillLoadBytes: 0 });
    if (made.target === 'sm_90a') expect(report.remarks).toEqual([]);
    expect(report.registers * made.threads * made.minBlocksPerMultiprocessor).toBeLessThanOrEqual(65536);
  });
});

describe('keys in pages', () => {
  test.skipIf(version === undefined).each([
    ['qk-int8-pv-fp16-cuda', 'sm_80'],
    ['qk-int8-pv-fp16-cuda', 'sm_90a'],
    ['qk-int8-pv-fp8-cuda', 'sm_89'],
    ['qk-int8-pv-fp8-cuda', 'sm_120a'],
    ['qk-fp4-pv-fp4', 'sm_89'],
  ] as const)('%s on %s: a token and its append do not spill', (kernel, target) => {
    const operand = (heads: number, tokens: number) => emptyTensor([4, heads, tokens, 128], 'bfloat16');
    const problem = createProblem(operand(32, 1), operand(8, 512), operand(8, 512), {});
    const accumulator = kernel === 'qk-int8-pv-fp8-cuda' ? ({ pvAccumDtype: 'fp32+fp32' } as const) : {};
    const choice = chooseOptions(descriptorOf(kernel), problem, accumulator);
    const pages = { pageTokens: 256, poolPages: 64, pagesPerSequence: 16 };
    const facts = { choice, device: { target, multiprocessors: 132 }, pages };
    const { planAppendPages, planAttendPages } = PAGE_PLANNER;
    const plans = [planAttendPages({ ...problem, keyLength: 4096 }, facts), planAppendPages(problem, facts)];
    for (const { module } of plans.flatMap(({ launches }) => launches)) {
      const made = (module as SimulatableModule).kernel();
      const { registers, spillStoreBytes } = assemble(made);
      expect(spillStoreBytes).toBe(0);
      expect(registers * made.threads * made.minBlocksPerMultiprocessor).toBeLessThanOrEqual(65536);
    }
  });
});

describe('configurations', () => {
  test('the table knows what shared memory a kernel takes', () => {
    for (const { name, kernel } of configurations(false, 'mma-sync')) {
      // FP4 kernels also hold scales: `fp4/ptxas.test.ts`.
      if (!name.startsWith('attention') || name.includes('fp4')) continue;
      const { sharedBytes, target, threads, minBlocksPerMultiprocessor } = kernel();
      const [valueTile, rowBytes] = name.includes('pv-fp16')
        ? [64 * 256, 128]
        : [64 * 128, name.includes('int4') && target === 'sm_89' ? 64 : 128];
      const smoothQ = name.includes('int4');
      const bytes = {
        queryRow: rowBytes,
        keyRow: rowBytes,
        queryScales: 0,
        keyScales: 0,
        valueTile,
        resultRow: 4 * 129,
      };
      const tile = chooseTile(target as Parameters<typeof chooseTile>[0], bytes, 128, {
        smoothQ,
        queryLength: name.includes('decoding') ? 1 : 256,
      });
      expect(tile.warps * (tile.keyWarps ?? 1)).toBe(threads / 32);
      expect(tile).toMatchObject({ minBlocksPerMultiprocessor });
      const estimate = attentionSharedBytes(tile, bytes);
      expect(sharedBytes, name).toBeLessThanOrEqual(estimate);
      expect(sharedBytes, name).toBeGreaterThan(estimate - 1024);
    }
  });
});
