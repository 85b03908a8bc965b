/**
 * A graph whose `If` nodes ask an input of the model, as the graphs that it is for each value of that input: exporters put a decoder with
 * and without a cache into one file so.
 */
import type { GraphProto, NodeProto } from '../onnx/codec.ts';
import { node as makeNode } from '../onnx/codec.ts';
import { type GraphIndex, isOp, subgraphOf } from './graph.ts';

export interface Branches {
  /** A boolean input of one element. */
  readonly condition: string;
  /** The graph with each `If` replaced by the nodes of one branch. */
  readonly whereFalse: GraphProto;
  readonly whereTrue: GraphProto;
}

/** Undefined if no `If` depends on an input, if several inputs decide, or if a branch reuses the name of another value. */
export function branchesOf({ graph, nodes, inputs }: GraphIndex): Branches | undefined {
  const conditionals = nodes.filter((node) => isOp(node, 'If') && inputs.has(node.input[0] ?? ''));
  const [condition, ...others] = new Set(conditionals.map((node) => node.input[0] as string));
  if (condition === undefined || others.length > 0) return undefined;
  const whereFalse = withBranch(graph, new Set(conditionals), 'else_branch');
  const whereTrue = withBranch(graph, new Set(conditionals), 'then_branch');
  return whereFalse && whereTrue && { condition, whereFalse, whereTrue };
}

function withBranch(
  graph: GraphProto,
  conditionals: ReadonlySet<NodeProto>,
  branch: 'then_branch' | 'else_branch',
): GraphProto | undefined {
  const node: NodeProto[] = [];
  const initializer = [...graph.initializer];
  const valueInfo = [...graph.valueInfo];
  for (const outer of graph.node) {
    const inner = conditionals.has(outer) ? subgraphOf(outer, branch) : undefined;
    if (inner === undefined) {
      if (conditionals.has(outer)) return undefined;
      node.push(outer);
      continue;
    }
    if (inner.output.length !== outer.output.length || inner.sparseInitializer.length > 0) return undefined;
    initializer.push(...inner.initializer);
    valueInfo.push(...inner.valueInfo);
    node.push(...inner.node);
    for (const [i, { name }] of inner.output.entries()) {
      const output = outer.output[i] as string;
      if (output !== '') node.push(makeNode('Identity', [name], [output]));
    }
  }
  const names = [...node.flatMap(({ output }) => output), ...initializer.map(({ name }) => name)].filter(Boolean);
  const isClear = new Set(names).size === names.length;
  return isClear ? { ...graph, node, initializer, valueInfo } : undefined;
}
