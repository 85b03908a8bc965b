/** The attention map of a head, exact and from codes, on top of each other: a slider wipes from one to the other. */
import { onColorScheme, paint, sequential } from './charts.ts';
import { h, rangeField } from './dom.ts';
import { short } from './format.ts';
import type { Picture } from './lab.ts';

/** Rows of softmax, whose result does not change by what was taken from every score of a row. */
export function weightsOf(scores: Float32Array, length: number): Float32Array {
  const weights = new Float32Array(scores.length);
  for (let row = 0; row < length; row++) {
    const part = scores.subarray(row * length, (row + 1) * length);
    const most = part.reduce((largest, score) => Math.max(largest, score));
    const terms = part.map((score) => Math.exp(score - most));
    const sum = terms.reduce((total, term) => total + term, 0);
    weights.set(
      terms.map((term) => term / sum),
      row * length,
    );
  }
  return weights;
}

/** The weight from which on colours are full: few weights are large, and what most of them are fills the colours. */
function fullColor(weights: Float32Array): number {
  const sorted = Float32Array.from(weights).sort();
  return sorted[Math.floor(0.995 * (sorted.length - 1))] as number;
}

/** Paints weights, one a pixel of a square. */
export function paintWeights(canvas: HTMLCanvasElement, weights: Float32Array, full = fullColor(weights)): void {
  canvas.width = Math.sqrt(weights.length);
  canvas.height = canvas.width;
  paint(
    canvas,
    weights.map((weight) => Math.sqrt(weight / full)),
    [0, 1],
    sequential,
  );
}

export interface AttentionMap {
  readonly element: HTMLElement;
  draw(picture: Picture): void;
}

export function attentionMap(): AttentionMap {
  const [exact, quantized] = [0, 1].map(() => h('canvas', { width: 1, height: 1, 'aria-hidden': 'true' })) as [
    HTMLCanvasElement,
    HTMLCanvasElement,
  ];
  const edge = h('i', { class: 'edge' });
  const note = h('p', { class: 'note' });
  const stack = h(
    'div',
    { class: 'wipe', role: 'img' },
    exact,
    quantized,
    edge,
    h('span', { class: 'left' }, 'exact'),
    h('span', { class: 'right' }, 'from codes'),
  );
  const move = () => {
    const at = `${slider.value}%`;
    quantized.style.clipPath = `inset(0 0 0 ${at})`;
    edge.style.left = at;
  };
  const slider = rangeField(
    'From exact to quantized',
    { min: 0, max: 100, step: 1, initial: 50, unit: ' %' },
    move,
    'wipe',
  );
  let last: Picture | undefined;
  const draw = (picture: Picture) => {
    last = picture;
    const { length } = picture;
    const maps = [weightsOf(picture.exactScores, length), weightsOf(picture.quantizedScores, length)] as const;
    const [of, from] = maps;
    const full = fullColor(of);
    paintWeights(exact, of, full);
    paintWeights(quantized, from, full);
    const difference = of.reduce((most, weight, i) => Math.max(most, Math.abs(weight - (from[i] as number))), 0);
    const said = `Weights of ${length} queries over ${length} keys; full colour is ${short(full)} or more. Largest difference of a weight: ${short(difference)}.`;
    note.textContent = said;
    stack.setAttribute(
      'aria-label',
      `Attention map, exact on the left of the line and from codes on its right. ${said}`,
    );
  };
  onColorScheme(() => {
    if (last !== undefined) draw(last);
  });
  move();
  return {
    element: h(
      'figure',
      { class: 'full map' },
      h('h3', {}, 'Attention map, exact and quantized'),
      note,
      stack,
      slider.element,
    ),
    draw,
  };
}
