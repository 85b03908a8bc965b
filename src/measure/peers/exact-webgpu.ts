/**
 * Exact attention on a WebGPU device: what benches compare the quantized kernels with. No part of the package's
 * interface.
 */

import { bandOf } from '../../attention/band.ts';
import { type AttentionOptions, validateOptions } from '../../attention/options.ts';
import { type AttentionProblem, createProblem, outputLayoutOf, outputShapeOf } from '../../attention/problem.ts';
import type { Capabilities } from '../../backends/webgpu/capabilities.ts';
import type { GpuContext } from '../../backends/webgpu/device.ts';
import { encodeParams } from '../../backends/webgpu/kernels/layout.ts';
import { emptyGpuTensor, GPU_BUFFER_USAGE, type GpuTensor } from '../../backends/webgpu/tensor.ts';
import { SageAttentionError, UnsupportedOptionError } from '../../errors.ts';
import { elementCount } from '../../tensor/tensor.ts';
import {
  EXACT_PARAMS,
  type ExactShape,
  exactAttentionKernel,
  exactOutputRegisters,
  exactWorkgroupBytes,
} from './exact-webgpu-kernel.ts';

export interface ExactVariant extends ExactShape {
  readonly name: string;
}

const NAMED_SHAPES = {
  '64x32': { rows: 64, keys: 32, rowThreads: 16, colThreads: 8 },
  '32x32': { rows: 32, keys: 32, rowThreads: 16, colThreads: 8 },
  '32x16': { rows: 32, keys: 16, rowThreads: 16, colThreads: 4 },
  '16x16': { rows: 16, keys: 16, rowThreads: 16, colThreads: 4 },
} as const;

const variant = (
  shape: keyof typeof NAMED_SHAPES,
  tile: ExactShape['tile'],
  staging: ExactShape['staging'],
): ExactVariant => ({ name: `${shape} ${tile} ${staging}`, ...NAMED_SHAPES[shape], tile, staging });

/**
 * Best first; the first that fits the device and the head dims is taken. Large tiles are read more often from registers
 * and less from memory, and tiles that need no conversion when they are read go before those that do.
 */
export const EXACT_VARIANTS: readonly ExactVariant[] = [
  variant('64x32', 'f32', 'separate'),
  variant('64x32', 'f32', 'shared'),
  variant('64x32', 'f16', 'separate'),
  variant('64x32', 'f16', 'shared'),
  variant('32x32', 'f32', 'separate'),
  variant('32x32', 'f32', 'shared'),
  variant('32x32', 'f16', 'separate'),
  variant('32x32', 'f16', 'shared'),
  variant('32x16', 'f32', 'shared'),
  variant('32x16', 'f16', 'shared'),
  variant('16x16', 'f32', 'shared'),
  variant('16x16', 'f16', 'shared'),
  variant('16x16', 'f32', 'none'),
];

const SOFTWARE_ROWS = 16;

/** A thread's output registers (float32) above which a tile is not used: more would spill. */
const OUTPUT_REGISTERS = 80;

/** The variants that a device can run, best first. float32 operands keep all their bits in every one of them. */
export function exactVariants(
  capabilities: Capabilities,
  { dtype, headDim, valueDim }: Pick<AttentionProblem, 'dtype' | 'headDim' | 'valueDim'>,
): readonly ExactVariant[] {
  const usable = EXACT_VARIANTS.filter(
    (shape) =>
      (shape.tile === 'f32' || dtype === 'float16') &&
      exactWorkgroupBytes(shape, headDim, valueDim) <= capabilities.workgroupBytes &&
      shape.rowThreads * shape.colThreads <= capabilities.workgroupThreads,
  );
  // Software drivers gain nothing from large tiles and compile them slowly.
  if (capabilities.isSoftware) return usable.filter(({ rows }) => rows === SOFTWARE_ROWS);
  const affordable = usable.filter((shape) => exactOutputRegisters(shape, valueDim) <= OUTPUT_REGISTERS);
  return affordable.length > 0 ? affordable : usable;
}

const HONOURED = ['tensorLayout', 'isCausal', 'causalAlignment', 'smScale'] as const;

export interface ExactAttentionOptions extends Pick<AttentionOptions, (typeof HONOURED)[number]> {
  /** Its tiles, for tests and tuning; default the best of {@link EXACT_VARIANTS} that fits. */
  readonly variant?: ExactVariant;
}

export interface ExactAttention {
  /** Name of its tiles. */
  readonly variant: string;
  /**
   * Submits one call.
   *
   * @param output contiguous, of the output's shape and dtype; default a new one, whose buffer the caller destroys
   */
  run(output?: GpuTensor): GpuTensor;
  dispose(): void;
}

