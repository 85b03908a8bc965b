/**
 * Dimensions of a node's result out of those of its inputs, as the standard defines them, for values whose shapes onnxruntime does not infer: it keeps
 * no symbol where two that are equal by design meet, as the tokens of a text and the rows of a position table that are sliced to their number. Behind
 * that addition an encoder has no shapes.
 */
import { intAttribute, intsAttribute } from '../model/graph.ts';
import { canonicalDomain, type NodeProto } from '../onnx/codec.ts';

type Dims = readonly number[];

/** What is known of the inputs; undefined: nothing. */
export interface Known {
  dims(value: string): Dims | undefined;
  /** Elements of small values of integers. */
  numbers(value: string): Dims | undefined;
}

type Rule = (node: NodeProto, known: Known, output: number) => Dims | undefined;

const inputOf = (node: NodeProto, at: number) => node.input[at] ?? '';
const dimsOf = (node: NodeProto, known: Known, at: number) =>
  inputOf(node, at) === '' ? undefined : known.dims(inputOf(node, at));

/** An attribute in older operator sets, an input in newer ones; undefined where it is given and not known. */
function integers(node: NodeProto, known: Known, name: string, at: number): Dims | 'absent' | undefined {
  const attribute = intsAttribute(node, name);
  if (attribute !== undefined) return attribute;
  return inputOf(node, at) === '' ? 'absent' : known.numbers(inputOf(node, at));
}

const axisOf = (axis: number, rank: number) => (axis < 0 ? axis + rank : axis);

function broadcast(shapes: readonly (Dims | undefined)[]): Dims | undefined {
  if (shapes.some((shape) => shape === undefined)) return undefined;
  const all = shapes as readonly Dims[];
  const rank = Math.max(...all.map(({ length }) => length));
  const sizes = Array.from({ length: rank }, (_, at) => {
    const here = all.map((shape) => shape[at - rank + shape.length] ?? 1).filter((size) => size !== 1);
    return here.every((size) => size === here[0]) ? (here[0] ?? 1) : undefined;
  });
  return sizes.every((size) => size !== undefined) ? sizes : undefined;
}

/** The result is as large as the first input; further results are not looked at. */
const same: Rule = (node, known, output) => (output === 0 ? dimsOf(node, known, 0) : undefined);
const elementwise: Rule = (node, known) => broadcast(node.input.map((_, at) => dimsOf(node, known, at)));

const transpose: Rule = (node, known) => {
  const dims = dimsOf(node, known, 0);
  const perm = intsAttribute(node, 'perm') ?? dims?.map((_, axis) => dims.length - 1 - axis);
  return dims && perm?.map((axis) => dims[axis] as number);
};

const concat: Rule = (node, known) => {
  const parts = node.input.map((input) => known.dims(input));
  const [part] = parts;
  if (part === undefined || parts.some((dims) => dims?.length !== part.length)) return undefined;
  const at = axisOf(intAttribute(node, 'axis') ?? 0, part.length);
  const total = parts.reduce((sum, dims) => sum + ((dims as Dims)[at] as number), 0);
  return part.map((size, i) => (i === at ? total : size));
};

const matMul: Rule = (node, known) => {
  const [a, b] = [dimsOf(node, known, 0), dimsOf(node, known, 1)];
  if (a === undefined || b === undefined || a.length < 2 || b.length < 2 || a.at(-1) !== b.at(-2)) return undefined;
  const batch = broadcast([a.slice(0, -2), b.slice(0, -2)]);
  return batch && [...batch, a.at(-2) as number, b.at(-1) as number];
};

const gemm: Rule = (node, known) => {
  const [a, b] = [dimsOf(node, known, 0), dimsOf(node, known, 1)];
  if (a?.length !== 2 || b?.length !== 2) return undefined;
  return [
    a[intAttribute(node, 'transA') === 1 ? 1 : 0] as number,
    b[intAttribute(node, 'transB') === 1 ? 0 : 1] as number,
  ];
};

