// Any ONNX model with SageAttention under it: node main.mjs model.onnx [name=size ...]
// Sizes are for the model's dynamic dimensions, e.g. batch_size=1 sequence_length=1024; those not given are 1.
import * as ort from 'onnxruntime-web';
import { withSageAttention } from 'sageattention/onnxruntime';

const [path, ...sizes] = process.argv.slice(2);
if (path === undefined) throw new Error('usage: node main.mjs model.onnx [name=size ...]');
const dimensions = Object.fromEntries(sizes.map((entry) => entry.split('=')));

const session = await withSageAttention(ort).InferenceSession.create(path);

const random = () => Math.random() * 2 - 1;
/** Bits of a float16 from 0.5 to 1, of either sign. */
const randomHalf = () => (Math.random() < 0.5 ? 0x8000 : 0) | 0x3800 | Math.floor(Math.random() * 0x400);
/** For each type an array, and what to put into it: random numbers, or ones where numbers are tokens or flags. */
const TYPES = {
  float32: [Float32Array, random],
  float16: [Uint16Array, randomHalf],
  int64: [BigInt64Array, () => 1n],
  int32: [Int32Array, () => 1],
  uint8: [Uint8Array, () => 1],
  bool: [Uint8Array, () => 1],
};
const feeds = Object.fromEntries(
  session.inputMetadata.map(({ name, type, shape }) => {
    if (!(type in TYPES)) throw new Error(`input ${name}: type ${type} needs code of its own`);
    const dims = shape.map((size) => (typeof size === 'number' ? size : Number(dimensions[size] ?? 1)));
    const [Data, value] = TYPES[type];
    const data = Data.from({ length: dims.reduce((product, size) => product * size, 1) }, value);
    return [name, new ort.Tensor(type, data, dims)];
  }),
);

const results = await session.run(feeds);
for (const [name, { type, dims }] of Object.entries(results)) console.log(`${name}: ${type} [${dims}]`);
// One line for each attention: taken, or left with onnxruntime and why.
console.table(session.sageAttention);
process.exit(0);
