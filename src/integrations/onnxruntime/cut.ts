/** Cuts a graph at its attentions into pieces that onnxruntime runs one after the other, attention between them. */
import { added } from './detect/additions.ts';
import { type AttentionSite, inputsOf } from './detect/site.ts';
import { type GraphIndex, indexGraph } from './model/graph.ts';
import { EXTERNAL, type GraphProto, node as makeNode, type NodeProto } from './onnx/codec.ts';

/** Nodes that run in one session. */
export interface Piece {
  /** Pieces run in this order; the attentions of a level run behind its piece. */
  readonly level: number;
  /** In topological order. */
  readonly nodes: readonly NodeProto[];
  /** Values that it takes from the caller or from elsewhere; constants left out. */
  readonly inputs: readonly string[];
  /** Values that are read elsewhere or are outputs of the graph. */
  readonly outputs: readonly string[];
}

export interface PlacedSite {
  readonly level: number;
  readonly site: AttentionSite;
  /** Values that must exist before it runs. */
  readonly inputs: readonly string[];
  /** Name under which other pieces read its output. */
  readonly result: string;
}

export interface Cut {
  /** Index of the graph, including the nodes that were added for the sites. */
  readonly index: GraphIndex;
  readonly levels: number;
  /** Ordered by level. */
  readonly pieces: readonly Piece[];
  readonly sites: readonly PlacedSite[];
  /** Last level that reads a value; outputs of the graph are not in it. */
  readonly lastUse: ReadonlyMap<string, number>;
}

interface NodeUnit {
  readonly node: NodeProto;
  readonly site?: undefined;
  readonly reads: readonly string[];
  level: number;
}

/** A node, or an attention in the place of the nodes that it replaces. */
type Unit =
  | NodeUnit
  | { readonly site: AttentionSite; readonly result: string; readonly reads: readonly string[]; level: number };

/**
 * Attentions that do not depend on each other share a level. Every node runs at the earliest level that has its inputs,
 * except that cheap chains move towards their readers where that keeps fewer values alive between sessions.
 */
export function cutGraph(graph: GraphProto, opset: number, sites: readonly AttentionSite[]): Cut {
  // Nodes behind the graph's own take over the values that they write: an attention's result that is an output of the
  // graph comes out of an Identity, so that its location and type are onnxruntime's.
  const identities = sites
    .filter((site) => graph.output.some((output) => output.name === site.output))
    .map((site) => makeNode('Identity', [resultName(site, true)], [site.output]));
  const index = indexGraph({ ...graph, node: [...graph.node, ...extraNodes(sites), ...identities] }, opset);
  const units = liveUnits(index, sites);
  assignLevels(units);
  sinkChains(index, units);
  return assemble(index, units);
}

function resultName(site: AttentionSite, isGraphOutput: boolean): string {
  return isGraphOutput ? added('result', site.output) : site.output;
}

/** Nodes that sites add, each once although several layers may ask for the same mask. */
function extraNodes(sites: readonly AttentionSite[]): NodeProto[] {
  const byOutput = new Map<string, NodeProto>();
  for (const site of sites) for (const node of site.extra) byOutput.set(node.output[0] as string, node);
  return [...byOutput.values()];
}

/** What the outputs of the graph depend on, in topological order. */
function liveUnits(index: GraphIndex, sites: readonly AttentionSite[]): Unit[] {
  const bySiteOutput = new Map<string, Unit>();
  for (const site of sites) {
    const result = resultName(site, index.outputs.has(site.output));
    const unit: Unit = { site, result, reads: inputsOf(index, site), level: 0 };
    bySiteOutput.set(result, unit);
  }
  const byNode = new Map<NodeProto, Unit>();
  const producerOf = (value: string): Unit | undefined => {
    const site = bySiteOutput.get(value);
    if (site !== undefined) return site;
    const node = index.producer(value);
    if (node === undefined) return undefined;
    let unit = byNode.get(node);
    if (unit === undefined) {
      unit = { node, reads: index.readsOf(node).filter((name) => !index.constants.has(name)), level: 0 };
      byNode.set(node, unit);
    }
    return unit;
  };
  const order: Unit[] = [];
  const state = new Map<Unit, 'open' | 'done'>();
  const stack = [...index.outputs]
    .map(producerOf)
    .filter((unit): unit is Unit => unit !== undefined)
    .reverse();
  for (let unit = stack.at(-1); unit !== undefined; unit = stack.at(-1)) {
    if (state.get(unit) === 'done') {
      stack.pop();
      continue;
    }
    const pending = unit.reads
      .map(producerOf)
      .filter((other): other is Unit => other !== undefined && state.get(other) !== 'done');
    if (pending.length === 0) {
      stack.pop();
      state.set(unit, 'done');
      order.push(unit);
    } else {
      if (state.get(unit) === 'open' && pending.some((other) => state.get(other) === 'open')) {
        throw new Error('the graph has a cycle');
      }
      state.set(unit, 'open');
      stack.push(...pending);
    }
  }
  return order;
}

