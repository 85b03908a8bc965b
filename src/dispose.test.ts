import { afterEach, expect, it, vi } from 'vitest';

afterEach(() => {
  vi.unstubAllGlobals();
  vi.resetModules();
});

it('in an engine without Symbol.dispose no class has a method called "undefined"', async () => {
  const { dispose: _dispose, asyncDispose: _asyncDispose, ...known } = Object.getOwnPropertyDescriptors(Symbol);
  const real = Symbol;
  const bare = Object.defineProperties((description?: string) => real(description), known as PropertyDescriptorMap);
  vi.stubGlobal('Symbol', bare);
  vi.resetModules();
  const { DISPOSE, ASYNC_DISPOSE } = await import('./dispose.ts');
  expect(DISPOSE).toBe(Symbol.for('Symbol.dispose'));
  expect(ASYNC_DISPOSE).toBe(Symbol.for('Symbol.asyncDispose'));
  const { Cuda } = await import('./backends/cuda/driver/device.ts');
  const { CudaGraph } = await import('./backends/cuda/driver/graph.ts');
  const { upload } = await import('./backends/cuda/tensor.ts');
  const { gpuTensor } = await import('./backends/webgpu/tensor.ts');
  const { FakeCuda } = await import('./backends/cuda/testing/fake-cuda.ts');
  const { tensor } = await import('./tensor/tensor.ts');
  const device = new Cuda(new FakeCuda().api).device();
  const made = [
    device.allocate(8),
    device.allocatePinned(8),
    device.createEvent(),
    new CudaGraph(device, () => {}),
    upload(tensor(new Float32Array(1), [1]), device),
    device.createStream(),
    gpuTensor({ size: 4 } as GPUBuffer, 'float32', [1]),
  ];
  for (const object of made) {
    expect('undefined' in object, object.constructor.name).toBe(false);
    const dispose = (object as unknown as Record<symbol, () => void>)[DISPOSE];
    expect(dispose, object.constructor.name).toBeTypeOf('function');
    dispose?.call(object);
  }
});
