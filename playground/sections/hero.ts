/** The first screen: K of a head while its mean is taken away and the error of attention falls. Then the same on the device in front. */
import * as Comlink from 'comlink';
import { channelMean } from '../../src/quantization/smoothing.ts';
import { connect } from '../alert.ts';
import { diverging, onColorScheme, paint } from '../charts.ts';
import { byId, codeBox, copyButton, exclusively, h, latest, messageOf, radioField, rangeField, say } from '../dom.ts';
import { percent } from '../format.ts';
import { codeSpan, drawHead, type Head, type Quantization, SWEEP_STEPS, smoothedPartly } from '../lab.ts';
import { fetchEncoderHead } from '../real-head.ts';
import { type CardFacts, cardText, copyPicture, resultCard, savePicture, sharePicture } from '../result-card.ts';
import { currentAddress } from '../url-state.ts';
import type { DeviceApi, DeviceReport, Measurement } from '../workers/device.ts';
import type { LabApi } from '../workers/lab.ts';
import { isMeasured, isWrong } from './speed.ts';

type Keys = 'large' | 'encoder';

/** Offsets of K in standard deviations, as drawn for the first picture. */
const DRAWN = { name: 'channels', strength: 6, length: 96, dim: 64, seed: 7 } as const;

const SAID: Readonly<Record<Keys, string>> = {
  large:
    'Colours span what the codes span: with the stripes, hardly any are left for what tells tokens apart. Drawn with offsets six times as large as that, as the papers show them in K of language and video models.',
  encoder:
    'Real: head 1 of layer 1 of the sentence encoder of section 4, on the first lines of Alice. So small a model has mild stripes, and smoothing them away gains less.',
};

/** How long K takes to lose its stripes by itself, once. */
const SWEEP_MS = 3200;
const PAUSE_MS = 700;

interface Shown {
  readonly head: Head;
  readonly mean: ArrayLike<number>;
  readonly errors: readonly number[];
  readonly bits: Quantization['bits'];
}

/** Starts and stops slowly. */
const eased = (t: number) => t * t * (3 - 2 * t);

