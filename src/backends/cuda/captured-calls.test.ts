/** Captures of any number of calls, over the fake driver. Which numbers real kernels give is in `test/cuda/checks.ts`. */
import fc from 'fast-check';
import { beforeEach, describe, expect, it } from 'vitest';
import { runSeed } from '../../../test/support/random.ts';
import { SageAttentionError } from '../../errors.ts';
import { createAttention, prepareKeyValue, sageattn } from '../../index.ts';
import { setBackend } from '../registry.ts';
import { capture } from './capture.ts';
import type { DriverFunctions } from './driver/api.ts';
import type { CudaStream } from './driver/stream.ts';
import { type CudaTensor, cudaTensorOn, download, downloadAsync, emptyCudaTensor, upload } from './tensor.ts';
import { both, open, rows, shifted, values } from './testing/stand-in.ts';

let setup: ReturnType<typeof open>;
beforeEach(async () => {
  setup = open();
  await setBackend(setup.backend);
});

/** What stands for a kernel of the caller's: zeros in a tensor. */
function clear(stream: CudaStream, { memory }: CudaTensor): void {
  const { device } = setup;
  device.call('cuMemsetD8Async', 'clearing', memory.pointer, 0, memory.byteLength, stream.handle);
}

function overwrite({ memory }: CudaTensor, first: number): void {
  const { device } = setup;
  const { data } = rows(2, first);
  const bytes = new Uint8Array(data.buffer);
  device.call('cuMemcpyHtoDAsync', 'copying', memory.pointer, bytes, bytes.length, device.stream.handle);
  device.stream.synchronize();
}

