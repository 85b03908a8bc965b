/** Ranks that share the memory of devices: here in one process, over the fake driver. */
import { spawn } from 'node:child_process';
import { createServer } from 'node:net';
import fc from 'fast-check';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { type CudaBackend, createCudaBackend } from '../../backends/cuda/backend.ts';
import { Cuda } from '../../backends/cuda/driver/device.ts';
import { FakeCuda } from '../../backends/cuda/testing/fake-cuda.ts';
import { createSimulatedBackend } from '../../backends/cuda/testing/simulator/backend.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { type Tensor, tensor } from '../../tensor/tensor.ts';
import { createDeviceGroup, DeviceGroup } from '../group.ts';
import { type ShardedOptions, sageattnSharded } from '../sharded.ts';
import { connectSharing } from './index.ts';

const seed = runSeed();

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as { port: number };
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** Groups of as many ranks, each of which would be a process. */
async function join(backends: readonly CudaBackend[], timeout: number, devices?: readonly number[]) {
  const address = `127.0.0.1:${await freePort()}`;
  return Promise.allSettled(
    backends.map(async (backend, rank) => {
      const device = devices?.[rank];
      const options = { rank, worldSize: backends.length, address, timeout, ...(device !== undefined && { device }) };
      return new DeviceGroup(await connectSharing(backend, options));
    }),
  );
}
const groupOf = (settled: PromiseSettledResult<DeviceGroup>) => (settled as PromiseFulfilledResult<DeviceGroup>).value;

describe(`ranks of processes that share memory (SAGEATTENTION_SEED=${seed})`, () => {
  const random = new Random(seed);
  const make = (heads: number, tokens: number): Tensor =>
    tensor(random.normals(heads * tokens * 16), [1, heads, tokens, 16]);
  // Both lie in each process's memory, whichever device its rank is on.
  const joint = { k: make(2, 5), v: make(2, 5), where: 'back' } as const;
  const attnMask = tensor(
    Uint8Array.from({ length: 19 * 23 }, () => (random.uniform() < 0.7 ? 1 : 0)),
    [19, 23],
  );

  const attend = async (group: DeviceGroup, [q, k, v]: readonly Tensor[], options: ShardedOptions) => {
    const parts = await Promise.all([q, k, v].map((x) => group.shard(x as Tensor, { order: 'zigzag' })));
    const { output, lse } = await sageattnSharded(...(parts as [never, never, never]), { ...options, returnLse: true });
    const values = [toFloat32(await group.gather(output)), toFloat32(await group.gather(lse))];
    for (const each of [...parts, output, lse]) each.dispose();
    return values;
  };

  it.each([
    ['two on one device, which exchange heads', [0, 0], { ulysses: 2 }],
    ['two on two devices, with a mask and joint tokens', [1, 0], { attnMask, joint }],
    ['a causal ring of three on two devices', [0, 1, 0], { isCausal: true }],
  ])('give the bits of ranks in one process: %s', async (_, devices, options) => {
    const backend = createSimulatedBackend(80, 2);
    const inputs = [make(2, 19), make(2, 23), make(2, 23)];
    const local = await createDeviceGroup({ devices, backend });
    const expected = await attend(local, inputs, options);
    local.dispose();
    const groups = (
      await join(
        devices.map(() => backend),
        60_000,
        devices,
      )
    ).map(groupOf);
    const everyRank = groups.map(async (group) => {
      // The second call meets what the first one left.
      for (let call = 0; call < 2; call++) expect(await attend(group, inputs, options)).toEqual(expected);
      group.dispose();
    });
    await Promise.all(everyRank);
    await backend.dispose();
  });
});

