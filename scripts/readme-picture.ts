/**
 * Draws the README's picture from what `demo --json FILE` wrote: `tsx scripts/readme-picture.ts FILE`. One drawing for
 * light pages, one for dark.
 */
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { chart, Plot } from '../src/cli/charts.ts';
import type { DemoReport } from '../src/cli/demo.ts';
import type { EncoderComparison } from '../src/cli/encoder-comparison.ts';

interface Theme {
  readonly ink: string;
  readonly soft: string;
  readonly rule: string;
  /** Of similarity 0 and 1. */
  readonly cells: readonly [string, string];
  /** Digits on cells nearer to 0 and nearer to 1. */
  readonly digits: readonly [string, string];
  readonly accent: string;
}

const THEMES: Readonly<Record<'light' | 'dark', Theme>> = {
  light: {
    ink: '#1f2328',
    soft: '#59636e',
    rule: '#d1d9e0',
    cells: ['#eef3fb', '#2455b8'],
    digits: ['#1f2328', '#ffffff'],
    accent: '#2455b8',
  },
  dark: {
    ink: '#e6edf3',
    soft: '#9198a1',
    rule: '#3d444d',
    cells: ['#182030', '#6ea8fe'],
    digits: ['#e6edf3', '#0d1117'],
    accent: '#6ea8fe',
  },
};

const WIDTH = 1080;
const CELL = 41;
const LABELS = 370;
const GAP = 40;
const TOP = 64;
const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif';

const escapeXml = (text: string) => text.replace(/[&<>"]/g, (character) => `&#${character.charCodeAt(0)};`);

/** A chart at a place inside the drawing. */
const place = (svg: string, x: number, y: number) => svg.replace('<svg ', `<svg x="${x}" y="${y}" `);

const label = (x: number, y: number, text: string, attributes: string) =>
  `<text x="${x}" y="${y}" ${attributes}>${escapeXml(text)}</text>`;

function matrix(values: readonly (readonly number[])[], theme: Theme): string {
  const cells = values.flatMap((row, y) => row.map((value, x) => ({ x, y, value })));
  const size = values.length * CELL;
  return chart({
    width: size,
    height: size,
    margin: 0,
    x: { axis: null, padding: 0.05, round: false },
    y: { axis: null, padding: 0.05, round: false },
    color: { type: 'linear', domain: [0, 1], range: [...theme.cells], clamp: true },
    marks: [
      Plot.cell(cells, { x: 'x', y: 'y', fill: 'value', rx: 4 }),
      Plot.text(cells, {
        x: 'x',
        y: 'y',
        text: ({ value }: { value: number }) => value.toFixed(2).replace('0.', '.'),
        fill: ({ value }: { value: number }) => theme.digits[value > 0.62 ? 1 : 0],
        fontSize: 12,
        fontFamily: FONT,
      }),
    ],
  });
}

const percent = (value: number) => `${(100 * value).toPrecision(2)} %`;

function errors(report: DemoReport, theme: Theme): string {
  const run = (name: string, { layers }: EncoderComparison) =>
    layers.map(({ layer, attention }) => ({ name: `${name}, layer ${layer + 1}`, error: attention.relativeL1 }));
  const { sentences, pieces, oneSequence } = report;
  const bars = [
    ...run(`${sentences.sequences} sentences`, sentences),
    ...run(`${pieces.sequences} pieces of at most ${pieces.longest} tokens`, pieces),
    ...run(`one sequence of ${oneSequence.tokens.toLocaleString('en-US')} tokens`, oneSequence),
  ];
  return chart({
    width: WIDTH,
    height: 32 + 24 * bars.length,
    marginLeft: LABELS,
    marginRight: 70,
    marginTop: 4,
    marginBottom: 24,
    x: {
      label: null,
      // From 0 to 5 % at least: errors of less than a percent shall look as small as they are.
      domain: [0, Math.max(0.05, ...bars.map(({ error }) => error))],
      tickFormat: (value: number) => `${Math.round(100 * value)} %`,
      ticks: 5,
      tickSize: 0,
    },
    y: { label: null, domain: bars.map(({ name }) => name), tickSize: 0, padding: 0.35 },
    style: { background: 'transparent', color: theme.ink, fontSize: '13px', fontFamily: FONT, overflow: 'visible' },
    marks: [
      Plot.gridX({ stroke: theme.rule, strokeOpacity: 1, ticks: 5 }),
      Plot.barX(bars, { x: 'error', y: 'name', fill: theme.accent, rx: 2 }),
      Plot.text(bars, {
        x: 'error',
        y: 'name',
        text: ({ error }: { error: number }) => percent(error),
        textAnchor: 'start',
        dx: 8,
        fill: theme.ink,
      }),
    ],
  });
}

function draw(report: DemoReport, theme: Theme): string {
  const { sentences } = report;
  const size = sentences.texts.length * CELL;
  const second = LABELS + size + GAP;
  const below = TOP + size + 62;
  const errorChart = errors(report, theme);
  const height = below + Number(/height="(\d+)"/.exec(errorChart)?.[1]) + 8;
  const heading = `font-size="15" font-weight="600" fill="${theme.ink}"`;
  const note = `font-size="13" fill="${theme.soft}"`;
  const kernels = [...new Set(sentences.layers.map(({ kernel }) => `${report.backend} ${kernel}`))].join(', ');
  const parts = [
    label(LABELS, 24, 'Exact attention', heading),
    label(LABELS, 44, 'float64', note),
    label(second, 24, 'SageAttention', heading),
    label(second, 44, `${kernels}, largest difference ${sentences.largestDifference.toFixed(4)}`, note),
    label(LABELS - 14, 24, 'How alike are two sentences?', `${heading} text-anchor="end"`),
    label(LABELS - 14, 44, 'a trained encoder answers', `${note} text-anchor="end"`),
    ...sentences.texts.map((text, i) =>
      label(
        LABELS - 14,
        TOP + (i + 0.5) * CELL + 4.5,
        text.length > 54 ? `${text.slice(0, 53)}…` : text,
        `font-size="13" fill="${theme.ink}" text-anchor="end"`,
      ),
    ),
    place(matrix(sentences.exactSimilarity, theme), LABELS, TOP),
    place(matrix(sentences.sageSimilarity, theme), second, TOP),
    label(LABELS, below - 16, 'Relative L1 error of the attention output', heading),
    place(errorChart, 0, below),
  ];
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${height}" width="${WIDTH}" height="${height}" font-family='${FONT}' role="img" aria-label="Similarity of ${sentences.texts.length} sentences by exact attention and by SageAttention: the largest difference is ${sentences.largestDifference.toFixed(4)}">
${parts.join('\n')}
</svg>
`;
}

const [file] = process.argv.slice(2);
if (file === undefined) throw new Error('which file? Write one with: sageattention demo --json FILE');
const report = JSON.parse(await readFile(file, 'utf8')) as DemoReport;
const folder = new URL('../docs/images/', import.meta.url);
await mkdir(folder, { recursive: true });
for (const [name, theme] of Object.entries(THEMES)) {
  const target = new URL(`demo-${name}.svg`, folder);
  await writeFile(target, draw(report, theme));
  console.log(`Wrote ${fileURLToPath(target)}`);
}