describe('captured calls', () => {
  it('run at each launch and not before, each on what the one before it wrote', async () => {
    const { fake, device } = setup;
    const q = upload(rows(2), device);
    const stream = device.createStream();
    const graph = await capture(stream, async () => {
      using first = await sageattn(q, q, q);
      using second = await sageattn(first, first, first, { stream });
      return sageattn(second, q, q);
    });
    device.stream.synchronize();
    expect(fake.executed).toEqual([]);
    graph.launch();
    expect(values(download(graph.result))).toEqual(shifted(300, 2));
    overwrite(q, 50);
    for (const on of [{ stream: device.createStream() }, { stream: { handle: fake.foreignStream(), device: 0 } }, {}]) {
      clear(device.stream, graph.result);
      graph.launch(on);
      expect(values(download(graph.result))).toEqual(shifted(300, 2, 50));
    }
    expect(fake.executed).toHaveLength(4 * 6);
    graph.dispose();
    expect(() => graph.launch()).toThrow(/disposed/);
    expect(() => download(graph.result)).toThrow(/disposed/);
    q.dispose();
    stream.dispose();
    device.trimMemory();
    // The constants of the plan.
    expect(fake.liveAllocations).toBe(1);
    expect(fake.liveHandles.graphs).toBe(0);
  });

  it('keep their order with launches of the caller, and with memory that a call gave back', async () => {
    const { fake, device } = setup;
    const q = upload(rows(2), device);
    const stream = device.streamFromHandle(fake.foreignStream());
    const kept = emptyCudaTensor(device, q.shape, 'float32');
    const graph = await capture(stream, async () => {
      const first = await sageattn(q, q, q);
      clear(stream, first);
      const second = await sageattn(first, q, q);
      first.dispose();
      const third = await sageattn(second, q, q);
      const pointers = [first, second, third].map(({ memory }) => memory.pointer);
      clear(stream, kept);
      return { second, third, pointers };
    });
    // What was given back serves again: as scratch, or as the output of a later call.
    expect(new Set(graph.result.pointers).size).toBeGreaterThanOrEqual(2);
    graph.launch();
    expect(values(download(graph.result.second))).toEqual(new Array(8).fill(100));
    expect(values(download(graph.result.third))).toEqual(new Array(8).fill(200));
    expect(values(download(kept))).toEqual(new Array(8).fill(0));
  });

  it('take other buffers without being captured again', async () => {
    const { fake, device } = setup;
    const [q, other] = [upload(rows(2), device), upload(rows(2, 500), device)];
    const stream = device.createStream();
    const graph = await capture(stream, async () => {
      const first = await sageattn(q, q, q);
      return [first, await sageattn(first, q, q), await sageattn(q, first, first)] as const;
    });
    const captures = fake.calls.filter((name) => name === 'cuStreamBeginCapture').length;
    const outputs = () => graph.result.map((view) => values(download(view)));
    const from = (first: number) => [shifted(100, 2, first), shifted(200, 2, first), shifted(100, 2, first)];
    graph.launch();
    // A launch that is under way keeps its buffers.
    graph.replace(q, other);
    expect(outputs()).toEqual(from(1));
    graph.launch();
    expect(outputs()).toEqual(from(500));
    // It does not read the first one any more.
    q.dispose();
    graph.launch();
    expect(outputs()).toEqual(from(500));
    expect(() => graph.replace(q, other)).toThrow(/tensor: expected an input of a captured call/);
    expect(fake.calls.filter((name) => name === 'cuStreamBeginCapture')).toHaveLength(captures);
    other.dispose();
    expect(() => graph.launch()).toThrow(/disposed/);
  });

  it('take only what the kernels were chosen for', async () => {
    const { device } = setup;
    const q = upload(rows(2), device);
    const graph = await capture(device.createStream(), () => sageattn(q, q, q));
    const longer = upload(rows(3), device);
    expect(() => graph.replace(q, longer)).toThrow(/replacement: expected float32 \[1,1,2,4\]/);
    const shiftedView = cudaTensorOn(device.allocate(64), 'float32', q.shape, { offset: 1 });
    expect(() => graph.replace(q, shiftedView)).toThrow(/an address of 16 n \+ 0, received 16 n \+ 4/);
    expect(() => graph.replace(q, rows(2) as never)).toThrow(/replacement: expected a CudaTensor/);
    const gone = upload(rows(2), device);
    gone.dispose();
    expect(() => graph.replace(q, gone)).toThrow(/disposed/);
    graph.launch();
    expect(values(download(graph.result))).toEqual(shifted(100, 2));
  });

  it('outlive the plans that they were captured from', async () => {
    const { device } = setup;
    const q = upload(rows(2), device);
    const attention = await createAttention<CudaTensor>(both(q));
    const graph = await capture(device.createStream(), async () => (await attention.run(both(q))).output);
    attention.dispose();
    // Memory that was freed is poisoned.
    device.stream.synchronize();
    graph.launch();
    expect(values(download(graph.result))).toEqual(shifted(100, 2));
    const { liveAllocations } = setup.fake;
    graph.dispose();
    // Output, scratch and constants.
    expect(setup.fake.liveAllocations).toBeLessThanOrEqual(liveAllocations - 3);
  });

  it('read prepared keys and values, until these grow', async () => {
    const { device } = setup;
    const keys = upload(rows(2), device);
    const q = cudaTensorOn(upload(rows(1, 1000), device).memory, 'float32', [1, 1, 1, 4]);
    const cache = await prepareKeyValue(keys, keys);
    const stream = device.createStream();
    const graph = await capture(stream, () => cache.attend(q));
    graph.launch();
    const direct = await cache.attend(q);
    expect(download(graph.result).data).toEqual(download(direct).data);
    await expect(capture(stream, () => cache.append(keys, keys))).rejects.toThrow(/keys appended outside of a capture/);
    for (let i = 0; i < 200; i++) await cache.append(keys, keys);
    expect(() => graph.launch()).toThrow(/disposed/);
  });

  it('leave calls outside of the captured function alone', async () => {
    const { fake, device } = setup;
    const q = upload(rows(2), device);
    let goOn = () => {};
    const capturing = capture(device.createStream(), async () => {
      await new Promise<void>((resolve) => {
        goOn = resolve;
      });
      return sageattn(q, q, q);
    });
    await new Promise(setImmediate);
    const beside = await sageattn(q, q, q);
    expect(values(download(beside))).toEqual(shifted(100, 2));
    beside.dispose();
    const ran = fake.executed.length;
    goOn();
    const graph = await capturing;
    expect(fake.executed).toHaveLength(ran);
    graph.launch();
    expect(values(download(graph.result))).toEqual(shifted(100, 2));
  });

  it('refuse what a graph cannot hold, and leave nothing behind', async () => {
    const { fake, device } = setup;
    const q = upload(rows(2), device);
    const stream = device.createStream();
    const calls = async () => {
      using output = await sageattn(q, q, q, { stream });
      expect(values(download(output))).toEqual(shifted(100, 2));
    };
    await calls();
    const refusals: [calls: () => Promise<unknown>, message: RegExp][] = [
      [() => sageattn(rows(2), rows(2), rows(2)), /CUDA tensors under capture/],
      [async () => download(await sageattn(q, q, q)), /nothing has been computed there yet/],
      [async () => downloadAsync(await sageattn(q, q, q)), /nothing has been computed there yet/],
      [async () => upload(rows(2), device, { stream }), /a stream that runs/],
      [async () => download(q, { stream }), /a stream that runs/],
      [async () => stream.synchronize(), /a stream that runs/],
      [() => stream.completed(), /a stream that runs/],
      [async () => stream.dispose(), /a stream that runs/],
      [() => capture(stream, async () => undefined), /a stream that runs/],
      [
        async () => {
          await sageattn(q, q, q);
          throw new Error('stop');
        },
        /stop/,
      ],
    ];
    for (const [refused, message] of refusals) {
      const { liveAllocations, liveHandles } = fake;
      await expect(capture(stream, refused)).rejects.toThrow(message);
      expect(fake.liveAllocations, String(message)).toBe(liveAllocations);
      expect(fake.liveHandles.graphs, String(message)).toBe(liveHandles.graphs);
      // The stream runs again.
      await calls();
    }
    await expect(capture(device.stream, async () => undefined)).rejects.toThrow(/a stream of your own/);
    await expect(capture(undefined as never, async () => undefined)).rejects.toThrow(/stream: expected a CudaStream/);
    await expect(capture(stream, 3 as never)).rejects.toThrow(/an asynchronous function/);
  });

  it('wait for what wrote their inputs on other streams, and freed memory waits for them', async () => {
    const { device } = setup;
    const [writing, capturing] = [device.createStream(), device.createStream()];
    const q = upload(rows(2), device);
    const graph = await capture(capturing, () => sageattn(q, q, q));
    const made = await sageattn(q, q, q, { stream: writing });
    graph.replace(q, made);
    graph.launch({ stream: device.createStream() });
    made.dispose();
    expect(values(download(graph.result))).toEqual(shifted(200, 2));
  });

  it('equal the calls themselves, for any sequence of calls and buffers', async () => {
    const seed = runSeed();
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.tuple(fc.nat(3), fc.boolean()), { minLength: 1, maxLength: 6 }),
        fc.nat(1000),
        async (steps, first) => {
          const { device } = setup;
          const inputs = [upload(rows(2), device), upload(rows(2, 30), device)];
          const run = async (given: readonly CudaTensor[]) => {
            const made = [...given];
            for (const [from, disposes] of steps) {
              const source = made[from % made.length] as CudaTensor;
              made.push(await sageattn(source, source, source));
              // What is not asked for again may go, but for the inputs and the last.
              if (disposes && made.length > 5) (made.splice(2, 1)[0] as CudaTensor).dispose();
            }
            return made.at(-1) as CudaTensor;
          };
          const stream = device.createStream();
          const graph = await capture(stream, () => run(inputs));
          overwrite(inputs[0] as CudaTensor, first);
          graph.launch();
          const direct = await run(inputs);
          expect(download(graph.result).data).toEqual(download(direct).data);
          graph.dispose();
          stream.dispose();
          for (const input of inputs) input.dispose();
        },
      ),
      { seed, numRuns: 25 },
    );
  });
});

