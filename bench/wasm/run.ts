/**
 * All measurements of the WASM backend: `npx tsx bench/wasm/run.ts [seconds]`. Each number of threads and each Node is
 * a process of its own; the results lie in bench/results/wasm-*.json.
 */
import { spawnSync } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { ensureRuntime } from '../../scripts/runtimes.ts';

const seconds = process.argv[2] ?? '20';
mkdirSync('bench/results', { recursive: true });
for (const node of new Set([process.execPath, ensureRuntime('node24')])) {
  const version = spawnSync(node, ['--version'], { encoding: 'utf8' }).stdout.slice(1).split('.')[0];
  for (const threads of ['1', '2']) {
    const out = `bench/results/wasm-node${version}-threads${threads}.json`;
    console.log(`\nNode ${version}, ${threads} thread(s)`);
    const { status } = spawnSync(
      node,
      ['--import', 'tsx', 'bench/wasm/attention.ts', '--threads', threads, '--seconds', seconds, '--out', out],
      { stdio: 'inherit' },
    );
    if (status !== 0) throw new Error(`the bench ended with code ${status}`);
  }
}
