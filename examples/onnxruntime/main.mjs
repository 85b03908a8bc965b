// Any ONNX model with SageAttention under it: node main.mjs model.onnx [name=size ...]
// Sizes are for the model's dynamic dimensions, e.g. batch_size=1 sequence_length=1024; those not given are 1.
import * as ort from 'onnxruntime-web';
import { withSageAttention } from 'sageattention/onnxruntime';

const [path, ...sizes] = process.argv.slice(2);
if (path === undefined) throw new Error('usage: node main.mjs model.onnx [name=size ...]');
const dimensions = Object.fromEntries(sizes.map((entry) => entry.split('=')));

const session = await withSageAttention(ort).InferenceSession.create(path);

const CLASSES = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array, bool: Uint8Array };
const feeds = Object.fromEntries(
  session.inputMetadata.map(({ name, type, shape }) => {
    const dims = shape.map((size) => (typeof size === 'number' ? size : Number(dimensions[size] ?? 1)));
    const count = dims.reduce((product, size) => product * size, 1);
    const data = new CLASSES[type](count);
    for (let i = 0; i < count; i++) data[i] = type === 'float32' ? Math.random() * 2 - 1 : type === 'int64' ? 1n : 1;
    return [name, new ort.Tensor(type, data, dims)];
  }),
);

const results = await session.run(feeds);
for (const [name, { type, dims }] of Object.entries(results)) console.log(`${name}: ${type} [${dims}]`);
// One line for each attention: taken, or left with onnxruntime and why.
console.table(session.sageAttention);
process.exit(0);
