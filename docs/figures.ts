/**
 * Draws the figures of how-it-works.md, distributed.md, integrations.md and training.md with the library's own code: `tsx docs/figures.ts` writes docs/figures/*.svg. The
 * activations are those of the sentence encoder on the first chapter of Alice in Wonderland.
 */
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { drawHead, type Head, outputErrors, picture } from '../playground/lab.ts';
import { chart, Plot } from '../src/cli/charts.ts';
import { openSentenceModel } from '../src/cli/model.ts';
import { spansOf } from '../src/distributed/shards.ts';
import { exactOutput } from '../src/measure/accuracy.ts';
import type { AttentionCall } from '../src/models/sentence-encoder/index.ts';
import { toFloat32 } from '../src/tensor/access.ts';
import { E4M3_MAX, roundToE4m3 } from '../src/tensor/formats/float8.ts';
import { roundToFloat16 } from '../src/tensor/formats/float16.ts';
import { slice, tensor } from '../src/tensor/tensor.ts';

/** Q, K and V of one head of the first layer. */
async function realHead(): Promise<Head> {
  const { tokenizer, encoder } = await openSentenceModel();
  const text = await readFile(new URL('../src/cli/alice-chapter-1.txt', import.meta.url), 'utf8');
  const calls: AttentionCall[] = [];
  await encoder.encode([tokenizer.encode(text).slice(0, 128)], async (call) => {
    calls.push(call);
    return tensor(await exactOutput({ ...call, tensorLayout: 'NHD' }, () => {}), call.q.shape);
  });
  const { q, k, v } = calls[0] as AttentionCall;
  const [, length = 0, , dim = 0] = q.shape;
  const head = (view: typeof q) => toFloat32(slice(view, 2, 0, 1));
  return { q: head(q), k: head(k), v: head(v), length, dim };
}

const ACCENT = '#3d8c66';
const SECOND = '#c8702a';
const THIRD = '#4a78c8';
const WIDTH = 720;

/** Text and rules follow the reader's colour scheme, also where the figure is an image. */
const STYLE = 'svg{color:#1b211d!important}@media (prefers-color-scheme:dark){svg{color:#e8ece9!important}}';

function svg(alt: string, options: Plot.PlotOptions): string {
  const drawn = chart({ width: WIDTH, marginBottom: 42, ...options });
  return drawn.replace(/^<svg ([^>]*)>/, `<svg $1 role="img"><title>${alt}</title><style>${STYLE}</style>`);
}

/** What the figures compare: mild offsets, and the large ones that big models have. */
interface Sample {
  readonly name: string;
  readonly head: Head;
}

/** Lowest and highest code of each channel, before and after smoothing. */
function codesFigure(samples: readonly Sample[]): string {
  const panels = ['K as it is', 'K smoothed'];
  const bars = samples.flatMap(({ name, head }) => {
    const { rawCodes, smoothedCodes } = picture(head, {
      smoothK: true,
      smoothQ: false,
      granularity: 'per-block',
      bits: 'int8',
    }).k;
    return [rawCodes, smoothedCodes].flatMap((codes, i) =>
      Array.from(codes.lowest, (low, channel) => ({
        name,
        panel: panels[i],
        color: [SECOND, ACCENT][i],
        channel,
        low,
        high: codes.highest[channel] as number,
      })),
    );
  });
  return svg('The INT8 codes that each channel of K uses, before and after smoothing', {
    height: 420,
    marginTop: 26,
    marginRight: 116,
    fx: { domain: panels, label: null, padding: 0.06 },
    fy: { domain: samples.map(({ name }) => name), label: null, padding: 0.12 },
    x: { label: 'channel', labelAnchor: 'center', labelArrow: 'none', ticks: 5 },
    y: { label: 'code', domain: [-128, 128], ticks: 5, labelAnchor: 'center', labelArrow: 'none' },
    marks: [
      Plot.ruleX(bars, {
        fx: 'panel',
        fy: 'name',
        x: 'channel',
        y1: 'low',
        y2: 'high',
        stroke: 'color',
        strokeWidth: 2.5,
      }),
      Plot.ruleY([0], { strokeOpacity: 0.4 }),
    ],
  });
}

/** Error of the output for every kernel and granularity of the playground's second section. */
function errorsFigure(samples: readonly Sample[]): string {
  const errors = samples.flatMap(({ name, head }) =>
    [...outputErrors(head)].map((error) => ({ ...error, name, row: `${error.kernel}, ${error.granularity}` })),
  );
  const percent = (value: number) => `${Number((100 * value).toPrecision(2))} %`;
  const dots = (smoothK: boolean, options: Plot.DotOptions) =>
    Plot.dot(
      errors.filter((error) => error.smoothK === smoothK),
      { fx: 'name', x: 'relativeL1', y: 'row', r: 4.5, ...options },
    );
  return svg('Relative L1 error of the output by kernel and granularity, with K smoothed and not', {
    height: 330,
    marginLeft: 200,
    marginRight: 30,
    marginTop: 26,
    fx: { domain: samples.map(({ name }) => name), label: null, padding: 0.1 },
    x: {
      type: 'log',
      label: 'relative L1 error of the output (filled: K smoothed, open: not smoothed)',
      labelAnchor: 'center',
      labelArrow: 'none',
      grid: true,
      ticks: [0.01, 0.1, 1],
      tickFormat: percent,
    },
    y: { domain: [...new Set(errors.map(({ row }) => row))], label: null, tickSize: 0 },
    marks: [dots(false, { stroke: SECOND, strokeWidth: 2 }), dots(true, { fill: ACCENT })],
  });
}

