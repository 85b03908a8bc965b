/** Ranks that NCCL connects: here in one process, over the fake driver and a fake NCCL. */
import { spawn } from 'node:child_process';
import { createServer } from 'node:net';
import fc from 'fast-check';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { Random, runSeed } from '../../../test/support/random.ts';
import { createCudaBackend } from '../../backends/cuda/backend.ts';
import { Cuda } from '../../backends/cuda/driver/device.ts';
import { FakeCuda } from '../../backends/cuda/testing/fake-cuda.ts';
import { createSimulatedBackend } from '../../backends/cuda/testing/simulator/backend.ts';
import { toFloat32 } from '../../tensor/access.ts';
import { type Tensor, tensor } from '../../tensor/tensor.ts';
import { createDeviceGroup, DeviceGroup } from '../group.ts';
import { type ShardedOptions, sageattnSharded } from '../sharded.ts';
import { FakeNccl } from '../testing/fake-nccl.ts';
import { connectProcess, newNcclId } from './index.ts';

const seed = runSeed();

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as { port: number };
  await new Promise((resolve) => server.close(resolve));
  return port;
}

describe(`ranks that NCCL connects (SAGEATTENTION_SEED=${seed})`, () => {
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
    ['a ring of three, of which lengths divide unevenly, with a mask and joint tokens', 3, { attnMask, joint }],
    ['two rows of two, causal', 4, { ulysses: 2, isCausal: true }],
    ['one rank, which finds itself', 1, {}],
  ])('give the bits of ranks in one process: %s', async (_, ranks, options) => {
    const backend = createSimulatedBackend(80, ranks);
    const nccl = new FakeNccl((await backend.cuda()).api);
    const inputs = [make(2, 19), make(2, 23), make(2, 23)];
    const local = await createDeviceGroup({ devices: Array.from({ length: ranks }, (__, rank) => rank), backend });
    const expected = await attend(local, inputs, options);
    local.dispose();
    const id = newNcclId(nccl.api);
    const everyRank = Array.from({ length: ranks }, async (__, rank) => {
      const transport = await connectProcess(
        backend,
        { rank, worldSize: ranks, id, timeout: 60_000 },
        async () => nccl.api,
      );
      const group = new DeviceGroup(transport);
      expect([group.size, group.ranks]).toEqual([ranks, [rank]]);
      for (let call = 0; call < (ranks === 1 ? 2 : 1); call++)
        expect(await attend(group, inputs, options)).toEqual(expected);
      group.dispose();
    });
    await Promise.all(everyRank);
    await vi.waitFor(() => expect(nccl.live).toBe(0));
    expect(nccl.aborted).toBe(0);
    await backend.dispose();
  });
});

