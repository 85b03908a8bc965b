/**
 * Subgroup matrices as the attention kernel writes them, in two forms: the WGSL extension, and plain WGSL that computes
 * the same (`emulated`), so that everything around the matrix operations can be run on devices without them.
 *
 * An emulated left or right matrix is a reference to memory, read when it is multiplied: that memory must not
 * change in between. An emulated result is an array, of which each lane holds M * N / lanes elements.
 */
import type { MatrixConfig, MatrixDialect } from '../capabilities.ts';

/** An array in workgroup or storage memory that matrices are loaded from and stored to. */
export interface MatrixMemory {
  readonly name: string;
  /** Added to every offset; an expression in components. Default: 0. */
  readonly base?: string;
  /** Component type of the matrices; `i8` lies packed in an `array<i32>`. */
  readonly component: 'i8' | 'i32' | 'f16' | 'f32';
}

/**
 * Declares an array in the workgroup memory of a kernel with matrices: at least `elements` of them, and a multiple of
 * 16 bytes long, so that whatever lies behind it is aligned as matrices must be.
 */
export function workgroupArray(name: string, type: string, elements: number, bytes: number): string {
  const perVector = 16 / bytes;
  return `var<workgroup> ${name}: array<${type}, ${Math.ceil(elements / perVector) * perVector}>;`;
}

/** A loaded operand: a WGSL name, and where it came from. */
export interface Operand {
  readonly name: string;
  readonly memory: MatrixMemory;
  readonly columnMajor: boolean;
}

export interface MatrixOperations {
  readonly enable: string;
  /** Functions that the statements call. */
  declarations(): string;
  /** `var name = 0`, a result of the product. */
  declareResult(product: MatrixConfig, name: string): string;
  clear(product: MatrixConfig, name: string): string;
  /** Offsets and strides count components. */
  loadLeft(
    product: MatrixConfig,
    name: string,
    memory: MatrixMemory,
    offset: string,
    stride: string,
  ): [string, Operand];
  loadRight(
    product: MatrixConfig,
    name: string,
    memory: MatrixMemory,
    offset: string,
    stride: string,
    columnMajor: boolean,
  ): [string, Operand];
  multiplyAccumulate(product: MatrixConfig, left: Operand, right: Operand, result: string): string;
  storeResult(product: MatrixConfig, result: string, memory: MatrixMemory, offset: string, stride: string): string;
  loadResult(product: MatrixConfig, result: string, memory: MatrixMemory, offset: string, stride: string): string;
}

const offsetIn = ({ base }: MatrixMemory, offset: string) => (base === undefined ? offset : `${base} + ${offset}`);

const majorness = (columnMajor: boolean) => (columnMajor ? 'col_major' : 'row_major');

/** @param extension the WGSL extension's name, as the device's feature calls it */
export function nativeMatrices(extension: string, dialect: MatrixDialect): MatrixOperations {
  const left = ({ componentType, K, M }: MatrixConfig) => `subgroup_matrix_left<${componentType}, ${K}, ${M}>`;
  const right = ({ componentType, N, K }: MatrixConfig) => `subgroup_matrix_right<${componentType}, ${N}, ${K}>`;
  const result = ({ resultComponentType, N, M }: MatrixConfig) =>
    `subgroup_matrix_result<${resultComponentType}, ${N}, ${M}>`;
  const units = ({ component }: MatrixMemory, n: string) =>
    component === 'i8' && dialect.packedUnit === 'words' ? `(${n}) / 4u` : n;
  const template = dialect.majorness === 'template';
  const load = (type: string, memory: MatrixMemory, offset: string, stride: string, columnMajor: boolean) => {
    const [at, step] = [units(memory, offsetIn(memory, offset)), units(memory, stride)];
    return template
      ? `subgroupMatrixLoad<${type}, ${majorness(columnMajor)}>(&${memory.name}, ${at}, ${step})`
      : `subgroupMatrixLoad<${type}>(&${memory.name}, ${at}, ${columnMajor}, ${step})`;
  };
  return {
    enable: `enable ${extension};`,
    declarations: () => '',
    declareResult: (product, name) => `var ${name}: ${result(product)};`,
    clear: (product, name) => `${name} = ${result(product)}();`,
    loadLeft: (product, name, memory, offset, stride) => [
      `let ${name} = ${load(left(product), memory, offset, stride, false)};`,
      { name, memory, columnMajor: false },
    ],
    loadRight: (product, name, memory, offset, stride, columnMajor) => [
      `let ${name} = ${load(right(product), memory, offset, stride, columnMajor)};`,
      { name, memory, columnMajor },
    ],
    multiplyAccumulate: (_, a, b, c) => `${c} = subgroupMatrixMultiplyAccumulate(${a.name}, ${b.name}, ${c});`,
    storeResult: (_, name, to, offset, stride) =>
      template
        ? `subgroupMatrixStore<row_major>(&${to.name}, ${offsetIn(to, offset)}, ${name}, ${stride});`
        : `subgroupMatrixStore(&${to.name}, ${offsetIn(to, offset)}, ${name}, false, ${stride});`,
    loadResult: (product, name, memory, offset, stride) =>
      `${name} = ${load(result(product), memory, offset, stride, false)};`,
  };
}

