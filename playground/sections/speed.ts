/** Section 3: how fast each kernel is here, beside exact attention of our own and of onnxruntime-web. */
import * as Comlink from 'comlink';
import { figure, fillLegend, Plot, seriesColor } from '../charts.ts';
import {
  byId,
  checkField,
  codeBox,
  download,
  exclusively,
  h,
  messageOf,
  say,
  saySteadily,
  selectField,
} from '../dom.ts';
import { count, counted, duration, percent, rate } from '../format.ts';
import type { BenchConfig, DeviceApi, DeviceReport, Measurement } from '../workers/device.ts';

export type Measured = Measurement & Required<Pick<Measurement, 'medianMs' | 'flops' | 'relativeL1'>>;
export const isMeasured = (result: Measurement): result is Measured => result.flops !== undefined;

/** No attention at all: a driver or an engine failed without saying so. Its speed is no measure of anything. */
export const isWrong = ({ contestant, relativeL1 }: Measured) =>
  !(relativeL1 < (contestant.includes('fp4') ? 0.3 : 0.1));

const LENGTHS = [256, 512, 1024, 2048, 4096, 8192, 16384] as const;

/** Where onnxruntime-web's files lie, if the host has them. */
export async function findOrt(): Promise<string | undefined> {
  const base = new URL('onnxruntime-web/', document.baseURI).href;
  try {
    // The smallest of its files. A host that answers everything with its own page has no such type.
    const response = await fetch(`${base}ort-wasm-simd-threaded.mjs`);
    await response.arrayBuffer();
    return response.ok && (response.headers.get('content-type') ?? '').includes('javascript') ? base : undefined;
  } catch {
    return undefined;
  }
}

