/**
 * One call on 1 to 16 threads of the WASM backend, interleaved in one process: how much faster each is than one thread.
 *
 *     node --import tsx bench/wasm/scaling.ts [--threads 1,2,4,8,16] [--tokens 64,128,256,512,1024,4096] [--seconds 2] [--short-work 24] [--out FILE]
 *
 * `--short-work` is the logarithm of the multiply-adds up to which this thread computes alone. Calls of 8 heads of 64 through the default kernel, `Backend.plan` once and `run` often. Prints and writes the median of each.
 */
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { loadavg } from 'node:os';
import { parseArgs } from 'node:util';
import { createProblem } from '../../src/attention/problem.ts';
import { chooseKernel } from '../../src/backends/choice.ts';
import { createWasmBackendOn } from '../../src/backends/wasm/backend.ts';
import { thisMachine } from '../../src/measure/machine.ts';
import { Random } from '../../src/measure/random.ts';
import { median } from '../../src/measure/statistics.ts';
import { tensor } from '../../src/tensor/tensor.ts';

const { values: flags } = parseArgs({
  options: {
    threads: { type: 'string', default: '1,2,4,8,16' },
    tokens: { type: 'string', default: '64,128,256,512,1024,4096' },
    seconds: { type: 'string', default: '2' },
    'short-work': { type: 'string' },
    out: { type: 'string' },
  },
});
const HEADS = 8;
const HEAD_DIM = 64;
/** Of one contender in a row; the first of them wakes threads that have gone to sleep. */
const BURST = 5;
const WARM_MILLISECONDS = 500;

const shortWork = flags['short-work'];
const parts = shortWork === undefined ? {} : { shortWork: 2 ** Number(shortWork) };
const backends = flags.threads.split(',').map((threads) => ({
  threads: Number(threads),
  backend: createWasmBackendOn({ threads: Number(threads) }, parts),
}));
const rows: { tokens: number; threads: number; medianMilliseconds: number; bestMilliseconds: number }[] = [];
for (const tokens of flags.tokens.split(',').map(Number)) {
  const random = new Random(tokens);
  const draw = () => tensor(random.normals(HEADS * tokens * HEAD_DIM), [1, HEADS, tokens, HEAD_DIM]);
  const inputs = { q: draw(), k: draw(), v: draw() };
  const problem = createProblem(inputs.q, inputs.k, inputs.v, {});
  const contenders = await Promise.all(
    backends.map(async ({ threads, backend }) => ({
      threads,
      plan: await backend.plan(problem, await chooseKernel(backend, problem, {})),
      times: [] as number[],
    })),
  );
  const warm = performance.now() + WARM_MILLISECONDS;
  while (performance.now() < warm) for (const { plan } of contenders) await plan.run(inputs, {});
  const end = performance.now() + Number(flags.seconds) * 1000;
  for (let round = 0; round < 3 || performance.now() < end; round++) {
    for (let turn = 0; turn < contenders.length; turn++) {
      const { plan, times } = contenders[(round + turn) % contenders.length] as (typeof contenders)[number];
      await plan.run(inputs, {});
      for (let i = 0; i < BURST; i++) {
        const start = performance.now();
        await plan.run(inputs, {});
        times.push(performance.now() - start);
      }
    }
  }
  const one = median((contenders[0] as (typeof contenders)[number]).times);
  const found = contenders.map(({ threads, times }) => {
    const middle = median(times);
    rows.push({ tokens, threads, medianMilliseconds: middle, bestMilliseconds: Math.min(...times) });
    return `${threads}: ${middle.toFixed(2)} ms (${(one / middle).toFixed(2)}x)`;
  });
  console.log(`${String(tokens).padStart(5)} tokens  ${found.join('  ')}`);
}
if (flags.out !== undefined) {
  const commit =
    process.env.SAGEATTENTION_COMMIT ?? execFileSync('git', ['rev-parse', 'HEAD'], { encoding: 'utf8' }).trim();
  const report = {
    ...thisMachine(),
    loadAverage: loadavg()[0],
    commit,
    date: new Date().toISOString(),
    ...{ heads: HEADS, headDim: HEAD_DIM, shortWork, rows },
  };
  writeFileSync(flags.out, `${JSON.stringify(report, null, 2)}\n`);
}
await Promise.all(backends.map(({ backend }) => backend.dispose()));