const gather: Rule = (node, known) => {
  const [data, indices] = [dimsOf(node, known, 0), dimsOf(node, known, 1)];
  if (data === undefined || indices === undefined) return undefined;
  const axis = axisOf(intAttribute(node, 'axis') ?? 0, data.length);
  return [...data.slice(0, axis), ...indices, ...data.slice(axis + 1)];
};

const reshape: Rule = (node, known) => {
  const [dims, target] = [dimsOf(node, known, 0), known.numbers(inputOf(node, 1))];
  if (dims === undefined || target === undefined) return undefined;
  if (intAttribute(node, 'allowzero') === 1 && target.includes(0)) return undefined;
  const copied = target.map((size, at) => (size === 0 ? dims[at] : size));
  if (copied.some((size) => size === undefined)) return undefined;
  const sizes = copied as number[];
  const count = dims.reduce((product, size) => product * size, 1);
  const rest = sizes.filter((size) => size !== -1).reduce((product, size) => product * size, 1);
  const open = sizes.length - sizes.filter((size) => size !== -1).length;
  if (open === 0) return rest === count ? sizes : undefined;
  return open === 1 && rest > 0 && count % rest === 0
    ? sizes.map((size) => (size === -1 ? count / rest : size))
    : undefined;
};

const unsqueeze: Rule = (node, known) => {
  const [dims, axes] = [dimsOf(node, known, 0), integers(node, known, 'axes', 1)];
  if (dims === undefined || axes === undefined || axes === 'absent') return undefined;
  const rank = dims.length + axes.length;
  const added = new Set(axes.map((axis) => axisOf(axis, rank)));
  let next = 0;
  return Array.from({ length: rank }, (_, at) => (added.has(at) ? 1 : (dims[next++] as number)));
};

const squeeze: Rule = (node, known) => {
  const [dims, axes] = [dimsOf(node, known, 0), integers(node, known, 'axes', 1)];
  if (dims === undefined || axes === undefined || axes === 'absent') return undefined;
  const gone = new Set(axes.map((axis) => axisOf(axis, dims.length)));
  return [...gone].every((at) => dims[at] === 1) ? dims.filter((_, at) => !gone.has(at)) : undefined;
};

/** Forwards, in steps of 1 or more. */
const slice: Rule = (node, known) => {
  const dims = dimsOf(node, known, 0);
  const [starts, ends] = [integers(node, known, 'starts', 1), integers(node, known, 'ends', 2)];
  if (dims === undefined || starts === undefined || ends === undefined) return undefined;
  if (starts === 'absent' || ends === 'absent' || starts.length !== ends.length) return undefined;
  const [givenAxes, givenSteps] = [integers(node, known, 'axes', 3), integers(node, known, 'steps', 4)];
  if (givenAxes === undefined || givenSteps === undefined) return undefined;
  const axes = givenAxes === 'absent' ? starts.map((_, at) => at) : givenAxes;
  const steps = givenSteps === 'absent' ? starts.map(() => 1) : givenSteps;
  if (axes.length !== starts.length || steps.length !== starts.length || steps.some((step) => step < 1))
    return undefined;
  const sizes = [...dims];
  for (const [i, given] of axes.entries()) {
    const axis = axisOf(given, dims.length);
    const size = dims[axis];
    if (size === undefined) return undefined;
    const clamp = (at: number) => Math.min(size, Math.max(0, at < 0 ? at + size : at));
    sizes[axis] = Math.max(
      0,
      Math.ceil((clamp(ends[i] as number) - clamp(starts[i] as number)) / (steps[i] as number)),
    );
  }
  return sizes;
};

const split: Rule = (node, known, output) => {
  const [dims, parts] = [dimsOf(node, known, 0), integers(node, known, 'split', 1)];
  if (dims === undefined || parts === undefined) return undefined;
  const axis = axisOf(intAttribute(node, 'axis') ?? 0, dims.length);
  const size = dims[axis] ?? 0;
  const equal = size % node.output.length === 0 ? size / node.output.length : undefined;
  const part = parts === 'absent' ? equal : parts[output];
  return part === undefined ? undefined : dims.map((n, at) => (at === axis ? part : n));
};

