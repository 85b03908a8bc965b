/**
 * Subgroup matrices as the attention kernel writes them, in two forms: the WGSL extension, and plain WGSL that computes
 * the same (`emulated`), so that everything around the matrix operations can be run on devices without them.
 *
 * Matrices come from workgroup memory alone, and from arrays of four 32-bit words alone. Drivers read matrices 16 bytes
 * at a time once offset and stride are constants, and nothing aligns an array of scalars to that: on an H200 one came
 * back shifted by 8 bytes, behind an array of two words (Vulkan asks for it: VUID-RuntimeSpirv-
 * OpCooperativeMatrixLoadKHR-08986). Offsets and strides here count units of 16 bytes.
 *
 * An emulated left or right matrix is a reference to memory, read when it is multiplied: that memory must not change in
 * between. One that is held is a copy of the row that a lane needs. An emulated result is an array, of which each lane
 * has `M * N / lanes` elements of one row.
 */
import type { MatrixConfig, MatrixDialect } from '../capabilities.ts';
import { range } from './storage.ts';

/** Bytes of a unit of workgroup memory. */
export const UNIT_BYTES = 16;

/** An array in workgroup memory. */
export interface MatrixMemory {
  readonly name: string;
  readonly element: 'vec4<f32>' | 'vec4<u32>';
}

/** Bytes of one component of a matrix. */
export const componentBytes = (component: string): number => (component === 'i8' ? 1 : component === 'f16' ? 2 : 4);

/** Units of `components` components that follow one another. */
export const unitsOf = (component: string, components: number): number =>
  (components * componentBytes(component)) / UNIT_BYTES;

export interface MatrixOperations {
  readonly enable: string;
  /** Workgroup memory and functions that the statements use. */
  declarations(threads: number): string;
  /** Bytes of that workgroup memory. */
  workgroupBytes(threads: number): number;
  /** `var name`, a result of the product; 0. */
  declareResult(product: MatrixConfig, name: string): string;
  /** @param value a literal of the result's type */
  fill(product: MatrixConfig, name: string, value: string): string;
  /** A left matrix in rows. */
  loadLeft(product: MatrixConfig, name: string, memory: MatrixMemory, offset: string, stride: number): string;
  /** A left matrix whose memory is overwritten before it is multiplied. */
  holdLeft(product: MatrixConfig, name: string, memory: MatrixMemory, offset: string, stride: number): string;
  /** A right matrix in columns. */
  loadRight(product: MatrixConfig, name: string, memory: MatrixMemory, offset: string, stride: number): string;
  /** A right matrix in rows; of 16-bit components. */
  loadRightRows(product: MatrixConfig, name: string, memory: MatrixMemory, offset: string, stride: number): string;
  multiplyAccumulate(product: MatrixConfig, left: string, right: string, result: string): string;
  storeResult(product: MatrixConfig, result: string, memory: MatrixMemory, offset: string, stride: number): string;
  loadResult(product: MatrixConfig, result: string, memory: MatrixMemory, offset: string, stride: number): string;
  /** `x` becomes the larger, or the sum, of the values that this lane and lane `lane ^ mask` have; in uniform flow. */
  shuffleMax(x: string, mask: number): string;
  shuffleAdd(x: string, mask: number): string;
}

