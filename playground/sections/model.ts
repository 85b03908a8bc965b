/** Section 4: a trained encoder, with exact attention and with SageAttention. */
import * as Comlink from 'comlink';
import { compare } from '../../src/reference/metrics.ts';
import { warn } from '../alert.ts';
import { css, type Figure, figure, inkOn, Plot, sequential } from '../charts.ts';
import { byId, exclusively, h, latest, messageOf, say, selectField } from '../dom.ts';
import { bytes, cosine, count, counted, duration, percent, short } from '../format.ts';
import { MODEL_BYTES, type ModelClient } from '../model-client.ts';
import type { DeviceReport } from '../workers/device.ts';
import type { LayerRun, SentencePair } from '../workers/model.ts';

const SENTENCES = [
  'How do I reset my password?',
  'I cannot log in to my account.',
  'The soup needs a little more salt.',
  'Taste it first, then season the broth.',
  'The last train leaves at midnight.',
  'Is there still a way to get home by rail tonight?',
];
const MOST_SENTENCES = 8;
const CHAPTER = new URL('../../src/cli/alice-chapter-1.txt', import.meta.url).href;

interface Encoded {
  /** As the list has it, from 1; a sentence without words has a number too. */
  readonly number: number;
  readonly pair: SentencePair;
}

const similarities = (embeddings: readonly Float32Array[]) =>
  embeddings.map((a) => embeddings.map((b) => compare(a, b).cosineSimilarity));

const cellColor = (t: number) => sequential(0.75 * t);

/** @param numbers of the sentences, of which there are two or more */
function drawMatrix(
  target: Figure,
  matrix: readonly (readonly number[])[],
  numbers: readonly number[],
  what: string,
): void {
  const cells = matrix.flatMap((row, i) =>
    row.map((value, j) => ({ i: numbers[i] as number, j: numbers[j] as number, value })),
  );
  const off = cells.filter(({ i, j }) => i < j);
  const closest = off.reduce((most, cell) => (cell.value > most.value ? cell : most));
  target.note(
    `Cosine similarity of every two sentences. Closest: ${closest.i} and ${closest.j}, ${closest.value.toFixed(3)}.`,
  );
  target.draw(`${what}. ${off.map(({ i, j, value }) => `${i} and ${j}: ${value.toFixed(2)}`).join(', ')}`, () => ({
    marginLeft: 24,
    marginRight: 2,
    marginTop: 22,
    marginBottom: 6,
    x: { axis: 'top', label: null, tickSize: 0 },
    y: { label: null, tickSize: 0 },
    color: { type: 'linear', domain: [0, 1], interpolate: (t: number) => css(cellColor(t)), clamp: true },
    marks: [
      Plot.cell(cells, { x: 'j', y: 'i', fill: 'value', inset: 1, rx: 3 }),
      Plot.text(cells, {
        x: 'j',
        y: 'i',
        text: ({ value }) => value.toFixed(2),
        fill: ({ value }) => inkOn(cellColor(Math.min(1, Math.max(0, value)))),
      }),
    ],
  }));
}