/** Error that each format of P makes, over P's range of 0 to 1. */
function formatsFigure(): string {
  const formats = [
    { name: 'INT8', color: SECOND, round: (p: number) => Math.round(p * 127) / 127 },
    { name: 'FP8 E4M3', color: THIRD, round: (p: number) => roundToE4m3(p * E4M3_MAX) / E4M3_MAX },
    { name: 'FP16', color: ACCENT, round: roundToFloat16 },
  ];
  const OCTAVES = 10;
  const points = formats.flatMap(({ name, color, round }) =>
    Array.from({ length: OCTAVES }, (_, i) => {
      const low = 2 ** (i - OCTAVES);
      let error = 0;
      for (let j = 0; j <= 4096; j++) {
        const p = low * (1 + j / 4096);
        error = Math.max(error, Math.abs(round(p) - p));
      }
      return [low, 2 * low].map((p) => ({ name, color, p, error }));
    }).flat(),
  );
  return svg('Largest rounding error of P by its size, for INT8, FP8 E4M3 and FP16', {
    height: 300,
    marginLeft: 64,
    marginRight: 76,
    x: {
      type: 'log',
      base: 2,
      label: 'P',
      labelAnchor: 'center',
      labelArrow: 'none',
      ticks: 6,
      tickFormat: (p: number) => (p < 1 ? `1/${Math.round(1 / p)}` : '1'),
    },
    y: {
      type: 'log',
      label: 'largest rounding error',
      grid: true,
      tickFormat: (e: number) => e.toExponential(0),
      ticks: 5,
      labelArrow: 'none',
    },
    marks: [
      Plot.line(points, { x: 'p', y: 'error', z: 'name', stroke: 'color', strokeWidth: 2.25 }),
      Plot.text(
        points.filter(({ p }) => p === 1),
        { x: 'p', y: 'error', text: 'name', fill: 'color', textAnchor: 'start', dx: 8 },
      ),
    ],
  });
}

/** Who computes which scores of a causal attention over four ranks, in both orders of tokens. */
function ordersFigure(): string {
  const [ranks, parts] = [4, 16];
  const colors = [ACCENT, SECOND, THIRD, '#9a6bb8'];
  const panels = ['contiguous', 'zigzag'] as const;
  const cells = panels.flatMap((panel) =>
    Array.from({ length: ranks }, (_, rank) => rank).flatMap((rank) =>
      spansOf(parts, ranks, rank, panel).flatMap(({ start, end }) =>
        Array.from({ length: end - start }, (_, i) => start + i).flatMap((query) =>
          Array.from({ length: query + 1 }, (_, key) => ({ panel, rank, query, key, color: colors[rank] })),
        ),
      ),
    ),
  );
  const shares = panels.flatMap((panel) =>
    Array.from({ length: ranks }, (_, rank) => {
      const share = cells.filter((cell) => cell.panel === panel && cell.rank === rank).length;
      const all = cells.filter((cell) => cell.panel === panel).length;
      return { panel, rank, text: `rank ${rank}: ${Math.round((100 * share) / all)}%`, color: colors[rank] };
    }),
  );
  return svg('Scores of a causal attention by the rank that computes them, tokens in contiguous and in zigzag order', {
    height: 380,
    marginTop: 26,
    fx: { domain: [...panels], label: null, padding: 0.08 },
    x: { type: 'linear', domain: [0, parts], label: 'keys', labelAnchor: 'center', labelArrow: 'none', ticks: [] },
    y: { type: 'linear', domain: [parts, 0], label: 'queries', labelAnchor: 'center', labelArrow: 'none', ticks: [] },
    marks: [
      Plot.rect(cells, {
        fx: 'panel',
        x1: 'key',
        x2: (cell: { key: number }) => cell.key + 1,
        y1: 'query',
        y2: (cell: { query: number }) => cell.query + 1,
        fill: 'color',
        inset: 0.5,
      }),
      Plot.text(shares, {
        fx: 'panel',
        x: parts * 0.78,
        y: (share: { rank: number }) => 1.2 + share.rank * 1.2,
        text: 'text',
        fill: 'color',
      }),
    ],
  });
}

