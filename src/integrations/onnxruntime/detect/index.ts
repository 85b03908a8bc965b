/** Finds every attention of a graph. */

import { type GraphIndex, indexNodes, nestedNodes } from '../model/graph.ts';
import { type FunctionProto, node as makeNode, type NodeProto } from '../onnx/codec.ts';
import { added } from './additions.ts';
import { detectDecomposed } from './decomposed.ts';
import { detectFused } from './fused.ts';
import { type AttentionSite, type LeftAttention, withSources } from './site.ts';
import { nameOf, softmaxAt } from './softmax.ts';

export interface Detected {
  readonly sites: readonly AttentionSite[];
  readonly left: readonly LeftAttention[];
}

/** A mask that is a constant of the model becomes a value that a session gives. */
function withComputedMask(index: GraphIndex, site: AttentionSite): AttentionSite {
  const { mask } = site;
  if (mask === undefined || !index.constants.has(mask.value)) return site;
  const value = added('constant', mask.value);
  return { ...site, mask: { ...mask, value }, extra: [...site.extra, makeNode('Identity', [mask.value], [value])] };
}

/** Attention among nodes that run elsewhere than in the graph itself: its fused node or its softmax. */
function elsewhere(index: GraphIndex, nodes: readonly NodeProto[], reason: string): LeftAttention[] {
  if (nodes.length === 0) return [];
  const within = indexNodes(nodes, index);
  return within.nodes.flatMap((node) => {
    const fused = detectFused(within, node);
    if (fused === undefined && softmaxAt(within, node) === undefined) return [];
    const form = fused === undefined ? node.opType : 'site' in fused ? fused.site.form : fused.left.form;
    return [{ name: nameOf(node), form, heads: undefined, headDim: undefined, reason }];
  });
}

/**
 * In graph order; then what is inside functions of the model. Attention inside control flow (If, Loop, Scan) and functions is found by its fused
 * node or softmax, and left.
 */
export function detectAttention(index: GraphIndex, functions: readonly FunctionProto[] = []): Detected {
  const sites: AttentionSite[] = [];
  const left: LeftAttention[] = [];
  for (const node of index.nodes) {
    const found = detectFused(index, node) ?? detectDecomposed(index, node);
    if (found !== undefined) {
      if ('site' in found) sites.push(withSources(index, withComputedMask(index, found.site)));
      else left.push(found.left);
    }
    const reason = `inside a subgraph of ${node.opType} '${nameOf(node)}', which onnxruntime runs as a whole`;
    const inner = elsewhere(index, nestedNodes(node), reason);
    left.push(...inner.map((entry) => ({ ...entry, isInBranch: node.opType === 'If' })));
  }
  for (const { name, node } of functions) {
    const nodes = node.flatMap((inner) => [inner, ...nestedNodes(inner)]);
    left.push(...elsewhere(index, nodes, `inside the model's function '${name}', which onnxruntime runs as a whole`));
  }
  return { sites, left };
}
