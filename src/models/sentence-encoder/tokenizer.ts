/**
 * SentencePiece's unigram tokenizer (Kudo 2018, arXiv 1804.10959, section 3.2): of all ways to cut a text into pieces
 * of the vocabulary, the one whose log probabilities sum highest, found by the Viterbi algorithm.
 */
import { InvalidArgumentError } from '../../errors.ts';

/** Pieces with their log probabilities, in the order of their ids: what `vocab.json` holds. */
export type Vocabulary = readonly (readonly [piece: string, score: number])[];

export interface Tokenizer {
  /** Token ids; an empty text (or one of nothing but white space) has none. */
  encode(text: string): number[];
  /** The piece of an id, U+2581 standing for a space. */
  pieceOf(id: number): string;
}

/** SentencePiece writes spaces as this character, and puts one before the first word. */
const SPACE = '\u2581';
const UNKNOWN_ID = 0;
/** Ids below this are unknown, begin, end and three extra tokens: never found in text. */
const RESERVED_IDS = 6;
/** SentencePiece scores an unknown character this far below the worst piece. */
const UNKNOWN_PENALTY = 10;

/**
 * The normalization that the vocabulary was trained with: NFKC, no control characters, single spaces, none at the ends.
 */
function normalize(text: string): string {
  const words = text
    .normalize('NFKC')
    .replace(/[\p{Cc}\p{Cf}]/gu, (character) => (/\s/u.test(character) ? ' ' : ''))
    .split(/\s+/u)
    .filter((word) => word !== '');
  return words.map((word) => SPACE + word).join('');
}

interface Piece {
  readonly id: number;
  readonly score: number;
}

/**
 * @param vocabulary at least the reserved entries; ids are positions
 * @throws {InvalidArgumentError} `invalid-shape` when this is no such list
 */
export function createTokenizer(vocabulary: Vocabulary): Tokenizer {
  if (!Array.isArray(vocabulary) || vocabulary.length <= RESERVED_IDS) {
    throw new InvalidArgumentError(
      'invalid-shape',
      'vocabulary',
      `a list of more than ${RESERVED_IDS} [piece, score] pairs`,
      Array.isArray(vocabulary) ? `${vocabulary.length} entries` : typeof vocabulary,
    );
  }
  const pieces = new Map<string, Piece>();
  let longest = 0;
  let lowest = 0;
  vocabulary.forEach(([piece, score], id) => {
    if (id < RESERVED_IDS) return;
    pieces.set(piece, { id, score });
    longest = Math.max(longest, [...piece].length);
    lowest = Math.min(lowest, score);
  });
  const unknown: Piece = { id: UNKNOWN_ID, score: lowest - UNKNOWN_PENALTY };

  function encode(text: string): number[] {
    const characters = [...normalize(text)];
    const count = characters.length;
    // Of the best cut of the first i characters: its score, and its last piece.
    const best = new Float64Array(count + 1).fill(Number.NEGATIVE_INFINITY);
    const lastId = new Int32Array(count + 1);
    const lastStart = new Int32Array(count + 1);
    best[0] = 0;
    for (let start = 0; start < count; start++) {
      const before = best[start] as number;
      let candidate = '';
      for (let end = start + 1; end <= Math.min(count, start + longest); end++) {
        candidate += characters[end - 1];
        const piece = pieces.get(candidate) ?? (end === start + 1 ? unknown : undefined);
        if (piece === undefined || before + piece.score <= (best[end] as number)) continue;
        best[end] = before + piece.score;
        lastId[end] = piece.id;
        lastStart[end] = start;
      }
    }
    const ids: number[] = [];
    for (let end = count; end > 0; end = lastStart[end] as number) {
      const id = lastId[end] as number;
      // A run of unknown characters is one unknown token.
      if (id !== UNKNOWN_ID || ids.at(-1) !== UNKNOWN_ID) ids.push(id);
    }
    return ids.reverse();
  }

  return { encode, pieceOf: (id) => vocabulary[id]?.[0] ?? '' };
}
