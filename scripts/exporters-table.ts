/**
 * What real models look like as exporters write them, and what becomes of their attention: from the graphs that the
 * tests run.
 */
import { detectAttention } from '../src/integrations/onnxruntime/detect/index.ts';
import { branchesOf } from '../src/integrations/onnxruntime/model/branches.ts';
import { indexGraph } from '../src/integrations/onnxruntime/model/graph.ts';
import { type GraphProto, readModel } from '../src/integrations/onnxruntime/onnx/codec.ts';
import { EXPORTERS } from '../src/integrations/onnxruntime/testing/exporters/index.ts';
import { mergedDecoder } from '../src/integrations/onnxruntime/testing/merged-decoder.ts';
import { rewriteTopology } from '../src/integrations/tfjs/graph-model.ts';
import { EXPORTED } from '../src/integrations/tfjs/testing/exporters.ts';
import { TopologyBuilder } from '../src/integrations/tfjs/testing/topology-builder.ts';
import { GraphBuilder } from '../test/support/graph-builder.ts';
import { Random } from '../test/support/random.ts';

/** Attentions in a graph, and those that are taken as far as the graph says: the tests see that runs take them, too. */
function countIn(graph: GraphProto, opset: number): { found: number; taken: number } {
  const { sites, left } = detectAttention(indexGraph(graph, opset));
  return { found: sites.length + left.length, taken: sites.length };
}

/** Models, exporter, attentions found, taken, and the version that takes them. */
export function exporterRows(): string[][] {
  const rows = EXPORTERS.flatMap((entry) => {
    if (entry.exported === undefined) return [];
    const builder = new GraphBuilder(new Random(1));
    entry.build(builder);
    const { found, taken } = countIn(
      readModel(builder.build(entry.opset ?? 17)).graph as GraphProto,
      entry.opset ?? 17,
    );
    if (taken !== (entry.taken ?? 1))
      throw new Error(`'${entry.name}': the tests take ${entry.taken ?? 1}, the graph shows ${taken}`);
    const { models, exporter, since } = entry.exported;
    return [[models, exporter, String(found), String(taken), taken === 0 ? '' : since]];
  });
  const merged = readModel(mergedDecoder(new Random(1))).graph as GraphProto;
  const branches = branchesOf(indexGraph(merged, 17));
  if (branches === undefined) throw new Error('the merged decoder has no branches');
  const { found, taken } = [branches.whereFalse, branches.whereTrue]
    .map((graph) => countIn(graph, 17))
    .reduce((a, b) => ({ found: a.found + b.found, taken: a.taken + b.taken }));
  const decoders = 'Whisper, BART, T5, GPT-2: decoders with and without a cache in one file (`If`)';
  return [...rows, [decoders, 'Optimum (merged), transformers.js', String(found), String(taken), '0.1.0']];
}

/** The same for GraphModels of TensorFlow.js: an attention is taken if our kernels compute it when the tests run the graph. */
export function topologyRows(): string[][] {
  return EXPORTED.map(({ models, exporter, calls = 1, build }) => {
    const builder = new TopologyBuilder(new Random(1));
    build(builder);
    const { taken, left } = rewriteTopology(builder.topology());
    return [models, exporter, String(taken.length + left.length), String(calls), calls === 0 ? '' : '0.1.0'];
  });
}