/** @param lanes lanes of an emulated subgroup; the kernel has a variable `lane` */
export function emulatedMatrices(lanes: number): MatrixOperations {
  const functions = new Map<string, string>();
  const elements = ({ M, N }: MatrixConfig) => {
    if ((M * N) % lanes !== 0) throw new Error(`a ${M}x${N} result cannot be divided among ${lanes} lanes`);
    return (M * N) / lanes;
  };
  const resultType = (product: MatrixConfig) => `array<${product.resultComponentType}, ${elements(product)}>`;
  const reader = ({ name, component }: MatrixMemory): string => {
    const body =
      component === 'i8'
        ? `let word = ${name}[i >> 2u]; return extractBits(word, (i & 3u) * 8u, 8u);`
        : component === 'f16'
          ? `return f32(${name}[i]);`
          : `return ${name}[i];`;
    const type = component === 'i8' || component === 'i32' ? 'i32' : 'f32';
    functions.set(`read_${name}`, `fn read_${name}(i: u32) -> ${type} { ${body} }`);
    return `read_${name}`;
  };
  const reference = (name: string, memory: MatrixMemory, offset: string, stride: string) =>
    `let ${name} = vec2<u32>(${offsetIn(memory, offset)}, ${stride});`;
  return {
    enable: '',
    declarations: () => [...functions.values()].join('\n'),
    declareResult: (product, name) => `var ${name}: ${resultType(product)};`,
    clear: (product, name) => `${name} = ${resultType(product)}();`,
    loadLeft: (_, name, memory, offset, stride) => [
      reference(name, memory, offset, stride),
      { name, memory, columnMajor: false },
    ],
    loadRight: (_, name, memory, offset, stride, columnMajor) => [
      reference(name, memory, offset, stride),
      { name, memory, columnMajor },
    ],
    multiplyAccumulate(product, a, b, c) {
      const name = `multiply_${a.memory.name}_${b.memory.name}`;
      const { resultComponentType, N, K } = product;
      const sum = resultComponentType === 'i32' ? 'i32' : 'f32';
      const at = b.columnMajor ? 'right.x + n * right.y + k' : 'right.x + k * right.y + n';
      functions.set(
        name,
        `fn ${name}(left: vec2<u32>, right: vec2<u32>, result: ptr<function, ${resultType(product)}>, lane: u32) {
  for (var e = 0u; e < ${elements(product)}u; e++) {
    let at = lane * ${elements(product)}u + e;
    let m = at / ${N}u;
    let n = at % ${N}u;
    var sum = ${sum}((*result)[e]);
    for (var k = 0u; k < ${K}u; k++) { sum += ${sum}(${reader(a.memory)}(left.x + m * left.y + k)) * ${sum}(${reader(b.memory)}(${at})); }
    (*result)[e] = ${resultComponentType}(sum);
  }
}`,
      );
      return `${name}(${a.name}, ${b.name}, &${c}, lane);`;
    },
    storeResult: (product, name, memory, offset, stride) =>
      `for (var e = 0u; e < ${elements(product)}u; e++) { let at = lane * ${elements(product)}u + e; ${memory.name}[${offsetIn(memory, offset)} + at / ${product.N}u * ${stride} + at % ${product.N}u] = ${name}[e]; }`,
    loadResult: (product, name, memory, offset, stride) =>
      `for (var e = 0u; e < ${elements(product)}u; e++) { let at = lane * ${elements(product)}u + e; ${name}[e] = ${memory.name}[${offsetIn(memory, offset)} + at / ${product.N}u * ${stride} + at % ${product.N}u]; }`,
  };
}