function errorCurve(): { readonly element: SVGSVGElement; draw(errors: readonly number[], step: number): void } {
  const make = <K extends keyof SVGElementTagNameMap>(tag: K, attributes: Readonly<Record<string, string>>) => {
    const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const element = make('svg', { viewBox: '0 0 200 64', class: 'curve', 'aria-hidden': 'true' });
  const area = make('path', { class: 'area' });
  const line = make('path', { class: 'line' });
  const dot = make('circle', { r: '5', class: 'dot' });
  element.append(area, line, dot);
  return {
    element,
    draw(errors, step) {
      const most = Math.max(...errors);
      const x = (i: number) => 6 + (188 * i) / SWEEP_STEPS;
      const y = (i: number) => 58 - (50 * (errors[i] as number)) / most;
      const points = errors.map((_, i) => `${x(i).toFixed(1)},${y(i).toFixed(1)}`).join('L');
      line.setAttribute('d', `M${points}`);
      area.setAttribute('d', `M${x(0)},60L${points}L${x(errors.length - 1)},60Z`);
      dot.setAttribute('cx', x(step).toFixed(1));
      dot.setAttribute('cy', y(step).toFixed(1));
    },
  };
}

/** The picture, its slider and its error. */
export function startPicture(): void {
  const lab = connect<LabApi>(new Worker(new URL('../workers/lab.ts', import.meta.url), { type: 'module' }));
  const canvas = h('canvas', { width: DRAWN.dim, height: DRAWN.length, role: 'img', class: 'keys' });
  const curve = errorCurve();
  const error = h('strong', {}, '–');
  const before = h('span', { class: 'before' }, '');
  const codes = h('span', { class: 'before' }, '');
  const caption = h('p', { class: 'note' });
  const heads = new Map<Keys, Promise<Head>>();
  const computed = new Map<string, Shown>();
  let shown: Shown | undefined;
  let frame = 0;

  const headOf = (which: Keys): Promise<Head> => {
    let head = heads.get(which);
    if (head === undefined) {
      head = which === 'large' ? Promise.resolve(drawHead(DRAWN)) : fetchEncoderHead();
      head.catch(() => heads.delete(which));
      heads.set(which, head);
    }
    return head;
  };

  const draw = () => {
    if (shown === undefined) return;
    const { head, mean, errors, bits } = shown;
    const k = smoothedPartly(head.k, mean, smoothing.value / 100);
    // The colours span what the codes span, so that what no code is left for is not seen either.
    const most = 0.75 * k.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);
    paint(canvas, k, [-most, most], diverging);
    const span = codeSpan(k, head.dim, bits);
    codes.textContent = `a channel spans ${span.mean.toFixed(0)} of ${span.codes} codes`;
    const step = Math.round((smoothing.value / 100) * SWEEP_STEPS);
    const now = errors[step] as number;
    error.textContent = percent(now);
    before.textContent = step === 0 ? 'K as it is' : `${percent(errors[0] as number)} without smoothing`;
    curve.draw(errors, step);
    canvas.setAttribute(
      'aria-label',
      `K, ${head.length} tokens by ${head.dim} channels, ${smoothing.value} % of its mean taken away: ${
        smoothing.value === 100 ? 'no stripes are left' : 'stripes are what all keys share'
      }. The output's error is ${percent(now)}.`,
    );
  };

  const stop = () => {
    cancelAnimationFrame(frame);
    frame = 0;
    again.textContent = 'Play';
  };

  const play = () => {
    const start = performance.now() + PAUSE_MS;
    again.textContent = 'Stop';
    const tick = (now: number) => {
      const t = Math.min(1, Math.max(0, (now - start) / SWEEP_MS));
      smoothing.set(Math.round((100 * eased(t)) / 5) * 5);
      draw();
      frame = t < 1 ? requestAnimationFrame(tick) : 0;
      if (t === 1) again.textContent = 'Play';
    };
    frame = requestAnimationFrame(tick);
  };

  const show = latest(async () => {
    const [which, bits] = [keys.value, format.value];
    caption.textContent = SAID[which];
    try {
      let next = computed.get(which + bits);
      if (next === undefined) {
        const head = await headOf(which);
        const mean = channelMean(head.k, head.dim);
        next = { head, mean, errors: await lab.sweep(head, bits), bits };
        computed.set(which + bits, next);
      }
      const first = shown === undefined;
      shown = next;
      draw();
      const still = matchMedia('(prefers-reduced-motion: reduce)').matches;
      const chosen = new URLSearchParams(location.search).has('smoothing');
      if (first && still && !chosen) smoothing.set(100);
      if (first && !still && !chosen) play();
      else draw();
    } catch (failure) {
      caption.textContent = messageOf(failure);
      caption.classList.add('bad');
    }
  });
  const changed = () => show(undefined);

  const smoothing = rangeField(
    'Smoothing of K',
    { min: 0, max: 100, step: 5, initial: 0, unit: ' %' },
    () => {
      stop();
      draw();
    },
    'smoothing',
  );
  const keys = radioField<Keys>(
    'Keys',
    [
      { value: 'large', label: 'large models' },
      { value: 'encoder', label: 'a small encoder' },
    ],
    'large',
    changed,
    'keys',
  );
  const format = radioField<Quantization['bits']>(
    'Codes',
    [
      { value: 'int8', label: 'INT8' },
      { value: 'int4', label: 'INT4' },
    ],
    'int8',
    changed,
    'bits',
  );
  const again = h('button', { type: 'button', class: 'play' }, 'Play');
  again.addEventListener('click', () => (frame === 0 ? play() : stop()));

  byId('hero-picture').append(
    h(
      'div',
      { class: 'keys-box' },
      canvas,
      h('span', { class: 'axis' }, 'channels →'),
      h('span', { class: 'axis tokens' }, 'tokens ↓'),
    ),
    h(
      'div',
      { class: 'readout' },
      h('p', {}, h('span', {}, 'Error of the attention'), error, before, codes),
      curve.element,
      again,
    ),
    smoothing.element,
    h('div', { class: 'choices-row' }, keys.element, format.element),
    caption,
  );
  onColorScheme(draw);
  changed();
}

/** Tokens of the quick measurement. */
const QUICK_TOKENS = { webgpu: 4096, wasm: 1024 } as const;
const QUICK = { heads: 8, headDim: 64, isCausal: false } as const;

