/** Whatever is passed to a public function: a result, or an error of this package, short and soon. */
import vm from 'node:vm';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { runSeed } from '../../test/support/random.ts';
import { createCudaBackend } from '../backends/cuda/index.ts';
import { createWasmBackend } from '../backends/wasm/index.ts';
import { createWebgpuBackend } from '../backends/webgpu/index.ts';
import * as package_ from '../index.ts';
import { compare, exactAttention, quantizedAttention } from '../reference/index.ts';
import { parseSafetensors } from '../tensor/safetensors.ts';
import { installFakes, restoreBackends, t } from './testing/fake-backend.ts';

const seed = runSeed();
const { SageAttentionError, sageattn, sageattnVarlen, createAttention, prepareKeyValue, tensor } = package_;

/** Throws whatever is asked of it, but to fast-check, which would report that error in place of the one that it found. */
const shown = { [fc.toStringMethod]: () => 'unreadable' };
const unreadable: object = new Proxy(shown, {
  get: (target, name) => {
    if (name === fc.toStringMethod) return target[fc.toStringMethod];
    throw new Error('no');
  },
  ownKeys: () => {
    throw new Error('no');
  },
});

const junk: fc.Arbitrary<unknown> = fc.oneof(
  fc.anything({ withBigInt: true, withDate: true, withMap: true, withNullPrototype: true, withTypedArray: true }),
  fc.constantFrom(
    Symbol('x'),
    [Symbol('x')],
    Object.create(null),
    [Object.create(null)],
    () => 0,
    unreadable,
    {
      get shape() {
        throw new Error('no');
      },
    },
    { length: 4e9 },
    new Float32Array(1e6),
    [2 ** 40],
    '\u001b[31m',
    vm.runInNewContext('new Float32Array(8)'),
  ),
);
/** A tensor of which one property is junk. */
const spoiled = fc
  .tuple(fc.constantFrom('location', 'dtype', 'shape', 'strides', 'offset', 'data', 'device'), junk)
  .map(([name, value]) => ({ ...t(1, 1, 8, 8), [name]: value }));
const operand: fc.Arbitrary<unknown> = fc.oneof(junk, spoiled, fc.constant(t(1, 1, 8, 8)));
const options: fc.Arbitrary<unknown> = fc.oneof(
  junk,
  fc
    .tuple(
      fc.constantFrom('backend', 'kernel', 'isCausal', 'windowSize', 'attnMask', 'signal', 'stream', 'softcap'),
      junk,
    )
    .map(([name, value]) => ({ backend: 'wasm', [name]: value })),
  fc.constant({ backend: 'wasm' }),
);

// biome-ignore-start lint/suspicious/noExplicitAny: what is passed is of no type.
const call = (f: unknown, ...args: unknown[]) => (f as (...all: any[]) => unknown)(...args);
// biome-ignore-end lint/suspicious/noExplicitAny: see above

async function expectTyped(run: () => unknown): Promise<void> {
  try {
    const result = (await run()) as { dispose?: unknown } | undefined;
    if (typeof result?.dispose === 'function') await result.dispose();
  } catch (error) {
    // A signal that has its own reason gives that.
    if (!(error instanceof SageAttentionError)) throw error;
    expect(error.message.length).toBeLessThan(1000);
    expect((error.received ?? '').length).toBeLessThanOrEqual(200);
    expect(error.message).not.toContain('\u001b');
  }
}

beforeAll(async () => {
  await installFakes();
});
afterAll(restoreBackends);

describe(`any argument (seed ${seed})`, () => {
  const ENTRIES: Record<string, (a: unknown, b: unknown, c: unknown, last: unknown) => unknown> = {
    sageattn: (a, b, c, last) => call(sageattn, a, b, c, last),
    'a kernel of its own': (a, b, c, last) => call(package_.sageattnQkInt8PvFp16, a, b, c, last),
    sageattnVarlen: (a, b, c, last) => call(sageattnVarlen, t(8, 1, 8), t(8, 1, 8), a, b, c, last),
    'sageattnVarlen, starts': (a, b, _, last) => call(sageattnVarlen, t(8, 1, 8), t(8, 1, 8), t(8, 1, 8), a, b, last),
    createAttention: (a, b, c, last) => call(createAttention, { q: a, k: b, v: c }, last),
    'createAttention, specs': (a, _, __, last) => call(createAttention, a, last),
    'Attention.run': async (a, b, c, last) => {
      using attention = await createAttention(
        { q: t(1, 1, 8, 8), k: t(1, 1, 8, 8), v: t(1, 1, 8, 8) },
        { backend: 'wasm' },
      );
      return await call(attention.run.bind(attention), { q: a, k: b, v: c }, last);
    },
    prepareKeyValue: (a, b, _, last) => call(prepareKeyValue, a, b, last),
    'prepareKeyValue, mask': (a) =>
      call(prepareKeyValue, t(1, 1, 8, 8), t(1, 1, 8, 8), { backend: 'wasm', keyMask: a }),
    'KeyValueCache.append': async (a, b, _, last) => {
      using cache = await prepareKeyValue(t(1, 1, 8, 8), t(1, 1, 8, 8), { backend: 'wasm' });
      return await call(cache.append.bind(cache), a, b, last);
    },
    'KeyValueCache.attend': async (a, _, __, last) => {
      using cache = await prepareKeyValue(t(1, 1, 8, 8), t(1, 1, 8, 8), { backend: 'wasm' });
      return await call(cache.attend.bind(cache), a, last);
    },
    tensor: (a, b, _, last) => call(tensor, a, b, last),
    'tensor, options': (a) => call(tensor, new Float32Array(64), [8, 8], { strides: a }),
    emptyTensor: (a, b) => call(package_.emptyTensor, a, b),
    fromFloat32: (a, b, c) => call(package_.fromFloat32, a, b, c),
    toFloat32: (a) => call(package_.toFloat32, a),
    slice: (a, b, c, last) => call(package_.slice, a, b, c, last),
    transpose: (a, b) => call(package_.transpose, a, b),
    getBackend: (a) => call(package_.getBackend, a),
    setBackend: (a) => call(package_.setBackend, a),
    listBackends: (a) => call(package_.listBackends, a),
    createWasmBackend: (a) => call(createWasmBackend, a),
    createWebgpuBackend: (a) => call(createWebgpuBackend, a),
    createCudaBackend: (a) => call(createCudaBackend, a),
    exactAttention: (a, b, c, last) => call(exactAttention, a, b, c, last),
    quantizedAttention: (a, b, c, last) => call(quantizedAttention, a, b, c, last),
    compare: (a, b) => call(compare, a, b),
    parseSafetensors: (a) => call(parseSafetensors, a),
  };
  it.each(Object.entries(ENTRIES))('%s', async (_, entry) => {
    await fc.assert(
      fc.asyncProperty(operand, operand, operand, options, (a, b, c, last) => expectTyped(() => entry(a, b, c, last))),
      { seed, numRuns: 150 },
    );
  });
});

