/**
 * Losses of the model of `examples/train` with exact attention and with SageAttention, on tfjs' CPU backend: in Node and in a Chromium.
 * `tsx bench/wasm/training-losses.ts [steps]` writes them to bench/results/training-losses.json, from which `docs/figures.ts` draws.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import type { TfTrainableAttention } from '../../src/integrations/tfjs/index.ts';
import { launchChromium, missingChromium } from '../../test/support/chromium.ts';

const steps = Number(process.argv[2] ?? 100);
const text = readFileSync(new URL('../../src/cli/alice-chapter-1.txt', import.meta.url), 'utf8');

export interface Losses {
  readonly exact: readonly number[];
  readonly ours: readonly number[];
}

/** The same program for both: trains twice from the same start. */
const PROGRAM = `
import tf from '@tensorflow/tfjs';
import { exactAttention, train } from './examples/train/model.mjs';
import { createTrainableAttention } from './src/integrations/tfjs/index.ts';
export async function run(text, steps) {
  await tf.setBackend('cpu');
  const attention = await createTrainableAttention();
  const attend = (q, k, v) => attention(q, k, v, { isCausal: true });
  return { exact: train(text, steps, exactAttention), ours: train(text, steps, attend) };
}`;

async function inChromium(): Promise<{ version: string } & Losses> {
  const missing = missingChromium();
  if (missing !== undefined) throw new Error(`needs ${missing}`);
  const { outputFiles } = await build({
    stdin: { contents: PROGRAM, resolveDir: fileURLToPath(new URL('../..', import.meta.url)), sourcefile: 'run.mjs' },
    bundle: true,
    write: false,
    format: 'iife',
    globalName: 'training',
    platform: 'browser',
    // The default import of TensorFlow.js is that of its CommonJS build.
    mainFields: ['browser', 'main'],
    conditions: ['browser'],
    external: ['node:*'],
    logLevel: 'error',
  });
  const browser = await launchChromium('none');
  try {
    const page = await browser.newPage();
    await page.addScriptTag({ content: outputFiles[0]?.text ?? '' });
    const losses = await page.evaluate(
      ([words, count]) =>
        (globalThis as unknown as { training: { run(text: string, steps: number): Promise<Losses> } }).training.run(
          words,
          count,
        ),
      [text, steps] as const,
    );
    return { version: browser.version(), ...losses };
  } finally {
    await browser.close();
  }
}

async function inNode(): Promise<{ version: string } & Losses> {
  const { default: tf } = await import('@tensorflow/tfjs');
  const { train, exactAttention } = (await import(new URL('../../examples/train/model.mjs', import.meta.url).href)) as {
    train(text: string, steps: number, attend: TfTrainableAttention): number[];
    exactAttention: TfTrainableAttention;
  };
  const { createTrainableAttention } = await import('../../src/integrations/tfjs/index.ts');
  await tf.setBackend('cpu');
  const attention = await createTrainableAttention();
  const ours = train(text, steps, (q, k, v) => attention(q, k, v, { isCausal: true }));
  return { version: process.version, exact: train(text, steps, exactAttention), ours };
}

const rounded = ({ version, exact, ours }: { version: string } & Losses) => ({
  version,
  largestDifference: Math.max(...exact.map((loss, i) => Math.abs((ours[i] as number) / loss - 1))),
  exact: exact.map((loss) => Number(loss.toPrecision(7))),
  ours: ours.map((loss) => Number(loss.toPrecision(7))),
});

const results = { steps, chromium: rounded(await inChromium()), node: rounded(await inNode()) };
writeFileSync(
  new URL('../results/training-losses.json', import.meta.url),
  `${JSON.stringify(results, undefined, 2)}\n`,
);
for (const [name, { largestDifference, exact, ours }] of [
  ['Chromium', results.chromium],
  ['Node', results.node],
] as const) {
  console.log(
    `${name}: last loss ${exact.at(-1)} exact, ${ours.at(-1)} ours; largest difference of a step ${(100 * largestDifference).toFixed(2)}%`,
  );
}
