/** The weights of a head with the blocks that block-sparse attention leaves out covered; a slider says how much of the softmax to keep. */
import { paintWeights, weightsOf } from './attention-map.ts';
import { onColorScheme } from './charts.ts';
import { h, rangeField } from './dom.ts';
import { percent, short } from './format.ts';
import type { Picture } from './lab.ts';

/** Below this a share of the softmax is rounding, and its digits say nothing. */
const LEAST_SHARE = 1e-4;

/** What came of keeping a share of the softmax. */
export interface KeptBlocks {
  readonly rows: number;
  readonly keys: number;
  /** `[row blocks, key blocks]`, nonzero: computed. */
  readonly map: Uint8Array;
  readonly keptFraction: number;
  readonly lostMass: number;
  /** Relative L1 error of the output, of these blocks and of all. */
  readonly error: number;
  readonly errorOfAll: number;
  /** How many times as fast as all blocks, choosing included. */
  readonly speed: number;
}

export interface KeptBlocksFigure {
  readonly element: HTMLElement;
  /** Share of the softmax to keep, 0 to 1. */
  readonly mass: number;
  draw(picture: Picture, kept: KeptBlocks | undefined): void;
}

const COVER = 'rgb(128 128 128 / 0.75)';

export function keptBlocks(onMass: () => void): KeptBlocksFigure {
  const canvases = [0, 1].map(() => h('canvas', { width: 1, height: 1, 'aria-hidden': 'true' }));
  const [weights, cover] = canvases as [HTMLCanvasElement, HTMLCanvasElement];
  const note = h('p', { class: 'note' });
  const stack = h('div', { class: 'wipe', role: 'img' }, weights, cover);
  const slider = rangeField(
    'Share of the softmax to keep',
    { min: 50, max: 100, step: 1, initial: 75, unit: ' %' },
    onMass,
    'mass',
  );
  let last: Picture | undefined;
  const paint = (picture: Picture) => paintWeights(weights, weightsOf(picture.exactScores, picture.length));
  onColorScheme(() => {
    if (last !== undefined) paint(last);
  });
  return {
    element: h(
      'figure',
      { class: 'full map' },
      h('h3', {}, 'Blocks of scores that matter'),
      note,
      stack,
      slider.element,
    ),
    get mass() {
      return slider.value / 100;
    },
    draw(picture, kept) {
      last = picture;
      paint(picture);
      if (kept === undefined) {
        note.textContent = 'No blocks are chosen here: this browser cannot run the WASM kernels.';
        stack.setAttribute('aria-label', 'Attention map; no block is left out.');
        return;
      }
      const { length } = picture;
      const { rows, keys, map, keptFraction, lostMass, error, errorOfAll, speed } = kept;
      const keyBlocks = Math.ceil(length / keys);
      cover.width = length;
      cover.height = length;
      const context = cover.getContext('2d');
      if (context === null) throw new Error('this browser draws no pictures');
      context.fillStyle = COVER;
      map.forEach((flag, i) => {
        if (flag === 0) context.fillRect((i % keyBlocks) * keys, Math.floor(i / keyBlocks) * rows, keys, rows);
      });
      const count = map.filter((flag) => flag !== 0).length;
      note.textContent = `Blocks of ${rows} queries by ${keys} keys; the covered ones are not computed. Kept: ${count} of ${map.length}, ${percent(keptFraction)}, with ${lostMass < LEAST_SHARE ? 'nothing' : percent(lostMass)} of the softmax lost by the estimate that chooses them. Error of the output ${percent(error)}, of all blocks ${percent(errorOfAll)}. ${short(speed)} times as fast as all blocks, choosing included, WASM on one thread${speed < 1 ? ': of so few tokens, choosing costs more than it saves' : ''}.`;
      stack.setAttribute(
        'aria-label',
        `Attention map with the blocks that are not computed covered. ${note.textContent}`,
      );
    },
  };
}
