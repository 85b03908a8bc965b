/** The values that sessions and attentions hand to each other within one run. */
import type { Cut } from '../cut.ts';
import type { OrtFeeds, OrtFetches, OrtResults, OrtTensor } from '../ort.ts';
import { namedError } from './engine.ts';

/** Values of one run, each held until its last reader has run. */
export class Run {
  readonly values = new Map<string, OrtTensor>();
  /** Attention of fewer tokens stays with onnxruntime. */
  readonly minTokens: number;
  readonly failures: { readonly node: string; readonly failure: Promise<Error | undefined> }[] = [];
  readonly #cut: Cut;
  readonly #feeds: OrtFeeds;
  readonly #fetches: OrtFetches;

  constructor(cut: Cut, feeds: OrtFeeds, fetches: OrtFetches, minTokens: number) {
    this.minTokens = minTokens;
    this.#cut = cut;
    this.#feeds = feeds;
    this.#fetches = fetches;
    for (const [name, tensor] of Object.entries(feeds)) this.values.set(name, tensor);
  }

  needs(name: string): boolean {
    return this.#isWanted(name) || this.#cut.lastUse.has(name);
  }

  #isWanted(name: string): boolean {
    return Object.hasOwn(this.#fetches, name);
  }

  take(names: readonly string[]): Record<string, OrtTensor> {
    return Object.fromEntries(
      names.map((name) => {
        const tensor = this.values.get(name);
        if (tensor === undefined) throw new Error(`value '${name}' was not computed`);
        return [name, tensor];
      }),
    );
  }

  /** Tensors that the caller wants results written to stay as they are. */
  fetchesOf(names: readonly string[]): OrtFetches {
    return Object.fromEntries(names.map((name) => [name, this.#fetches[name] ?? null]));
  }

  store(results: OrtResults): void {
    for (const [name, tensor] of Object.entries(results)) {
      const before = this.values.get(name);
      if (before !== undefined && before !== tensor) this.#release(name, before);
      this.values.set(name, tensor);
    }
  }

  endLevel(level: number): void {
    for (const [name, tensor] of this.values) {
      if (this.#isWanted(name) || (this.#cut.lastUse.get(name) ?? -1) > level) continue;
      this.#release(name, tensor);
      this.values.delete(name);
    }
  }

  /** @throws {ExecutionError} what a kernel reported since, with the attention's name */
  async throwFailures(): Promise<void> {
    for (const { node, failure } of this.failures) {
      const error = await failure;
      if (error !== undefined) throw namedError(node, error);
    }
  }

  releaseAll(): void {
    for (const [name, tensor] of this.values) this.#release(name, tensor);
    this.values.clear();
  }

  results(): OrtResults {
    return this.take(Object.keys(this.#fetches));
  }

  /** What the caller gave is the caller's. */
  #release(name: string, tensor: OrtTensor): void {
    if (this.#feeds[name] === tensor || this.#fetches[name] === tensor) return;
    tensor.dispose();
  }
}
