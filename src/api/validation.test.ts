/** Every way to call wrongly: the error's class, code, argument, and that it says what was expected and what came. */
import { describe, expect, it } from 'vitest';
import type { AttentionOptions } from '../attention/options.ts';
import { InvalidArgumentError, type SageAttentionError } from '../errors.ts';
import { emptyTensor, type Tensor, type TensorView, tensor } from '../tensor/tensor.ts';
import { prepareKeyValue } from './key-value-cache.ts';
import { createAttention } from './planned.ts';
import { kernelFunction, type SparseOptions, sageattn, sageattnSparse, sageattnVarlen } from './sageattn.ts';

const t = (...shape: number[]) => emptyTensor(shape, 'float32');
const bools = (...shape: number[]) => tensor(new Uint8Array(shape.reduce((product, size) => product * size, 1)), shape);
const with_ = (view: Tensor, changes: Partial<Tensor>): Tensor => ({ ...view, ...changes });
const [q, k, v] = [t(1, 4, 5, 16), t(1, 2, 7, 16), t(1, 2, 7, 8)];

async function errorOf(call: () => Promise<unknown>): Promise<SageAttentionError> {
  try {
    await call();
  } catch (error) {
    return error as SageAttentionError;
  }
  throw new Error('the call did not fail');
}

interface Wrong {
  readonly name: string;
  readonly call: () => Promise<unknown>;
  readonly code: string;
  readonly argument: string;
  readonly received: string;
}

const dense = (
  name: string,
  operands: Partial<Record<'q' | 'k' | 'v', unknown>>,
  code: string,
  argument: string,
  received: string,
): Wrong => ({
  name,
  call: () => {
    const all = { q, k, v, ...operands } as Record<'q' | 'k' | 'v', TensorView>;
    return sageattn(all.q, all.k, all.v);
  },
  code,
  argument,
  received,
});

const option = (
  name: string,
  options: Record<string, unknown>,
  code: string,
  argument: string,
  received: string,
): Wrong => ({
  name,
  call: () => sageattn<TensorView>(q, k, v, options as AttentionOptions),
  code,
  argument,
  received,
});

const packed = [t(10, 4, 16), t(12, 2, 16), t(12, 2, 8)] as const;
const varlen = (name: string, cuQ: number[], cuK: number[], argument: string, received: string): Wrong => ({
  name,
  call: () => sageattnVarlen(...packed, cuQ, cuK),
  code: 'invalid-cu-seqlens',
  argument,
  received,
});

