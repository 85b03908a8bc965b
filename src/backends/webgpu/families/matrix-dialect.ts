/**
 * Finds out by value how a device's subgroup matrices are written: the extension is experimental, and implementations
 * have differed in syntax and in the unit of offsets, where a wrong reading is a fast wrong answer.
 */
import { float16FromNumber } from '../../../tensor/formats/float16.ts';
import { MATRIX_FEATURES, type MatrixConfig, type MatrixDialect } from '../capabilities.ts';
import {
  componentBytes,
  type MatrixMemory,
  type MatrixOperations,
  nativeMatrices,
  UNIT_BYTES,
  unitsOf,
  workgroupUnits,
} from '../kernels/matrix-operations.ts';
import { SUM_ORIGIN } from '../kernels/matrix-softmax.ts';
import { GPU_BUFFER_USAGE, GPU_MAP_READ } from '../tensor.ts';

const DIALECTS: readonly MatrixDialect[] = [
  { majorness: 'template', unit: 'elements' },
  { majorness: 'template', unit: 'components' },
  { majorness: 'argument', unit: 'components' },
  { majorness: 'argument', unit: 'elements' },
];

/** Subgroups of the probe's workgroup: each multiplies matrices of its own, as in the attention kernel. */
const SUBGROUPS = 2;

const LEFTS: MatrixMemory = { name: 'left_stage', element: 'vec4<u32>' };
const RIGHTS: MatrixMemory = { name: 'right_stage', element: 'vec4<u32>' };
const RESULTS: MatrixMemory = { name: 'result_stage', element: 'vec4<f32>' };

/**
 * A kernel that multiplies one left by one right matrix a subgroup in the memory of the attention kernel: rows with a
 * unit between them for P and for results, dense columns for K and V, constant strides, and offsets that depend on the
 * subgroup. INT8 sums begin at {@link SUM_ORIGIN}; float ones are stored, doubled, loaded, and stored again. Two words
 * lie beside the units, so that a driver that aligns those differently shows it, as does one whose subgroups are not
 * the threads that the kernel takes them for.
 */
export function matrixProbeKernel(product: MatrixConfig, operations: MatrixOperations, lanes: number): string {
  const { componentType, resultComponentType, K, M, N } = product;
  const units = unitsOf(componentType, K);
  const resultUnits = unitsOf(resultComponentType, N);
  const [leftStride, resultStride] = [units + 1, resultUnits + 1];
  const integer = resultComponentType === 'i32';
  const threads = SUBGROUPS * lanes;
  const at = `subgroup * ${M * resultStride}u + i / ${resultUnits}u * ${resultStride}u + i % ${resultUnits}u`;
  const eachUnit = (statement: string) =>
    `for (var i = lane; i < ${M * resultUnits}u; i += ${lanes}u) { let unit = result_stage[${at}]; ${statement} }`;
  const half = (two: string) =>
    `2.0 * unpack2x16float(bitcast<vec4<u32>>(unit).${two[0]}), 2.0 * unpack2x16float(bitcast<vec4<u32>>(unit).${two[1]})`;
  const doubled =
    resultComponentType === 'f16'
      ? `let low = vec4<f32>(${half('xy')}); let high = vec4<f32>(${half('zw')}); result_stage[${at}] = bitcast<vec4<f32>>(vec4<u32>(pack2x16float(low.xy), pack2x16float(low.zw), pack2x16float(high.xy), pack2x16float(high.zw)));`
      : `result_stage[${at}] = 2.0 * unit;`;
  const result = `subgroup * ${M * resultStride}u`;
  const storeResult = operations.storeResult(product, 'c', RESULTS, result, resultStride);
  const again = `${eachUnit(doubled)}
  workgroupBarrier();
  ${operations.loadResult(product, 'c', RESULTS, result, resultStride)}
  workgroupBarrier();
  ${storeResult}
  workgroupBarrier();`;
  const body = `
@compute @workgroup_size(${threads})
fn main(@builtin(local_invocation_index) t: u32) {
  let subgroup = t / ${lanes}u;
  let lane = t % ${lanes}u;
  for (var i = lane; i < ${M * units}u; i += ${lanes}u) { left_stage[subgroup * ${M * leftStride}u + i / ${units}u * ${leftStride}u + i % ${units}u] = lefts[subgroup * ${M * units}u + i]; }
  for (var i = lane; i < ${N * units}u; i += ${lanes}u) { right_stage[subgroup * ${N * units}u + i] = rights[subgroup * ${N * units}u + i]; }
  if (t == 0u) { atomicStore(&counters[1], 1u); }
  workgroupBarrier();
  ${operations.declareResult(product, 'c')}
  ${operations.fill(product, 'c', integer ? `${SUM_ORIGIN.bits}i` : '0.0')}
  ${operations.loadLeft(product, 'a', LEFTS, `subgroup * ${M * leftStride}u`, leftStride)}
  ${operations.loadRight(product, 'b', RIGHTS, `subgroup * ${N * units}u`, units)}
  ${operations.multiplyAccumulate(product, 'a', 'b', 'c')}
  ${storeResult}
  workgroupBarrier();
  ${integer ? '' : again}
  let once = f32(atomicLoad(&counters[1]));
  ${eachUnit(
    resultComponentType === 'f16'
      ? `let words = bitcast<vec4<u32>>(unit); let to = 2u * (subgroup * ${M * resultUnits}u + i); results[to] = once * vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y)); results[to + 1u] = once * vec4<f32>(unpack2x16float(words.z), unpack2x16float(words.w));`
      : `results[subgroup * ${M * resultUnits}u + i] = once * (unit${integer ? ` - ${SUM_ORIGIN.value}.0` : ''});`,
  )}
}`;
  const usesF16 = componentType === 'f16' || resultComponentType === 'f16';
  return `
enable subgroups;
${usesF16 && operations.enable !== '' ? 'enable f16;' : ''}
${operations.enable}
@group(0) @binding(0) var<storage, read> lefts: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> rights: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> results: array<vec4<f32>>;
var<workgroup> counters: array<atomic<u32>, 2>;
${workgroupUnits(LEFTS, SUBGROUPS * M * leftStride)}
${workgroupUnits(RIGHTS, SUBGROUPS * N * units)}
${workgroupUnits(RESULTS, SUBGROUPS * M * resultStride)}
${operations.declarations(threads)}
${body}`;
}

