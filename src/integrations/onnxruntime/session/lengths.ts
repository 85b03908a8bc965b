/** How many tokens an attention has, where the graph says it: a model whose sizes are fixed is judged before it is cut. */
import type { AttentionSite } from '../detect/site.ts';
import { contiguous } from '../detect/views.ts';
import { isOp } from '../model/graph.ts';
import type { ModelFacts } from '../model/sketch.ts';
import type { OrtDimension } from '../ort.ts';
import { isSize } from './feeds.ts';

export interface Lengths {
  readonly queryLength: number | undefined;
  readonly keyLength: number | undefined;
}

const scoresOf = (site: AttentionSite) => site.nodes.find((node) => isOp(node, 'Softmax'))?.input[0];

/** Values whose shapes {@link lengthsOf} reads. */
export function watchedBy(site: AttentionSite): string[] {
  const scores = scoresOf(site);
  return scores === undefined ? [site.output, site.k.value] : [scores];
}

/** Undefined what only a run shows. */
export function lengthsOf(site: AttentionSite, shapes: ModelFacts['shapes']): Lengths {
  const sizeOf = (size: OrtDimension | undefined) => (size !== undefined && isSize(size) ? size : undefined);
  const scores = scoresOf(site);
  // Rows and keys are the last two axes of the scores, wherever heads and batch are.
  if (scores !== undefined) {
    const [queryLength, keyLength] = (shapes.get(scores) ?? []).slice(-2).map(sizeOf);
    return { queryLength, keyLength };
  }
  if (site.scores !== undefined) return { queryLength: undefined, keyLength: undefined };
  // Operators write `[B,L,channels]` or `[B,H,L,D]`.
  const queryLength = sizeOf((shapes.get(site.output) ?? []).at(-2));
  const keys = shapes.get(site.k.value)?.map(sizeOf);
  const isKnown = keys?.every((size) => size !== undefined) === true && site.k.parameters.length === 0;
  return { queryLength, keyLength: isKnown ? site.k.view(contiguous(keys), () => [])?.shape[2] : undefined };
}