/** @param extension the WGSL extension's name, as the device's feature calls it */
export function nativeMatrices(extension: string, dialect: MatrixDialect): MatrixOperations {
  const left = ({ componentType, K, M }: MatrixConfig) => `subgroup_matrix_left<${componentType}, ${K}, ${M}>`;
  const right = ({ componentType, N, K }: MatrixConfig) => `subgroup_matrix_right<${componentType}, ${N}, ${K}>`;
  const result = ({ resultComponentType, N, M }: MatrixConfig) =>
    `subgroup_matrix_result<${resultComponentType}, ${N}, ${M}>`;
  const factorOf = (component: string) => (dialect.unit === 'elements' ? 1 : UNIT_BYTES / componentBytes(component));
  const place = (component: string, offset: string, stride: number): readonly [string, string] => {
    const factor = factorOf(component);
    return factor === 1 ? [offset, `${stride}u`] : [`(${offset}) * ${factor}u`, `${stride * factor}u`];
  };
  const template = dialect.majorness === 'template';
  const load = (
    type: string,
    component: string,
    memory: MatrixMemory,
    at: readonly [offset: string, stride: number],
    columnMajor: boolean,
  ) => {
    const [offset, stride] = place(component, ...at);
    return template
      ? `subgroupMatrixLoad<${type}, ${columnMajor ? 'col_major' : 'row_major'}>(&${memory.name}, ${offset}, ${stride})`
      : `subgroupMatrixLoad<${type}>(&${memory.name}, ${offset}, ${columnMajor}, ${stride})`;
  };
  const loadLeft: MatrixOperations['loadLeft'] = (product, name, memory, offset, stride) =>
    `let ${name} = ${load(left(product), product.componentType, memory, [offset, stride], false)};`;
  return {
    enable: `enable ${extension};
diagnostic(off, ${extension.includes('chromium') ? 'chromium.' : ''}subgroup_matrix_uniformity);`,
    declarations: () => '',
    workgroupBytes: () => 0,
    declareResult: (product, name) => `var ${name}: ${result(product)};`,
    fill: (product, name, value) => `${name} = ${result(product)}(${value});`,
    loadLeft,
    holdLeft: loadLeft,
    loadRight: (product, name, memory, offset, stride) =>
      `let ${name} = ${load(right(product), product.componentType, memory, [offset, stride], true)};`,
    loadRightRows: (product, name, memory, offset, stride) =>
      `let ${name} = ${load(right(product), product.componentType, memory, [offset, stride], false)};`,
    multiplyAccumulate: (_, a, b, c) => `${c} = subgroupMatrixMultiplyAccumulate(${a}, ${b}, ${c});`,
    storeResult: (product, name, memory, ...at) => {
      const [offset, stride] = place(product.resultComponentType, ...at);
      return template
        ? `subgroupMatrixStore<row_major>(&${memory.name}, ${offset}, ${name}, ${stride});`
        : `subgroupMatrixStore(&${memory.name}, ${offset}, ${name}, false, ${stride});`;
    },
    loadResult: (product, name, memory, offset, stride) =>
      `${name} = ${load(result(product), product.resultComponentType, memory, [offset, stride], false)};`,
    shuffleMax: (x, mask) => `${x} = max(${x}, subgroupShuffleXor(${x}, ${mask}u));`,
    shuffleAdd: (x, mask) => `${x} += subgroupShuffleXor(${x}, ${mask}u);`,
  };
}

/** A component out of a unit's word, as i32 or f32. */
const DECODED: Readonly<Record<string, string>> = {
  i8: 'extractBits(bitcast<i32>(word), c % 4u * 8u, 8u)',
  f16: 'unpack2x16float(word)[c % 2u]',
  f32: 'bitcast<f32>(word)',
};