describe('a rank that fails', () => {
  const opened: DeviceGroup[] = [];
  afterEach(() => {
    for (const group of opened.splice(0)) group.dispose();
  });

  /** Groups of ranks of one process on devices of these kinds. */
  async function groupsOf(
    ranks: number,
    timeout: number,
    kinds = Array.from({ length: ranks }, () => 90),
    deviceOf = (rank: number) => rank,
  ) {
    const fake = new FakeCuda({ devices: kinds, memoryBytes: 2 ** 32 });
    const cuda = new Cuda(fake.api);
    const nccl = new FakeNccl(fake.api);
    const address = `127.0.0.1:${await freePort()}`;
    const backends = kinds.map(() => createCudaBackend({ open: async () => cuda }));
    const joined = await Promise.allSettled(
      backends.map(async (backend, rank) => {
        const options = { rank, worldSize: ranks, address, device: deviceOf(rank), timeout };
        const group = new DeviceGroup(await connectProcess(backend, options, async () => nccl.api));
        opened.push(group);
        return group;
      }),
    );
    return { joined, nccl, backends, address };
  }
  const groupOf = (settled: PromiseSettledResult<DeviceGroup>) =>
    (settled as PromiseFulfilledResult<DeviceGroup>).value;
  const call = async (group: DeviceGroup) => {
    const x = await group.shard(tensor(new Float32Array(2 * 40 * 16), [1, 2, 40, 16]));
    await sageattnSharded(x, x, x);
  };

  it('ends the call of every rank with a typed error that names it, and every later call', async () => {
    const { joined, nccl, backends } = await groupsOf(3, 60_000);
    const groups = joined.map(groupOf);
    const failing = backends[1] as (typeof backends)[number];
    vi.spyOn(failing, 'fixedKeyValue').mockImplementation(() => {
      throw new Error('out of luck');
    });
    const ended = await Promise.allSettled(groups.map(call));
    expect(ended.map(({ status }) => status)).toEqual(['rejected', 'rejected', 'rejected']);
    for (const rank of [0, 2]) {
      expect(ended[rank]).toMatchObject({
        reason: { name: 'ExecutionError', message: expect.stringMatching(/rank 1 failed: out of luck/) },
      });
      await expect(call(groups[rank] as DeviceGroup)).rejects.toMatchObject({ code: 'execution-failed' });
    }
    expect(nccl.live).toBe(0);
    expect(nccl.aborted).toBe(3);
  });

  it('is given up after the timeout where it takes no part in a call', async () => {
    const { joined } = await groupsOf(2, 300);
    await expect(call(groupOf(joined[0] as never))).rejects.toThrow(/rank 0: .* took longer than 300 ms/);
    await expect(call(groupOf(joined[1] as never))).rejects.toThrow(/rank 0 failed: .* took longer than 300 ms/);
  });

  it("reports NCCL's own error", async () => {
    const { joined, nccl } = await groupsOf(2, 60_000);
    nccl.break(0, 6);
    const ended = await Promise.allSettled(joined.map(groupOf).map(call));
    expect(ended).toMatchObject([
      { reason: { message: expect.stringMatching(/ncclRemoteError/) } },
      { reason: { message: expect.stringMatching(/rank 0 failed: .*ncclRemoteError/) } },
    ]);
  });

  it('refuses devices of different kinds, on every rank', async () => {
    const { joined } = await groupsOf(2, 60_000, [90, 80]);
    for (const each of joined) {
      expect(each).toMatchObject({ reason: { message: expect.stringMatching(/rank 0 is sm_90, rank 1 is sm_80/) } });
    }
  });

  it('refuses two ranks on one device, on every rank', async () => {
    const { joined } = await groupsOf(3, 60_000, [90, 90, 90], (rank) => rank % 2);
    for (const each of joined) {
      expect(each).toMatchObject({
        reason: { message: expect.stringMatching(/ranks (0 and 2|2 and 0) are both on device 00:00:00 of /) },
      });
    }
  });

  it('is missed where it does not come', async () => {
    const fake = new FakeCuda();
    const backend = createCudaBackend({ open: async () => new Cuda(fake.api) });
    const options = { rank: 0, worldSize: 3, address: `127.0.0.1:${await freePort()}`, timeout: 200 };
    await expect(connectProcess(backend, options, async () => new FakeNccl(fake.api).api)).rejects.toThrow(
      /ranks 1, 2 of 3 did not come within 200 ms/,
    );
  });

  it('is noticed when its process dies', async () => {
    const fake = new FakeCuda();
    const cuda = new Cuda(fake.api);
    const nccl = new FakeNccl(fake.api);
    const port = await freePort();
    // It speaks as a rank does, and is killed in the middle of a call.
    const program = `const socket = require('node:net').connect(${port}, '127.0.0.1');
      socket.write(JSON.stringify({ kind: 'hello', rank: 1, size: 2, of: 'sm_90' }) + '\\n');
      socket.on('data', () => setTimeout(() => process.kill(process.pid, 'SIGKILL'), 100));`;
    const server = createCudaBackend({ open: async () => cuda });
    const options = { rank: 0, worldSize: 2, address: `127.0.0.1:${port}`, timeout: 60_000 };
    const joining = connectProcess(server, options, async () => nccl.api);
    const child = spawn(process.execPath, ['-e', program]);
    // NCCL waits for it to connect; what ends that is that the process is gone.
    await expect(joining).rejects.toThrow(/rank 1 has ended/);
    expect(nccl.aborted).toBe(1);
    child.kill();
  });
});

describe('connectProcess', () => {
  it('names the option that is wrong', async () => {
    const fake = new FakeCuda();
    const backend = createCudaBackend({ open: async () => new Cuda(fake.api) });
    const good = { rank: 0, worldSize: 2, address: 'host:1', timeout: 1000 };
    await fc.assert(
      fc.asyncProperty(
        fc.constantFrom(
          { rank: 2 },
          { rank: -1 },
          { worldSize: 0 },
          { address: 'host' },
          { address: 'host:99999' },
          { timeout: 0 },
          { id: new Uint8Array(3) },
          { address: undefined as never },
        ),
        async (wrong) => {
          const [option] = Object.keys(wrong);
          await expect(connectProcess(backend, { ...good, ...wrong })).rejects.toMatchObject({
            code: 'invalid-option',
            argument: `options.${option}`,
          });
        },
      ),
      { numRuns: 8 },
    );
    // Started by hand, without a launcher.
    await expect(connectProcess(backend, { timeout: 1000 })).rejects.toMatchObject({
      argument: 'options.worldSize',
      expected: expect.stringMatching(/sageattention launch/),
    });
  });
});
