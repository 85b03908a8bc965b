import { sageattn, tensor } from 'sageattention';

const shape = [1, 8, 512, 64]; // batch, heads, tokens, head dim
const random = () =>
  tensor(
    Float32Array.from({ length: 8 * 512 * 64 }, () => Math.random() - 0.5),
    shape,
  );
const [q, k, v] = [random(), random(), random()];

const started = performance.now();
const output = await sageattn(q, k, v, { backend: 'webgpu', isCausal: true });
const milliseconds = (performance.now() - started).toFixed(0);
document.querySelector('#result').textContent = `Attention of [${output.shape}] in ${milliseconds} ms`;
