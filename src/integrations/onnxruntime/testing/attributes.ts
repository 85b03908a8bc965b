/** Graphs of exporters with another value of an attribute that detection reads. */
import { GraphBuilder } from '../../../../test/support/graph-builder.ts';
import { Random } from '../../../../test/support/random.ts';
import { detectAttention } from '../detect/index.ts';
import { indexGraph } from '../model/graph.ts';
import { ATTRIBUTE_TYPES, type GraphProto, readModel, writeModel } from '../onnx/codec.ts';
import type { Case } from './case.ts';

/** Counts of heads and outputs are left out: some values of those end onnxruntime's process. */
const CHANGED = new Set(
  (
    'alpha allowzero axes axis ends is_causal keepdims local_window_size mask_filter_value perm scale softcap starts ' +
    'transA transB unidirectional'
  ).split(' '),
);

/** Integers; of an attribute of floats an eighth of them. */
export const OTHER_VALUES = [-4, -3, -2, -1, 0, 1, 2, 3, 4, 8, 100] as const;

export interface Change {
  /** Counts over all attributes, and over the integers of one, modulo how many there are. */
  readonly at: number;
  readonly position: number;
  readonly value: number;
}

/** Undefined where no attribute can be changed. */
export function withAnotherAttribute(
  entry: Case,
  seed: number,
  { at, position, value }: Change,
): { readonly bytes: Uint8Array; readonly name: string } | undefined {
  const builder = new GraphBuilder(new Random(seed));
  entry.build(builder);
  const opset = entry.opset ?? 17;
  const model = readModel(builder.build(opset));
  const graph = model.graph as GraphProto;
  const attributes = detectAttention(indexGraph(graph, opset))
    .sites.flatMap((site) => site.nodes)
    .filter((node) => graph.node.includes(node))
    .flatMap((node) => node.attribute.filter(({ name }) => CHANGED.has(name)));
  const changed = attributes[at % Math.max(1, attributes.length)];
  if (changed === undefined) return undefined;
  if (changed.type === ATTRIBUTE_TYPES.int) changed.i = BigInt(value);
  else if (changed.type === ATTRIBUTE_TYPES.float) changed.f = value / 8;
  else if (changed.type === ATTRIBUTE_TYPES.ints) changed.ints[position % changed.ints.length] = BigInt(value);
  else return undefined;
  return { bytes: writeModel(model), name: changed.name };
}
