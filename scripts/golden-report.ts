/**
 * Prints, as Markdown, the accuracy of the official kernels on the golden inputs and of the reference's emulation of
 * each.
 *
 *     npx tsx scripts/golden-report.ts
 */

import type { Accuracy } from '../src/reference/metrics.ts';
import { goldenAccuracy } from '../test/golden/accuracy.ts';
import { GOLDEN_NAMES, type GoldenName } from '../test/golden/golden.ts';

const cells = ({ cosineSimilarity, relativeL1, rmse }: Accuracy) =>
  `${cosineSimilarity.toFixed(6)} | ${relativeL1.toFixed(5)} | ${rmse.toExponential(2)}`;

/** A table of one golden file. */
export function goldenTable(name: GoldenName): string {
  const rows = goldenAccuracy(name).map(
    ({ kernel, official, emulated, between }) =>
      `| \`${kernel}\` | ${cells(official)} | ${cells(emulated)} | ${between.relativeL1.toFixed(5)} |`,
  );
  return [
    `### ${name}`,
    '',
    '| kernel | official: cosine | relative L1 | RMSE | emulated: cosine | relative L1 | RMSE | between them: relative L1 |',
    '|---|---|---|---|---|---|---|---|',
    ...rows,
  ].join('\n');
}

if (import.meta.url === new URL(process.argv[1] ?? '', 'file:').href) {
  console.log(GOLDEN_NAMES.map(goldenTable).join('\n\n'));
}
