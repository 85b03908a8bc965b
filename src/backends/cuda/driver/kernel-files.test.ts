import { chmodSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import fc from 'fast-check';
import { afterAll, describe, expect, it, vi } from 'vitest';
import { InvalidArgumentError } from '../../../errors.ts';
import type { KernelModule } from '../launches/launch.ts';
import { FakeCuda } from '../testing/fake-cuda.ts';
import { Cuda } from './device.ts';
import { defaultKernelFolder, digestOf, KernelFiles } from './kernel-files.ts';

const scratch = mkdtempSync(path.join(tmpdir(), 'kernel-files-'));
afterAll(() => rmSync(scratch, { recursive: true, force: true }));
let folders = 0;
const newFolder = () => path.join(scratch, `${folders++}`);

const ptxOf = (entry: string) => `.version 8.0
.target sm_80
.address_size 64
.visible .entry ${entry}(.param .u64 data)
{ ret; }`;

function moduleOf(entry: string): KernelModule & { readonly made: () => number } {
  let made = 0;
  const ptx = () => {
    made++;
    return ptxOf(entry);
  };
  return { id: entry, ptx, made: () => made };
}

function open(folder: string | undefined, devices: readonly number[] = [90]) {
  const fake = new FakeCuda({ devices });
  const cuda = new Cuda(fake.api);
  cuda.kernelFolder = folder;
  return { fake, cuda, device: cuda.device(0) };
}

const count = (fake: FakeCuda, name: string) => fake.calls.filter((call) => call === name).length;

describe('compiled kernels on disk', () => {
  it('are compiled in one process and loaded in the next', () => {
    const folder = newFolder();
    const first = open(folder);
    expect(first.device.module(moduleOf('one')).log).toBe('');
    expect(first.device.module(moduleOf('one')).function('one').name).toBe('one');
    expect(count(first.fake, 'cuLinkComplete')).toBe(1);
    expect(readdirSync(folder)).toEqual([expect.stringMatching(/^[0-9a-f]{40}\.sm_90\.cuda13000\.cubin$/)]);
    const second = open(folder);
    expect(second.device.module(moduleOf('one')).function('one').name).toBe('one');
    expect(count(second.fake, 'cuLinkCreate')).toBe(0);
    for (const { cuda, fake } of [first, second]) {
      cuda.dispose();
      expect(fake.liveHandles.modules).toBe(0);
    }
  });

  it('are not linked where the compiler makes linked code slow, and keep their text', () => {
    for (const instruction of ['setmaxnreg.inc.sync.aligned.u32 240;', 'wgmma.fence.sync.aligned;']) {
      const folder = newFolder();
      const module = { id: 'one', ptx: () => ptxOf('one').replace('ret;', `${instruction} ret;`) };
      for (const _process of ['first', 'second']) {
        const { fake, device } = open(folder);
        expect(device.module(module).function('one').name).toBe('one');
        expect(count(fake, 'cuLinkCreate')).toBe(0);
        expect(readdirSync(folder)).toEqual([expect.stringMatching(/^[0-9a-f]{40}\.sm_90\.ptx$/)]);
      }
    }
  });

  it('are of one compute capability each', () => {
    const folder = newFolder();
    for (const capability of [80, 90]) open(folder, [capability]).device.module(moduleOf('one'));
    expect(readdirSync(folder)).toHaveLength(2);
  });

  it('are left alone without a folder', () => {
    const { fake, device } = open(undefined);
    device.module(moduleOf('one'));
    expect(count(fake, 'cuLinkCreate')).toBe(0);
    expect(() => open('')).toThrow(InvalidArgumentError);
    expect(() => open(3 as never)).toThrow(/kernelFolder: expected a folder or undefined, received 3/);
  });

  it('are found by configuration where the code that makes them is known, without being made', () => {
    const module = moduleOf('one');
    const digest = digestOf(module, 'generator');
    expect(module.made()).toBe(0);
    expect(digest).not.toBe(digestOf(module, 'another generator'));
    expect(digest).not.toBe(digestOf(moduleOf('two'), 'generator'));
    expect(digestOf(module, undefined)).toBe(digestOf({ ...moduleOf('one'), id: 'renamed' }, undefined));
  });

  it('are compiled anew when damaged in any place or cut off, and never run', () => {
    const folder = newFolder();
    open(folder).device.module(moduleOf('one'));
    const file = path.join(folder, readdirSync(folder)[0] as string);
    const whole = readFileSync(file);
    const faults = fc.oneof(
      fc.record({ at: fc.nat(whole.length - 1), bit: fc.nat(7) }),
      fc.record({ length: fc.nat(whole.length - 1) }),
    );
    fc.assert(
      fc.property(faults, (fault) => {
        const bytes = Buffer.from('length' in fault ? whole.subarray(0, fault.length) : whole);
        if ('at' in fault) bytes[fault.at] = (bytes[fault.at] as number) ^ (1 << fault.bit);
        writeFileSync(file, bytes);
        const { fake, device } = open(folder);
        device.module(moduleOf('one'));
        expect(count(fake, 'cuLinkComplete')).toBe(1);
        expect(readFileSync(file)).toEqual(whole);
      }),
      { numRuns: 30 },
    );
  });

  it('give way to the driver where it refuses them, or gives no machine code', () => {
    const folder = newFolder();
    open(folder).device.module(moduleOf('one'));
    const refused = open(folder);
    refused.fake.failNext('cuModuleLoadDataEx', 300);
    expect(refused.device.module(moduleOf('one')).function('one').name).toBe('one');
    for (const name of ['cuLinkCreate', 'cuLinkAddData', 'cuLinkComplete'] as const) {
      const { fake, cuda, device } = open(newFolder());
      fake.failNext(name, 1);
      expect(device.module(moduleOf('one')).log).toContain('one');
      cuda.dispose();
      expect(fake.liveHandles.modules, name).toBe(0);
    }
    const { device } = open(newFolder());
    expect(() => device.module({ id: 'broken', ptx: () => 'nonsense' })).toThrow(/Missing .version/);
  });

  it('are taken from a folder made ahead of time, as machine code or PTX, which may be read-only', () => {
    const folder = newFolder();
    const files = new KernelFiles(folder);
    const [one, two] = [moduleOf('one'), moduleOf('two')];
    const code = new TextEncoder().encode(`\u007fELF of sm_90\n${ptxOf('one')}\0`);
    files.write(digestOf(one, undefined), { computeCapability: 90 }, 'cubin', code);
    files.write(digestOf(two, undefined), { computeCapability: 90 }, 'ptx', new TextEncoder().encode(ptxOf('two')));
    chmodSync(folder, 0o555);
    const { fake, device } = open(folder);
    device.module(one);
    expect(count(fake, 'cuLinkCreate')).toBe(0);
    device.module(two);
    expect(count(fake, 'cuLinkCreate')).toBe(1);
    chmodSync(folder, 0o755);
  });

  it('lie nowhere that cannot be a folder, without harm', () => {
    const file = path.join(scratch, 'a-file');
    writeFileSync(file, '');
    const { device } = open(file);
    expect(device.module(moduleOf('one')).function('one').name).toBe('one');
  });

  it('lie where the environment says, else in the cache of the user', () => {
    const stub = (name: string, value: string | undefined) => vi.stubEnv(name, value as string);
    stub('SAGEATTENTION_KERNELS', '/kernels');
    expect(defaultKernelFolder()).toBe('/kernels');
    stub('SAGEATTENTION_KERNELS', '');
    expect(defaultKernelFolder()).toBeUndefined();
    stub('SAGEATTENTION_KERNELS', undefined);
    stub('XDG_CACHE_HOME', '/cache');
    expect(defaultKernelFolder()).toBe('/cache/sageattention/cuda');
    stub('XDG_CACHE_HOME', '');
    expect(defaultKernelFolder()).toMatch(/\.cache\/sageattention\/cuda$/);
    vi.unstubAllEnvs();
    vi.stubGlobal('Deno', {});
    expect(defaultKernelFolder()).toBeUndefined();
    vi.unstubAllGlobals();
  });
});
