/**
 * A marker alone in a session: what its shader is on this device, and whether it works here. That a marker is one dispatch which binds operands in
 * order, the constant and the result is how onnxruntime-web is today and no promise of its; the test says whether it still is.
 */
import { downloadTensor, type GpuTensor, gpuTensor, uploadTensor } from '../../../backends/webgpu/tensor.ts';
import { float16FromNumber } from '../../../tensor/formats/float16.ts';
import { bitsOf, elementCount } from '../../../tensor/tensor.ts';
import { graph, model, node, tensorProto, untypedValue, valueInfo, writeModel } from '../onnx/codec.ts';
import type { OrtSession, OrtSessionOptions, OrtTensor, OrtTensorConstructor } from '../ort.ts';
import type { OperandCall } from '../session/call.ts';
import { inLayout } from '../session/engine.ts';
import type { DeviceHooks } from './hooks.ts';
import type { MarkerEngine, MarkerPlan } from './plan.ts';
import type { Marker } from './site.ts';

const zerosOf = ({ type }: Marker, count: number) =>
  type === 'float16' ? new Uint16Array(count) : new Float32Array(count);

function markerAlone(marker: Marker): Uint8Array {
  const { equation, type, operands } = marker;
  const names = operands.map((_, i) => `operand${i}`);
  const terms = equation.text.split(',');
  const count = elementCount(equation.constant);
  return writeModel(
    model(
      graph({
        name: 'marker',
        nodes: [node('Einsum', [...names, 'sizes'], ['y'], { attributes: { equation: equation.text } })],
        inputs: names.map((name, i) =>
          valueInfo(
            name,
            type,
            [...(terms[i] as string)].map((letter) => `size_${letter}`),
          ),
        ),
        outputs: [untypedValue('y')],
        initializers: [tensorProto('sizes', type, equation.constant, zerosOf(marker, count))],
      }),
      { '': 17 },
    ),
  );
}

export interface MarkerSession {
  run(tensors: readonly OrtTensor[]): Promise<OrtTensor>;
  release(): Promise<void>;
}

export async function openMarker(
  create: (model: Uint8Array, options: OrtSessionOptions) => Promise<OrtSession>,
  { executionProviders }: OrtSessionOptions,
  marker: Marker,
): Promise<MarkerSession> {
  const given = executionProviders === undefined ? {} : { executionProviders };
  const session = await create(markerAlone(marker), { ...given, logSeverityLevel: 4 });
  return {
    async run(tensors) {
      const feeds = Object.fromEntries(tensors.map((tensor, i) => [`operand${i}`, tensor]));
      return (await session.run(feeds, ['y'])).y as OrtTensor;
    },
    release: () => session.release(),
  };
}

/**
 * The shader's text. Inside of {@link DeviceHooks.exclusive}.
 *
 * @throws why it is none that can be told from others
 */
export async function learnMarker(
  hooks: DeviceHooks,
  session: MarkerSession,
  marker: Marker,
  TensorClass: OrtTensorConstructor,
): Promise<string> {
  const key = `${marker.type} ${marker.equation.text}`;
  const ranks = marker.equation.text
    .split(',')
    .slice(0, -1)
    .map((term) => term.length);
  // Axes of one element: as an Einsum a marker is a sum over all of them.
  const tensors = ranks.map(
    (rank) => new TensorClass(marker.type, zerosOf(marker, 1), new Array<number>(rank).fill(1)),
  );
  const seen = await hooks.watch(async () => {
    (await session.run(tensors)).dispose();
  });
  const [dispatch, ...others] = seen;
  if (dispatch === undefined || others.length > 0) throw new Error(`an Einsum makes ${seen.length} dispatches here`);
  const { code } = dispatch;
  if (code === undefined) throw new Error('the shader of an Einsum is not seen');
  for (const [other, known] of hooks.learned) {
    if (known === code && other !== key) throw new Error('different Einsums have the same shader here');
  }
  hooks.learned.set(key, code);
  return code;
}

/** Numbers of both signs that repeat nowhere. */
function sample({ type }: Marker, count: number, phase: number): Float32Array | Uint16Array {
  const values = Float32Array.from({ length: count }, (_, i) => 1.5 * Math.sin(i * 12.9898 + phase));
  return type === 'float16' ? Uint16Array.from(values, float16FromNumber) : values;
}

/**
 * Runs a marker with its dispatch replaced, and the same attention without onnxruntime. Inside of {@link DeviceHooks.exclusive}.
 *
 * @param dims of the operands
 * @throws what is unlike
 */
export async function testMarker(
  hooks: DeviceHooks,
  session: MarkerSession,
  marker: Marker,
  { work, call, plan }: MarkerPlan,
  code: string,
  dims: readonly (readonly number[])[],
  { device }: MarkerEngine,
  TensorClass: OrtTensorConstructor,
): Promise<void> {
  const data = dims.map((shape, i) => sample(marker, elementCount(shape), i));
  const tensors = dims.map((shape, i) => new TensorClass(marker.type, data[i], shape));
  const output = await hooks.replacing(new Map([[code, work]]), async () => {
    const result = await session.run(tensors);
    if (hooks.failure !== undefined) throw new Error(hooks.failure);
    if (hooks.replaced !== 1) throw new Error(`${hooks.replaced} dispatches of one marker were replaced`);
    return result;
  });
  const uploaded: GpuTensor[] = [];
  try {
    const given = ({ view }: OperandCall, value: string): GpuTensor => {
      const at = marker.operands.indexOf(value);
      const { buffer } = uploadTensor(device, {
        location: 'cpu',
        dtype: marker.type,
        data: data[at] as Float32Array,
        shape: [(data[at] as Float32Array).length],
        strides: [1],
        offset: 0,
      });
      const { shape, strides, offset } = view;
      const tensor = gpuTensor(buffer, marker.type, shape, { strides, offset });
      uploaded.push(tensor);
      return tensor;
    };
    const { site, mask } = marker;
    const [q, k, v] = [given(call.q, site.q.value), given(call.k, site.k.value), given(call.v, site.v.value)].map(
      (tensor) => inLayout(call, tensor),
    ) as [GpuTensor, GpuTensor, GpuTensor];
    const attnMask = call.mask === undefined || mask === undefined ? {} : { attnMask: given(call.mask, mask) };
    const expected = (await plan.run({ q, k, v, ...attnMask })).output as GpuTensor;
    uploaded.push(expected);
    const { data: wanted } = await downloadTensor(device, expected);
    if (!isSame(await output.getData(), wanted)) throw new Error('a marker gave another result than its attention');
  } finally {
    output.dispose();
    for (const { buffer } of uploaded) buffer.destroy();
  }
}

/** Bit for bit. */
function isSame(actual: unknown, expected: unknown): boolean {
  const bytes = (data: unknown) => {
    const array = data instanceof Float32Array ? data : bitsOf(data as Uint16Array);
    return new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
  };
  const [a, b] = [bytes(actual), bytes(expected)];
  return a.length === b.length && a.every((byte, i) => byte === b[i]);
}