describe('arguments that ask for too much', () => {
  const empty = (...shape: number[]) => tensor(new Float32Array(0), shape);
  const broadcast = (...shape: number[]) => tensor(new Float32Array(64), shape, { strides: [0, 0, 0, 1] });
  const many = 2 ** 31 + 2;
  const refused = { code: 'unsupported-size' };
  const options = { backend: 'wasm' } as const;

  it('is refused at once, whatever the tensors hold', async () => {
    const cases = [
      [empty(many, 1, 0, 8), empty(many, 1, 0, 8), empty(many, 1, 0, 8)],
      [empty(1, many, 0, 8), t(1, 1, 4, 8), t(1, 1, 4, 8)],
      [broadcast(2 ** 28, 1, 1, 8), broadcast(2 ** 28, 1, 1, 8), broadcast(2 ** 28, 1, 1, 8)],
      [empty(0, 1, 2 ** 40, 8), empty(0, 1, 2 ** 40, 8), empty(0, 1, 2 ** 40, 8)],
    ] as const;
    for (const [q, k, v] of cases) await expect(sageattn(q, k, v, options)).rejects.toMatchObject(refused);
    const starts = { length: 4e9 } as ArrayLike<number>;
    const packed = t(8, 1, 8);
    await expect(sageattnVarlen(packed, packed, packed, starts, starts, options)).rejects.toMatchObject(refused);
    expect(() => package_.emptyTensor([2 ** 40], 'float32')).toThrow(SageAttentionError);
  });
});

describe('options', () => {
  it('name the one that was probably meant', async () => {
    const of = (options: object) => sageattn(t(1, 1, 8, 8), t(1, 1, 8, 8), t(1, 1, 8, 8), options);
    for (const [wrong, meant] of [
      ['is_causal', 'isCausal'],
      ['iscausal', 'isCausal'],
      ['smscale', 'smScale'],
      ['softCap', 'softcap'],
    ] as const) {
      const error = await of({ [wrong]: 1 }).catch((thrown) => thrown);
      expect(error).toMatchObject({ code: 'unknown-option', argument: `options.${wrong}` });
      expect(error.message).toContain(`(perhaps ${meant})`);
    }
    expect(() => tensor(new Float32Array(8), [8], { stride: [1] } as object)).toThrow('perhaps strides');
    expect(() => createWasmBackend({ thread: 1 } as object)).toThrow('perhaps threads');
  });

  it('that are inherited count like others', async () => {
    const of = (options: object) => sageattn(t(1, 1, 8, 8), t(1, 1, 8, 8), t(1, 1, 8, 8), options);
    await expect(of(Object.create({ isCausal: 1 }))).rejects.toMatchObject({ argument: 'options.isCausal' });
    await expect(of(Object.create({ tag: 1 }))).rejects.toMatchObject({ code: 'unknown-option' });
  });
});

describe('arrays of another realm', () => {
  it('are arrays', async () => {
    const Other = vm.runInNewContext('Float32Array') as Float32ArrayConstructor;
    const of = () =>
      tensor(
        Other.from({ length: 64 }, (_, i) => i),
        [1, 1, 8, 8],
      );
    expect(of().data).toBeInstanceOf(Float32Array);
    await expect(sageattn({ ...of(), data: new Other(64) }, of(), of(), { backend: 'wasm' })).resolves.toBeDefined();
  });

  it('a typed array in place of a tensor is said to be one', async () => {
    const array = new Float32Array(1e6) as unknown as package_.Tensor;
    await expect(sageattn(array, array, array)).rejects.toThrow(
      'k: expected a tensor (tensor(data, shape) makes one), received Float32Array of 1000000 elements',
    );
  });
});
