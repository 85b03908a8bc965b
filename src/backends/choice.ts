/**
 * Settles what a call asked for against what a backend has: its kernel, the kernel's options, what belongs to the run.
 */

import type { BackwardPrecision } from '../attention/backward.ts';
import type { KernelName } from '../attention/kernels.ts';
import type { AttentionOptions, BackendName } from '../attention/options.ts';
import type { AttentionProblem } from '../attention/problem.ts';
import { InvalidArgumentError, reading, UnsupportedOptionError } from '../errors.ts';
import { copyOfCpu, type Tensor, type TensorView, validateData } from '../tensor/tensor.ts';
import type {
  AttentionInputs,
  Backend,
  BackwardSupport,
  KernelChoice,
  KernelDescriptor,
  RunContext,
  SideInputs,
} from './backend.ts';

/** The value asked for, or the kernel's default, by the option's name; nothing where the option has no meaning. */
function pick<N extends 'qkQuantGran' | 'pvAccumDtype' | 'scaleSearch'>(
  descriptor: KernelDescriptor,
  name: N,
  asked: KernelChoice[N],
): Pick<KernelChoice, N> {
  const honoured = (descriptor[name] ?? []) as readonly KernelChoice[N][];
  if (asked !== undefined && !honoured.includes(asked)) {
    const taken = honoured.length === 0 ? 'no value' : honoured.map((value) => `'${value}'`).join(' or ');
    throw new UnsupportedOptionError(descriptor.name, `options.${name}`, taken, `'${asked}'`);
  }
  return (honoured.length === 0 ? {} : { [name]: asked ?? honoured[0] }) as Pick<KernelChoice, N>;
}

const written = (value: unknown) => (typeof value === 'string' ? `'${value}'` : `${value}`);

/** What of a problem not every kernel computes. */
export type ProblemFeatures = Pick<AttentionProblem, 'headDim' | 'valueDim'> &
  Partial<Pick<AttentionProblem, 'dtype' | 'sinks' | 'blocks'>>;

/** The argument that keeps a kernel from a problem, with what it takes and what it was given; undefined: nothing does. */
export function obstacleTo(
  { maxHeadDim, dtypes, sinks = false, blockMask = false }: KernelDescriptor,
  problem: ProblemFeatures,
): readonly [argument: string, taken: string, received: string] | undefined {
  for (const [argument, size] of [
    ['q', problem.headDim],
    ['v', problem.valueDim],
  ] as const) {
    if (size > maxHeadDim) return [argument, `head dims up to ${maxHeadDim}`, String(size)];
  }
  if (problem.dtype !== undefined && dtypes?.includes(problem.dtype) === false) {
    return ['q', dtypes.join(' or '), problem.dtype];
  }
  if (problem.sinks !== undefined && !sinks) return ['options.sinks', 'no sinks', 'a tensor'];
  if (problem.blocks !== undefined && !blockMask) return ['options.blockMask', 'no block mask', 'a block mask'];
  return undefined;
}

/**
 * The kernel and the precision of a backward pass: those asked for, or the backend's first.
 *
 * @param support undefined: the backend has no backward pass for the call
 * @throws {InvalidArgumentError} `unsupported-option`, naming what the backend has not
 */
export function settleBackward(
  backend: Pick<Backend, 'name'>,
  support: BackwardSupport | undefined,
  askedKernel: AttentionOptions['kernel'],
  askedPrecision: BackwardPrecision | undefined,
): { readonly kernel: KernelName; readonly precision: BackwardPrecision } {
  if (support === undefined) {
    const expected = 'a backend with a backward pass for this call';
    throw new InvalidArgumentError('unsupported-option', 'options.backend', expected, `'${backend.name}'`);
  }
  const { kernels, precisions } = support;
  const kernel = askedKernel === undefined || askedKernel === 'auto' ? kernels[0] : askedKernel;
  if (kernel === undefined || !kernels.includes(kernel)) {
    const expected = `a kernel with a backward pass on backend '${backend.name}': ${kernels.map(written).join(' or ')}`;
    throw new InvalidArgumentError('unsupported-option', 'options.kernel', expected, `'${kernel}'`);
  }
  const precision = askedPrecision ?? (precisions[0] as BackwardPrecision);
  if (!precisions.includes(precision)) {
    const taken = precisions.map(written).join(' or ');
    throw new UnsupportedOptionError(kernel, 'options.backwardPrecision', taken, `'${precision}'`);
  }
  return { kernel, precision };
}

