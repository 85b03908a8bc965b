/** Finds every attention of a graph. */

import { type GraphIndex, nestedNodes } from '../model/graph.ts';
import { node as makeNode } from '../onnx/codec.ts';
import { added } from './additions.ts';
import { detectDecomposed } from './decomposed.ts';
import { detectFused } from './fused.ts';
import { type AttentionSite, type LeftAttention, withSources } from './site.ts';

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

/** In graph order. Attention inside control flow (If, Loop, Scan) is found by its fused node or Softmax, and left. */
export function detectAttention(index: GraphIndex): Detected {
  const sites: AttentionSite[] = [];
  const left: LeftAttention[] = [];
  for (const node of index.nodes) {
    const found = detectFused(index, node) ?? detectDecomposed(index, node);
    if (found !== undefined) {
      if ('site' in found) sites.push(withSources(index, withComputedMask(index, found.site)));
      else left.push(found.left);
    }
    for (const inner of nestedNodes(node)) {
      const fused = detectFused(index, inner);
      if (fused === undefined && inner.opType !== 'Softmax') continue;
      left.push({
        name: inner.name || (inner.output[0] as string),
        form: fused === undefined ? inner.opType : 'site' in fused ? fused.site.form : fused.left.form,
        heads: undefined,
        headDim: undefined,
        reason: `inside a subgraph of ${node.opType} '${node.name || node.output[0]}', which onnxruntime runs as a whole`,
        isInBranch: node.opType === 'If',
      });
    }
  }
  return { sites, left };
}
