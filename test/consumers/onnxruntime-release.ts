/**
 * A diffusion transformer of two blocks under the onnxruntime-web that is installed beside this program, on both of its providers. Prints one line
 * of JSON. `scripts/onnxruntime-releases.ts` runs it with each release.
 */
import { messageOf } from '../../src/errors.ts';
import { attentionReportOf, enableNodeWebgpu, withSageAttention } from '../../src/integrations/onnxruntime/index.ts';
import { compare } from '../../src/reference/metrics.ts';
import { GraphBuilder } from '../support/graph-builder.ts';
import { buildDiT } from '../support/models.ts';
import { Random, runSeed } from '../support/random.ts';

const SIZE = { heads: 2, headDim: 40, blocks: 2 };
const WIDTH = SIZE.heads * SIZE.headDim;
const TOKENS = 50;

type Ort = typeof import('onnxruntime-web');
const seed = runSeed();

function model(): Uint8Array {
  const g = new GraphBuilder(new Random(seed));
  buildDiT(g, SIZE);
  return g.build();
}

/** What became of the attentions, and the cosine similarity with the same onnxruntime alone on a CPU; or what failed. */
async function outcome(load: () => Promise<Ort>, provider: 'wasm' | 'webgpu'): Promise<string> {
  try {
    const ort = await load();
    ort.env.wasm.numThreads = 1;
    ort.env.logLevel = 'error';
    const bytes = model();
    const random = new Random(seed + 1);
    const feeds = {
      x: new ort.Tensor('float32', random.normals(TOKENS * WIDTH), [1, TOKENS, WIDTH]),
      c: new ort.Tensor('float32', random.normals(WIDTH), [1, WIDTH]),
    };
    const plain = await ort.InferenceSession.create(bytes, { executionProviders: ['wasm'] });
    const exact = (await plain.run(feeds)).y?.data as Float32Array;
    const session = await withSageAttention(ort, { minTokens: 0 }).InferenceSession.create(bytes, {
      executionProviders: [provider],
    });
    await session.run(feeds);
    const actual = (await session.run(feeds)).y?.data as Float32Array;
    const { cosineSimilarity } = compare(actual, exact);
    const report = attentionReportOf(session) ?? [];
    const became = report.map(({ path, cutReason, reason }) =>
      provider === 'webgpu' && path === 'cut' ? `cut: ${cutReason}` : (path ?? `left: ${reason}`),
    );
    if (!(cosineSimilarity > 0.999)) return `WRONG: cosine similarity ${cosineSimilarity} (${became[0]})`;
    return `${report.length} x ${[...new Set(became)].join(', ')}`;
  } catch (error) {
    return `failed: ${(messageOf(error).split('\n')[0] as string).slice(0, 160)}`;
  }
}

const handle = setInterval(() => {}, 1e9);
const wasm = await outcome(() => import('onnxruntime-web'), 'wasm');
await enableNodeWebgpu();
const webgpu = await outcome(() => import('onnxruntime-web/webgpu') as Promise<unknown> as Promise<Ort>, 'webgpu');
clearInterval(handle);
console.log(`RESULT ${JSON.stringify({ seed, wasm, webgpu })}`);
process.exit(0);