/** @param lanes lanes of an emulated subgroup; the kernel has variables `lane` and `t` */
export function emulatedMatrices(lanes: number): MatrixOperations {
  const functions = new Map<string, string>();
  /** Where each loaded matrix is, or that it is held. */
  const origins = new Map<string, MatrixMemory | 'held'>();
  /** Right matrices that lie in rows. */
  const inRows = new Set<string>();
  const typeOf = (component: string) => (component === 'i8' || component === 'i32' ? 'i32' : 'f32');
  const elements = ({ M, N }: MatrixConfig) => {
    const count = (M * N) / lanes;
    if (N % count !== 0) throw new Error(`a ${M}x${N} result cannot be divided among ${lanes} lanes`);
    return count;
  };
  const resultType = (product: MatrixConfig) => `array<${typeOf(product.resultComponentType)}, ${elements(product)}>`;
  const reader = (component: string, { name }: MatrixMemory): string => {
    const perUnit = UNIT_BYTES / componentBytes(component);
    const call = `read_${component}_${name}`;
    functions.set(
      call,
      `fn ${call}(unit: u32, c: u32) -> ${typeOf(component)} { let word = bitcast<u32>(${name}[unit + c / ${perUnit}u][c % ${perUnit}u / ${perUnit / 4}u]); return ${DECODED[component]}; }`,
    );
    return call;
  };
  const reference: MatrixOperations['loadLeft'] = (_, name, memory, offset, stride) => {
    origins.set(name, memory);
    return `let ${name} = vec2<u32>(${offset}, ${stride}u);`;
  };
  const inWords = (memory: MatrixMemory, value: string) =>
    memory.element === 'vec4<u32>' ? `bitcast<u32>(${value})` : `bitcast<f32>(${value})`;
  /** A loop over the words of a lane's elements, of which `e` is the first in a word. */
  const eachWord = (product: MatrixConfig, offset: string, stride: number, statement: (place: string) => string) => {
    const perWord = 4 / componentBytes(product.resultComponentType);
    const [count, row] = [elements(product), product.N];
    return `for (var e = 0u; e < ${count}u; e += ${perWord}u) { let at = lane * ${count}u + e; ${statement(`[${offset} + at / ${row}u * ${stride}u + at % ${row}u / ${4 * perWord}u][at % ${4 * perWord}u / ${perWord}u]`)} }`;
  };
  const exchange = (x: string, mask: number, combined: string) =>
    `exchange[t] = ${x}; workgroupBarrier(); { let other = exchange[t ^ ${mask}u]; ${x} = ${combined}; } workgroupBarrier();`;
  return {
    enable: '',
    declarations: (threads) => [`var<workgroup> exchange: array<f32, ${threads}>;`, ...functions.values()].join('\n'),
    workgroupBytes: (threads) => 4 * threads,
    declareResult: (product, name) => `var ${name}: ${resultType(product)};`,
    fill: (product, name, value) => `for (var e = 0u; e < ${elements(product)}u; e++) { ${name}[e] = ${value}; }`,
    loadLeft: reference,
    holdLeft(product, name, memory, offset, stride) {
      origins.set(name, 'held');
      const { componentType, N, K } = product;
      return `var ${name}: array<${typeOf(componentType)}, ${K}>;
    for (var c = 0u; c < ${K}u; c++) { ${name}[c] = ${reader(componentType, memory)}(${offset} + lane * ${elements(product)}u / ${N}u * ${stride}u, c); }`;
    },
    loadRight: (...given) => {
      inRows.delete(given[1]);
      return reference(...given);
    },
    loadRightRows: (...given) => {
      inRows.add(given[1]);
      return reference(...given);
    },
    multiplyAccumulate(product, a, b, c) {
      const [left, right] = [origins.get(a), origins.get(b)];
      if (left === undefined || right === undefined || right === 'held') throw new Error(`${a} or ${b} is not loaded`);
      const { componentType, N, K } = product;
      const held = left === 'held';
      const rows = inRows.has(b);
      const element = rows ? `right.x + k * right.y, at % ${N}u` : `right.x + at % ${N}u * right.y, k`;
      const name = `multiply_${componentType}_${held ? 'held' : left.name}_${right.name}${rows ? '_rows' : ''}`;
      const operand = held ? '(*left)[k]' : `${reader(componentType, left)}(left.x + at / ${N}u * left.y, k)`;
      functions.set(
        name,
        `fn ${name}(left: ${held ? `ptr<function, array<${typeOf(componentType)}, ${K}>>` : 'vec2<u32>'}, right: vec2<u32>, result: ptr<function, ${resultType(product)}>, lane: u32) {
  for (var e = 0u; e < ${elements(product)}u; e++) {
    let at = lane * ${elements(product)}u + e;
    var sum = (*result)[e];
    for (var k = 0u; k < ${K}u; k++) { sum += ${operand} * ${reader(componentType, right)}(${element}); }
    (*result)[e] = sum;
  }
}`,
      );
      return `${name}(${held ? '&' : ''}${a}, ${b}, &${c}, lane);`;
    },
    storeResult: (product, name, memory, offset, stride) =>
      eachWord(product, offset, stride, (place) => {
        const packed =
          product.resultComponentType === 'f16'
            ? `pack2x16float(vec2<f32>(${name}[e], ${name}[e + 1u]))`
            : `${name}[e]`;
        return `${memory.name}${place} = ${inWords(memory, packed)};`;
      }),
    loadResult: (product, name, memory, offset, stride) =>
      eachWord(product, offset, stride, (place) =>
        product.resultComponentType === 'f16'
          ? `let pair = unpack2x16float(bitcast<u32>(${memory.name}${place})); ${name}[e] = pair.x; ${name}[e + 1u] = pair.y;`
          : `${name}[e] = bitcast<${typeOf(product.resultComponentType)}>(${memory.name}${place});`,
      ),
    shuffleMax: (x, mask) => exchange(x, mask, `max(${x}, other)`),
    shuffleAdd: (x, mask) => exchange(x, mask, `${x} + other`),
  };
}

/** Declares an array of units in workgroup memory. */
export const workgroupUnits = ({ name, element }: MatrixMemory, units: number): string =>
  `var<workgroup> ${name}: array<${element}, ${units}>;`;

/** Names of the matrices of a grid, row by row. */
export const grid = (name: string, rows: number, columns: number): readonly (readonly string[])[] =>
  range(rows).map((row) => range(columns).map((column) => `${name}_${row}_${column}`));
