/** The page's charts: Observable Plot, drawn to the width that there is, in the colours of the page. */
import * as Plot from '@observablehq/plot';
import { h } from './dom.ts';

export { Plot };

const dark = matchMedia('(prefers-color-scheme: dark)');

/** Figures are drawn again when the colour scheme or the width changes. */
const redraws = new Set<() => void>();
dark.addEventListener('change', () => {
  for (const redraw of redraws) redraw();
});

export interface Figure {
  readonly element: HTMLElement;
  /** `alt` says in words what the chart shows. */
  draw(alt: string, options: (width: number) => Plot.PlotOptions): void;
  note(text: string): void;
  /** Removes outdated contents; the box stays. */
  clear(): void;
}

/** A figure whose box has its final size before anything is drawn in it. */
export function figure(
  title: string,
  {
    shape,
    span = '',
    legend,
  }: { shape: 'square' | 'tall' | 'low' | 'list'; span?: '' | 'quarter' | 'half' | 'full'; legend?: HTMLElement },
): Figure {
  const plot = h('div', { class: `plot ${shape}` });
  const note = h('p', { class: 'note' });
  const element = h('figure', span === '' ? {} : { class: span }, h('h3', {}, title), note, legend, plot);
  let last: { alt: string; options: (width: number) => Plot.PlotOptions } | undefined;
  const redraw = () => {
    if (last === undefined) return;
    const { width, height } = plot.getBoundingClientRect();
    if (width === 0) return;
    const drawn = Plot.plot({
      width: Math.round(width),
      height: Math.round(height),
      style: { background: 'transparent', color: 'var(--ink)', fontSize: '12px', overflow: 'visible' },
      ...last.options(width),
    });
    drawn.setAttribute('role', 'img');
    drawn.setAttribute('aria-label', `${title}. ${last.alt}`);
    for (const part of drawn.querySelectorAll('[aria-label]')) part.removeAttribute('aria-label');
    plot.replaceChildren(drawn);
  };
  redraws.add(redraw);
  let width = 0;
  new ResizeObserver(([entry]) => {
    const next = Math.round(entry?.contentRect.width ?? 0);
    if (next !== width) redraw();
    width = next;
  }).observe(plot);
  return {
    element,
    draw(alt, options) {
      last = { alt, options };
      redraw();
    },
    note(text) {
      note.textContent = text;
    },
    clear() {
      last = undefined;
      note.textContent = '';
      plot.replaceChildren();
    },
  };
}

type Rgb = readonly [number, number, number];
const mix = (a: Rgb, b: Rgb, t: number): Rgb => {
  const at = (i: 0 | 1 | 2) => Math.round(a[i] + (b[i] - a[i]) * t);
  return [at(0), at(1), at(2)];
};

/** A colour for each number from 0 to 1. */
type Ramp = (t: number) => Rgb;

export const css = (color: Rgb) => `rgb(${color.join(', ')})`;

/** Blue below zero, orange above; zero is the colour of the panel, so that dark pages are not lit up by zeros. */
export const diverging: Ramp = (t) => {
  const middle: Rgb = dark.matches ? [26, 30, 27] : [255, 255, 255];
  const low: Rgb = dark.matches ? [108, 168, 240] : [28, 84, 162];
  const high: Rgb = dark.matches ? [243, 154, 92] : [188, 84, 22];
  const distance = Math.min(1, Math.abs(2 * t - 1)) ** 0.8;
  return mix(middle, t < 0.5 ? low : high, distance);
};

/** From the colour of the panel to the accent. */
export const sequential: Ramp = (t) =>
  dark.matches ? mix([26, 30, 27], [150, 226, 182], t) : mix([255, 255, 255], [16, 74, 48], t);

/** Black or white, whichever reads better on the colour. */
export function inkOn(color: Rgb): string {
  const [red, green, blue] = color.map((channel) => {
    const level = channel / 255;
    return level <= 0.04045 ? level / 12.92 : ((level + 0.055) / 1.055) ** 2.4;
  }) as [number, number, number];
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 ? '#ffffff' : '#000000';
}

