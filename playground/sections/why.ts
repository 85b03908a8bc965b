/** Section 2: Q and K of a head, what smoothing does to them, and what that is worth. */
import type { Granularity } from '../../src/quantization/schemes.ts';
import { connect } from '../alert.ts';
import { attentionMap } from '../attention-map.ts';
import { diverging, type Figure, figure, fillLegend, heatMap, Plot, sequential, seriesColor } from '../charts.ts';
import { byId, checkField, codeBox, h, latest, messageOf, radioField, rangeField, say, selectField } from '../dom.ts';
import { count, counted, percent, short } from '../format.ts';
import { keptBlocks } from '../kept-blocks.ts';
import type { DistributionName, Operand, OutputError, Picture } from '../lab.ts';
import type { ModelClient } from '../model-client.ts';
import type { LabApi } from '../workers/lab.ts';

const DISTRIBUTIONS = [
  { value: 'channels', label: 'offset in each channel' },
  { value: 'few', label: 'three outlier channels' },
  { value: 'token', label: 'one outlier token' },
  { value: 'normal', label: 'normal, no offset' },
] as const satisfies readonly { value: DistributionName; label: string }[];

/** A fixed scale, so that a control's effect on the error can be seen: a quarter of a unit of a softmax exponent. */
const FULL_DIFFERENCE = 0.25;

const EXAMPLE_TEXT =
  'The tea had gone cold by the time she looked up from the page. Outside, rain ran down the window in long crooked lines, and the street lamps made a small yellow world of every drop.';

function extremes(values: Float32Array): [number, number] {
  let low = Number.POSITIVE_INFINITY;
  let high = Number.NEGATIVE_INFINITY;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return [low, high];
}

const symmetric = (values: Float32Array): [number, number] => {
  const most = Math.max(...extremes(values).map(Math.abs), 1e-6);
  return [-most, most];
};

function drawCodes(target: Figure, name: string, dim: number, { rawCodes, smoothedCodes }: Operand): void {
  const total = 2 * rawCodes.max + 1;
  const panels = [
    { panel: 'not smoothed', codes: rawCodes, color: 1 },
    { panel: 'smoothed', codes: smoothedCodes, color: 0 },
  ];
  const bars = panels.flatMap(({ panel, codes, color }) =>
    Array.from(codes.lowest, (low, channel) => ({
      panel,
      color,
      channel,
      low: low - 0.5,
      high: (codes.highest[channel] as number) + 0.5,
    })),
  );
  target.note(
    `Of ${total} codes a channel of ${name} spans ${Math.round(rawCodes.meanSpan)} on average as it is, ${Math.round(smoothedCodes.meanSpan)} smoothed. The whole head uses ${rawCodes.used} and ${smoothedCodes.used}.`,
  );
  target.draw(
    `A channel of ${name} spans ${Math.round(rawCodes.meanSpan)} of ${total} codes, smoothed ${Math.round(smoothedCodes.meanSpan)}.`,
    (width) => ({
      marginLeft: 52,
      marginBottom: 38,
      marginTop: 22,
      fx: { domain: panels.map(({ panel }) => panel), label: null, padding: 0.08 },
      x: {
        domain: [0, dim],
        label: 'channel',
        labelAnchor: 'center',
        labelArrow: 'none',
        // None at the right edge, where the next panel's 0 is near.
        ticks: [0, 1, 2, 3].map((quarter) => (quarter * dim) / 4),
      },
      y: {
        label: 'code',
        domain: [-rawCodes.max - 0.5, rawCodes.max + 0.5],
        ticks: 5,
        labelAnchor: 'center',
        labelArrow: 'none',
      },
      marks: [
        Plot.frame({ stroke: 'var(--line)' }),
        Plot.rect(bars, {
          fx: 'panel',
          x1: 'channel',
          x2: (d) => d.channel + 1,
          y1: 'low',
          y2: 'high',
          fill: (d) => seriesColor(d.color),
          // A gap between bars where there is room for one.
          insetRight: width / dim > 5 ? 1 : 0.3,
        }),
      ],
    }),
  );
}