describe('a rank of a process', () => {
  const opened: DeviceGroup[] = [];
  afterEach(() => {
    for (const group of opened.splice(0)) group.dispose();
  });

  /** Ranks that take turns on the only device of one driver. */
  async function groupsOf(ranks: number, timeout: number, kinds: readonly number[] = [90]) {
    const fake = new FakeCuda({ devices: kinds, memoryBytes: 2 ** 32 });
    const cuda = new Cuda(fake.api);
    const backends = Array.from({ length: ranks }, () => createCudaBackend({ open: async () => cuda }));
    const joined = await join(backends, timeout, kinds.length > 1 ? kinds.map((__, i) => i) : undefined);
    for (const each of joined) if (each.status === 'fulfilled') opened.push(each.value);
    return { joined, fake, backends };
  }
  const call = async (group: DeviceGroup, tokens = 40) => {
    const x = await group.shard(tensor(new Float32Array(2 * tokens * 16), [1, 2, tokens, 16]));
    const output = await sageattnSharded(x, x, x);
    for (const each of [x, output]) each.dispose();
  };

  it('gives back all that it shared and mapped, larger windows too', async () => {
    const { joined, fake } = await groupsOf(2, 60_000);
    const before = fake.calls.length;
    const groups = joined.map(groupOf);
    // More than the first windows hold: 8-bit keys and values of 20,000 tokens.
    await Promise.all(groups.map((group) => call(group, 40_000)));
    const mapped = () => fake.calls.filter((name) => name === 'cuIpcOpenMemHandle').length;
    expect(mapped()).toBe(4);
    for (const group of groups) group.dispose();
    await vi.waitFor(() => expect(fake.calls.filter((name) => name === 'cuIpcCloseMemHandle')).toHaveLength(4));
    await vi.waitFor(() =>
      expect(fake.calls.slice(before).filter((name) => name === 'cuMemFree').length).toBeGreaterThanOrEqual(4),
    );
    // None was freed before it was closed by whoever mapped it.
    const order = fake.calls.filter((name) => name === 'cuIpcCloseMemHandle' || name === 'cuMemFree');
    expect(order.lastIndexOf('cuIpcCloseMemHandle')).toBeLessThan(order.indexOf('cuMemFree'));
  });

  it('ends the call of every rank with a typed error that names it, and every later call', async () => {
    const { joined, backends } = await groupsOf(3, 60_000);
    const groups = joined.map(groupOf);
    vi.spyOn(backends[1] as CudaBackend, 'fixedKeyValue').mockImplementation(() => {
      throw new Error('out of luck');
    });
    const ended = await Promise.allSettled(groups.map((group) => call(group)));
    expect(ended.map(({ status }) => status)).toEqual(['rejected', 'rejected', 'rejected']);
    for (const rank of [0, 2]) {
      expect(ended[rank]).toMatchObject({
        reason: { name: 'ExecutionError', message: expect.stringMatching(/rank 1 failed: out of luck/) },
      });
      await expect(call(groups[rank] as DeviceGroup)).rejects.toMatchObject({ code: 'execution-failed' });
    }
  });

  it('fails with what the driver says, where a copy or a mapping is refused', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.constantFrom('cuMemcpyDtoDAsync' as const, 'cuIpcOpenMemHandle' as const, 'cuIpcGetMemHandle' as const),
        async (name) => {
          const { joined, fake } = await groupsOf(2, 60_000);
          if (name === 'cuMemcpyDtoDAsync') fake.failNext(name, 1);
          // The windows that hold more than the first are shared and mapped in the call.
          else fake.failNext(name, 801);
          const ended = await Promise.allSettled(joined.map((each) => call(groupOf(each), 40_000)));
          for (const each of ended) {
            expect(each).toMatchObject({
              reason: { name: expect.stringMatching(/Error$/), message: expect.stringContaining(name) },
            });
          }
        },
      ),
      { numRuns: 3, seed: seed | 0 },
    );
  });

  it('is given up after the timeout where it takes no part in a call', async () => {
    const { joined } = await groupsOf(2, 300);
    await expect(call(groupOf(joined[0] as never))).rejects.toThrow(/rank 0: .* took longer than 300 ms/);
    await expect(call(groupOf(joined[1] as never))).rejects.toThrow(/rank 0 failed: .* took longer than 300 ms/);
  });

  it('refuses devices of different kinds, on every rank', async () => {
    const { joined } = await groupsOf(2, 60_000, [90, 80]);
    for (const each of joined) {
      expect(each).toMatchObject({
        reason: { message: expect.stringMatching(/rank 0 is sm_90 on .*, rank 1 is sm_80 on /) },
      });
    }
  });

  it('is refused by a driver that shares nothing, on every rank', async () => {
    const fake = new FakeCuda();
    vi.spyOn(fake.api, 'has').mockReturnValue(false);
    const cuda = new Cuda(fake.api);
    const joined = await join(
      [0, 1].map(() => createCudaBackend({ open: async () => cuda })),
      60_000,
    );
    for (const each of joined) {
      expect(each).toMatchObject({ reason: { message: expect.stringMatching(/shares no memory between processes/) } });
    }
  });

  it('is noticed when its process dies in a call', async () => {
    const fake = new FakeCuda({ memoryBytes: 2 ** 32 });
    const cuda = new Cuda(fake.api);
    const port = await freePort();
    const { hostname } = process.getBuiltinModule('node:os');
    // It speaks as a rank does, sends a window that is no window of the other, and is killed when that waits for its keys.
    const handle = new Uint8Array(64);
    new DataView(handle.buffer).setBigUint64(0, 0x7000_0000_0000n, true);
    const hello = { kind: 'hello', rank: 1, size: 2, of: `sm_90 on ${hostname()}` };
    const window = { kind: 'posted', from: 1, to: 0, name: 'window', value: Buffer.from(handle).toString('base64') };
    const program = `const socket = require('node:net').connect(${port}, '127.0.0.1');
      socket.write(${JSON.stringify(JSON.stringify(hello))} + '\\n');
      let heard = '';
      socket.on('data', (data) => {
        heard += data;
        if (heard.includes('"window"')) socket.write(${JSON.stringify(JSON.stringify(window))} + '\\n');
        if (heard.includes('laid out')) process.kill(process.pid, 'SIGKILL');
      });`;
    const backend = createCudaBackend({ open: async () => cuda });
    const options = { rank: 0, worldSize: 2, address: `127.0.0.1:${port}`, timeout: 60_000 };
    const joining = connectSharing(backend, options);
    const child = spawn(process.execPath, ['-e', program]);
    const group = new DeviceGroup(await joining);
    await expect(call(group)).rejects.toMatchObject({ code: 'execution-failed', message: 'rank 1 has ended' });
    await expect(call(group)).rejects.toThrow('rank 1 has ended');
    group.dispose();
    child.kill();
  });

  it('takes an address, and no id', async () => {
    const backend = createCudaBackend({ open: async () => new Cuda(new FakeCuda().api) });
    const given = { rank: 0, worldSize: 2, timeout: 1000 };
    await expect(connectSharing(backend, { ...given, id: new Uint8Array(128) })).rejects.toMatchObject({
      argument: 'options.id',
    });
    await expect(connectSharing(backend, given)).rejects.toMatchObject({ argument: 'options.address' });
  });
});