/**
 * @throws {UnsupportedOptionError} naming the option that the kernel does not honour
 */
export function chooseOptions(
  descriptor: KernelDescriptor,
  problem: ProblemFeatures,
  options: AttentionOptions,
): KernelChoice {
  const { name, smoothV, smoothQ } = descriptor;
  const obstacle = obstacleTo(descriptor, problem);
  if (obstacle !== undefined) throw new UnsupportedOptionError(name, ...obstacle);
  if (options.smoothV === true && !smoothV) {
    throw new UnsupportedOptionError(name, 'options.smoothV', 'false', 'true');
  }
  const querySmoothing = options.smoothQ === true ? 'block' : (options.smoothQ ?? smoothQ[0]);
  if (!smoothQ.includes(querySmoothing)) {
    throw new UnsupportedOptionError(
      name,
      'options.smoothQ',
      smoothQ.map(written).join(' or '),
      written(options.smoothQ),
    );
  }
  return {
    descriptor,
    ...pick(descriptor, 'qkQuantGran', options.qkQuantGran),
    ...pick(descriptor, 'pvAccumDtype', options.pvAccumDtype),
    ...pick(descriptor, 'scaleSearch', options.scaleSearch),
    smoothK: options.smoothK ?? true,
    smoothV: options.smoothV ?? false,
    smoothQ: querySmoothing,
  };
}

/** Options that say how to quantize. */
const QUANTIZATION_OPTIONS = ['qkQuantGran', 'pvAccumDtype', 'scaleSearch', 'smoothK', 'smoothV', 'smoothQ'] as const;

/**
 * The kernel that a call runs: the one asked for, or the backend's own choice; a promise only where the backend must be waited for.
 *
 * @param held keys and values are to be held for later calls
 * @throws {InvalidArgumentError} `unsupported-option`: the backend has no such kernel
 * @throws {UnsupportedOptionError} the kernel does not honour an option
 */
export function chooseKernel(
  backend: Backend,
  problem: AttentionProblem,
  options: AttentionOptions,
  held = false,
): KernelChoice | Promise<KernelChoice> {
  const asked = options.kernel ?? 'auto';
  const settle = (descriptor: KernelDescriptor | undefined): KernelChoice => {
    if (descriptor !== undefined) return chooseOptions(descriptor, problem, options);
    const names = backend.kernels.map(({ name }) => `'${name}'`).join(', ');
    throw new InvalidArgumentError(
      'unsupported-option',
      'options.kernel',
      `one of backend '${backend.name}': ${names}`,
      `'${asked}'`,
    );
  };
  if (asked !== 'auto') return settle(backend.kernels.find(({ name }) => name === asked));
  const quantized = held || QUANTIZATION_OPTIONS.some((name) => options[name] !== undefined);
  const found = backend.defaultKernel(problem, { quantized });
  return found instanceof Promise ? found.then(settle) : settle(found);
}

/**
 * Inputs as they are now: CPU storage must hold the views, and what the caller changes in their descriptions later
 * changes nothing. A backend checks its own kind of storage when it runs.
 *
 * @throws {InvalidArgumentError} naming the tensor that its array does not hold, or whose array was transferred
 */
export function takeInputs<T extends TensorView>(inputs: AttentionInputs<T>): AttentionInputs<T> {
  return reading('q, k or v', () => {
    const own = { q: takeTensor('q', inputs.q), k: takeTensor('k', inputs.k), v: takeTensor('v', inputs.v) };
    return withSide(own, mapSide(inputs, takeTensor));
  });
}