export function startModel(model: ModelClient, report: DeviceReport, ortBase: string | undefined): void {
  const body = byId('model-body');
  const loadBox = byId('model-load');
  const loadNote = h(
    'p',
    { role: 'status' },
    `The weights are ${bytes(MODEL_BYTES)}, fetched once from where this page came from.`,
  );
  const loadBar = h('progress', { max: MODEL_BYTES, value: 0, 'aria-label': 'Loading of the model', hidden: true });
  const loadButton = h('button', { type: 'button', class: 'primary' }, 'Load the model');
  loadBox.append(loadButton, loadNote, loadBar);

  loadButton.addEventListener('click', async () => {
    loadButton.disabled = true;
    loadBar.hidden = false;
    try {
      await model.load((received) => {
        loadBar.value = received;
        say(loadNote, `${bytes(received)} of ${bytes(MODEL_BYTES)}`);
      });
      if (report.chosen === 'webgpu') void model.worker.watchDevice(Comlink.proxy(warn));
      loadBox.hidden = true;
      showSentences();
      showLong();
    } catch (error) {
      say(loadNote, messageOf(error), true);
      loadButton.disabled = false;
      loadBar.hidden = true;
    }
  });

  function showSentences(): void {
    const cache = new Map<string, SentencePair>();
    const list = h('ol', { class: 'sentences' });
    const message = h('p', { class: 'message', role: 'status' });
    const exact = figure('Exact attention', { shape: 'square', span: 'half' });
    const quantized = figure('SageAttention', { shape: 'square', span: 'half' });
    const difference = h('dd', {}, '–');
    const worst = h('dd', {}, '–');
    const tokens = h('dd', {}, '–');
    const kernel = h('dd', {}, '–');
    const add = h('button', { type: 'button' }, 'Add a sentence');

    const inputs = () => [...list.querySelectorAll('input')];
    const compute = latest(async () => {
      const texts = inputs().map(({ value }) => value.trim());
      try {
        const encoded: Encoded[] = [];
        for (const [i, text] of texts.entries()) {
          if (text === '') continue;
          let pair = cache.get(text);
          if (pair === undefined) {
            say(message, 'Encoding…');
            pair = await model.worker.sentence(text, report.chosen);
            cache.set(text, pair);
          }
          if (pair.tokens > 0) encoded.push({ number: i + 1, pair });
        }
        tokens.textContent = count(encoded.reduce((sum, { pair }) => sum + pair.tokens, 0));
        if (encoded.length < 2) {
          say(message, 'Two sentences are needed to compare.');
          for (const each of [exact, quantized]) each.clear();
          for (const fact of [difference, worst, kernel]) fact.textContent = '–';
          return;
        }
        const numbers = encoded.map(({ number }) => number);
        say(message, '');
        const a = similarities(encoded.map(({ pair }) => pair.exact));
        const b = similarities(encoded.map(({ pair }) => pair.quantized));
        drawMatrix(exact, a, numbers, 'Similarities with exact attention');
        drawMatrix(quantized, b, numbers, 'Similarities with SageAttention');
        difference.textContent = short(compare(b.flat(), a.flat()).maxAbsoluteError);
        worst.textContent = cosine(Math.min(...encoded.map(({ pair }) => pair.cosine)));
        kernel.textContent = [...new Set(encoded.flatMap(({ pair }) => pair.kernels))].join(', ');
      } catch (error) {
        say(message, messageOf(error), true);
      }
    });
    const renumber = () => {
      inputs().forEach((input, i) => {
        input.setAttribute('aria-label', `Sentence ${i + 1}`);
        const number = input.previousElementSibling;
        if (number !== null) number.textContent = String(i + 1);
        input.nextElementSibling?.setAttribute('aria-label', `Remove sentence ${i + 1}`);
      });
      add.disabled = inputs().length >= MOST_SENTENCES;
    };
    const addSentence = (text: string) => {
      const input = h('input', { type: 'text', value: text, maxlength: 400, oninput: () => compute(undefined) });
      const remove = h('button', { type: 'button', class: 'plain' }, 'Remove');
      const item = h('li', {}, h('b', { 'aria-hidden': 'true' }), input, remove);
      remove.addEventListener('click', () => {
        item.remove();
        renumber();
        compute(undefined);
        add.focus();
      });
      list.append(item);
      return input;
    };
    add.addEventListener('click', () => {
      const input = addSentence('');
      renumber();
      input.focus();
    });
    for (const text of SENTENCES) addSentence(text);
    renumber();
    body.append(
      h('h3', { class: 'sub' }, 'Sentences'),
      list,
      h('div', { class: 'actions' }, add),
      message,
      h('div', { class: 'figures' }, exact.element, quantized.element),
      h(
        'dl',
        { class: 'facts' },
        h('div', {}, h('dt', {}, 'Largest difference of a similarity'), difference),
        h('div', {}, h('dt', {}, 'Lowest cosine of an embedding with its exact one'), worst),
        h('div', {}, h('dt', {}, 'Tokens'), tokens),
        h('div', {}, h('dt', {}, 'Kernel'), kernel),
      ),
    );
    compute(undefined);
  }

  function showLong(): void {
    const text = h('textarea', {
      id: 'long-text',
      rows: 6,
      spellcheck: 'false',
      placeholder: 'Paste a long text here.',
    });
    const most = selectField(
      'Tokens, up to',
      ['512', '1024', '2048', '4096', '8192'].map((value) => ({ value, label: count(Number(value)) })),
      '2048',
      () => {},
    );
    const insert = h('button', { type: 'button' }, 'Take a chapter of Alice in Wonderland');
    const run = h('button', { type: 'button', class: 'primary' }, 'Run');
    const stop = h('button', { type: 'button', disabled: true }, 'Stop');
    const message = h('p', { class: 'message', role: 'status' });
    const results = h('div', { id: 'long-results' });
    insert.addEventListener('click', async () => {
      try {
        const response = await fetch(CHAPTER);
        if (!response.ok) throw new Error(`The chapter could not be fetched: ${response.status}.`);
        text.value = await response.text();
        text.focus();
      } catch (error) {
        say(message, messageOf(error), true);
      }
    });
    const attend = async () => {
      if (text.value.trim() === '') {
        say(message, 'Paste a text first, or take the chapter.', true);
        return;
      }
      const rows: LayerRun[] = [];
      const draw = () => {
        const cells = ({
          layer,
          heads,
          headDim,
          kernel,
          quantizedMs,
          exact,
          relativeL1,
          cosine: similarity,
        }: LayerRun) =>
          h(
            'tr',
            {},
            [
              `Layer ${layer + 1}, ${heads} heads of ${headDim}`,
              kernel,
              duration(quantizedMs),
              exact === undefined ? 'none' : duration(exact.ms),
              exact === undefined ? '' : `${(exact.ms / quantizedMs).toFixed(2)}×`,
              percent(relativeL1),
              cosine(similarity),
            ].map((cell) => h('td', {}, cell)),
          );
        const head = ['Attention of', 'Kernel', 'SageAttention', 'Exact', 'Speed-up', 'Relative L1', 'Cosine'];
        results.replaceChildren(
          h(
            'div',
            { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': 'Attention on the long text' },
            h(
              'table',
              {},
              h(
                'thead',
                {},
                h(
                  'tr',
                  {},
                  head.map((title) => h('th', { scope: 'col' }, title)),
                ),
              ),
              h('tbody', {}, rows.map(cells)),
            ),
          ),
        );
      };
      draw();
      try {
        const done = await model.worker.long(
          text.value,
          Number(most.value),
          report.chosen,
          ortBase,
          Comlink.proxy((note) => {
            if (!stop.disabled) say(message, note);
          }),
          Comlink.proxy((layer) => {
            rows.push(layer);
            draw();
          }),
        );
        if (done === undefined) {
          say(message, 'Stopped. What was timed so far is below.');
          return;
        }
        const { tokens, restMs } = done;
        if (tokens === 0) {
          results.replaceChildren();
          say(message, 'There are no words in this text.', true);
          return;
        }
        const peers = [...new Set(rows.map(({ exact }) => exact?.label ?? 'none'))].join(' and ');
        say(
          message,
          `${counted(tokens, 'token')} as one sequence. Everything but attention, in plain TypeScript, took ${duration(restMs)}. Exact: the fastest here, ${peers}.`,
        );
      } catch (error) {
        say(message, messageOf(error), true);
      }
    };
    exclusively(run, attend, {
      button: stop,
      press: () => {
        say(message, 'Stopping…');
        void model.worker.stop();
      },
    });
    body.append(
      h('h3', { class: 'sub' }, 'A long text'),
      h(
        'p',
        { class: 'intro' },
        'Paste a long text and run it as one sequence. That is beyond the 128 tokens that the model was trained with, so the embedding means little; what it shows is how accurate and how fast attention is on real activations at length.',
      ),
      h(
        'div',
        { class: 'controls' },
        h('div', { class: 'field wide' }, h('label', { for: 'long-text' }, 'Text'), text),
        most.element,
      ),
      h('div', { class: 'actions' }, run, stop, insert),
      message,
      results,
    );
  }
}