const reduce: Rule = (node, known) => {
  const [dims, axes] = [dimsOf(node, known, 0), integers(node, known, 'axes', 1)];
  if (dims === undefined || axes === undefined || axes === 'absent' || axes.length === 0) return undefined;
  const gone = new Set(axes.map((axis) => axisOf(axis, dims.length)));
  const keeps = intAttribute(node, 'keepdims') !== 0;
  return keeps ? dims.map((size, at) => (gone.has(at) ? 1 : size)) : dims.filter((_, at) => !gone.has(at));
};

const expand: Rule = (node, known) => broadcast([dimsOf(node, known, 0), known.numbers(inputOf(node, 1))]);
const filled: Rule = (node, known) => known.numbers(inputOf(node, 0));
const shape: Rule = (node, known) => {
  const dims = dimsOf(node, known, 0);
  return dims && [dims.slice(intAttribute(node, 'start') ?? 0, intAttribute(node, 'end') ?? dims.length).length];
};

const range: Rule = (node, known) => {
  const [start, limit, delta] = [0, 1, 2].map((at) => known.numbers(inputOf(node, at))?.[0]);
  if (start === undefined || limit === undefined || delta === undefined || delta === 0) return undefined;
  return [Math.max(0, Math.ceil((limit - start) / delta))];
};

const table = (names: string, rule: Rule): [string, Rule][] => names.split(' ').map((name) => [name, rule]);

/** Operators of the default set; in the order of what each gives. */
const RULES: ReadonlyMap<string, Rule> = new Map([
  ...table('Identity Cast Relu LeakyRelu Gelu Erf Sigmoid HardSigmoid HardSwish Tanh Sqrt Exp Log Neg Abs Sign', same),
  ...table('Reciprocal Not Softmax LogSoftmax LayerNormalization RMSNormalization Clip Dropout Elu Softplus', same),
  ...table('Sin Cos Floor Ceil Round IsNaN CumSum Trilu InstanceNormalization', same),
  ...table(
    'Add Sub Mul Div Pow Min Max Sum Where Equal Less Greater LessOrEqual GreaterOrEqual And Or Mod',
    elementwise,
  ),
  ...table('ReduceMean ReduceSum ReduceMax ReduceMin', reduce),
  ['Transpose', transpose],
  ['Concat', concat],
  ['MatMul', matMul],
  ['Gemm', gemm],
  ['Gather', gather],
  ['Reshape', reshape],
  ['Unsqueeze', unsqueeze],
  ['Squeeze', squeeze],
  ['Slice', slice],
  ['Split', split],
  ['Expand', expand],
  ['ConstantOfShape', filled],
  ['Shape', shape],
  ['Range', range],
]);

/** Of `com.microsoft`, as onnxruntime's optimizer writes encoders. */
const OWN_RULES: ReadonlyMap<string, Rule> = new Map([
  ...table('SkipLayerNormalization SkipSimplifiedLayerNormalization FastGelu Gelu BiasGelu QuickGelu', same),
]);

/** Operators that a value is followed through even where dimensions are only asked for, not computed. */
const PLAIN = new Set(['Identity', 'Cast', 'Transpose', 'Concat']);

/** @param isShallow follow only what moves elements: through anything else a value depends on the whole graph before it */
export function derivedDims(node: NodeProto, value: string, known: Known, isShallow: boolean): Dims | undefined {
  const domain = canonicalDomain(node.domain);
  if (isShallow && (domain !== '' || !PLAIN.has(node.opType))) return undefined;
  const rules = domain === '' ? RULES : domain === 'com.microsoft' ? OWN_RULES : undefined;
  return rules?.get(node.opType)?.(node, known, node.output.indexOf(value));
}