/** Where an error says that an input is. */
const SIDE_ARGUMENTS: Readonly<Record<keyof SideInputs, string>> = {
  attnMask: 'options.attnMask',
  sinks: 'options.sinks',
  blockMap: 'options.blockMask.map',
};
export const SIDE_NAMES = Object.keys(SIDE_ARGUMENTS) as readonly (keyof SideInputs)[];

/** Each input that is there, made anew by `make`. */
export function mapSide(side: SideInputs, make: (argument: string, view: TensorView) => TensorView): SideInputs {
  const made: { -readonly [name in keyof SideInputs]: SideInputs[name] } = {};
  for (const name of SIDE_NAMES) {
    const view = side[name];
    if (view !== undefined) made[name] = make(SIDE_ARGUMENTS[name], view);
  }
  return made;
}

/** V8 spreads objects slowly, and most calls have nothing beside q, k and v. */
export const withSide = <T extends TensorView>(own: Pick<AttentionInputs<T>, 'q' | 'k' | 'v'>, side: SideInputs) => {
  for (const _ in side) return { ...own, ...side };
  return own;
};

/** What options hold beside q, k and v. */
export function sideOf({ attnMask, sinks, blockMask }: AttentionOptions): SideInputs {
  if (attnMask === undefined && sinks === undefined && blockMask === undefined) return NOTHING;
  return {
    ...(attnMask && { attnMask }),
    ...(sinks && { sinks }),
    ...(blockMask && { blockMap: blockMask.map }),
  };
}
const NOTHING: SideInputs = {};

/** Options with these in place of their own. */
export function withSideOptions<O extends AttentionOptions>(options: O, { attnMask, sinks, blockMap }: SideInputs): O {
  if (attnMask === undefined && sinks === undefined && blockMap === undefined) return options;
  const { blockMask } = options;
  return {
    ...options,
    ...(attnMask && { attnMask }),
    ...(sinks && { sinks }),
    ...(blockMask && blockMap && { blockMask: { ...blockMask, map: blockMap } }),
  };
}

/** One tensor of {@link takeInputs}. */
export const takeTensor = <T extends TensorView>(argument: string, view: T): T =>
  view.location === 'cpu' ? (validateData(argument, view as unknown as Tensor) as unknown as T) : view;

/** Inputs that cannot change while the call waits: CPU tensors are copied. */
export function keepInputs<T extends TensorView>(inputs: AttentionInputs<T>): AttentionInputs<T> {
  const own = { q: copyOfCpu(inputs.q), k: copyOfCpu(inputs.k), v: copyOfCpu(inputs.v) };
  return withSide(own, keepSide(inputs));
}

/** Likewise what is beside q, k and v. */
export const keepSide = (side: SideInputs): SideInputs => mapSide(side, (_, view) => copyOfCpu(view));

/** Options that belong to one run and not to a plan. */
export const RUN_OPTIONS = ['signal', 'stream'] as const;
/** And of one that gives an output. */
export const ATTENTION_RUN_OPTIONS = [...RUN_OPTIONS, 'out'] as const;

/**
 * What of the options belongs to the run.
 *
 * @throws {InvalidArgumentError} a stream on a backend that has none
 */
export function contextOf({ signal, stream }: Pick<RunContext, 'signal' | 'stream'>, backend: BackendName): RunContext {
  if (stream !== undefined && backend !== 'cuda') {
    throw new InvalidArgumentError('invalid-option', 'options.stream', `no stream on backend '${backend}'`, 'a stream');
  }
  if (signal === undefined && stream === undefined) return NO_CONTEXT;
  return { ...(signal === undefined ? {} : { signal }), ...(stream === undefined ? {} : { stream }) };
}
const NO_CONTEXT: RunContext = {};