/** What a model of two attentions is to onnxruntime-web: in one piece, in pieces, and with markers. */
function markersFigure(): string {
  const rows = ['left', 'cut', 'marker'] as const;
  const blocks = rows.flatMap((row) => {
    const gap = row === 'cut' ? 0.5 : 0;
    return Array.from({ length: 5 }, (_, i) => {
      const isAttention = i % 2 === 1;
      const start = i * (2 + gap);
      const own = isAttention && row !== 'left';
      const text = isAttention ? 'attention' : 'MatMul, Add, ...';
      return { row, start, end: start + 2, color: own ? ACCENT : THIRD, text };
    });
  });
  const sessions = rows.flatMap((row) => {
    const spans = row === 'cut' ? [0, 5, 10].map((start) => ({ start, end: start + 2 })) : [{ start: 0, end: 10 }];
    return spans.map((span) => ({ ...span, row, text: 'session.run' }));
  });
  const brackets = sessions.map((session) => ({ ...session, middle: (session.start + session.end) / 2 }));
  return svg(
    'A model with two attentions: left to onnxruntime, cut into three sessions, and one session with markers',
    {
      height: 270,
      marginLeft: 58,
      marginBottom: 8,
      fy: { domain: [...rows], label: null, padding: 0.25 },
      x: { domain: [0, 12], axis: null },
      y: { domain: [0, 2], axis: null },
      marks: [
        Plot.rect(blocks, { fy: 'row', x1: 'start', x2: 'end', y1: 0, y2: 1.1, fill: 'color', inset: 1 }),
        Plot.text(blocks, {
          fy: 'row',
          x: (block: { start: number; end: number }) => (block.start + block.end) / 2,
          y: 0.55,
          text: 'text',
          fill: 'white',
        }),
        Plot.ruleY(brackets, { fy: 'row', x1: 'start', x2: 'end', y: 1.4, stroke: 'currentColor' }),
        Plot.text(brackets, { fy: 'row', x: 'middle', y: 1.75, text: 'text' }),
      ],
    },
  );
}

interface Losses {
  readonly version: string;
  readonly exact: readonly number[];
  readonly ours: readonly number[];
}

/** Losses of `examples/train` as bench/wasm/training-losses.ts measured them. */
async function lossesFigure(): Promise<string> {
  const measured = new URL('../bench/results/training-losses.json', import.meta.url);
  const { node, chromium } = JSON.parse(await readFile(measured, 'utf8')) as Record<'node' | 'chromium', Losses>;
  const names = { exact: 'exact attention', ours: 'SageAttention' } as const;
  const panels = [
    [`Node ${node.version}`, node],
    [`Chromium ${chromium.version}`, chromium],
  ] as const;
  const points = panels.flatMap(([panel, losses]) =>
    (['exact', 'ours'] as const).flatMap((name) =>
      losses[name].map((loss, i) => ({ panel, attention: names[name], step: i + 1, loss })),
    ),
  );
  const own = (name: keyof typeof names) => points.filter(({ attention }) => attention === names[name]);
  return svg('Loss of a character model step by step, with exact attention and with SageAttention', {
    height: 300,
    fx: { label: null, domain: panels.map(([panel]) => panel) },
    x: { label: 'step' },
    y: { label: 'loss', grid: true },
    color: { legend: false, domain: Object.values(names), range: [SECOND, ACCENT] },
    marks: [
      Plot.line(own('exact'), {
        fx: 'panel',
        x: 'step',
        y: 'loss',
        stroke: 'attention',
        strokeWidth: 5,
        strokeOpacity: 0.6,
      }),
      Plot.line(own('ours'), { fx: 'panel', x: 'step', y: 'loss', stroke: 'attention', strokeWidth: 1.5 }),
      Plot.text(
        (['exact', 'ours'] as const).map((name, i) => ({
          panel: panels[0][0],
          text: names[name],
          name: names[name],
          dy: i,
        })),
        {
          fx: 'panel',
          frameAnchor: 'top-right',
          dy: 4,
          text: ({ text, dy }: { text: string; dy: number }) => (dy === 0 ? text : `\n${text}`),
          fill: 'name',
          fontSize: 12,
        },
      ),
    ],
  });
}

/** Every figure by its file's name. */
export async function drawFigures(): Promise<Readonly<Record<string, string>>> {
  const samples: Sample[] = [
    { name: 'sentence encoder', head: await realHead() },
    { name: 'large offsets', head: drawHead({ name: 'channels', strength: 6, length: 128, dim: 64, seed: 7 }) },
  ];
  return {
    codes: codesFigure(samples),
    errors: errorsFigure(samples),
    formats: formatsFigure(),
    losses: await lossesFigure(),
    markers: markersFigure(),
    orders: ordersFigure(),
  };
}

if (process.argv[1]?.endsWith('figures.ts')) {
  const folder = new URL('figures/', import.meta.url);
  await mkdir(folder, { recursive: true });
  for (const [name, drawing] of Object.entries(await drawFigures())) {
    await writeFile(new URL(`${name}.svg`, folder), `${drawing}\n`);
  }
}
