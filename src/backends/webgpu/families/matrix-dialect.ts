/**
 * Finds out by value how a device's subgroup matrices are written: the extension is experimental, and implementations
 * have differed in syntax and in the unit of offsets of 8-bit matrices, where a wrong reading is a fast wrong answer.
 */
import { float16FromNumber, float16ToNumber } from '../../../tensor/formats/float16.ts';
import { MATRIX_FEATURES, type MatrixConfig, type MatrixDialect } from '../capabilities.ts';
import { type MatrixMemory, nativeMatrices, workgroupArray } from '../kernels/matrix-operations.ts';
import { GPU_BUFFER_USAGE, GPU_MAP_READ } from '../tensor.ts';

const DIALECTS: readonly MatrixDialect[] = [
  { majorness: 'template', packedUnit: 'words' },
  { majorness: 'template', packedUnit: 'components' },
  { majorness: 'argument', packedUnit: 'components' },
  { majorness: 'argument', packedUnit: 'words' },
];

/**
 * Rows of the left matrix are this many components longer than the product's K, and data starts this far into a buffer.
 */
const GAP = 16;

/** Components before the right matrix. */
const rightStart = ({ N, K }: MatrixConfig) => 2 * GAP + N * K;

/** Subgroups of the probe's workgroup: each multiplies a matrix of its own, as in the attention kernel. */
const SUBGROUPS = 2;

/**
 * A kernel that multiplies one left by one right matrix a subgroup with the memory of the attention kernel: rows with
 * gaps in storage for Q, dense columns for K and V, padded rows in workgroup memory for P and for results, which are
 * stored, loaded and stored again. Strides are constants and short arrays lie between, so that a driver that aligns
 * them differently shows it, as does one whose subgroups are not the threads that the kernel takes them for.
 */
export function matrixProbeKernel(
  product: MatrixConfig,
  extension: string,
  dialect: MatrixDialect,
  lanes: number,
  subgroupId = false,
): string {
  const operations = nativeMatrices(extension, dialect);
  const { componentType, resultComponentType, K, M, N } = product;
  const component = componentType as MatrixMemory['component'];
  const element = component === 'i8' ? 'i32' : component;
  const staged = component !== 'i8';
  const threads = SUBGROUPS * lanes;
  const [loadLeft, left] = operations.loadLeft(
    product,
    'a',
    staged ? { name: 'tile', component, base: `subgroup * ${M * (K + 8)}u` } : { name: 'lefts', component },
    staged ? '0u' : `${GAP}u`,
    `${staged ? K + 8 : K + GAP}u`,
  );
  const base = `(group.x + subgroup + 1u) * ${rightStart(product)}u`;
  const [loadRight, right] = operations.loadRight(
    product,
    'b',
    { name: 'rights', component, base },
    '0u',
    `${K}u`,
    true,
  );
  const ownResult = `subgroup * ${M * (N + 8)}u`;
  const result: MatrixMemory = {
    name: 'result',
    component: resultComponentType as MatrixMemory['component'],
    base: ownResult,
  };
  const resultBytes = resultComponentType === 'f16' ? 2 : 4;
  return `
enable subgroups;
${operations.enable}
${component === 'f16' || resultComponentType === 'f16' ? 'enable f16;' : ''}
${subgroupId ? 'requires subgroup_id;' : ''}
diagnostic(off, ${extension.includes('chromium') ? 'chromium.' : ''}subgroup_matrix_uniformity);
@group(0) @binding(0) var<storage, read> lefts: array<${element}>;
@group(0) @binding(1) var<storage, read> rights: array<${element}>;
@group(0) @binding(2) var<storage, read_write> results: array<${resultComponentType}>;
${workgroupArray('counters', 'atomic<u32>', 2, 4)}
${staged ? workgroupArray('tile', element, SUBGROUPS * M * (K + 8), component === 'f16' ? 2 : 4) : ''}
${workgroupArray('factors', 'f32', M, 4)}
${workgroupArray('result', resultComponentType, SUBGROUPS * M * (N + 8), resultBytes)}
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32, @builtin(subgroup_size) subgroup_lanes: u32, @builtin(subgroup_invocation_id) subgroup_lane: u32${subgroupId ? ', @builtin(subgroup_id) subgroup_index: u32' : ''}) {
  let t = ${subgroupId ? 'subgroup_index * subgroup_lanes + subgroup_lane' : 'lid'};
  let subgroup = t / ${lanes}u;
  let lane = t % ${lanes}u;
  ${
    staged
      ? `for (var i = lane; i < ${M * K}u; i += ${lanes}u) { tile[subgroup * ${M * (K + 8)}u + i / ${K}u * ${K + 8}u + i % ${K}u] = lefts[${GAP}u + i / ${K}u * ${K + GAP}u + i % ${K}u]; }
  workgroupBarrier();`
      : ''
  }
  ${operations.declareResult(product, 'c')}
  ${loadLeft}
  ${loadRight}
  ${operations.multiplyAccumulate(product, left, right, 'c')}
  ${operations.storeResult(product, 'c', result, '0u', `${N + 8}u`)}
  if (t < ${M}u) { factors[t] = 2.0; }
  if (t == 0u) { atomicStore(&counters[1], 1u); }
  workgroupBarrier();
  for (var i = lane; i < ${M * N}u; i += ${lanes}u) { result[${ownResult} + i / ${N}u * ${N + 8}u + i % ${N}u] *= ${resultComponentType}(factors[i / ${N}u]); }
  workgroupBarrier();
  ${operations.loadResult(product, 'c', result, '0u', `${N + 8}u`)}
  workgroupBarrier();
  ${operations.storeResult(product, 'c', result, '0u', `${N + 8}u`)}
  workgroupBarrier();
  let once = ${resultComponentType}(atomicLoad(&counters[1]));
  for (var i = lane; i < ${M * N}u; i += ${lanes}u) { results[subgroup * ${M * N}u + i] = once * result[${ownResult} + i / ${N}u * ${N + 8}u + i % ${N}u]; }
}`;
}