const WRONG: readonly Wrong[] = [
  dense('q of rank 3', { q: t(4, 5, 16) }, 'invalid-rank', 'q', 'shape [4,5,16]'),
  dense('v of rank 5', { v: t(1, 1, 2, 7, 8) }, 'invalid-rank', 'v', 'shape [1,1,2,7,8]'),
  dense('no tensor', { k: undefined }, 'invalid-shape', 'k', 'undefined'),
  dense('k of another dtype', { k: emptyTensor([1, 2, 7, 16], 'float16') }, 'invalid-dtype', 'k.dtype', 'float16'),
  dense('v of another dtype', { v: emptyTensor([1, 2, 7, 8], 'bfloat16') }, 'invalid-dtype', 'v.dtype', 'bfloat16'),
  dense('q of a dtype that is none', { q: with_(q, { dtype: 'bool' }) }, 'invalid-dtype', 'q.dtype', 'bool'),
  dense('heads that do not divide', { q: t(1, 3, 5, 16) }, 'invalid-shape', 'q', '3 heads'),
  dense('no KV heads', { k: t(1, 0, 7, 16), v: t(1, 0, 7, 8) }, 'invalid-shape', 'q', '4 heads'),
  dense('k and v with different heads', { v: t(1, 4, 7, 8) }, 'invalid-shape', 'v', '4'),
  dense('D of 513', { q: t(1, 4, 5, 513), k: t(1, 2, 7, 513) }, 'unsupported-size', 'q', '513'),
  dense('D of 0', { q: t(1, 4, 5, 0), k: t(1, 2, 7, 0) }, 'unsupported-size', 'q', '0'),
  dense('Dv of 600', { v: t(1, 2, 7, 600) }, 'unsupported-size', 'v', '600'),
  dense('q and k of different D', { k: t(1, 2, 7, 8) }, 'invalid-shape', 'k', '8'),
  dense('k and v of different lengths', { v: t(1, 2, 6, 8) }, 'invalid-shape', 'v', '6'),
  dense('different batch sizes', { k: t(2, 2, 7, 16) }, 'invalid-shape', 'k', '2'),
  dense(
    'last dimension not contiguous',
    { k: with_(t(1, 2, 7, 64), { shape: [1, 2, 7, 16], strides: [896, 448, 64, 4] }) },
    'invalid-strides',
    'k.strides',
    '[896,448,64,4]',
  ),
  dense(
    'a negative stride',
    { q: with_(q, { strides: [320, -80, 16, 1] }) },
    'invalid-strides',
    'q.strides',
    '[320,-80,16,1]',
  ),
  dense('too few strides', { q: with_(q, { strides: [80, 16, 1] }) }, 'invalid-strides', 'q.strides', '[80,16,1]'),
  dense('an offset that is no index', { q: with_(q, { offset: -1 }) }, 'invalid-strides', 'q.offset', '-1'),
  dense(
    'a size that is no integer',
    { q: with_(q, { shape: [1, 4, 2.5, 16] }) },
    'invalid-shape',
    'q.shape',
    '[1,4,2.5,16]',
  ),
  dense(
    'a buffer shorter than its shape',
    { q: with_(q, { data: new Float32Array(319) }) },
    'buffer-too-small',
    'q',
    '319 elements',
  ),
  dense(
    'a buffer shorter than its strides reach',
    { v: with_(v, { strides: [200, 100, 8, 1] }) },
    'buffer-too-small',
    'v',
    '112 elements',
  ),
  dense('tensors in different places', { k: { ...k, location: 'webgpu' } }, 'mixed-locations', 'k', 'webgpu'),
  option('an unknown option', { causal: true }, 'unknown-option', 'options.causal', "'causal'"),
  option('a name of Object.prototype', { toString: true }, 'unknown-option', 'options.toString', "'toString'"),
  option('a boolean that is a number', { isCausal: 1 }, 'invalid-option', 'options.isCausal', '1'),
  option('smScale NaN', { smScale: Number.NaN }, 'invalid-option', 'options.smScale', 'NaN'),
  option('smScale a string', { smScale: '1' }, 'invalid-option', 'options.smScale', "'1'"),
  option('softcap negative', { softcap: -1 }, 'invalid-option', 'options.softcap', '-1'),
  option('window of one side', { windowSize: [4] }, 'invalid-option', 'options.windowSize', '[4]'),
  option('window of fractions', { windowSize: [1.5, 0] }, 'invalid-option', 'options.windowSize', '[1.5,0]'),
  option('window of -2', { windowSize: [-2, 0] }, 'invalid-option', 'options.windowSize', '[-2,0]'),
  option('an unknown layout', { tensorLayout: 'NDH' }, 'invalid-option', 'options.tensorLayout', "'NDH'"),
  option('an unknown kernel', { kernel: 'fast' }, 'invalid-option', 'options.kernel', "'fast'"),
  option('an unknown backend', { backend: 'opencl' }, 'invalid-option', 'options.backend', "'opencl'"),
  option(
    'an unknown alignment',
    { causalAlignment: 'bottom' },
    'invalid-option',
    'options.causalAlignment',
    "'bottom'",
  ),
  option('a signal that is none', { signal: {} }, 'invalid-option', 'options.signal', '[object Object]'),
  option('a mask that is no tensor', { attnMask: [true] }, 'invalid-option', 'options.attnMask', '[true]'),
  option('a mask too short', { attnMask: tensor(new Uint8Array(6), [6]) }, 'invalid-mask', 'options.attnMask', '[6]'),
  option(
    'a mask of rank 5',
    { attnMask: tensor(new Uint8Array(35), [1, 1, 1, 5, 7]) },
    'invalid-mask',
    'options.attnMask',
    '[1,1,1,5,7]',
  ),
  option(
    'a mask with heads of KV',
    { attnMask: tensor(new Uint8Array(70), [1, 2, 5, 7]) },
    'invalid-mask',
    'options.attnMask',
    '[1,2,5,7]',
  ),
  option(
    'a mask of an integer dtype',
    { attnMask: { ...tensor(new Uint8Array(7), [7]), dtype: 'int8' } },
    'invalid-dtype',
    'options.attnMask.dtype',
    'int8',
  ),
  option(
    'a mask whose buffer is short',
    { attnMask: { ...tensor(new Uint8Array(7), [7]), shape: [5, 7], strides: [7, 1] } },
    'buffer-too-small',
    'options.attnMask',
    '7 elements',
  ),
  option(
    'a mask elsewhere',
    { attnMask: { ...tensor(new Uint8Array(7), [7]), location: 'cuda' } },
    'mixed-locations',
    'options.attnMask',
    'cuda',
  ),
  option('sinks that are no tensor', { sinks: [1, 2, 3, 4] }, 'invalid-option', 'options.sinks', '[1,2,3,4]'),
  option('sinks of the heads of KV', { sinks: t(2) }, 'invalid-shape', 'options.sinks', '[2]'),
  option('sinks of each row', { sinks: t(4, 5) }, 'invalid-shape', 'options.sinks', '[4,5]'),
  option(
    'sinks of a bool dtype',
    { sinks: tensor(new Uint8Array(4), [4]) },
    'invalid-dtype',
    'options.sinks.dtype',
    'bool',
  ),
  option(
    'sinks elsewhere',
    { sinks: with_(t(4), { location: 'cuda' } as object) },
    'mixed-locations',
    'options.sinks',
    'cuda',
  ),
  option(
    'sinks whose buffer is short',
    { sinks: { ...t(2), shape: [4] } },
    'buffer-too-small',
    'options.sinks',
    '2 elements',
  ),
  option(
    'a block mask that is a tensor',
    { blockMask: bools(1, 1) },
    'invalid-option',
    'options.blockMask',
    '[object Object]',
  ),
  ...[0, 24, -16, 16.5, '16'].map((rows) =>
    option(
      `blocks of ${typeof rows} ${rows} rows`,
      { blockMask: { rows, keys: 16, map: bools(1, 1) } },
      'invalid-option',
      'options.blockMask',
      '[object Object]',
    ),
  ),
  ...[[1], [1, 2], [3, 1, 1], [2, 1, 1, 1], [1, 2, 1, 1], [1, 1, 4, 1, 1]].map((shape) =>
    option(
      `a map of shape [${shape}]`,
      { blockMask: { rows: 16, keys: 16, map: bools(...shape) } },
      'invalid-mask',
      'options.blockMask.map',
      `[${shape}]`,
    ),
  ),
  option(
    'a map of floats',
    { blockMask: { rows: 16, keys: 16, map: t(1, 1) } },
    'invalid-dtype',
    'options.blockMask.map.dtype',
    'float32',
  ),
  option(
    'a map elsewhere',
    { blockMask: { rows: 16, keys: 16, map: { ...bools(1, 1), location: 'webgpu' } } },
    'mixed-locations',
    'options.blockMask.map',
    'webgpu',
  ),
  ...[
    {},
    { topK: 0.5, topP: 0.5 },
    { topK: 1.5 },
    { topP: -0.1 },
    { threshold: 2 },
    { topK: 0.5, mass: 0.9 },
    { topK: 0.5, rows: 24 },
    { topK: 0.5, sinkBlocks: -1 },
    { topk: 0.5 },
  ].map((sparsity) =>
    option(
      `a sparsity of ${JSON.stringify(sparsity)}`,
      { sparsity },
      'invalid-option',
      'options.sparsity',
      '[object Object]',
    ),
  ),
  option(
    'a sparsity beside a block mask',
    { sparsity: { topK: 0.5 }, blockMask: { rows: 16, keys: 16, map: bools(1, 1) } },
    'invalid-option',
    'options.sparsity',
    '[object Object]',
  ),
  {
    name: 'sageattnSparse without a sparsity',
    call: () => sageattnSparse(q, k, v, {} as SparseOptions),
    code: 'invalid-option',
    argument: 'options.sparsity',
    received: 'undefined',
  },
  {
    name: 'sageattnSparse with one cuSeqlens',
    call: () => sageattnSparse(q, k, v, { sparsity: { topK: 0.5 }, cuSeqlensQ: [0, 5] }),
    code: 'invalid-option',
    argument: 'options.cuSeqlensK',
    received: 'none',
  },
  varlen('cuSeqlensQ that starts at 1', [1, 10], [0, 12], 'cuSeqlensQ', '[1,10]'),
  varlen('cuSeqlensK that falls', [0, 5, 10], [0, 8, 4], 'cuSeqlensK', '[0,8,4]'),
  varlen('cuSeqlensQ past the data', [0, 11], [0, 12], 'cuSeqlensQ', '[0,11]'),
  varlen('different numbers of sequences', [0, 5, 10], [0, 12], 'cuSeqlensK', '2 entries'),
  varlen('no entries', [], [], 'cuSeqlensQ', '[]'),
  varlen('fractions', [0, 2.5], [0, 12], 'cuSeqlensQ', '[0,2.5]'),
  varlen('too many to show', [0, 1, 2, 3, 4, 5, 6, 7, 6], [0, 12], 'cuSeqlensQ', '[0,1,2,3,4,5,6,7,...]'),
  {
    name: 'tensorLayout for varlen',
    call: () => sageattnVarlen(...packed, [0, 10], [0, 12], { tensorLayout: 'NHD' } as AttentionOptions),
    code: 'unknown-option',
    argument: 'options.tensorLayout',
    received: "'tensorLayout'",
  },
  {
    name: 'varlen tensors of rank 4',
    call: () => sageattnVarlen(q, k, v, [0, 1], [0, 1]),
    code: 'invalid-rank',
    argument: 'q',
    received: 'shape [1,4,5,16]',
  },
  {
    name: 'a causal mask when preparing keys and values',
    call: () => prepareKeyValue(k, v, { isCausal: true } as AttentionOptions),
    code: 'unknown-option',
    argument: 'options.isCausal',
    received: "'isCausal'",
  },
  dense(
    'float32 in an array of bytes',
    { q: with_(q, { data: new Uint8Array(9999) }) },
    'invalid-dtype',
    'q.data',
    'Uint8Array, which holds bool',
  ),
  dense(
    'a plain array',
    { v: with_(v, { data: new Array(999).fill(0) as unknown as Float32Array }) },
    'invalid-dtype',
    'v.data',
    'Array, which holds no dtype',
  ),
  dense(
    'no data',
    { k: with_(k, { data: undefined as unknown as Float32Array }) },
    'invalid-dtype',
    'k.data',
    'Undefined, which holds no dtype',
  ),
  dense('a place that is none', { q: { ...q, location: 'gpu' } }, 'mixed-locations', 'q.location', 'gpu'),
  varlen('cuSeqlensK past the data', [0, 10], [0, 13], 'cuSeqlensK', '[0,13]'),
  varlen('no cuSeqlensQ', null as unknown as number[], [0, 12], 'cuSeqlensQ', 'null'),
  varlen('big integers', [0n, 10n] as unknown as number[], [0, 12], 'cuSeqlensQ', '[0,10]'),
  option('an array for options', [] as unknown as Record<string, unknown>, 'invalid-option', 'options', '[]'),
  {
    name: "another kernel for a kernel's own function",
    call: () => kernelFunction('qk-int8-pv-fp16')(q, k, v, { kernel: 'qk-int8-pv-int8' } as AttentionOptions),
    code: 'unknown-option',
    argument: 'options.kernel',
    received: "'kernel'",
  },
  {
    name: 'nothing to plan for',
    call: () => createAttention(undefined as unknown as { q: Tensor; k: Tensor; v: Tensor }),
    code: 'invalid-shape',
    argument: 'specs',
    received: 'undefined',
  },
  {
    name: 'a signal when planning',
    call: () => createAttention({ q, k, v }, { signal: new AbortController().signal } as AttentionOptions),
    code: 'unknown-option',
    argument: 'options.signal',
    received: "'signal'",
  },
];

describe('wrong calls', () => {
  it.each(WRONG)('$name', async ({ call, code, argument, received }) => {
    const error = await errorOf(call);
    expect(error).toBeInstanceOf(InvalidArgumentError);
    expect({ code: error.code, argument: error.argument, received: error.received }).toEqual({
      code,
      argument,
      received,
    });
    expect(error.message).toBe(`${argument}: expected ${error.expected}, received ${received}`);
    expect(error.expected).not.toBe('');
  });

  it('options that are null', async () => {
    const error = await errorOf(() => sageattn<TensorView>(q, k, v, null as unknown as AttentionOptions));
    expect(error.argument).toBe('options');
  });

  it('an option that is undefined counts as absent', async () => {
    // Not one of these is reached before the aborted signal is: every option before it passed.
    const reason = new Error('stop');
    const options = { isCausal: undefined, attnMask: undefined, signal: AbortSignal.abort(reason) };
    await expect(sageattn<TensorView>(q, k, v, options as unknown as AttentionOptions)).rejects.toBe(reason);
  });
});
