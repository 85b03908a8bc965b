/**
 * All measurements of the WASM backend: `npx tsx bench/wasm/run.ts [--only attention|short] [--seconds 20] [--short-seconds 2]`.
 * Each number of threads and each Node is a process of its own. `attention.ts` compares kernels at 1024 and 4096 tokens, its results lie in
 * bench/results/wasm-node*.json; `short.ts` compares whole calls of 1 to 2048 tokens, in bench/results/wasm-short-node*.json. The latter
 * runs as a bundle: what tsx adds to closures takes as long as a call of one token.
 */
import { execFileSync, spawnSync } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { ensureRuntime } from '../../scripts/runtimes.ts';

const { values: flags } = parseArgs({
  options: {
    only: { type: 'string' },
    seconds: { type: 'string', default: '20' },
    'short-seconds': { type: 'string', default: '2' },
  },
});
mkdirSync('bench/results', { recursive: true });
if (flags.only !== 'attention') {
  execFileSync(process.execPath, ['--import', 'tsx', 'scripts/gpu-programs.ts'], { stdio: 'inherit' });
}
const benches = [
  {
    name: 'attention',
    file: 'wasm-',
    program: ['--import', 'tsx', 'bench/wasm/attention.ts', '--seconds', flags.seconds],
  },
  {
    name: 'short',
    file: 'wasm-short-',
    program: ['.gpu/programs/bench-wasm.mjs', '--seconds', flags['short-seconds']],
  },
];
for (const node of new Set([process.execPath, ensureRuntime('node24')])) {
  const version = spawnSync(node, ['--version'], { encoding: 'utf8' }).stdout.slice(1).split('.')[0];
  for (const threads of ['1', '2']) {
    for (const { name, file, program } of benches) {
      if (flags.only !== undefined && flags.only !== name) continue;
      const out = `bench/results/${file}node${version}-threads${threads}.json`;
      console.log(`\nNode ${version}, ${threads} thread(s), ${name}`);
      const { status } = spawnSync(node, [...program, '--threads', threads, '--out', out], { stdio: 'inherit' });
      if (status !== 0) throw new Error(`the bench ended with code ${status}`);
    }
  }
}