function drawHistogram(target: Figure, name: string, { histogram }: Operand): void {
  const { edges, raw, smoothed } = histogram;
  const bars = [raw, smoothed].flatMap((counts, series) =>
    Array.from(counts, (count, i) => ({ series, x1: edges[i] as number, x2: edges[i + 1] as number, count })),
  );
  const most = Math.max(...smoothed, ...raw);
  const reach = (counts: Uint32Array) => {
    const filled = Array.from(counts, (count, i) => (count > 0 ? i : -1)).filter((i) => i >= 0);
    return `${short(edges[filled[0] ?? 0] as number)} to ${short(edges[(filled.at(-1) ?? 0) + 1] as number)}`;
  };
  target.note(`All elements of ${name} in this head, in the same bins before and after.`);
  target.draw(`${name} reaches from ${reach(raw)} as it is, from ${reach(smoothed)} smoothed.`, () => ({
    marginLeft: 44,
    marginBottom: 38,
    x: { label: `value of an element of ${name}`, labelAnchor: 'center', labelArrow: 'none', ticks: 6 },
    y: {
      label: 'elements',
      domain: [0, most],
      grid: true,
      nice: true,
      ticks: 4,
      tickFormat: (elements: number) => (Number.isInteger(elements) ? count(elements) : ''),
      labelArrow: 'none',
    },
    marks: [
      Plot.rectY(
        bars.filter(({ series }) => series === 0),
        { x1: 'x1', x2: 'x2', y: 'count', fill: seriesColor(1), fillOpacity: 0.55, inset: 0 },
      ),
      Plot.rectY(
        bars.filter(({ series }) => series === 1),
        { x1: 'x1', x2: 'x2', y: 'count', fill: seriesColor(0), fillOpacity: 0.6, inset: 0 },
      ),
      Plot.ruleY([0], { stroke: 'var(--control)' }),
    ],
  }));
}

/** Powers of ten, and three times each, of which an axis takes what its values span. */
const ERROR_TICKS = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1];

const ERRORS_NOTE =
  'Against float64. The WASM kernels are run, the others computed step by step. Filled: K smoothed; open: not smoothed.';

function drawErrors(target: Figure, errors: readonly OutputError[]): void {
  const rows = errors.map((error) => ({ ...error, row: `${error.kernel}\n${error.granularity}` }));
  const names = [...new Set(rows.map(({ row }) => row))];
  const pairs = names.map((row) => {
    const [raw, smoothed] = [false, true].map((which) => rows.find((d) => d.row === row && d.smoothK === which));
    return { row, x1: raw?.relativeL1 ?? 0, x2: smoothed?.relativeL1 ?? 0 };
  });
  const values = rows.map(({ relativeL1 }) => relativeL1);
  const low = ERROR_TICKS.filter((tick) => tick <= Math.min(...values)).at(-1) ?? Math.min(...values);
  const high = Math.max(...values, low);
  const domain = [low, ERROR_TICKS.find((tick) => tick >= high) ?? high];
  const ticks = ERROR_TICKS.filter((tick) => tick >= low && tick <= (domain[1] as number));
  const best = rows.reduce((least, error) => (error.relativeL1 < least.relativeL1 ? error : least));
  target.draw(
    rows
      .map((d) => `${d.kernel} ${d.granularity}, ${d.smoothK ? 'smoothed' : 'not smoothed'}: ${percent(d.relativeL1)}`)
      .join('; '),
    (width) => ({
      marginLeft: width < 420 ? 142 : 215,
      marginRight: width < 420 ? 20 : 40,
      marginBottom: 40,
      marginTop: 6,
      x: {
        type: 'log',
        domain,
        // The plot of a phone is narrower than these words.
        label: width < 420 ? 'relative L1 error' : 'relative L1 error of the output',
        labelAnchor: 'center',
        labelArrow: 'none',
        grid: true,
        tickFormat: (error: number) => `${Number((100 * error).toPrecision(2))} %`,
        ticks: width < 520 ? ticks.filter((tick) => Number.isInteger(Math.log10(tick))) : ticks,
      },
      y: {
        domain: names,
        label: null,
        tickSize: 0,
        tickFormat: (row: string) => (width < 420 ? row : row.replace('\n', ', ')),
      },
      marks: [
        Plot.link(pairs, { x1: 'x1', x2: 'x2', y1: 'row', y2: 'row', stroke: 'var(--control)' }),
        Plot.dot(
          rows.filter((d) => !d.smoothK),
          { x: 'relativeL1', y: 'row', r: 4.5, fill: 'var(--panel)', stroke: seriesColor(1), strokeWidth: 2 },
        ),
        Plot.dot(
          rows.filter((d) => d.smoothK),
          { x: 'relativeL1', y: 'row', r: 5, fill: seriesColor(0) },
        ),
        width > 520
          ? Plot.text([best], {
              x: 'relativeL1',
              y: 'row',
              text: (d: OutputError) => percent(d.relativeL1),
              dx: -10,
              textAnchor: 'end',
              fill: 'var(--soft)',
            })
          : null,
      ],
    }),
  );
}

