/** The result of a measurement as a card: on the page, as text, as a picture. */

import { channelMean } from '../src/quantization/smoothing.ts';
import { diverging, paint } from './charts.ts';
import { download, h } from './dom.ts';
import { count, duration, percent, rate } from './format.ts';
import { drawHead, smoothedPartly } from './lab.ts';

export interface CardFacts {
  readonly device: string;
  readonly where: 'WebGPU' | 'WebAssembly';
  readonly kernel: string;
  readonly tokens: number;
  readonly heads: number;
  readonly headDim: number;
  readonly milliseconds: number;
  readonly flops: number;
  readonly relativeL1: number;
  /** Exact attention on the same device in the same run. */
  readonly peers: readonly { readonly label: string; readonly flops: number }[];
  /** As YYYY-MM-DD. */
  readonly date: string;
  readonly address: string;
}

/** The fastest exact attention is what a reader would use instead. */
const fastest = ({ peers }: CardFacts) => [...peers].sort((a, b) => b.flops - a.flops)[0];

function headline(facts: CardFacts): { readonly ratio: string; readonly against: string } {
  const peer = fastest(facts);
  if (peer === undefined) return { ratio: rate(facts.flops), against: 'no exact attention ran to compare with' };
  const ratio = facts.flops / peer.flops;
  return {
    ratio: `${ratio.toFixed(ratio < 10 ? 2 : 1)}×`,
    against: `as fast as the fastest exact attention here, ${peer.label}`,
  };
}

const rowsOf = (facts: CardFacts): readonly (readonly [name: string, value: string])[] => [
  ['Device', facts.device],
  ['Kernel', `${facts.kernel} on ${facts.where}`],
  ['Speed', `${rate(facts.flops)}, ${duration(facts.milliseconds)} a call`],
  ['Error', `${percent(facts.relativeL1)} relative L1 against float64`],
  ['Problem', `${count(facts.tokens)} tokens, ${facts.heads} heads of ${facts.headDim}`],
];

export function resultCard(facts: CardFacts): HTMLElement {
  const { ratio, against } = headline(facts);
  return h(
    'article',
    { class: 'result-card', 'aria-label': 'The result on this device' },
    h('p', { class: 'ratio' }, h('strong', {}, ratio), ` ${against}`),
    h(
      'dl',
      {},
      rowsOf(facts).flatMap(([name, value]) => [h('dt', {}, name), h('dd', {}, value)]),
    ),
  );
}

export function cardText(facts: CardFacts): string {
  const { ratio, against } = headline(facts);
  const rows = rowsOf(facts).map(([name, value]) => `${name}: ${value}`);
  return [`SageAttention: ${ratio} ${against}`, ...rows, `${facts.date}, ${facts.address}`].join('\n');
}

const WIDTH = 1200;
const HEIGHT = 630;

/** Breaks a text into lines that fit. */
function linesOf(context: CanvasRenderingContext2D, text: string, width: number): string[] {
  const lines: string[] = [];
  for (const word of text.split(' ')) {
    const longer = lines.length === 0 ? word : `${lines.at(-1)} ${word}`;
    if (lines.length > 0 && context.measureText(longer).width <= width) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines;
}

/** K with its stripes and without them. */
function drawKeys(context: CanvasRenderingContext2D, x: number, y: number, width: number, height: number): void {
  const { k, dim, length } = drawHead({ name: 'channels', strength: 6, length: 48, dim: 64, seed: 7 });
  const mean = channelMean(k, dim);
  context.imageSmoothingEnabled = false;
  for (const [i, part] of [0, 1].entries()) {
    const canvas = h('canvas', { width: dim, height: length });
    paint(canvas, smoothedPartly(k, mean, part), [-13, 13], diverging);
    context.drawImage(canvas, x, y + i * (height / 2 + 6), width, height / 2 - 6);
  }
}

/** The size that links are shown in. */
function drawCard(facts: CardFacts): HTMLCanvasElement {
  const canvas = h('canvas', { width: WIDTH, height: HEIGHT });
  const context = canvas.getContext('2d');
  if (context === null) throw new Error('this browser draws no pictures');
  const style = getComputedStyle(document.documentElement);
  const color = (name: string) => {
    // light-dark() is a colour only once it is computed of an element.
    const probe = h('i', {});
    probe.style.color = `var(${name})`;
    document.body.append(probe);
    const computed = getComputedStyle(probe).color;
    probe.remove();
    return computed;
  };
  const family = style.fontFamily || 'sans-serif';
  const write = (text: string, x: number, y: number, font: string, fill: string) => {
    context.font = `${font} ${family}`;
    context.fillStyle = fill;
    context.fillText(text, x, y);
  };
  context.fillStyle = color('--page');
  context.fillRect(0, 0, WIDTH, HEIGHT);
  drawKeys(context, 860, 60, 280, 510);
  const { ratio, against } = headline(facts);
  write('SageAttention', 60, 96, '600 34px', color('--accent'));
  write(ratio, 60, 210, '700 104px', color('--ink'));
  context.font = `400 28px ${family}`;
  let y = 258;
  for (const line of linesOf(context, against, 740)) {
    write(line, 60, y, '400 28px', color('--soft'));
    y += 36;
  }
  y = Math.max(y + 16, 336);
  for (const [name, value] of rowsOf(facts)) {
    write(name, 60, y, '400 24px', color('--soft'));
    context.font = `500 24px ${family}`;
    for (const line of linesOf(context, value, 590)) {
      write(line, 200, y, '500 24px', color('--ink'));
      y += 32;
    }
    y += 6;
  }
  write(`${facts.date}   npm install sageattention`, 60, HEIGHT - 34, '400 20px', color('--soft'));
  return canvas;
}

const FILE_NAME = 'sageattention-result.png';

function pictureOf(facts: CardFacts): Promise<Blob> {
  return new Promise((resolve, reject) => {
    drawCard(facts).toBlob((blob) => {
      if (blob === null) reject(new Error('this browser makes no pictures'));
      else resolve(blob);
    }, 'image/png');
  });
}

export async function savePicture(facts: CardFacts): Promise<void> {
  download(await pictureOf(facts), FILE_NAME);
}

/** Safari wants the item while the click is handled, and takes a promise of its content. */
export const copyPicture = (facts: CardFacts): Promise<void> =>
  navigator.clipboard.write([new ClipboardItem({ 'image/png': pictureOf(facts) })]);

/** Opens the system's sheet; with the picture where it takes files. */
export async function sharePicture(facts: CardFacts): Promise<void> {
  const files = [new File([await pictureOf(facts)], FILE_NAME, { type: 'image/png' })];
  const text = cardText(facts);
  const withPicture = { text, files };
  try {
    await navigator.share(navigator.canShare?.(withPicture) ? withPicture : { text, url: facts.address });
  } catch (error) {
    // Closing the sheet is no failure.
    if (!(error instanceof DOMException && error.name === 'AbortError')) throw error;
  }
}
