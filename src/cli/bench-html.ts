/** `bench --html`: one page that needs nothing else, readable in light and dark. */
import type { BenchReport, BenchResult } from './bench-report.ts';
import { chart, Plot } from './charts.ts';
import { cosine, duration, rate, small } from './terminal.ts';

const escapeHtml = (text: string) => text.replace(/[&<>"]/g, (character) => `&#${character.charCodeAt(0)};`);

type Measured = BenchResult & Required<Pick<BenchResult, 'medianMs' | 'gflops' | 'accuracy' | 'rows'>>;
const isMeasured = (result: BenchResult): result is Measured => result.accuracy !== undefined;

/** Legible on white and on near-black. */
const COLORS = ['#4269d0', '#d9822b', '#e0526b', '#3a9c8f', '#8a63c9', '#5b8c3a', '#b0632f', '#7d7d7d'];

const series = ({ backend, kernel }: BenchResult) => `${backend} ${kernel}`;
const facet = ({ headDim, isCausal }: BenchResult) => `head dim ${headDim}${isCausal ? ', causal' : ''}`;

function colorScale(results: readonly Measured[]) {
  const domain = [...new Set(results.map(series))];
  return { domain, range: domain.map((_, i) => COLORS[i % COLORS.length] as string) };
}

function legend(results: readonly Measured[]): string {
  const { domain, range } = colorScale(results);
  const items = domain.map((name, i) => `<li><i style="background:${range[i]}"></i>${escapeHtml(name)}</li>`);
  return `<ul class="legend">${items.join('')}</ul>`;
}

/** One chart for each head dim and causality, so that each has room. */
function charts(results: readonly Measured[], draw: (part: readonly Measured[]) => string): string {
  const facets = [...new Set(results.map(facet))];
  return facets
    .map((name) => {
      const part = results.filter((result) => facet(result) === name);
      return `<figure><figcaption>${escapeHtml(name)}</figcaption>${draw(part)}</figure>`;
    })
    .join('\n');
}

function speedChart(results: readonly Measured[], color: Plot.ScaleOptions): string {
  const teraflops = results.some(({ gflops }) => gflops >= 1000);
  const y = ({ gflops }: Measured) => (teraflops ? gflops / 1000 : gflops);
  const title = (result: Measured) => `${series(result)}\n${rate(result.gflops)}, ${duration(result.medianMs)}`;
  const lengths = [...new Set(results.map(({ length }) => length))].sort((a, b) => a - b);
  const shared = { width: 500, height: 290, marginLeft: 52, marginBottom: 44, color };
  const axis = { label: teraflops ? 'TFLOP/s' : 'GFLOP/s', grid: true, zero: true, nice: true };
  if (lengths.length === 1) {
    return chart({
      ...shared,
      x: { label: null, axis: null },
      y: axis,
      marks: [
        Plot.barY(results, { x: series, y, fill: series, title, inset: 8 }),
        Plot.text(results, { x: series, y, text: ({ gflops }: Measured) => rate(gflops), dy: -8 }),
        Plot.ruleY([0]),
      ],
    });
  }
  return chart({
    ...shared,
    x: { label: 'tokens', labelOffset: 38, type: 'log', base: 2, ticks: lengths, tickFormat: String },
    y: axis,
    marks: [
      Plot.ruleY([0]),
      Plot.line(results, { x: 'length', y, stroke: series, strokeWidth: 2 }),
      Plot.dot(results, { x: 'length', y, fill: series, r: 3.5, title }),
    ],
  });
}

function errorChart(results: readonly Measured[], color: Plot.ScaleOptions): string {
  const x = (result: Measured) => result.accuracy.relativeL1;
  const worst = Math.max(...results.map(x));
  return chart({
    width: 500,
    height: 74 + 26 * new Set(results.map(series)).size,
    marginLeft: 215,
    marginBottom: 44,
    color,
    x: {
      label: 'relative L1 error against float64',
      labelOffset: 38,
      grid: true,
      domain: [0, worst > 0 ? worst * 1.15 : 1],
    },
    y: { label: null },
    marks: [
      Plot.ruleY(results, { y: series, x, stroke: series, strokeWidth: 2 }),
      Plot.dot(results, {
        x,
        y: series,
        fill: series,
        r: 4,
        title: (result: Measured) => `${series(result)}, ${result.length} tokens: ${small(x(result))}`,
      }),
    ],
  });
}

function resultTable(results: readonly BenchResult[]): string {
  const cells = (result: BenchResult): (string | number)[] => {
    const { backend, kernel, length, headDim, isCausal } = result;
    const shape = [backend, kernel, length, headDim, isCausal ? 'yes' : 'no'];
    if (!isMeasured(result)) return [...shape, result.refused ?? result.failed ?? '', '', '', '', '', '', ''];
    const { accuracy } = result;
    return [
      ...shape,
      duration(result.medianMs),
      result.withCopiesMs === undefined ? '' : duration(result.withCopiesMs),
      rate(result.gflops),
      cosine(accuracy.cosineSimilarity),
      small(accuracy.relativeL1),
      small(accuracy.maxAbsoluteError),
      result.rows,
    ];
  };
  const headings =
    'backend,kernel,tokens,head dim,causal,time,with copies from and to the CPU,speed,cosine,relative L1,largest error,rows checked';
  const row = (tag: string, values: readonly (string | number)[]) =>
    `<tr>${values.map((value) => `<${tag}>${escapeHtml(String(value))}</${tag}>`).join('')}</tr>`;
  return `<table><thead>${row('th', headings.split(','))}</thead><tbody>${results
    .map((result) => row('td', cells(result)))
    .join('\n')}</tbody></table>`;
}

const STYLE = `
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --page: #ffffff; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --page: #0d1117; --line: #3d444d; } }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .25rem; } p { color: var(--soft); margin: .25rem 0; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: .5rem 0; } figcaption { font-weight: 600; }
svg { max-width: 100%; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; margin: .5rem 0; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
`;

/** A complete HTML document. */
export function benchHtml(report: BenchReport): string {
  const { machine, results, version, date, dtype, repetitions, seed, backends } = report;
  const measured = results.filter(isMeasured);
  const color = { type: 'ordinal', ...colorScale(measured) } as const;
  const { batch, heads, kvHeads } = results[0] as BenchResult;
  const found = Object.entries(backends).map(
    ([name, details]) =>
      `<p><b>${escapeHtml(name)}</b> ${Object.entries(details)
        .map(([key, value]) => escapeHtml(`${key}: ${value}`))
        .join(' · ')}</p>`,
  );
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>SageAttention benchmark</title>
<style>${STYLE}</style>
</head>
<body>
<h1>SageAttention benchmark</h1>
<p>${escapeHtml(`Version ${version}, ${date}. ${machine.runtime} on ${machine.platform}, ${machine.cpu}, ${machine.cores} cores.`)}</p>
<p>${escapeHtml(`Batch ${batch}, ${heads} heads (${kvHeads} of keys and values), ${dtype}. Median of ${repetitions} runs; seed ${seed}.`)}</p>
${found.join('\n')}
<h2>Speed</h2>
<p>4 × batch × heads × tokens² × head dim operations, half of that when causal, by the median time of a call over tensors where the backend computes. Higher is better.</p>
${legend(measured)}
<div class="charts">${charts(measured, (part) => speedChart(part, color))}</div>
<h2>Accuracy</h2>
<p>Σ|output − exact| / Σ|exact|, exact attention computed in float64 on the rows that the table counts. Lower is better.</p>
<div class="charts">${charts(measured, (part) => errorChart(part, color))}</div>
<h2>All figures</h2>
<div class="scroll">${resultTable(results)}</div>
</body>
</html>`;
}