/**
 * Exact attention over tensors that stay where they are.
 *
 * @param q `[B,Hq,Lq,D]` (HND) or `[B,Lq,Hq,D]` (NHD), float32, or float16 where the device has `shader-f16`; finite
 * @param k `[B,Hkv,Lk,D]`
 * @param v `[B,Hkv,Lk,Dv]`
 * @throws {InvalidArgumentError} naming the argument at fault
 * @throws {UnsupportedOptionError} another dtype
 * @throws {SageAttentionError} `unsupported-size`: a tensor is larger than a binding of the device
 */
export async function createExactAttention(
  context: GpuContext,
  { q, k, v }: { readonly q: GpuTensor; readonly k: GpuTensor; readonly v: GpuTensor },
  { variant: forced, ...options }: ExactAttentionOptions = {},
): Promise<ExactAttention> {
  const { device, capabilities } = context;
  validateOptions(options, HONOURED);
  const problem = createProblem(q, k, v, options);
  const { dtype, headDim, valueDim, batch, queryHeads, kvHeads, queryLength, keyLength } = problem;
  if (dtype === 'bfloat16' || (dtype === 'float16' && !capabilities.shaderF16)) {
    const can = capabilities.shaderF16 ? 'float16 or float32' : 'float32, as the device has no shader-f16';
    throw new UnsupportedOptionError('exact', 'q.dtype', can, dtype);
  }
  const shape = forced ?? exactVariants(capabilities, problem)[0];
  if (shape === undefined) {
    const least = Math.min(...EXACT_VARIANTS.map((each) => exactWorkgroupBytes(each, headDim, valueDim)));
    const received = `${capabilities.workgroupBytes} bytes`;
    throw new UnsupportedOptionError('exact', 'device', `at least ${least} bytes of workgroup memory`, received);
  }
  for (const { buffer } of [q, k, v]) {
    if (buffer.size <= capabilities.bindingBytes) continue;
    const received = `${buffer.size} bytes`;
    throw new SageAttentionError(
      'unsupported-size',
      `a tensor of ${received} is larger than a binding of this device`,
      {
        expected: `at most ${capabilities.bindingBytes} bytes`,
        received,
      },
    );
  }
  const layouts = { query: problem.q, key: problem.k, value: problem.v, output: outputLayoutOf(problem) };
  const vectors =
    headDim % 4 === 0 &&
    valueDim % 4 === 0 &&
    [q, k, v].every(({ shape }) => elementCount(shape) > 0) &&
    Object.values(layouts).every((layout) => Object.values(layout).every((elements: number) => elements % 4 === 0));
  const { subgroups, subgroupSize, subgroupId } = capabilities;
  const compiled = await context.pipeline(
    `attention exact ${shape.name}`,
    exactAttentionKernel({
      ...shape,
      component: dtype === 'float16' ? 'f16' : 'f32',
      headDim,
      valueDim,
      vectors,
      subgroups: subgroups && shape.colThreads <= subgroupSize[0],
      subgroupId,
    }),
  );
  const { upper } = bandOf(problem, problem);
  const bytes = encodeParams(EXACT_PARAMS, {
    queryLength,
    keyLength,
    groupSize: queryHeads / kvHeads,
    upper: Math.min(upper, keyLength),
    scoreScale: problem.smScale * Math.LOG2E,
    ...Object.fromEntries(
      Object.entries(layouts).flatMap(([name, layout]) => [
        [`${name}Offset`, layout.offset],
        [`${name}BatchStride`, layout.batchStride],
        [`${name}HeadStride`, layout.headStride],
        [`${name}TokenStride`, layout.tokenStride],
      ]),
    ),
  });
  const uniform = device.createBuffer({
    label: 'sageattention exact parameters',
    size: bytes.byteLength,
    usage: GPU_BUFFER_USAGE.UNIFORM | GPU_BUFFER_USAGE.COPY_DST,
  });
  device.queue.writeBuffer(uniform, 0, bytes);
  const outputShape = outputShapeOf(problem);
  return {
    variant: shape.name,
    run(output = emptyGpuTensor(device, dtype, outputShape)) {
      if (elementCount(outputShape) === 0) return output;
      const encoder = device.createCommandEncoder();
      const pass = encoder.beginComputePass();
      pass.setPipeline(compiled);
      const bound = [uniform, q.buffer, k.buffer, v.buffer, output.buffer];
      const entries = bound.map((buffer, binding) => ({ binding, resource: { buffer } }));
      pass.setBindGroup(0, device.createBindGroup({ layout: compiled.getBindGroupLayout(0), entries }));
      pass.dispatchWorkgroups(Math.ceil(queryLength / shape.rows), queryHeads, batch);
      pass.end();
      device.queue.submit([encoder.finish()]);
      return output;
    },
    dispose: () => uniform.destroy(),
  };
}
