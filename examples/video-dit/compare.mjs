// Speed and output of a diffusion transformer with SageAttention and without; see README.md.
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { enableNodeWebgpu, withSageAttention } from 'sageattention/onnxruntime';
import { compare } from 'sageattention/reference';

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    provider: { type: 'string', default: 'webgpu' },
    dim: { type: 'string', multiple: true, default: [] },
    external: { type: 'string', multiple: true, default: [] },
    runs: { type: 'string', default: '5' },
    'min-tokens': { type: 'string' },
  },
});
const [file] = positionals;
if (file === undefined)
  throw new Error('usage: node compare.mjs dit.onnx [--provider webgpu|wasm] [--dim name=size] [--runs 5]');

if (options.provider === 'webgpu') await enableNodeWebgpu();
const ort = await (options.provider === 'webgpu' ? import('onnxruntime-web/webgpu') : import('onnxruntime-web'));
// The WebGPU build finds no workers and reads no files in Node.
if (options.provider === 'webgpu') ort.env.wasm.numThreads = 1;
const model = new Uint8Array(await readFile(file));
const sessionOptions = {
  executionProviders: [options.provider],
  externalData: await Promise.all(
    options.external.map(async (name) => ({ path: path.basename(name), data: new Uint8Array(await readFile(name)) })),
  ),
};
const minTokens = options['min-tokens'] === undefined ? {} : { minTokens: Number(options['min-tokens']) };
const sizes = Object.fromEntries(options.dim.map((entry) => entry.split('=')));

/** Standard normal numbers, the same at every start. */
let state = 1;
function normal() {
  const uniform = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state + 0.5) / 2 ** 32;
  };
  return Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
}

/** float16 bits of a number, rounded to nearest. */
function half(value) {
  const [bits] = new Uint32Array(Float32Array.of(value).buffer);
  const exponent = ((bits >>> 23) & 255) - 112;
  const sign = (bits >>> 16) & 0x8000;
  if (exponent <= 0) return sign | Math.round(Math.abs(value) * 2 ** 24);
  return sign | ((exponent << 10) + (((bits & 0x7fffff) + 0x1000) >>> 13));
}

function randomTensor({ type, shape }) {
  const dims = shape.map((size) => (typeof size === 'number' && size < 2 ** 31 ? size : Number(sizes[size] ?? 1)));
  const count = dims.reduce((product, size) => product * size, 1);
  switch (type) {
    case 'float32':
      return new ort.Tensor(type, Float32Array.from({ length: count }, normal), dims);
    case 'float16': {
      const bits = Uint16Array.from({ length: count }, () => half(normal()));
      return new ort.Tensor(type, globalThis.Float16Array ? new globalThis.Float16Array(bits.buffer) : bits, dims);
    }
    case 'int64':
      return new ort.Tensor(type, new BigInt64Array(count).fill(500n), dims);
    case 'bool':
      return new ort.Tensor(type, new Uint8Array(count).fill(1), dims);
    default:
      throw new Error(`an input of type ${type} needs code of its own`);
  }
}

function numbers({ type, data }) {
  if (type !== 'float16' || !(data instanceof Uint16Array)) return Float32Array.from(data, Number);
  return Float32Array.from(data, (bits) => {
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    return (
      (bits & 0x8000 ? -1 : 1) * (exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15))
    );
  });
}

async function measure(InferenceSession) {
  const session = await InferenceSession.create(model, sessionOptions);
  state = 1;
  const feeds = Object.fromEntries(session.inputMetadata.map((input) => [input.name, randomTensor(input)]));
  let results = await session.run(feeds);
  const times = [];
  for (let run = 0; run < Number(options.runs); run++) {
    const start = performance.now();
    results = await session.run(feeds);
    times.push(performance.now() - start);
  }
  const output = numbers(results[session.outputNames[0]]);
  const report = session.sageAttention;
  await session.release();
  return { output, report, median: times.sort((a, b) => a - b)[Math.floor(times.length / 2)] };
}

const before = await measure(ort.InferenceSession);
const after = await measure(withSageAttention(ort, minTokens).InferenceSession);
const { cosineSimilarity, relativeL1 } = compare(after.output, before.output);
console.log(
  `without: ${before.median.toFixed(1)} ms   with: ${after.median.toFixed(1)} ms   ${(before.median / after.median).toFixed(2)}x`,
);
console.log(`output: cosine similarity ${cosineSimilarity.toFixed(6)}, relative L1 ${relativeL1.toFixed(6)}`);
console.table(after.report);
process.exit(0);
