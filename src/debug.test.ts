import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { type DebugPlan, debugLevel, debugPlan } from './debug.ts';

const PLAN: DebugPlan = {
  backend: 'cuda',
  kernel: 'qk-int8-pv-fp16-cuda',
  settings: { pvAccumDtype: 'fp32', split: undefined, registers: { producer: 24 } },
  launches: [
    { name: 'quantize Q', grid: [8, 1, 1], language: 'ptx', source: () => '.entry quantize' },
    { name: 'attention', grid: [16, 1, 1], sharedBytes: 1024, language: 'ptx', source: () => '.entry attention' },
  ],
  scratchBytes: 4096,
};

let folder: string;
let lines: string[];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'debug-'));
  lines = [];
  vi.spyOn(console, 'error').mockImplementation((line: string) => void lines.push(line));
});

afterEach(() => {
  vi.restoreAllMocks();
  vi.unstubAllEnvs();
  vi.unstubAllGlobals();
  rmSync(folder, { recursive: true, force: true });
});

describe('SAGEATTENTION_DEBUG', () => {
  it.each(['', '0', 'no', '-1', 'NaN'])('of %o says nothing and asks for no description', (value) => {
    vi.stubEnv('SAGEATTENTION_DEBUG', value);
    const describePlan = vi.fn(() => PLAN);
    debugPlan(describePlan);
    expect(debugLevel()).toBe(0);
    expect(describePlan).not.toHaveBeenCalled();
    expect(lines).toEqual([]);
  });

  it('of 1 says what was chosen', () => {
    vi.stubEnv('SAGEATTENTION_DEBUG', '1');
    debugPlan(() => PLAN);
    expect(lines).toEqual(['sageattention: cuda qk-int8-pv-fp16-cuda pvAccumDtype=fp32 registers={"producer":24}']);
  });

  it('of 2 lists launches and memory', () => {
    vi.stubEnv('SAGEATTENTION_DEBUG', '2');
    debugPlan(() => PLAN);
    expect(lines.slice(1)).toEqual([
      'sageattention:   quantize Q: grid 8 x 1 x 1',
      'sageattention:   attention: grid 16 x 1 x 1, 1024 bytes shared',
      'sageattention:   4096 bytes of scratch',
    ]);
  });

  it('of 3 writes each source once, and a folder that cannot be made fails no call', () => {
    vi.stubEnv('SAGEATTENTION_DEBUG', '3');
    vi.stubEnv('SAGEATTENTION_DEBUG_FOLDER', join(folder, 'sources'));
    debugPlan(() => PLAN);
    debugPlan(() => PLAN);
    const files = readdirSync(join(folder, 'sources')).sort();
    expect(files).toEqual([
      expect.stringMatching(/^cuda-qk-int8-pv-fp16-cuda-attention-[0-9a-f]{8}\.ptx$/),
      expect.stringMatching(/^cuda-qk-int8-pv-fp16-cuda-quantize-Q-[0-9a-f]{8}\.ptx$/),
    ]);
    expect(readFileSync(join(folder, 'sources', files[0] as string), 'utf8')).toBe('.entry attention');
    expect(lines.filter((line) => line.includes('source:'))).toHaveLength(2);
    const file = join(folder, 'file');
    writeFileSync(file, '');
    vi.stubEnv('SAGEATTENTION_DEBUG_FOLDER', file);
    const other = { ...PLAN, launches: [{ ...PLAN.launches[0], source: () => 'other' } as never] };
    expect(() => debugPlan(() => other)).not.toThrow();
    expect(lines.at(-1)).toMatch(/source not written/);
  });

  it('is not read where Deno would have to ask for it', () => {
    vi.stubEnv('SAGEATTENTION_DEBUG', '2');
    let state = 'prompt';
    vi.stubGlobal('Deno', { permissions: { querySync: () => ({ state }) } });
    expect(debugLevel()).toBe(0);
    state = 'granted';
    expect(debugLevel()).toBe(2);
  });

  it('in a browser is a property of globalThis, and sources are kept there', () => {
    const info = vi.spyOn(console, 'info').mockImplementation(() => {});
    vi.stubGlobal('process', undefined);
    vi.stubGlobal('SAGEATTENTION_DEBUG', 3);
    vi.stubGlobal('SAGEATTENTION_SOURCES', undefined);
    debugPlan(() => ({ ...PLAN, backend: 'webgpu' }));
    expect(info.mock.calls[0]?.[0]).toMatch(/^sageattention: webgpu qk-int8/);
    const sources = (globalThis as { SAGEATTENTION_SOURCES?: Record<string, string> }).SAGEATTENTION_SOURCES;
    expect(Object.values(sources ?? {})).toEqual(['.entry quantize', '.entry attention']);
    expect(existsSync('sageattention-debug')).toBe(false);
  });
});