/** Small integers that depend on row and column, so that a misread matrix does not give the right product. */
const valueAt = (row: number, column: number) => ((row * 7 + column * 5 + row * column * 3) % 15) - 7;

/** The rows that a matrix of the probe takes from {@link valueAt} begin here. */
const LEFT_SALT = 0;
const rightSalt = (subgroup: number) => 3 + 2 * subgroup;

/** Rows of K values from the starts on, as the probe's buffers hold them, in bytes of the component's type. */
function rowsOf(
  component: string,
  rows: number,
  K: number,
  stride: number,
  blocks: readonly { readonly start: number; readonly salt: number }[],
): ArrayBuffer {
  const length = Math.max(...blocks.map(({ start }) => start)) + rows * stride + 64;
  const data =
    component === 'i8'
      ? new Int8Array(length).fill(77)
      : component === 'f16'
        ? new Uint16Array(length).fill(0x4000)
        : new Float32Array(length).fill(2);
  for (const { start, salt } of blocks) {
    for (let row = 0; row < rows; row++) {
      for (let k = 0; k < K; k++) {
        const value = valueAt(row + salt, k);
        data[start + row * stride + k] = component === 'f16' ? float16FromNumber(value) : value;
      }
    }
  }
  return data.buffer as ArrayBuffer;
}

/**
 * The dialect in which all products come out right; where there is none, the first product that stood in the way.
 *
 * @param products listed configurations
 */
export async function probeMatrixDialect(
  device: GPUDevice,
  feature: string,
  products: readonly MatrixConfig[],
  lanes: number,
  subgroupId = false,
): Promise<{ readonly dialect?: MatrixDialect; readonly wrong?: MatrixConfig }> {
  const extension = MATRIX_FEATURES.find(([name]) => name === feature)?.[1] ?? '';
  let furthest = 0;
  for (const dialect of DIALECTS) {
    let right = 0;
    for (const product of products) {
      if (!(await isExact(device, matrixProbeKernel(product, extension, dialect, lanes, subgroupId), product))) break;
      right++;
    }
    if (right === products.length) return { dialect };
    furthest = Math.max(furthest, right);
  }
  const wrong = products[furthest];
  return wrong === undefined ? {} : { wrong };
}

/** Whether a probe's kernel gives the product of the probe's matrices. */
async function isExact(device: GPUDevice, code: string, product: MatrixConfig): Promise<boolean> {
  const { M, N, K, componentType, resultComponentType } = product;
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
    const left = rowsOf(componentType, M, K, K + GAP, [{ start: GAP, salt: LEFT_SALT }]);
    const blocks = Array.from({ length: SUBGROUPS }, (_, i) => ({
      start: (i + 1) * rightStart(product),
      salt: rightSalt(i),
    }));
    const right = rowsOf(componentType, N, K, K, blocks);
    const [lefts, rights] = [buffer(left.byteLength, storage), buffer(right.byteLength, storage)];
    const bytes = SUBGROUPS * M * N * (resultComponentType === 'f16' ? 2 : 4);
    const results = buffer(bytes, storage);
    const staging = buffer(bytes, GPU_BUFFER_USAGE.MAP_READ | GPU_BUFFER_USAGE.COPY_DST);
    device.queue.writeBuffer(lefts, 0, left);
    device.queue.writeBuffer(rights, 0, right);
    const encoder = device.createCommandEncoder();
    const pass = encoder.beginComputePass();
    pass.setPipeline(pipeline);
    const entries = [lefts, rights, results].map((bound, binding) => ({ binding, resource: { buffer: bound } }));
    pass.setBindGroup(0, device.createBindGroup({ layout: pipeline.getBindGroupLayout(0), entries }));
    pass.dispatchWorkgroups(1);
    pass.end();
    encoder.copyBufferToBuffer(results, 0, staging, 0, bytes);
    device.queue.submit([encoder.finish()]);
    await staging.mapAsync(GPU_MAP_READ);
    const mapped = staging.getMappedRange(0, bytes).slice(0);
    const actual =
      resultComponentType === 'f16'
        ? Float64Array.from(new Uint16Array(mapped), float16ToNumber)
        : Float64Array.from(resultComponentType === 'i32' ? new Int32Array(mapped) : new Float32Array(mapped));
    return actual.every((value, i) => {
      const [m, n] = [Math.floor(i / N) % M, i % N];
      const salt = rightSalt(Math.floor(i / (M * N)));
      let expected = 0;
      for (let k = 0; k < K; k++) expected += 2 * valueAt(m + LEFT_SALT, k) * valueAt(n + salt, k);
      return value === expected;
    });
  } catch {
    // A dialect that does not compile is not the device's.
    return false;
  } finally {
    for (const made of buffers) made.destroy();
  }
}
