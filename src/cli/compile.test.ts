import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { itNeeds } from '../../test/support/requirement.ts';
import { ptxasVersion } from '../backends/cuda/testing/ptxas.ts';
import { run } from './testing/run.ts';

const scratch = mkdtempSync(path.join(tmpdir(), 'compile-'));
afterAll(() => rmSync(scratch, { recursive: true, force: true }));

const SMALL = ['--head-dim', '32', '--length', '64', '--dtype', 'float16'];

describe('sageattention compile', () => {
  it('writes PTX where there is no assembler, a file for each kernel and device', async () => {
    const folder = path.join(scratch, 'ptx');
    const devices = ['--compute-capability', '8.0,9.0'];
    const { code, out, err } = await run('compile', '-o', folder, ...devices, ...SMALL, '--ptxas', 'no-such-ptxas');
    expect([code, err]).toEqual([0, '']);
    const files = readdirSync(folder);
    expect(out).toContain(`${files.length} kernels in ${folder} (no no-such-ptxas: PTX`);
    expect(files.filter((name) => /^[0-9a-f]{40}\.sm_80\.ptx$/.test(name)).length).toBeGreaterThan(2);
    expect(files.filter((name) => /^[0-9a-f]{40}\.sm_90\.ptx$/.test(name)).length).toBeGreaterThan(0);
    expect(readFileSync(path.join(folder, files[0] as string), 'latin1')).toMatch(/\.target sm_(80|90a)/);
  });

  itNeeds(ptxasVersion() === undefined ? 'ptxas of the CUDA toolkit' : undefined)(
    'writes machine code where there is one, of prepared keys and values too',
    async () => {
      const folder = path.join(scratch, 'cubin');
      const asked = ['--compute-capability', '8.9', '--kernel', 'qk-int8-pv-fp16-cuda', '--prepared'];
      const { code, out, err } = await run('compile', '-o', folder, ...asked, ...SMALL, '--causal', 'both');
      expect([code, err]).toEqual([0, '']);
      expect(out).toMatch(/ptxas, release \d+/);
      expect(out).toMatch(/attention +8\.9 +\d+ KiB/);
      for (const name of readdirSync(folder)) {
        expect(name).toMatch(/\.sm_89\.cubin$/);
        expect(readFileSync(path.join(folder, name)).subarray(1, 4).toString()).toBe('ELF');
      }
    },
  );

  it('says what no device runs', async () => {
    const at = (device: string, ...more: string[]) =>
      run('compile', '-o', path.join(scratch, 'none'), '--compute-capability', device, ...SMALL, ...more);
    expect((await at('7.5')).err).toBe('error: no kernel runs on compute capability 7.5\n');
    expect((await at('8.0', '-k', 'qk-int8-pv-fp8-cuda-sm90')).err).toMatch(/needs compute capability 9.0/);
    expect((await at('8.0', '-k', 'qk-int8-pv-int8')).err).toMatch(/none of CUDA/);
  });
});
