/** The text and the sentences that the demo takes when it is given none. */
import { readFile } from 'node:fs/promises';

export const DEFAULT_TEXT = {
  title: "Lewis Carroll, Alice's Adventures in Wonderland, chapter I (1865; public domain)",
  // The file lies beside the source and, in the package, beside the bundle.
  read: () => readFile(new URL('./alice-chapter-1.txt', import.meta.url), 'utf8'),
} as const;

/** Four pairs of sentences that mean about the same. */
export const DEFAULT_SENTENCES: readonly string[] = [
  'How old are you?',
  'May I ask what your age is?',
  'Heavy rain is expected along the coast tonight.',
  'A storm will bring showers to the shore this evening.',
  'The orchestra played the symphony beautifully.',
  'Her concert at the music hall was a great success.',
  'The program runs out of memory on long inputs.',
  'Our software crashes when the file is too large.',
];

const MOST_SENTENCES = 8;

/** Up to eight sentences of a text, of readable length and spread evenly. */
export function pickSentences(text: string): string[] {
  // A single line break is only where a line was full; the segmenter would end a sentence there.
  const unwrapped = text.replaceAll('\r\n', '\n').replace(/(?<!\n)\n(?!\n)/gu, ' ');
  const sentences = [...new Intl.Segmenter('en', { granularity: 'sentence' }).segment(unwrapped)]
    .map(({ segment }) => segment.replace(/\s+/gu, ' ').trim())
    .filter((sentence) => /\p{L}/u.test(sentence));
  const readable = sentences.filter((sentence) => sentence.length >= 20 && sentence.length <= 120);
  const pool = readable.length >= 2 ? readable : sentences;
  if (pool.length <= MOST_SENTENCES) return pool;
  return Array.from({ length: MOST_SENTENCES }, (_, i) => {
    const at = Math.round((i * (pool.length - 1)) / (MOST_SENTENCES - 1));
    return pool[at] as string;
  });
}