/** The package's reference with the choices of the page. */
function codeOf({ length, dim, quantization: { smoothK, smoothQ, granularity, bits } }: Picture): string {
  return `import { tensor } from 'sageattention';
import { compare, exactAttention, quantizedAttention } from 'sageattention/reference';

const shape = [1, 1, ${length}, ${dim}]; // [batch, heads, tokens, head dim]
const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
const offsets = Float32Array.from({ length: ${dim} }, () => 6 * normal());
const random = (offset) => tensor(Float32Array.from({ length: ${length * dim} }, (_, i) => normal() + offset(i % ${dim})), shape);
const [q, k, v] = [random(() => 0), random((channel) => offsets[channel]), random(() => 0)];

const { output } = quantizedAttention(q, k, v, {
  smoothK: ${smoothK},
  algorithm: { qkFormat: '${bits}', granularity: '${granularity}', smoothQ: ${smoothQ} },
});
console.log(compare(output, exactAttention(q, k, v).output).relativeL1);
`;
}

export function startWhy(model: ModelClient): void {
  const startLab = () => connect<LabApi>(new Worker(new URL('../workers/lab.ts', import.meta.url), { type: 'module' }));
  // One for what must follow every move of a control, one for the errors, each of which takes a while.
  const [lab, errorLab] = [startLab(), startLab()];
  const message = byId('why-message');

  const maps = {
    q: figure('Q as it is', { shape: 'tall', span: 'quarter' }),
    smoothedQ: figure('Q smoothed', { shape: 'tall', span: 'quarter' }),
    k: figure('K as it is', { shape: 'tall', span: 'quarter' }),
    smoothedK: figure('K smoothed', { shape: 'tall', span: 'quarter' }),
    exact: figure('Scores, exact', { shape: 'square' }),
    quantized: figure('Scores from codes', { shape: 'square' }),
    difference: figure('Difference', { shape: 'square' }),
  };
  const legend = () => {
    const list = h('ul', { class: 'legend' });
    fillLegend(list, ['smoothed', 'not smoothed']);
    return list;
  };
  const histogram = figure('Values', { shape: 'low', span: 'half', legend: legend() });
  const codes = figure('Codes, channel by channel', { shape: 'low', span: 'half' });
  const errors = figure('Error of the output, by kernel and granularity', {
    shape: 'list',
    span: 'full',
    legend: legend(),
  });
  errors.note(ERRORS_NOTE);
  byId('why-figures').append(
    maps.q.element,
    maps.smoothedQ.element,
    maps.k.element,
    maps.smoothedK.element,
    histogram.element,
    codes.element,
    maps.exact.element,
    maps.quantized.element,
    maps.difference.element,
    errors.element,
  );

  const wipe = attentionMap();
  byId('why-figures').insertBefore(wipe.element, errors.element);
  const kept = keptBlocks(() => redrawBlocks(undefined));
  byId('why-figures').insertBefore(kept.element, errors.element);
  const code = codeBox('The code of what is shown');

  const drawPicture = (data: Picture) => {
    const { length, dim, quantization } = data;
    const range = (values: Float32Array) => extremes(values).map(short).join(' to ');
    const tokensByChannels = (target: Figure, values: Float32Array, domain: [number, number], what: string) => {
      const said = `Values from ${range(values)}.`;
      target.draw(said, () => heatMap(values, length, dim, { domain, color: diverging, x: 'channel', y: 'token' }));
      target.note(`${what} ${said}`);
    };
    const [queries, keys] = [symmetric(data.q.raw), symmetric(data.k.raw)];
    tokensByChannels(maps.q, data.q.raw, queries, `${length} tokens, ${dim} channels.`);
    tokensByChannels(maps.smoothedQ, data.q.smoothed, queries, 'Mean of each block taken away.');
    tokensByChannels(maps.k, data.k.raw, keys, 'Stripes are what all keys share.');
    tokensByChannels(maps.smoothedK, data.k.smoothed, keys, 'Mean of all taken away, same colours.');

    const shown = operand.value === 'q' ? data.q : data.k;
    drawHistogram(histogram, operand.value.toUpperCase(), shown);
    drawCodes(codes, operand.value.toUpperCase(), dim, shown);

    const scores = symmetric(data.exactScores);
    const square = (values: Float32Array, domain: [number, number], color: typeof diverging) =>
      heatMap(values, length, length, { domain, color, x: 'key', y: 'query' });
    maps.exact.note('Scaled, with the mean of each row taken away, which softmax does not see.');
    maps.exact.draw(`Values from ${range(data.exactScores)}`, () => square(data.exactScores, scores, diverging));
    const used = (name: string, smoothed: boolean) => `${name} ${smoothed ? 'smoothed' : 'as it is'}`;
    maps.quantized.note(
      `${quantization.bits.toUpperCase()} codes of ${used('Q', quantization.smoothQ)} and ${used('K', quantization.smoothK)}, multiplied as integers, times their scales.`,
    );
    maps.quantized.draw(`Values from ${range(data.quantizedScores)}`, () =>
      square(data.quantizedScores, scores, diverging),
    );
    wipe.draw(data);
    code.set(codeOf(data));
    const difference = data.quantizedScores.map((value, i) => Math.abs(value - (data.exactScores[i] as number)));
    const most = Math.max(extremes(difference)[1], 1e-9);
    maps.difference.note(
      `Root mean square ${short(data.scoreError)}, at most ${short(most)}. Full colour is ${FULL_DIFFERENCE} or more.`,
    );
    maps.difference.draw(`At most ${short(most)}`, () => square(difference, [0, FULL_DIFFERENCE], sequential));
  };

  /** Whether the figures show a head: an empty text has none. */
  let shownHead = false;
  const both = (tell: (each: typeof lab) => Promise<void>) => Promise.all([lab, errorLab].map(tell));

  const redraw = latest(async () => {
    if (!shownHead) return;
    try {
      const data = await lab.picture({
        smoothK: smoothing.value.includes('k'),
        smoothQ: smoothing.value.includes('q'),
        granularity: granularity.value,
        bits: format.value,
      });
      if (!shownHead) return;
      drawPicture(data);
      shown = data;
      redrawBlocks(undefined);
    } catch (error) {
      say(message, messageOf(error), true);
    }
  });

  let shown: Picture | undefined;
  const redrawBlocks = latest(async () => {
    const data = shown;
    if (data === undefined || !shownHead) return;
    try {
      kept.draw(data, await lab.blocks(kept.mass));
    } catch (error) {
      say(message, messageOf(error), true);
    }
  });

  const redrawErrors = latest(async () => {
    try {
      const computed = await errorLab.errors();
      if (computed === undefined || !shownHead) return;
      errors.note(ERRORS_NOTE);
      drawErrors(errors, computed);
    } catch (error) {
      say(message, messageOf(error), true);
    }
  });

  const showHead = latest(async () => {
    const real = source.value === 'model';
    say(message, '');
    try {
      if (real) {
        const head = await model.head(text.value, Number(layer.value), Number(headIndex.value), (note) =>
          say(message, note),
        );
        if (head.length < 2) {
          say(message, 'Type a few words: there is nothing to attend to yet.');
          shownHead = false;
          for (const each of [...Object.values(maps), histogram, codes, errors]) each.clear();
          return;
        }
        say(
          message,
          `${counted(head.length, 'token')}, layer ${Number(layer.value) + 1} of 2, head ${Number(headIndex.value) + 1} of 4.`,
        );
        await both((each) => each.take(head));
      } else {
        strength.enable(distribution.value !== 'normal');
        const drawn = {
          name: distribution.value,
          strength: strength.value,
          length: tokens.value,
          dim: Number(dim.value),
          seed: 7,
        };
        await both((each) => each.draw(drawn));
      }
      shownHead = true;
      redraw(undefined);
      redrawErrors(undefined);
    } catch (error) {
      say(message, messageOf(error), true);
    }
  });
  const changed = () => showHead(undefined);

  const source = radioField(
    'Take Q and K from',
    [
      { value: 'random', label: 'a distribution' },
      { value: 'model', label: 'a real layer, on your text' },
    ],
    'random',
    () => {
      showFields();
      changed();
    },
    'from',
  );
  const showFields = () => {
    for (const { element } of [distribution, strength, tokens, dim]) element.hidden = source.value === 'model';
    for (const element of [textField, layer.element, headIndex.element]) element.hidden = source.value !== 'model';
  };
  const distribution = selectField('Distribution of K', DISTRIBUTIONS, 'channels', changed, 'distribution');
  const strength = rangeField('Offset of K, in σ', { min: 0, max: 20, step: 0.5, initial: 6 }, changed, 'offset');
  const tokens = rangeField('Tokens', { min: 16, max: 160, step: 16, initial: 96 }, changed, 'tokens');
  const dim = selectField(
    'Head dim',
    [
      { value: '64', label: '64' },
      { value: '128', label: '128' },
    ],
    '64',
    changed,
    'dim',
  );
  const text = h(
    'textarea',
    { id: 'why-text', rows: 3, maxlength: 2000, spellcheck: 'false', oninput: changed },
    EXAMPLE_TEXT,
  );
  const textField = h(
    'div',
    { class: 'field wide' },
    h('label', { for: 'why-text' }, 'Text, of which the first 128 tokens are used'),
    text,
  );
  const layer = selectField(
    'Layer',
    [
      { value: '0', label: '1 (head dim 64)' },
      { value: '1', label: '2 (head dim 128)' },
    ],
    '0',
    changed,
    'layer',
  );
  const headIndex = selectField(
    'Head',
    ['0', '1', '2', '3'].map((value) => ({ value, label: String(Number(value) + 1) })),
    '0',
    changed,
    'head',
  );
  const smoothing = checkField(
    'Smooth',
    [
      { value: 'k', label: 'K' },
      { value: 'q', label: 'Q' },
    ],
    ['k'],
    () => redraw(undefined),
  );
  const granularity = selectField<Granularity>(
    'One scale',
    [
      { value: 'per-block', label: 'per block of tokens' },
      { value: 'per-warp', label: 'per warp: 32 tokens of Q' },
      { value: 'per-thread', label: 'per thread of a warp' },
    ],
    'per-block',
    () => redraw(undefined),
    'scale',
  );
  const format = radioField(
    'Codes',
    [
      { value: 'int8', label: 'INT8' },
      { value: 'int4', label: 'INT4' },
    ],
    'int8',
    () => redraw(undefined),
    'codes',
  );

  const operand = radioField(
    'Values and codes of',
    [
      { value: 'k', label: 'K' },
      { value: 'q', label: 'Q' },
    ],
    'k',
    () => redraw(undefined),
    'of',
  );

  const form = byId<HTMLFormElement>('why-controls');
  form.addEventListener('submit', (event) => event.preventDefault());
  source.element.classList.add('wide');
  form.append(
    source.element,
    distribution.element,
    strength.element,
    tokens.element,
    dim.element,
    textField,
    layer.element,
    headIndex.element,
    smoothing.element,
    granularity.element,
    format.element,
    operand.element,
  );
  showFields();
  form.after(code.element);
  changed();
}