const writesOf = (unit: Unit): readonly string[] =>
  unit.site === undefined ? unit.node.output.filter((name) => name !== '') : [unit.result];

function assignLevels(units: readonly Unit[]): void {
  const available = new Map<string, number>();
  for (const unit of units) {
    unit.level = unit.reads.reduce((level, value) => Math.max(level, available.get(value) ?? 0), 0);
    for (const value of writesOf(unit)) available.set(value, unit.site === undefined ? unit.level : unit.level + 1);
  }
}

/** Operators whose output is about as large as their input or larger, so that moving them later costs no memory. */
const MOVABLE = new Set(
  (
    'Gemm MatMul MatMulNBits Add Sub Mul Div Neg Not Cast Split Reshape Transpose Unsqueeze Squeeze Expand Tile ' +
    'Sigmoid Silu Relu Gelu Tanh Exp Identity QuickGelu'
  ).split(' '),
);

/**
 * Without this, everything that depends only on a timestep or a mask (the modulation of every block of a diffusion
 * transformer, say) would run in the first piece and stay alive through all others.
 */
function sinkChains(index: GraphIndex, units: readonly Unit[]): void {
  const firstUse = new Map<string, number>();
  for (const value of index.outputs) firstUse.set(value, 0);
  for (let i = units.length - 1; i >= 0; i--) {
    const unit = units[i] as Unit;
    if (unit.site === undefined && unit.reads.length === 1 && MOVABLE.has(unit.node.opType)) {
      const uses = writesOf(unit).map((value) => firstUse.get(value) ?? Number.POSITIVE_INFINITY);
      const earliest = Math.min(...uses);
      if (Number.isFinite(earliest)) unit.level = Math.max(unit.level, earliest);
    }
    for (const value of unit.reads) firstUse.set(value, Math.min(firstUse.get(value) ?? unit.level, unit.level));
  }
}

function assemble(index: GraphIndex, units: readonly Unit[]): Cut {
  const levels =
    1 + units.reduce((most, unit) => Math.max(most, unit.site === undefined ? unit.level : unit.level + 1), 0);
  const home = new Map<string, number>();
  const siteResults = new Set<string>();
  for (const unit of units) {
    for (const value of writesOf(unit)) {
      if (unit.site === undefined) home.set(value, unit.level);
      else siteResults.add(value);
    }
  }
  const lastUse = new Map<string, number>();
  const crossing = new Set<string>(index.outputs);
  for (const unit of units) {
    for (const value of unit.reads) {
      lastUse.set(value, Math.max(lastUse.get(value) ?? 0, unit.level));
      if (unit.site !== undefined || home.get(value) !== unit.level) crossing.add(value);
    }
  }
  const pieces: Piece[] = [];
  const constants = constantOutputs(index);
  if (constants.length > 0) {
    pieces.push({ level: 0, nodes: constants, inputs: [], outputs: constants.flatMap((node) => node.output) });
  }
  const byLevel = Array.from({ length: levels }, (): NodeUnit[] => []);
  for (const unit of units) if (unit.site === undefined) byLevel[unit.level]?.push(unit);
  for (const [level, own] of byLevel.entries()) {
    if (own.length === 0) continue;
    const nodes = own.map(({ node }) => node);
    const reads = new Set(own.flatMap((unit) => unit.reads));
    const outputs = nodes.flatMap((node) => node.output.filter((value) => value !== '' && crossing.has(value)));
    pieces.push({ level, nodes, inputs: [...reads].filter((value) => home.get(value) !== level), outputs });
  }
  const placed = units.flatMap((unit): PlacedSite[] =>
    unit.site === undefined ? [] : [{ level: unit.level, site: unit.site, inputs: unit.reads, result: unit.result }],
  );
  return { index, levels, pieces, sites: placed, lastUse };
}

/** Outputs of the graph that are constants: a separate piece gives them, since the other pieces hold constants as weights. */
function constantOutputs(index: GraphIndex): NodeProto[] {
  return [...index.outputs].flatMap((name) => {
    const value = index.constants.get(name);
    if (value === undefined) return [];
    if (value.dataLocation === EXTERNAL) throw new Error(`output '${name}' is a constant outside of the model`);
    return [makeNode('Constant', [], [name], { attributes: { value } })];
  });
}