describe('failures of the driver under capture', () => {
  async function program({ backend, cuda }: ReturnType<typeof open>): Promise<void> {
    await setBackend(backend);
    const device = cuda.device();
    using q = upload(rows(2), device);
    using other = upload(rows(2, 30), device);
    using stream = device.createStream();
    using graph = await capture(stream, async () => {
      using first = await sageattn(q, q, q);
      return sageattn(first, q, q);
    });
    graph.launch();
    graph.replace(q, other);
    graph.launch();
    expect(values(download(graph.result))).toEqual(shifted(200, 2, 30));
  }

  it('are each a typed error', async () => {
    const calm = open();
    await program(calm);
    const tried = ['cuStreamBeginCapture', 'cuStreamEndCapture', 'cuStreamGetCaptureInfo', 'cuGraphInstantiate'];
    tried.push('cuGraphExecKernelNodeSetParams', 'cuGraphLaunch', 'cuLaunchKernel', 'cuMemAllocFromPoolAsync');
    for (const name of tried) {
      const count = calm.fake.calls.filter((call) => call === name).length;
      expect(count, name).toBeGreaterThan(0);
      for (let skip = 0; skip < Math.min(count, 8); skip++) {
        const broken = open();
        broken.fake.failNext(name as keyof DriverFunctions, ...new Array<number>(skip).fill(0), 1);
        const error = await program(broken).then(
          () => undefined,
          (reason: unknown) => reason,
        );
        expect(error, `${name} #${skip}`).toBeInstanceOf(SageAttentionError);
        expect((error as Error).message, `${name} #${skip}`).toContain('CUDA_ERROR_INVALID_VALUE');
        broken.cuda.device().trimMemory();
        // The constants of a plan that is kept.
        expect(broken.fake.liveAllocations, `${name} #${skip}`).toBeLessThanOrEqual(1);
        expect(broken.fake.liveHandles.graphs, `${name} #${skip}`).toBe(0);
      }
    }
  });
});