/** Told apart by lightness as well as by hue, on white and on near-black. */
const SERIES = {
  light: ['#2a6a4b', '#b0520f', '#3361b8', '#8c3a8f', '#6f6a12', '#a8324f', '#5c6270'],
  dark: ['#8bcfa9', '#f2a261', '#8fb4ff', '#d898da', '#d3c95f', '#ff9bb0', '#b8bfcc'],
} as const;

export function seriesColor(index: number): string {
  const colors = dark.matches ? SERIES.dark : SERIES.light;
  return colors[index % colors.length] as string;
}

const legends = new Map<HTMLElement, readonly string[]>();

function paintLegend(list: HTMLElement, names: readonly string[]): void {
  list.replaceChildren(
    ...names.map((name, i) => {
      const swatch = h('i');
      swatch.style.background = seriesColor(i);
      return h('li', {}, swatch, name);
    }),
  );
}
redraws.add(() => {
  for (const [list, names] of legends) paintLegend(list, names);
});

/** The key to colours; each name has the `seriesColor` of its place. */
export function fillLegend(list: HTMLElement, names: readonly string[]): void {
  legends.set(list, names);
  paintLegend(list, names);
}

/** Colours of a ramp that pictures use: a colour for every pixel would take longer to make than all that it shows. */
const STEPS = 1024;

/** Paints values as pixels; the canvas has as many. */
export function paint(
  canvas: HTMLCanvasElement,
  values: ArrayLike<number>,
  [low, high]: readonly [number, number],
  ramp: Ramp,
): void {
  const { width: columns, height: rows } = canvas;
  const context = canvas.getContext('2d');
  if (context === null) throw new Error('this browser draws no pictures');
  const colors = Array.from({ length: STEPS }, (_, i) => ramp(i / (STEPS - 1)));
  const pixels = context.createImageData(columns, rows);
  const step = (STEPS - 1) / (high - low || 1);
  for (let i = 0; i < rows * columns; i++) {
    const at = Math.round(((values[i] as number) - low) * step);
    pixels.data.set(colors[Math.max(0, Math.min(STEPS - 1, at))] as Rgb, 4 * i);
    pixels.data[4 * i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
}

/** Values as pixels, as a URL. */
function pictureOf(
  values: ArrayLike<number>,
  rows: number,
  columns: number,
  domain: readonly [number, number],
  ramp: Ramp,
): string {
  const canvas = h('canvas', { width: columns, height: rows });
  paint(canvas, values, domain, ramp);
  return canvas.toDataURL();
}

/** Runs `redraw` whenever the colours of the page change. */
export const onColorScheme = (redraw: () => void): void => void redraws.add(redraw);

/** Rows by columns of values as one picture; row 0 on top. */
export function heatMap(
  values: ArrayLike<number>,
  rows: number,
  columns: number,
  { domain, color, x, y }: { domain: readonly [number, number]; color: Ramp; x: string; y: string },
): Plot.PlotOptions {
  const drawPicture: Plot.RenderFunction = (
    _,
    __,
    ___,
    { width, height, marginLeft, marginRight, marginTop, marginBottom },
  ) => {
    const image = document.createElementNS('http://www.w3.org/2000/svg', 'image');
    const attributes = {
      x: marginLeft,
      y: marginTop,
      width: width - marginLeft - marginRight,
      height: height - marginTop - marginBottom,
      preserveAspectRatio: 'none',
      href: pictureOf(values, rows, columns, domain, color),
    };
    for (const [name, value] of Object.entries(attributes)) image.setAttribute(name, String(value));
    image.style.imageRendering = 'pixelated';
    return image;
  };
  return {
    marginLeft: 40,
    marginRight: 8,
    marginTop: 8,
    marginBottom: 40,
    x: { domain: [0, columns], label: x, ticks: 5, tickSize: 4, labelAnchor: 'center', labelArrow: 'none' },
    y: { domain: [rows, 0], label: y, ticks: 5, tickSize: 4, labelAnchor: 'center', labelArrow: 'none' },
    marks: [drawPicture, Plot.frame({ stroke: 'var(--line)' })],
  };
}
