/** From a site and the tensors of one run to the arguments of `sageattn`, or the reason why onnxruntime must do it. */
import { float16ToNumber } from '../../../tensor/formats/float16.ts';
import { contiguousStrides } from '../../../tensor/tensor.ts';
import type { AttentionSite, Mask, View } from '../detect/site.ts';
import { contiguous, type Numbers, readSizes, sameSizes } from '../detect/views.ts';
import type { OrtTensor } from '../ort.ts';
import { readScores } from './score-shapes.ts';

export interface OperandCall {
  readonly tensor: OrtTensor;
  readonly view: View;
}

export interface AttentionCall {
  readonly q: OperandCall;
  readonly k: OperandCall;
  readonly v: OperandCall;
  /** Broadcasts to `[B,Hq,Lq,Lk]`. */
  readonly mask: OperandCall | undefined;
  readonly smScale: number | undefined;
  readonly softcap: number;
  readonly isCausal: boolean;
  readonly causalAlignment: 'top-left' | 'bottom-right';
  /** Keys that a row sees up to its diagonal. */
  readonly windowLength: number | undefined;
  readonly layout: 'HND' | 'NHD';
  /** Shape of the output tensor, which has the elements of `layout`. */
  readonly dims: readonly number[];
  readonly type: 'float16' | 'float32';
}

export type Preparation = { readonly call: AttentionCall } | { readonly reason: string };

/**
 * @param values has the site's inputs
 * @param maxHeadDim of the backend that is to run it
 */
export function prepareCall(
  site: AttentionSite,
  values: ReadonlyMap<string, OrtTensor>,
  maxHeadDim: number,
): Preparation {
  const tensor = (name: string) => values.get(name) as OrtTensor;
  const numbers = (name: string) => numbersOf(tensor(name));
  const [q, k, v] = [site.q, site.k, site.v].map((operand) => ({
    tensor: tensor(operand.value),
    view: operand.view(contiguous(tensor(operand.value).dims), numbers),
  })) as [PartialOperand, PartialOperand, PartialOperand];
  const { type } = q.tensor;
  if ((type !== 'float32' && type !== 'float16') || k.tensor.type !== type || v.tensor.type !== type) {
    return { reason: `operands of type ${q.tensor.type}, ${k.tensor.type}, ${v.tensor.type}` };
  }
  const shapes = `[${q.tensor.dims}], [${k.tensor.dims}], [${v.tensor.dims}]`;
  if (q.view === undefined || k.view === undefined || v.view === undefined) {
    return { reason: `operands of shapes ${shapes}` };
  }
  const { rank } = q.view;
  let operands: Operands = { q: q.view, k: k.view, v: v.view };
  if (!agree(operands, maxHeadDim) || (site.scores !== undefined && !multiply(operands)))
    return { reason: `operands of shapes ${shapes}` };
  const scores = site.scores && readScores(site.scores, productOf(operands), numbers);
  if (scores !== undefined && 'reason' in scores) return scores;
  const maskTensor = site.mask && tensor(site.mask.value);
  const maskRank = scores?.masked.length ?? rank;
  if (maskTensor !== undefined && scores !== undefined && maskRank !== rank) {
    const split = splitHeads(operands, rank, scores.masked);
    if (split === undefined) return { reason: `a mask of scores [${scores.masked}] over operands ${shapes}` };
    operands = split;
  }
  const [batch, heads, length] = operands.q.shape;
  const keys = operands.k.shape[2];
  let mask: OperandCall | undefined;
  if (site.mask !== undefined && maskTensor !== undefined) {
    const view = maskView(site.mask, maskTensor, operands.q, keys, maskRank);
    if (view === undefined) return { reason: `a mask [${maskTensor.dims}] of type ${maskTensor.type}` };
    mask = { tensor: maskTensor, view };
  }
  const lengths = reasonOfLengths(site, length, keys, values, numbers);
  if (lengths !== undefined) return { reason: lengths };
  const smScale = scaleOf(site, operands.q.shape[3], values, scores?.rank ?? rank);
  if (smScale !== undefined && !Number.isFinite(smScale)) return { reason: 'a scale that is no single finite number' };
  const outputShape = [batch, heads, length, operands.v.shape[3]] as const;
  return {
    call: {
      q: { tensor: q.tensor, view: operands.q },
      k: { tensor: k.tensor, view: operands.k },
      v: { tensor: v.tensor, view: operands.v },
      mask,
      smScale,
      softcap: site.softcap,
      isCausal: site.isCausal,
      causalAlignment: site.causalAlignment,
      windowLength: site.windowLength,
      layout: site.outputLayout(rank),
      dims: site.outputDims(outputShape, rank, q.view.batch ?? []),
      type,
    },
  };
}

interface PartialOperand {
  readonly tensor: OrtTensor;
  readonly view: View | undefined;
}

interface Operands {
  readonly q: View;
  readonly k: View;
  readonly v: View;
}

function agree({ q, k, v }: Operands, maxHeadDim: number): boolean {
  const [batch, heads, , dim] = q.shape;
  const [keyBatch, keyHeads, keys, keyDim] = k.shape;
  const [valueBatch, valueHeads, values, valueDim] = v.shape;
  return (
    keyBatch === batch &&
    valueBatch === batch &&
    keyHeads === valueHeads &&
    keyHeads > 0 &&
    heads % keyHeads === 0 &&
    keys === values &&
    keyDim === dim &&
    [dim, valueDim].every((size) => size >= 1 && size <= maxHeadDim) &&
    // Nothing to compute: onnxruntime gives its own empty tensors.
    [q, k, v].every((view) => view.shape.every((size) => size > 0))
  );
}