function factsOf(report: DeviceReport, kernel: string, results: readonly Measurement[]): CardFacts {
  const measured = results.filter(isMeasured);
  const ours = measured.find(({ kind }) => kind === 'sage');
  if (ours === undefined) throw new Error(results[0]?.failure ?? 'nothing could be measured');
  if (isWrong(ours)) {
    throw new Error(
      `${kernel} computes wrong here (error ${percent(ours.relativeL1)}): check the kernels in section 1`,
    );
  }
  const peers = measured
    .filter((other) => other.kind === 'peer' && !isWrong(other))
    .map(({ label, flops }) => ({ label, flops }));
  const found = report.backends.find(({ name }) => name === report.chosen)?.availability.details ?? {};
  const device =
    report.chosen === 'webgpu'
      ? (found.adapter ?? 'an unnamed GPU')
      : `${report.processors} processors, ${found.threads}, ${found.simd === 'relaxed' ? 'relaxed SIMD' : 'SIMD128'}`;
  return {
    device,
    where: report.chosen === 'webgpu' ? 'WebGPU' : 'WebAssembly',
    kernel,
    tokens: ours.length,
    ...QUICK,
    milliseconds: ours.medianMs,
    flops: ours.flops,
    relativeL1: ours.relativeL1,
    peers,
    date: new Date().toISOString().slice(0, 10),
    address: currentAddress(),
  };
}

/** What stands under the card: a call as it was measured. */
const callOf = ({
  where,
  kernel,
  tokens,
  heads,
  headDim,
}: CardFacts) => `import { sageattn, tensor } from 'sageattention';

const shape = [1, ${heads}, ${tokens}, ${headDim}]; // [batch, heads, tokens, head dim]
const random = () => tensor(Float32Array.from({ length: ${heads * tokens * headDim} }, Math.random), shape);
const [q, k, v] = [random(), random(), random()];

// sageattn picks both by itself; here they are what was measured.
const output = await sageattn(q, k, v, { backend: '${where === 'WebGPU' ? 'webgpu' : 'wasm'}', kernel: '${kernel}' });
console.log(output.shape);
`;

/** "Run it on my device": one measurement, and a card that can be shared. */
export function startQuickRun(
  device: Comlink.Remote<DeviceApi>,
  report: DeviceReport,
  ortBase: string | undefined,
): void {
  const button = byId<HTMLButtonElement>('quick-run');
  const note = byId('quick-note');
  const place = byId('result');
  const backend = report.backends.find(({ name }) => name === report.chosen);
  const kernel = backend?.defaultKernel;
  if (kernel === undefined) return;
  exclusively(button, async () => {
    say(note, 'Measuring…');
    const chosen = (await device.contestants(ortBase))
      .filter(
        ({ id, kind, where }) => where === report.chosen && (kind === 'peer' || id === `${report.chosen}:${kernel}`),
      )
      .map(({ id }) => id);
    const results: Measurement[] = [];
    try {
      await device.bench(
        { contestants: chosen, lengths: [QUICK_TOKENS[report.chosen]], ...QUICK },
        ortBase,
        Comlink.proxy(({ done, total, measurements }) => {
          results.push(...measurements);
          say(note, `Measuring: ${Math.round((100 * done) / total)} %`);
        }),
      );
      const facts = factsOf(report, kernel, results);
      const code = codeBox('The call that was measured');
      code.set(callOf(facts));
      const action = (label: string, act: () => unknown) => {
        const made = h('button', { type: 'button' }, label);
        made.addEventListener('click', () => void act());
        return made;
      };
      place.replaceChildren(
        resultCard(facts),
        h(
          'div',
          { class: 'actions' },
          // Where the system has a sheet for it, as phones do.
          ...('share' in navigator ? [action('Share', () => sharePicture(facts))] : []),
          copyButton('Copy the result', () => cardText(facts)),
          ...('ClipboardItem' in window ? [copyButton('Copy as a picture', () => copyPicture(facts))] : []),
          action('Save as a picture', () => savePicture(facts)),
          copyButton('Copy the link', () => currentAddress()),
        ),
        code.element,
      );
      place.hidden = false;
      place.scrollIntoView({ block: 'nearest' });
      say(note, 'Done. Section 3 measures every kernel and more lengths.');
    } catch (error) {
      say(note, messageOf(error), true);
    }
  });
  button.hidden = false;
}