export async function startSpeed(
  device: Comlink.Remote<DeviceApi>,
  report: DeviceReport,
  ortBase: string | undefined,
): Promise<void> {
  const offered = await device.contestants(ortBase);
  const start = byId<HTMLButtonElement>('bench-start');
  const save = byId<HTMLButtonElement>('bench-download');
  const progress = byId<HTMLProgressElement>('bench-progress');
  const note = byId('bench-note');
  const accelerated = report.chosen === 'webgpu';

  const code = codeBox('The calls that are measured');
  const nothing = () => showCode();
  const who = checkField(
    'Measure',
    offered.map(({ id, label }) => ({ value: id, label })),
    // A software GPU is right but slow; it is measured when asked for.
    offered.filter(({ where }) => where === 'wasm' || accelerated).map(({ id }) => id),
    nothing,
  );
  who.element.classList.add('wide');
  const longest = selectField(
    'Tokens, up to',
    LENGTHS.map((length) => ({ value: String(length), label: count(length) })),
    accelerated ? '8192' : '2048',
    nothing,
    'upto',
  );
  const heads = selectField(
    'Heads',
    ['1', '4', '8', '16'].map((value) => ({ value, label: value })),
    '8',
    nothing,
    'heads',
  );
  const headDim = selectField(
    'Head dim',
    ['64', '128'].map((value) => ({ value, label: value })),
    '64',
    nothing,
    'headdim',
  );
  const mask = selectField(
    'Mask',
    [
      { value: 'none', label: 'none' },
      { value: 'causal', label: 'causal' },
    ],
    'none',
    nothing,
    'mask',
  );
  const form = byId<HTMLFormElement>('speed-controls');
  form.addEventListener('submit', (event) => event.preventDefault());
  form.append(who.element, longest.element, heads.element, headDim.element, mask.element);
  if (ortBase === undefined) {
    say(
      note,
      'onnxruntime-web is not on this host; npm install onnxruntime-web adds it. Our own exact attention is what there is to compare with.',
    );
  }

  const legend = h('ul', { class: 'legend' });
  const chart = figure('Tokens against speed', { shape: 'low', span: 'full', legend });
  // There is nothing to see before the first measurement.
  chart.element.hidden = true;
  byId('bench-figures').append(chart.element);

  let results: Measurement[] = [];
  let config: BenchConfig | undefined;

  const drawChart = () => {
    const measured = results.filter(isMeasured);
    // All of them from the start, so that colours and the figure's height stay as they are.
    const names = offered.filter(({ id }) => config?.contestants.includes(id)).map(({ label }) => label);
    fillLegend(legend, names);
    const lengths = config?.lengths ?? LENGTHS.filter((length) => length <= Number(longest.value));
    const tera = measured.some(({ flops }) => flops >= 1e12);
    const y = ({ flops }: Measured) => flops / (tera ? 1e12 : 1e9);
    const best = measured.reduce<Measured | undefined>(
      (most, result) => (most === undefined || result.flops > most.flops ? result : most),
      undefined,
    );
    chart.element.hidden = config === undefined;
    chart.draw(
      best === undefined
        ? 'Nothing measured yet.'
        : `Fastest: ${best.label}, ${rate(best.flops)} at ${best.length} tokens.`,
      (width) => ({
        marginLeft: 46,
        marginRight: 16,
        marginBottom: 42,
        x: {
          type: 'log',
          base: 2,
          domain: [lengths[0] ?? 256, lengths.at(-1) ?? 2048],
          ticks: [...lengths],
          tickFormat: (length: number) => (width < 420 && length >= 1024 ? `${length / 1024}K` : String(length)),
          label: 'tokens',
          labelAnchor: 'center',
          labelArrow: 'none',
          inset: 12,
        },
        y: {
          label: tera ? 'TFLOP/s' : 'GFLOP/s',
          grid: true,
          zero: true,
          nice: true,
          domain: [0, measured.length === 0 ? 100 : Math.max(...measured.map(y))],
          labelArrow: 'none',
        },
        marks: [
          Plot.ruleY([0], { stroke: 'var(--control)' }),
          ...(['sage', 'peer'] as const).map((kind) =>
            Plot.line(
              measured.filter((result) => result.kind === kind),
              {
                x: 'length',
                y,
                z: 'label',
                stroke: (d: Measured) => seriesColor(names.indexOf(d.label)),
                strokeWidth: 2.25,
                ...(kind === 'peer' ? { strokeDasharray: '5 4' } : {}),
              },
            ),
          ),
          Plot.dot(measured, {
            x: 'length',
            y,
            r: 4,
            fill: (d: Measured) => seriesColor(names.indexOf(d.label)),
            title: (d: Measured) =>
              `${d.label}\n${count(d.length)} tokens: ${rate(d.flops)}, ${duration(d.medianMs)} a call`,
          }),
        ],
      }),
    );
  };

  /** How many times as fast as the fastest exact attention on the same backend. */
  const speedUp = (result: Measured): string => {
    if (result.kind === 'peer') return '';
    const peers = results
      .filter(isMeasured)
      .filter(
        (other) =>
          other.kind === 'peer' && other.where === result.where && other.length === result.length && !isWrong(other),
      );
    if (peers.length === 0) return '';
    return `${(result.flops / Math.max(...peers.map(({ flops }) => flops))).toFixed(2)}×`;
  };

  const drawTable = () => {
    const row = (result: Measurement) => {
      const cells = isMeasured(result)
        ? [
            ...[duration(result.medianMs), rate(result.flops), speedUp(result)].map((text) => h('td', {}, text)),
            isWrong(result)
              ? h('td', { class: 'bad' }, `wrong output: ${percent(result.relativeL1)}`)
              : h('td', {}, percent(result.relativeL1)),
          ]
        : [h('td', { class: 'wrapped', colspan: 4 }, result.failure ?? '')];
      return h('tr', {}, h('td', {}, result.label), h('td', {}, count(result.length)), cells);
    };
    const head = ['Kernel', 'Tokens', 'A call', 'Speed', 'Against the fastest exact', 'Relative L1 error'];
    byId('bench-table').replaceChildren(
      h(
        'div',
        { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': 'All measurements' },
        h(
          'table',
          {},
          h(
            'thead',
            {},
            h(
              'tr',
              {},
              head.map((text) => h('th', { scope: 'col' }, text)),
            ),
          ),
          h('tbody', {}, results.map(row)),
        ),
      ),
    );
  };

  /** The library's calls as the controls choose them. */
  const showCode = () => {
    const kernels = who.value
      .map((id) => id.split(':') as [string, string])
      .filter(([, kernel]) => kernel.startsWith('qk-'));
    const options = (where: string, kernel: string) =>
      `{ backend: '${where}', kernel: '${kernel}', tensorLayout: 'NHD'${mask.value === 'causal' ? ', isCausal: true' : ''} }`;
    code.set(
      [
        "import { createAttention, tensor } from 'sageattention';",
        '',
        `const shape = [1, ${longest.value}, ${heads.value}, ${headDim.value}]; // [batch, tokens, heads, head dim]`,
        'const random = () => tensor(Float32Array.from({ length: shape.reduce((a, b) => a * b) }, Math.random), shape);',
        'const [q, k, v] = [random(), random(), random()];',
        ...kernels.flatMap(([where, kernel]) => [
          '',
          '{',
          `  const attention = await createAttention({ q, k, v }, ${options(where, kernel)});`,
          '  await attention.run({ q, k, v });',
          '  const start = performance.now();',
          '  await attention.run({ q, k, v });',
          `  console.log('${where} ${kernel}', performance.now() - start, 'ms');`,
          '  attention.dispose();',
          '}',
        ]),
      ].join('\n'),
    );
  };
  form.after(code.element);
  showCode();

  drawChart();

  const run = async () => {
    const chosen = who.value;
    if (chosen.length === 0) {
      say(note, 'Choose at least one kernel to measure.', true);
      return;
    }
    results = [];
    config = {
      contestants: chosen,
      lengths: LENGTHS.filter((length) => length <= Number(longest.value)),
      heads: Number(heads.value),
      headDim: Number(headDim.value),
      isCausal: mask.value === 'causal',
    };
    save.disabled = true;
    saySteadily(note, true);
    progress.value = 0;
    chart.note(
      `${config.heads} heads of ${config.headDim}${config.isCausal ? ', causal' : ''}. Solid: SageAttention; dashed: exact attention. Higher is better.`,
    );
    drawChart();
    drawTable();
    try {
      let complete = false;
      await device.bench(
        config,
        ortBase,
        Comlink.proxy(({ done, total, doing, measurements }) => {
          progress.value = done / total;
          complete = done === total;
          say(note, `${done} of ${total} steps: ${doing}${complete ? '' : '…'}`);
          if (measurements.length === 0) return;
          results.push(...measurements);
          drawChart();
          drawTable();
        }),
      );
      say(
        note,
        complete
          ? `${counted(results.length, 'measurement')}. Times are medians of samples taken in turns; GPU times are without copies to and from the GPU.`
          : 'Stopped. What was measured so far is below.',
      );
    } catch (error) {
      say(note, messageOf(error), true);
    } finally {
      saySteadily(note, false);
      save.disabled = results.length === 0;
    }
  };
  exclusively(start, run, {
    button: byId<HTMLButtonElement>('bench-stop'),
    press: () => {
      say(note, 'Stopping…');
      void device.stop();
    },
  });

  save.addEventListener('click', () => {
    const file = {
      schema: 'sageattention-playground/1',
      date: new Date().toISOString(),
      userAgent: navigator.userAgent,
      device: report,
      config,
      results,
    };
    download(new Blob([JSON.stringify(file, null, 2)], { type: 'application/json' }), 'sageattention-bench.json');
  });
}