/** Why sequences of these lengths are left to onnxruntime. */
function reasonOfLengths(
  { lastKeys, alignedPast }: AttentionSite,
  length: number,
  keys: number,
  values: ReadonlyMap<string, OrtTensor>,
  numbers: Numbers,
): string | undefined {
  if (lastKeys !== undefined && !readSizes(lastKeys, numbers).every((last) => last + 1 === keys)) {
    return 'sequences of different lengths in one batch, or a cache longer than its keys';
  }
  if (alignedPast === undefined) return undefined;
  const past = alignedPast === '' ? 0 : values.get(alignedPast)?.dims[2];
  return keys - length === past
    ? undefined
    : `a causal mask of ${length} queries over ${keys} keys, ${past} of them past`;
}

/** Dimensions of q k^T as the graph has it. */
function productOf({ q, k }: Operands): number[] {
  const [batch, heads, length] = q.shape;
  const keys = k.shape[2];
  return [...(q.batch ?? [batch, heads]), length, keys];
}

/** True where a MatMul takes the operands as they are, with at most one key head for all queries. */
function multiply({ q, k, v }: Operands): boolean {
  const heads = [k, v].map(({ shape, repeats = 1 }) => shape[1] * repeats);
  const isSameBatch = [k, v].every(({ batch = [] }) => sameSizes(batch.slice(0, -1), q.batch?.slice(0, -1) ?? []));
  return (
    k.rank === q.rank &&
    v.rank === q.rank &&
    (q.rank <= 4 || isSameBatch) &&
    heads.every((count) => count === q.shape[1] || count === 1)
  );
}

/** Factor of q k^T, undefined for the default; NaN where a factor is no single number, or has more axes than `rank`. */
function scaleOf(
  site: AttentionSite,
  dim: number,
  values: ReadonlyMap<string, OrtTensor>,
  rank: number,
): number | undefined {
  if (site.runtimeScales.length === 0) return site.scale;
  return site.runtimeScales.reduce(
    (product, { value, inverse }) => {
      const tensor = values.get(value) as OrtTensor;
      const [number, ...others] = numbersOf(tensor);
      const isOne = number !== undefined && others.length === 0 && tensor.dims.length <= rank;
      const factor = isOne ? number : Number.NaN;
      return inverse ? product / factor : product * factor;
    },
    site.scale ?? 1 / Math.sqrt(dim),
  );
}

function numbersOf(tensor: OrtTensor): number[] {
  const data = tensor.data as ArrayLike<number | bigint>;
  // float16 comes as bits where there is no native array class for it.
  if (tensor.type === 'float16' && data instanceof Uint16Array) return Array.from(data, float16ToNumber);
  return Array.from(data, Number);
}

/** `[B*H,L,D]` as `[B,H,L,D]`, with B and H from the scores `[B,H,L,S]` that the graph adds a mask to. */
function splitHeads(operands: Operands, rank: number, scores: readonly number[]): Operands | undefined {
  if (rank !== 3 || scores.length !== 4) return undefined;
  const [batch, heads] = scores as [number, number];
  const split = ({ shape, strides, offset }: View): View => ({
    shape: [batch, heads, shape[2], shape[3]],
    strides: [heads * strides[0], strides[0], strides[2], strides[3]],
    offset,
    rank: 4,
  });
  return { q: split(operands.q), k: split(operands.k), v: split(operands.v) };
}

function maskView(mask: Mask, tensor: OrtTensor, query: View, keys: number, rank: number): View | undefined {
  if (tensor.type !== 'bool' && tensor.type !== 'float32' && tensor.type !== 'float16') return undefined;
  const dims = rank > 4 ? foldedMask(tensor.dims, query) : maskShape(mask.form, tensor.dims, rank);
  const [batch, heads, length] = query.shape;
  const target = [batch, heads, length, keys];
  const broadcasts = dims?.every((size, i) => size === 1 || size === target[i]);
  if (dims === undefined || broadcasts !== true) return undefined;
  return {
    shape: dims as unknown as View['shape'],
    strides: contiguousStrides(dims) as unknown as View['strides'],
    offset: 0,
    rank,
  };
}

/** Dimensions of a mask over more axes than four: all axes in front of the heads become one, as the axes of the queries did. */
function foldedMask(dims: readonly number[], { batch = [] }: View): number[] | undefined {
  const rank = batch.length + 2;
  if (dims.length > rank) return undefined;
  const all = [...new Array<number>(rank - dims.length).fill(1), ...dims];
  const folded = all.slice(0, -3);
  const isOne = folded.every((size) => size === 1);
  if (!isOne && !sameSizes(folded, batch.slice(0, -1))) return undefined;
  return [folded.reduce((product, size) => product * size, 1), ...all.slice(-3)];
}

/** A mask's dimensions as `[B,H,L,S]`. */
function maskShape(form: Mask['form'], dims: readonly number[], rank: number): number[] | undefined {
  if (form === 'padding') {
    if (dims.length === 2) return [dims[0] as number, 1, 1, dims[1] as number];
    return dims.length === 3 ? [dims[0] as number, 1, dims[1] as number, dims[2] as number] : undefined;
  }
  if (form === 'scores' && rank === 3) {
    if (dims.length > 3) return undefined;
    const [batch, length, keys] = [...[1, 1, 1].slice(dims.length), ...dims] as [number, number, number];
    return [batch, 1, length, keys];
  }
  return dims.length > 4 ? undefined : [...[1, 1, 1, 1].slice(dims.length), ...dims];
}
