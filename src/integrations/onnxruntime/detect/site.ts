/** What detection finds: one attention in a graph, as the operands of `sageattn` and the nodes that it replaces. */
import { contiguousStrides } from '../../../tensor/tensor.ts';
import type { GraphIndex } from '../graph.ts';
import type { NodeProto } from '../onnx/codec.ts';

/** `[B,H,L,D]` seen in the elements of a tensor. */
export interface View {
  readonly shape: readonly [batch: number, heads: number, length: number, dim: number];
  readonly strides: readonly [number, number, number, number];
  readonly offset: number;
}

/** How an operand lies in a value of the graph. `view` is undefined for sizes that it does not cover. */
export interface Operand {
  readonly value: string;
  view(dims: readonly number[]): View | undefined;
}

export interface Mask {
  /** bool (true = attend) or additive float; the tensor's type says which. */
  readonly value: string;
  /**
   * `full`: broadcasts to `[B,H,L,S]`. `scores`: broadcasts to the scores, of rank 3 or 4 as q is. `split-heads`: broadcasts
   * to `[B,H,L,S]` while q, k and v are `[B*H,L,D]`. `padding`: `[B,S]`, or `[B,L,S]` for all heads.
   */
  readonly form: 'full' | 'scores' | 'split-heads' | 'padding';
}

/** A factor of the scores that is known only when the graph runs: a tensor of one element. */
export interface RuntimeScale {
  readonly value: string;
  readonly inverse: boolean;
}

/** Values of the graph that must hold equal numbers for the replacement to be exact; see `checks`. */
export interface SequenceLengthCheck {
  /** `seqlens_k` of GroupQueryAttention: keys of each sequence minus one. */
  readonly value: string;
}

export interface AttentionSite {
  /** Name of the node, or of its output where it has none. */
  readonly name: string;
  /** What was matched: `com.microsoft.MultiHeadAttention`, `MatMul-Softmax-MatMul`, ... */
  readonly form: string;
  readonly heads: number | undefined;
  readonly headDim: number | undefined;
  readonly q: Operand;
  readonly k: Operand;
  readonly v: Operand;
  readonly mask: Mask | undefined;
  /** Factor of q k^T; undefined: 1/sqrt(D). */
  readonly scale: number | undefined;
  readonly runtimeScales: readonly RuntimeScale[];
  readonly softcap: number;
  readonly isCausal: boolean;
  readonly causalAlignment: 'top-left' | 'bottom-right';
  readonly check: SequenceLengthCheck | undefined;
  /** The attention output and how `[B,H,Lq,Dv]` lies in it. */
  readonly output: string;
  /** `rank` is that of the tensor that holds q. */
  outputLayout(rank: number): 'HND' | 'NHD';
  outputDims(view: View['shape'], rank: number): number[];
  /** Rank that the scores must have for the softmax axis to be the last one; undefined where any will do. */
  readonly scoresRank: number | undefined;
  /** The replaced nodes in topological order: onnxruntime computes `output` and `overrides` with them when it must. */
  readonly nodes: readonly NodeProto[];
  /** Outputs of `nodes` that `extra` computes too (present keys and values). */
  readonly overrides: readonly string[];
  /** Nodes to add to the graph: they compute operands that the graph has in another form. */
  readonly extra: readonly NodeProto[];
}

/** An attention that stays with onnxruntime. */
export interface LeftAttention {
  readonly name: string;
  readonly form: string;
  readonly heads: number | undefined;
  readonly headDim: number | undefined;
  readonly reason: string;
}

export type Detection = { readonly site: AttentionSite } | { readonly left: LeftAttention };

/** The operand `[B,H,L,D]` whose axes are `axes` of a value of rank 4. */
export function permutedOperand(value: string, axes: readonly [number, number, number, number]): Operand {
  return {
    value,
    view(dims) {
      if (dims.length !== 4) return undefined;
      const strides = contiguousStrides(dims);
      const [b, h, l, d] = axes;
      return {
        shape: [dims[b] as number, dims[h] as number, dims[l] as number, dims[d] as number],
        strides: [strides[b] as number, strides[h] as number, strides[l] as number, strides[d] as number],
        offset: 0,
      };
    },
  };
}

/** A value `[B,H,L,D]`, or `[B,L,D]` with one head. */
export function naturalOperand(value: string): Operand {
  const rank4 = permutedOperand(value, [0, 1, 2, 3]);
  return {
    value,
    view(dims) {
      const [batch, length, dim] = dims as [number, number, number];
      return dims.length === 3 ? rank4.view([batch, 1, length, dim]) : rank4.view(dims);
    },
  };
}

/** Columns `[start, start + heads * dim)` of a value `[B,L,columns]`, where start and dim are fractions of the columns. */
export function hiddenOperand(value: string, heads: number, part = 0, parts: readonly number[] = [1]): Operand {
  const total = parts.reduce((sum, size) => sum + size, 0);
  const before = parts.slice(0, part).reduce((sum, size) => sum + size, 0);
  return {
    value,
    view(dims) {
      if (dims.length !== 3) return undefined;
      const [batch, length, columns] = dims as [number, number, number];
      const start = (columns * before) / total;
      const width = (columns * (parts[part] as number)) / total;
      const dim = width / heads;
      if (!Number.isInteger(start) || !Number.isInteger(dim)) return undefined;
      return {
        shape: [batch, heads, length, dim],
        strides: [length * columns, dim, columns, 1],
        offset: start,
      };
    },
  };
}

/** `[B,L,H*D]`, or `[B,H,L,D]`. */
export function hiddenOrHeadsOperand(value: string, heads: number): Operand {
  const hidden = hiddenOperand(value, heads);
  const natural = permutedOperand(value, [0, 1, 2, 3]);
  return { value, view: (dims) => (dims.length === 3 ? hidden.view(dims) : natural.view(dims)) };
}

/** Part `part` of `parts` in a value `[B,L,H,parts,D]`. */
export function packedOperand(value: string, part: number, parts: number): Operand {
  return {
    value,
    view(dims) {
      if (dims.length !== 5 || dims[3] !== parts) return undefined;
      const [batch, length, heads, , dim] = dims as [number, number, number, number, number];
      const token = heads * parts * dim;
      return {
        shape: [batch, heads, length, dim],
        strides: [length * token, parts * dim, token, 1],
        offset: part * dim,
      };
    },
  };
}

/** The first of several readings that covers a tensor's dimensions. */
export function anyOperand(...readings: readonly [Operand, ...Operand[]]): Operand {
  return {
    value: readings[0].value,
    view: (dims) => readings.map((reading) => reading.view(dims)).find((view) => view !== undefined),
  };
}

/** Names that the nodes read and do not write, constants left out. */
export function boundaryOf(index: GraphIndex, nodes: readonly NodeProto[]): string[] {
  const written = new Set(nodes.flatMap((node) => node.output));
  const read = nodes.flatMap((node) => index.readsOf(node));
  return [...new Set(read)].filter((name) => !written.has(name) && !index.constants.has(name));
}

/** Everything that must exist before the site can run. */
export function inputsOf(index: GraphIndex, site: AttentionSite): string[] {
  const values = [
    site.q.value,
    site.k.value,
    site.v.value,
    ...(site.mask === undefined ? [] : [site.mask.value]),
    ...site.runtimeScales.map((scale) => scale.value),
    ...(site.check === undefined ? [] : [site.check.value]),
    ...boundaryOf(index, site.nodes),
  ];
  return [...new Set(values)].filter((name) => !index.constants.has(name));
}
