// One attention of a video transformer divided among devices: video tokens are sharded, the text's keys and values are on every rank.
//
//   node main.mjs --devices 0,1,2,3 --frames 21     on NVIDIA cards (npm install koffi)
//   npx sageattention launch -n 4 main.mjs --nccl   on NVIDIA cards, a process each
//   npx sageattention launch -n 2 main.mjs --ipc    on NVIDIA cards of one machine, or two processes on one card, without NCCL
//   node main.mjs --ranks 4                         the same in memory, to try it without any
import { parseArgs } from 'node:util';
import { fromFloat32, sageattn, toFloat32 } from 'sageattention';
import { createDeviceGroup, sageattnSharded } from 'sageattention/distributed';
import { compare } from 'sageattention/reference';

const { values: flags } = parseArgs({
  options: {
    devices: { type: 'string' },
    nccl: { type: 'boolean', default: false },
    ipc: { type: 'boolean', default: false },
    ranks: { type: 'string', default: '4' },
    ulysses: { type: 'string', default: '2' },
    frames: { type: 'string', default: '2' },
    heads: { type: 'string', default: '4' },
  },
});
// A latent frame of 30 x 52 patches, and 226 tokens of text, as in video transformers of 480p.
const [tokens, text, heads, dim] = [Number(flags.frames) * 30 * 52, 226, Number(flags.heads), 128];
const backend = flags.nccl || flags.ipc || flags.devices !== undefined ? 'cuda' : 'wasm';

let state = 1;
/** About normal, the same at every start. */
function normal() {
  let sum = -6;
  for (let i = 0; i < 12; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    sum += state / 2 ** 32;
  }
  return sum;
}
const draw = (length) =>
  fromFloat32(Float32Array.from({ length: heads * length * dim }, normal), [1, heads, length, dim], 'float16');

const [q, k, v] = [draw(tokens), draw(tokens), draw(tokens)];
const joint = { k: draw(text), v: draw(text), where: 'front' };

/** Every process of several runs all of this, and holds its own part. */
const where = () => {
  if (flags.nccl || flags.ipc) return { transport: flags.nccl ? 'nccl' : 'ipc' };
  return flags.devices === undefined
    ? { ranks: Number(flags.ranks) }
    : { devices: flags.devices.split(',').map(Number) };
};
const group = await createDeviceGroup(where());
const shards = await Promise.all([q, k, v].map((x) => group.shard(x)));
const options = { ulysses: Number(flags.ulysses), joint };
(await sageattnSharded(...shards, options)).dispose();
let start = performance.now();
const output = await sageattnSharded(...shards, options);
const divided = toFloat32(await group.gather(output));
const together = performance.now() - start;

/** Text first, then video, in one tensor. */
const join = (a, b) => {
  const [x, y] = [toFloat32(a), toFloat32(b)];
  const values = new Float32Array(x.length + y.length);
  for (let h = 0; h < heads; h++) {
    values.set(x.subarray(h * text * dim, (h + 1) * text * dim), h * (text + tokens) * dim);
    values.set(y.subarray(h * tokens * dim, (h + 1) * tokens * dim), (h * (text + tokens) + text) * dim);
  }
  return fromFloat32(values, [1, heads, text + tokens, dim], 'float16');
};
const [wholeK, wholeV] = [join(joint.k, k), join(joint.v, v)];
await sageattn(q, wholeK, wholeV, { backend });
start = performance.now();
const one = toFloat32(await sageattn(q, wholeK, wholeV, { backend }));
const alone = performance.now() - start;

const { relativeL1 } = compare(divided, Float64Array.from(one));
const say = (line) => group.ranks.includes(0) && console.log(line);
say(`${tokens} video and ${text} text tokens, ${heads} heads of ${dim}, ${group.size} ranks, backend ${backend}`);
say(`divided, with gathering: ${together.toFixed(1)} ms; one device: ${alone.toFixed(1)} ms`);
say(`relative L1 between them: ${relativeL1.toFixed(4)}`);
for (const tensor of [...shards, output]) tensor.dispose();
group.dispose();
