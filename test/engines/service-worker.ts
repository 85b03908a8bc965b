/** A service worker, which may not use `import()`: with `?embedded` the kernels come with it, without they cannot come. */
import { createWasmBackend } from '../../src/backends/wasm/embedded.ts';
import { sageattn, setBackend, tensor } from '../../src/index.ts';

async function attend(): Promise<string> {
  if (new URL(location.href).searchParams.has('embedded')) await setBackend(createWasmBackend());
  const x = tensor(Float32Array.from({ length: 512 }, Math.random), [1, 1, 16, 32]);
  const output = await sageattn(x, x, x);
  return output.data.every(Number.isFinite) ? `ran ${output.shape}` : 'not finite';
}

addEventListener('message', ({ data, source }: MessageEvent) => {
  attend()
    .catch(String)
    .then((text) => source?.postMessage({ id: data, text } as never));
});
