/**
 * Finds out by value how a device's subgroup matrices are written: the extension is experimental, and implementations
 * have differed in syntax and in the unit of offsets of 8-bit matrices, where a wrong reading is a fast wrong answer.
 */
import { MATRIX_FEATURES, type MatrixConfig } from './capabilities.ts';
import { GPU_BUFFER_USAGE, GPU_MAP_READ } from './gpu-tensor.ts';
import { type MatrixDialect, nativeMatrices } from './wgsl/matrix-operations.ts';

const DIALECTS: readonly MatrixDialect[] = [
  { majorness: 'template', packedUnit: 'words' },
  { majorness: 'template', packedUnit: 'components' },
  { majorness: 'argument', packedUnit: 'components' },
  { majorness: 'argument', packedUnit: 'words' },
];

/** Rows are this many components longer than the product's K, and data starts this far into the buffer. */
const GAP = 16;

/** A kernel that multiplies one left by one right matrix, both with gaps between their rows. */
export function matrixProbeKernel(
  product: MatrixConfig,
  extension: string,
  dialect: MatrixDialect,
  lanes: number,
): string {
  const operations = nativeMatrices(extension, dialect);
  const { componentType, K, N } = product;
  const component = componentType as 'i8' | 'f16' | 'f32';
  const memory = (name: string) => ({ name, component });
  const [loadLeft, left] = operations.loadLeft(product, 'a', memory('lefts'), `${GAP}u`, `${K + GAP}u`);
  const [loadRight, right] = operations.loadRight(product, 'b', memory('rights'), `${GAP}u`, `${K + GAP}u`, true);
  const result = { name: 'results', component: 'i32' as const };
  return `
enable subgroups;
${operations.enable}
${component === 'f16' ? 'enable f16;' : ''}
@group(0) @binding(0) var<storage, read> lefts: array<${component === 'i8' ? 'i32' : component}>;
@group(0) @binding(1) var<storage, read> rights: array<${component === 'i8' ? 'i32' : component}>;
@group(0) @binding(2) var<storage, read_write> results: array<${product.resultComponentType}>;
@compute @workgroup_size(${lanes})
fn main() {
  ${operations.declareResult(product, 'c')}
  ${loadLeft}
  ${loadRight}
  ${operations.multiplyAccumulate(product, left, right, 'c')}
  ${operations.storeResult(product, 'c', result, '0u', `${N}u`)}
}`;
}

/** Small integers that depend on row and column, so that a misread matrix does not give the right product. */
const valueAt = (row: number, column: number) => ((row * 7 + column * 5 + row * column * 3) % 15) - 7;

/** `rows` rows of K INT8 values with gaps, as the probe's buffers hold them. */
function packedRows(rows: number, K: number, salt: number): Int8Array<ArrayBuffer> {
  const data = new Int8Array(GAP + rows * (K + GAP) + 64).fill(77);
  for (let row = 0; row < rows; row++) {
    for (let k = 0; k < K; k++) data[GAP + row * (K + GAP) + k] = valueAt(row + salt, k);
  }
  return data;
}

/**
 * The dialect in which the product of INT8 matrices comes out right; `undefined` when there is none.
 *
 * @param product a listed i8 -> i32 configuration
 */
export async function probeMatrixDialect(
  device: GPUDevice,
  feature: string,
  product: MatrixConfig,
  lanes: number,
): Promise<MatrixDialect | undefined> {
  const extension = MATRIX_FEATURES.find(([name]) => name === feature)?.[1] ?? '';
  for (const dialect of DIALECTS) {
    if (await isExact(device, matrixProbeKernel(product, extension, dialect, lanes), product)) return dialect;
  }
  return undefined;
}

async function isExact(device: GPUDevice, code: string, { M, N, K }: MatrixConfig): Promise<boolean> {
  const buffers: GPUBuffer[] = [];
  const buffer = (size: number, usage: number) => {
    const made = device.createBuffer({ label: 'sageattention matrix probe', size: Math.ceil(size / 16) * 16, usage });
    buffers.push(made);
    return made;
  };
  try {
    // Scopes are a stack that other code on the device uses too: this one is closed before anything is waited for.
    device.pushErrorScope('validation');
    const module = device.createShaderModule({ code });
    const compiling = device.createComputePipelineAsync({ layout: 'auto', compute: { module, entryPoint: 'main' } });
    device.popErrorScope().catch(() => null);
    const pipeline = await compiling;
    const storage = GPU_BUFFER_USAGE.STORAGE | GPU_BUFFER_USAGE.COPY_DST | GPU_BUFFER_USAGE.COPY_SRC;
    const [left, right] = [packedRows(M, K, 0), packedRows(N, K, 3)];
    const [lefts, rights] = [buffer(left.byteLength, storage), buffer(right.byteLength, storage)];
    const results = buffer(M * N * 4, storage);
    const staging = buffer(M * N * 4, GPU_BUFFER_USAGE.MAP_READ | GPU_BUFFER_USAGE.COPY_DST);
    device.queue.writeBuffer(lefts, 0, left);
    device.queue.writeBuffer(rights, 0, right);
    const encoder = device.createCommandEncoder();
    const pass = encoder.beginComputePass();
    pass.setPipeline(pipeline);
    const entries = [lefts, rights, results].map((bound, binding) => ({ binding, resource: { buffer: bound } }));
    pass.setBindGroup(0, device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries }));
    pass.dispatchWorkgroups(1);
    pass.end();
    encoder.copyBufferToBuffer(results, 0, staging, 0, M * N * 4);
    device.queue.submit([encoder.finish()]);
    await staging.mapAsync(GPU_MAP_READ);
    const actual = new Int32Array(staging.getMappedRange(0, M * N * 4).slice(0));
    return actual.every((value, i) => {
      const [m, n] = [Math.floor(i / N), i % N];
      let expected = 0;
      for (let k = 0; k < K; k++) expected += valueAt(m, k) * valueAt(n + 3, k);
      return value === expected;
    });
  } catch {
    // A dialect that does not compile is not the device's.
    return false;
  } finally {
    for (const made of buffers) made.destroy();
  }
}
