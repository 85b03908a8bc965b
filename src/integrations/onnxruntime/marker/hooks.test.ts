import { expect, it } from 'vitest';
import { DeviceHooks } from './hooks.ts';

/** The part of a device that records, and what was recorded. */
function fakeDevice() {
  const recorded: string[] = [];
  const made: string[] = [];
  class Pass {
    setPipeline({ label }: { label: string }) {
      recorded.push(`pipeline ${label}`);
    }
    setBindGroup(index: number, { label }: { label: string }) {
      recorded.push(`group ${index} ${label}`);
    }
    dispatchWorkgroups(...counts: number[]) {
      recorded.push(`dispatch ${counts.filter((count) => count !== undefined)}`);
    }
  }
  class Device {
    createShaderModule = ({ code }: { code: string }) => ({ code });
    createBindGroup = ({ label }: { label: string }) => {
      made.push(label);
      return { label };
    };
    createPipelineLayout = ({ bindGroupLayouts }: { bindGroupLayouts: object[] }) => ({ bindGroupLayouts });
    createComputePipeline = ({ label }: { label: string }) => {
      const layout = {};
      return { label, getBindGroupLayout: () => layout };
    };
    createComputePipelineAsync = async (descriptor: { label: string }) => this.createComputePipeline(descriptor);
    createCommandEncoder = () => ({ beginComputePass: () => new Pass() });
  }
  return { device: new Device() as unknown as GPUDevice, recorded, made, Pass };
}

async function withMarker() {
  const { device, recorded, made, Pass } = fakeDevice();
  const hooks = DeviceHooks.on(device);
  expect(DeviceHooks.on(device)).toBe(hooks);
  const pipelineOf = (code: string) =>
    device.createComputePipelineAsync({
      label: code,
      layout: 'auto',
      compute: { module: device.createShaderModule({ code }) },
    });
  const [marker, other] = [await pipelineOf('marker'), await pipelineOf('other')];
  const entries = [{ binding: 0, resource: { buffer: 'q' as unknown as GPUBuffer } }];
  /** As onnxruntime does it: a bind group for each dispatch, of its pipeline's layout. */
  const record = (pipelines = [other, marker, other]) => {
    recorded.length = 0;
    made.length = 0;
    const pass = device.createCommandEncoder().beginComputePass();
    for (const pipeline of pipelines) {
      const layout = pipeline.getBindGroupLayout(0);
      const group = device.createBindGroup({ label: 'g', layout, entries });
      pass.setPipeline(pipeline);
      pass.setBindGroup(0, group);
      pass.dispatchWorkgroups(1, 2, 3);
    }
    return recorded.join('; ');
  };
  const misuse = () => {
    const group = device.createBindGroup({ label: 'g', layout: marker.getBindGroupLayout(0), entries });
    recorded.length = 0;
    const pass = device.createCommandEncoder().beginComputePass();
    pass.setPipeline(other);
    pass.setBindGroup(0, group);
    pass.dispatchWorkgroups(1, 2, 3);
    return recorded.join('; ');
  };
  return { hooks, device, record, misuse, made, entries, marker, prototype: Pass.prototype };
}

const OTHER = 'pipeline other; group 0 g; dispatch 1,2,3';
const MARKER = 'pipeline marker; group 0 g; dispatch 1,2,3';

it('records a marker as it is outside of a run with markers, and the work in its place inside', async () => {
  const { hooks, record, entries, marker, prototype } = await withMarker();
  const before = Object.getOwnPropertyDescriptors(prototype);
  expect(record()).toBe([OTHER, MARKER, OTHER].join('; '));
  const work = (pass: GPUComputePassEncoder, given: unknown) => {
    expect(given).toBe(entries);
    pass.dispatchWorkgroups(7);
  };
  await hooks.replacing(new Map([['marker', work]]), async () => {
    expect(record()).toBe([OTHER, 'dispatch 7', OTHER].join('; '));
    expect([hooks.replaced, hooks.failure]).toEqual([1, undefined]);
    expect(record([marker, marker])).toBe('dispatch 7; dispatch 7');
  });
  expect([hooks.replaced, record()]).toEqual([0, [OTHER, MARKER, OTHER].join('; ')]);
  expect(Object.getOwnPropertyDescriptors(prototype)).toEqual(before);
});

it('makes no bind group for a marker', async () => {
  const { hooks, record, misuse, made, entries } = await withMarker();
  const whole = [OTHER, MARKER, OTHER].join('; ');
  expect([record(), made.length]).toEqual([whole, 3]);
  const work = (pass: GPUComputePassEncoder, given: unknown) => {
    expect(given).toBe(entries);
    pass.dispatchWorkgroups(7);
  };
  await hooks.replacing(new Map([['marker', work]]), async () => {
    expect(record()).toBe([OTHER, 'dispatch 7', OTHER].join('; '));
    expect([hooks.replaced, hooks.failure, made.length]).toEqual([1, undefined, 2]);
    // It is none that a device could bind.
    misuse();
    expect(hooks.failure).toContain('with the bind group of another');
  });
  expect([record(), made.length]).toEqual([whole, 3]);
});

it("makes one where passes do not come from it, so that nothing but a device's own object is bound", async () => {
  const { hooks, device, record, made, prototype } = await withMarker();
  const work = () => expect.unreachable();
  const own = device.createCommandEncoder;
  device.createCommandEncoder = () =>
    ({ beginComputePass: () => Object.create(prototype) }) as unknown as GPUCommandEncoder;
  await hooks.replacing(new Map([['marker', work]]), async () => {
    expect([record(), made.length]).toEqual([[OTHER, MARKER, OTHER].join('; '), 3]);
    expect([hooks.replaced, hooks.failure]).toEqual([0, undefined]);
  });
  device.createCommandEncoder = own;
});

it('throws nothing into the caller, keeps the first failure and does no more', async () => {
  const { hooks, record } = await withMarker();
  let calls = 0;
  const work = () => {
    calls++;
    throw new Error(`failure ${calls}`);
  };
  await hooks.replacing(new Map([['marker', work]]), async () => {
    record();
    expect(record()).not.toContain(MARKER);
    expect([hooks.failure, hooks.replaced, calls]).toEqual(['failure 1', 2, 1]);
  });
  expect(hooks.failure).toBeUndefined();
});

it('tells the dispatches of a watched run, and lets work of one device wait for its turn', async () => {
  const { hooks, record } = await withMarker();
  const order: string[] = [];
  const first = hooks.exclusive(async () => {
    const seen = await hooks.watch(async () => void record());
    expect(seen.map(({ code }) => code)).toEqual(['other', 'marker', 'other']);
    order.push('first');
    throw new Error('no');
  });
  const second = hooks.exclusive(async () => order.push('second'));
  await expect(first).rejects.toThrow('no');
  await second;
  expect(order).toEqual(['first', 'second']);
  expect([hooks.tagOf('a'), hooks.tagOf('b'), hooks.tagOf('a')]).toEqual([0, 1, 0]);
});
