/** Tables, progress bars and number formats of the command line. Results go to stdout, progress to stderr. */
import { Presets, SingleBar } from 'cli-progress';
import Table from 'cli-table3';
import { Help } from 'commander';
import type { Accuracy } from './library.ts';

/** Styles only where someone looks at them; https://no-color.org. */
const styled = process.stdout.isTTY === true && !process.env.NO_COLOR;
const style = (code: number, text: string) => (styled ? `\u001b[${code}m${text}\u001b[0m` : text);
export const bold = (text: string) => style(1, text);
export const dim = (text: string) => style(2, text);

export const print = (text = ''): void => {
  process.stdout.write(`${text}\n`);
};

const RULED = {
  top: '',
  'top-mid': '',
  'top-left': '',
  'top-right': '',
  bottom: '',
  'bottom-mid': '',
  'bottom-left': '',
  'bottom-right': '',
  left: '',
  'left-mid': '',
  mid: '',
  'mid-mid': '',
  right: '',
  'right-mid': '',
  middle: '  ',
};

/** Columns under headings; those whose heading starts with `>` are flush right. */
export function table(headings: readonly string[], rows: readonly (readonly string[])[]): string {
  const names = headings.map((heading) => heading.replace(/^>/, ''));
  const aligned = new Table({
    chars: RULED,
    style: { head: [], border: [], 'padding-left': 0, 'padding-right': 0 },
    colAligns: headings.map((heading) => (heading.startsWith('>') ? 'right' : 'left')),
  });
  const widths = names.map((name, i) => Math.max(name.length, ...rows.map((row) => row[i]?.length ?? 0)));
  aligned.push(
    names,
    widths.map((width) => '-'.repeat(width)),
    ...rows.map((row) => [...row]),
  );
  return aligned
    .toString()
    .split('\n')
    .map((line) => line.trimEnd())
    .join('\n');
}

/** What tables and lists fit into. */
const COLUMNS = 80;

/** Rows of a name and what was found; long lines go on below where they began. */
export function printFacts(entries: Readonly<Record<string, string>>): void {
  const width = Math.max(0, ...Object.keys(entries).map(({ length }) => length));
  for (const [name, value] of Object.entries(entries)) {
    const lines = new Help().boxWrap(value, COLUMNS - width - 4).split('\n');
    for (const [i, line] of lines.entries()) print(`  ${(i === 0 ? name : '').padEnd(width)}  ${line}`);
  }
}

/** Lines of at most 80 characters. */
export const paragraph = (text: string): string => new Help().boxWrap(text, COLUMNS);

export interface Progress {
  advance(steps?: number): void;
  stop(): void;
}

/** A bar on a terminal; elsewhere one line, so that logs say what takes long. */
export function progress(label: string, total: number): Progress {
  if (process.stderr.isTTY !== true) {
    process.stderr.write(`${label}...\n`);
    return { advance: () => {}, stop: () => {} };
  }
  const bar = new SingleBar(
    {
      format: '{label} {bar} {percentage}% | {duration_formatted} gone, {eta_formatted} to go',
      stream: process.stderr,
      clearOnComplete: true,
      hideCursor: true,
      barsize: 30,
    },
    Presets.shades_classic,
  );
  bar.start(total, 0, { label });
  return { advance: (steps = 1) => bar.increment(steps), stop: () => bar.stop() };
}

export const count = (value: number): string => value.toLocaleString('en-US');

/** Milliseconds, in a unit that keeps three digits. */
export function duration(milliseconds: number): string {
  if (milliseconds >= 60_000) return `${(milliseconds / 60_000).toPrecision(3)} min`;
  if (milliseconds >= 1000) return `${(milliseconds / 1000).toPrecision(3)} s`;
  if (milliseconds >= 1) return `${milliseconds.toPrecision(3)} ms`;
  return `${(milliseconds * 1000).toPrecision(3)} us`;
}

/** Operations a second, under a heading that says so. */
export const rateCell = (gflops: number): string =>
  gflops >= 1000 ? `${(gflops / 1000).toPrecision(3)} T` : `${gflops.toPrecision(3)} G`;

/** Operations a second. */
export function rate(gflops: number): string {
  return gflops >= 1000 ? `${(gflops / 1000).toPrecision(3)} TFLOP/s` : `${gflops.toPrecision(3)} GFLOP/s`;
}

export const cosine = (value: number): string => value.toFixed(6);
export const small = (value: number): string =>
  value === 0 ? '0' : value < 1e-3 ? value.toExponential(2) : value.toPrecision(3);

/** Cosine similarity, relative L1, largest absolute difference. */
export const ACCURACY_HEADINGS = ['>cosine', '>rel. L1', '>largest'] as const;
export const accuracyCells = ({ cosineSimilarity, relativeL1, maxAbsoluteError }: Accuracy): string[] => [
  cosine(cosineSimilarity),
  small(relativeL1),
  small(maxAbsoluteError),
];