/** Small integers that depend on row and column, so that a misread matrix does not give the right product. */
const valueAt = (row: number, column: number) => ((row * 7 + column * 5 + row * column * 3) % 15) - 7;

/** Where the rows that a subgroup's matrices take from {@link valueAt} begin. */
const leftSalt = (subgroup: number) => 4 * subgroup;
const rightSalt = (subgroup: number) => 3 + 2 * subgroup;

/** Rows of K values for each subgroup, in bytes of the component's type. */
function rowsOf(component: string, rows: number, K: number, salt: (subgroup: number) => number): ArrayBuffer {
  const length = SUBGROUPS * rows * K;
  const data =
    component === 'i8'
      ? new Int8Array(length)
      : component === 'f16'
        ? new Uint16Array(length)
        : new Float32Array(length);
  for (let i = 0; i < length; i++) {
    const row = Math.floor(i / K);
    const value = valueAt((row % rows) + salt(Math.floor(row / rows)), i % K);
    data[i] = component === 'f16' ? float16FromNumber(value) : value;
  }
  return data.buffer as ArrayBuffer;
}

/** Where a trial of products ended. */
export interface MatrixTrial {
  /** The dialect in which all products come out right. */
  readonly dialect?: MatrixDialect;
  /** Without one: the first product that stood in the way. */
  readonly wrong?: MatrixConfig;
}

/**
 * The dialect in which all products come out right; where there is none, the first product that stood in the way.
 *
 * @param products listed configurations that fit units of 16 bytes
 * @param operationsIn how matrices are written in a dialect; default: in the extension
 */
export async function probeMatrixDialect(
  device: GPUDevice,
  feature: string,
  products: readonly MatrixConfig[],
  lanes: number,
  operationsIn?: (dialect: MatrixDialect) => MatrixOperations,
): Promise<MatrixTrial> {
  const extension = MATRIX_FEATURES.find(([name]) => name === feature)?.[1] ?? '';
  const operationsOf = operationsIn ?? ((dialect: MatrixDialect) => nativeMatrices(extension, dialect));
  let furthest = 0;
  for (const dialect of DIALECTS) {
    let right = 0;
    for (const product of products) {
      if (!(await isExact(device, matrixProbeKernel(product, operationsOf(dialect), lanes), product))) break;
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
    const made = device.createBuffer({
      label: 'sageattention matrix probe',
      size: Math.ceil(size / UNIT_BYTES) * UNIT_BYTES,
      usage,
    });
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
    const left = rowsOf(componentType, M, K, leftSalt);
    const right = rowsOf(componentType, N, K, rightSalt);
    const [lefts, rights] = [buffer(left.byteLength, storage), buffer(right.byteLength, storage)];
    const bytes = SUBGROUPS * M * N * componentBytes('f32');
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
    const actual = new Float32Array(staging.getMappedRange(0, bytes).slice(0));
    const times = resultComponentType === 'i32' ? 1 : 2;
    return actual.every((value, i) => {
      const subgroup = Math.floor(i / (M * N));
      const [m, n] = [Math.floor(i / N) % M, i % N];
      let expected = 0;
      for (let k = 0; k < K; k++) {
        expected += times * valueAt(m + leftSalt(subgroup), k) * valueAt(n + rightSalt(subgroup), k);
      }
      return value === expected;
    });
  } catch {
    // A dialect that does not compile is not the device's.
    return false;
  } finally {
    for (const made of buffers) made.destroy();
  }
}
