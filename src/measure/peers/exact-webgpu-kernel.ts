/**
 * Exact attention: FlashAttention (arXiv 2205.14135, with the loop order of 2307.08691) on the shader's own arithmetic
 * units, the peer that the quantized kernels are measured against.
 *
 * A workgroup owns `rows` queries and walks over the keys in tiles of `keys`. Its threads form a grid of `rowThreads` x
 * `colThreads`: each holds a register tile of scores and one of the output, both float32, and a running maximum and sum
 * of its rows. Operands stay in the type that they come in, float16 or float32, until they are multiplied; products and
 * sums are float32, as on matrix units. Values must be finite.
 */
import { params } from '../../backends/webgpu/kernels/layout.ts';
import { EXCLUDED, EXCLUDED_BELOW, range, roundUp } from '../../backends/webgpu/kernels/storage.ts';

/** Sizes and strategies of a kernel. `keys / colThreads` is a multiple of 4. */
export interface ExactShape {
  readonly rows: number;
  readonly keys: number;
  readonly rowThreads: number;
  readonly colThreads: number;
  /** Type of the tiles in workgroup memory. float16 takes half the room and a conversion each time it is read. */
  readonly tile: 'f16' | 'f32';
  /**
   * `shared`: K and V take turns in the same memory. `none`: nothing is staged but P, for devices with little memory.
   */
  readonly staging: 'separate' | 'shared' | 'none';
}

export interface ExactConfig extends ExactShape {
  /** Type of q, k, v and the output. */
  readonly component: 'f16' | 'f32';
  readonly headDim: number;
  readonly valueDim: number;
  /** Head dims, offsets and strides are multiples of 4 elements: operands are read by vectors. */
  readonly vectors: boolean;
  /** Row maxima and sums by shuffles: subgroups have at least `colThreads` lanes. */
  readonly subgroups: boolean;
  /** WGSL has `subgroup_id` (language feature): a thread's place does not rest on how lanes are numbered. */
  readonly subgroupId: boolean;
}

const OPERANDS = ['query', 'key', 'value', 'output'] as const;

/** Fields of the uniform parameters. Offsets and strides count elements; row i sees keys up to `i + upper`. */
export const EXACT_PARAMS = [
  ...['queryLength', 'keyLength', 'groupSize', 'upper', 'scoreScale'],
  ...OPERANDS.flatMap((name) => ['Offset', 'BatchStride', 'HeadStride', 'TokenStride'].map((part) => name + part)),
];

const bytesOf = (type: 'f16' | 'f32') => (type === 'f16' ? 2 : 4);
// A vector more than the contents: the same vector of neighbouring rows is then in other banks.
const rowVectors = (vectors: number) => vectors + 1;
const valueVectors = (valueDim: number, colThreads: number) => roundUp(Math.ceil(valueDim / 4), colThreads);

/** Bytes of workgroup memory that the kernel takes. */
export function exactWorkgroupBytes(shape: ExactShape, headDim: number, valueDim: number): number {
  const { rows, keys, colThreads, tile, staging } = shape;
  const vector = 4 * bytesOf(tile);
  const row = rowVectors(Math.ceil(headDim / 4)) * vector;
  const [keyTile, valueTile] = [keys * row, keys * valueVectors(valueDim, colThreads) * vector];
  const staged = { separate: keyTile + valueTile, shared: Math.max(keyTile, valueTile), none: 0 }[staging];
  return (staging === 'none' ? 0 : rows * row) + staged + rows * rowVectors(keys / 4) * 16 + rows * colThreads * 4;
}

/** Output registers (float32) of a thread. */
export const exactOutputRegisters = ({ rows, rowThreads, colThreads }: ExactShape, valueDim: number): number =>
  ((rows / rowThreads) * 4 * valueVectors(valueDim, colThreads)) / colThreads;

/** Row `i` and key `n` of a thread within the tile. */
const rowOf = ({ rowThreads }: ExactShape, i: number) => `(r + ${i * rowThreads}u)`;
const columnOf = ({ colThreads }: ExactShape, n: number) => `(c + ${n * colThreads}u)`;

/** Declarations and expressions by which a thread gets at q, k and v: from storage, or staged in workgroup memory. */
function operandAccess(config: ExactConfig) {
  const { rows, keys, rowThreads, colThreads, tile, staging, component, headDim, valueDim, vectors } = config;
  const threads = rowThreads * colThreads;
  const quads = Math.ceil(headDim / 4);
  const stride = rowVectors(quads);
  const valueQuads = valueVectors(valueDim, colThreads);
  const staged = staging !== 'none';

  /** `load_<name>(start, quad) -> vec4`: four channels of the token at element `start`; 0 beyond the last. */
  const loader = (name: string, binding: number, dim: number) => {
    const type = `vec4<${tile}>`;
    const [element, body] = vectors
      ? [
          `vec4<${component}>`,
          `${dim % (4 * colThreads) === 0 || name !== 'value' ? '' : `if (quad >= ${dim / 4}u) { return ${type}(); }\n  `}return ${type}(${name}s[start / 4u + quad]);`,
        ]
      : [
          component,
          `var x: ${type};
  for (var e = 0u; e < 4u; e++) { if (4u * quad + e < ${dim}u) { x[e] = ${tile}(${name}s[start + 4u * quad + e]); } }
  return x;`,
        ];
    return `@group(0) @binding(${binding}) var<storage, read> ${name}s: array<${element}>;
fn load_${name}(start: u32, quad: u32) -> ${type} {
  ${body}
}`;
  };

  const tileArray = (name: string, size: number) => `var<workgroup> ${name}: array<vec4<${tile}>, ${size}>;`;
  const [keyTile, valueTile] = staging === 'shared' ? ['tile_kv', 'tile_kv'] : ['tile_k', 'tile_v'];
  const memory = !staged
    ? ''
    : `${tileArray('tile_q', rows * stride)}
${staging === 'shared' ? tileArray('tile_kv', Math.max(keys * stride, keys * valueQuads)) : `${tileArray('tile_k', keys * stride)}\n${tileArray('tile_v', keys * valueQuads)}`}`;

  const token = (name: string, index: string) => `(${name}_base + ${index} * P.${name}TokenStride)`;
  const lastKey = (index: string) => `min(${index}, P.keyLength - 1u)`;
  const stage = (to: string, width: number, toStride: number, count: number, value: string) =>
    `for (var i = t; i < ${count * width}u; i += ${threads}u) { let y = i / ${width}u; let x = i % ${width}u; ${to}[y * ${toStride}u + x] = ${value}; }`;
  const stageQueries = stage(
    'tile_q',
    quads,
    stride,
    rows,
    `load_query(${token('query', 'min(first_row + y, P.queryLength - 1u)')}, x)`,
  );
  const stageKeys = stage(keyTile, quads, stride, keys, `load_key(${token('key', lastKey('start + y'))}, x)`);
  // Weights of keys beyond the last are 0, and their values must be set to 0 too: anything may lie there.
  const valueAt = (key: string, quad: string) =>
    `select(vec4<${tile}>(), load_value(${token('value', lastKey(key))}, ${quad}), ${key} < P.keyLength)`;
  const stageValues = stage(valueTile, valueQuads, valueQuads, keys, valueAt('(start + y)', 'x'));

  const query = (i: number) =>
    staged
      ? `tile_q[${rowOf(config, i)} * ${stride}u + w]`
      : `load_query(${token('query', `min(first_row + ${rowOf(config, i)}, P.queryLength - 1u)`)}, w)`;
  const key = (n: number) =>
    staged
      ? `${keyTile}[${columnOf(config, n)} * ${stride}u + w]`
      : `load_key(${token('key', lastKey(`(start + ${columnOf(config, n)})`))}, w)`;
  const value = (v: number) =>
    staged
      ? `${valueTile}[key * ${valueQuads}u + c + ${v * colThreads}u]`
      : valueAt('(start + key)', `c + ${v * colThreads}u`);

  const loaders = [loader('query', 1, headDim), loader('key', 2, headDim), loader('value', 3, valueDim)].join('\n');
  return { loaders, memory, stageQueries, stageKeys, stageValues, query, key, value };
}

export function exactAttentionKernel(config: ExactConfig): string {
  const { rows, keys, rowThreads, colThreads, tile, staging, component, headDim, valueDim, vectors } = config;
  const { subgroups, subgroupId } = config;
  const threads = rowThreads * colThreads;
  const quads = Math.ceil(headDim / 4);
  const valueQuads = valueVectors(valueDim, colThreads);
  const probabilityStride = rowVectors(keys / 4);
  const staged = staging !== 'none';
  const [tm, tn, tv] = [rows / rowThreads, keys / colThreads, valueQuads / colThreads];
  const [I, N, V] = [range(tm), range(tn), range(tv)];
  const { loaders, memory, stageQueries, stageKeys, stageValues, query, key, value } = operandAccess(config);
  const row = (i: number) => rowOf(config, i);
  const column = (n: number) => columnOf(config, n);
  const float = tile === 'f32' ? (x: string) => x : (x: string) => `vec4<f32>(${x})`;

  const multiply = (i: number, n: number) =>
    `s_${i}_${n} = fma(q_${i}.x, k.x, s_${i}_${n}); s_${i}_${n} = fma(q_${i}.y, k.y, s_${i}_${n}); s_${i}_${n} = fma(q_${i}.z, k.z, s_${i}_${n}); s_${i}_${n} = fma(q_${i}.w, k.w, s_${i}_${n});`;

  /** Combines `name_i` over the threads of a row, by shuffles or through workgroup memory. */
  const shuffle = (variable: string, combine: (a: string, b: string) => string) =>
    range(Math.log2(colThreads))
      .map((s) => `${variable} = ${combine(variable, `subgroupShuffleXor(${variable}, ${1 << s}u)`)};`)
      .join(' ');
  const gathered = (i: number, combine: (a: string, b: string) => string) =>
    range(colThreads)
      .map((n) => `exchange[${row(i)} * ${colThreads}u + ${n}u]`)
      .reduce(combine);
  const exchange = (name: string, combine: (a: string, b: string) => string) =>
    subgroups
      ? I.map((i) => shuffle(`${name}_${i}`, combine)).join('\n    ')
      : `${I.map((i) => `exchange[${row(i)} * ${colThreads}u + c] = ${name}_${i};`).join(' ')}
    workgroupBarrier();
    ${I.map((i) => `${name}_${i} = ${gathered(i, combine)};`).join('\n    ')}`;
  const maximum = (a: string, b: string) => `max(${a}, ${b})`;

  const softmax = (i: number) => `
    { let updated = max(m_${i}, tile_m_${i});
      let alpha = select(exp2(m_${i} - updated), 0.0, m_${i} < ${EXCLUDED_BELOW});
      m_${i} = updated;
      l_${i} *= alpha;
      ${V.map((v) => `o_${i}_${v} *= alpha;`).join(' ')}
      ${N.map((n) => `s_${i}_${n} = select(exp2(s_${i}_${n} - updated), 0.0, s_${i}_${n} < ${EXCLUDED_BELOW});`).join('\n      ')}
      l_${i} += ${N.map((n) => `s_${i}_${n}`).join(' + ')};
      ${range(tn / 4)
        .map(
          (q) =>
            `tile_p[${row(i)} * ${probabilityStride}u + ${q * colThreads}u + c] = vec4<f32>(${range(4)
              .map((n) => `s_${i}_${q * 4 + n}`)
              .join(', ')});`,
        )
        .join(' ')} }`;

  const finish = (i: number) => `
  if (first_row + ${row(i)} < P.queryLength) {
    let norm = select(1.0 / max(l_${i}, 1.0e-37f), 0.0, l_${i} == 0.0);
    let at = P.outputOffset + group.z * P.outputBatchStride + group.y * P.outputHeadStride + (first_row + ${row(i)}) * P.outputTokenStride;
    ${V.map((v) => {
      const quad = `(c + ${v * colThreads}u)`;
      return vectors
        ? `if (${quad} < ${valueDim / 4}u) { outputs[at / 4u + ${quad}] = vec4<${component}>(o_${i}_${v} * norm); }`
        : `for (var e = 0u; e < 4u; e++) { if (4u * ${quad} + e < ${valueDim}u) { outputs[at + 4u * ${quad} + e] = ${component}(o_${i}_${v}[e] * norm); } }`;
    }).join('\n    ')}
  }`;

  const builtins = subgroups
    ? `, @builtin(subgroup_size) lanes: u32, @builtin(subgroup_invocation_id) lane: u32${subgroupId ? ', @builtin(subgroup_id) subgroup: u32' : ''}`
    : '';
  return `
${component === 'f16' ? 'enable f16;' : ''}
${subgroups ? 'enable subgroups;' : ''}
${subgroups && subgroupId ? 'requires subgroup_id;' : ''}
${params(0, EXACT_PARAMS)}
${loaders}
@group(0) @binding(4) var<storage, read_write> outputs: array<${vectors ? `vec4<${component}>` : component}>;
${memory}
var<workgroup> tile_p: array<vec4<f32>, ${rows * probabilityStride}>;
${subgroups ? '' : `var<workgroup> exchange: array<f32, ${rows * colThreads}>;`}

@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) lid: u32${builtins}) {
  let t = ${subgroups && subgroupId ? 'subgroup * lanes + lane' : 'lid'};
  let r = t / ${colThreads}u;
  let c = t % ${colThreads}u;
  // Last rows first: under a causal mask they take longest.
  let first_row = (groups.x - 1u - group.x) * ${rows}u;
  let query_base = P.queryOffset + group.z * P.queryBatchStride + group.y * P.queryHeadStride;
  let key_base = P.keyOffset + group.z * P.keyBatchStride + group.y / P.groupSize * P.keyHeadStride;
  let value_base = P.valueOffset + group.z * P.valueBatchStride + group.y / P.groupSize * P.valueHeadStride;
  let upper = i32(P.upper) + i32(first_row);
  let key_end = u32(clamp(upper + ${rows}, 0, i32(P.keyLength)));
  ${staged ? stageQueries : ''}
  ${I.map((i) => `var m_${i} = ${EXCLUDED}; var l_${i} = 0.0; ${V.map((v) => `var o_${i}_${v} = vec4<f32>();`).join(' ')}`).join('\n  ')}

  for (var start = 0u; start < key_end; start += ${keys}u) {
    ${staged ? `workgroupBarrier();\n    ${stageKeys}\n    ${staging === 'separate' ? stageValues : ''}\n    workgroupBarrier();` : 'workgroupBarrier();'}
    ${I.map((i) => N.map((n) => `var s_${i}_${n} = 0.0;`).join(' ')).join('\n    ')}
    for (var w = 0u; w < ${quads}u; w++) {
      ${I.map((i) => `let q_${i} = ${float(query(i))};`).join('\n      ')}
      ${N.map((n) => `{ let k = ${float(key(n))}; ${I.map((i) => multiply(i, n)).join('\n        ')} }`).join('\n      ')}
    }
    ${I.map((i) => N.map((n) => `s_${i}_${n} *= P.scoreScale;`).join(' ')).join('\n    ')}
    if (start + ${keys}u > P.keyLength || i32(start) + ${keys - 1} > upper) {
      ${N.map((n) => `{ let key = start + ${column(n)}; ${I.map((i) => `if (key >= P.keyLength || i32(key) > upper + i32(${row(i)})) { s_${i}_${n} = ${EXCLUDED}; }`).join(' ')} }`).join('\n      ')}
    }
    ${I.map((i) => `var tile_m_${i} = ${N.map((n) => `s_${i}_${n}`).reduce(maximum)};`).join('\n    ')}
    ${exchange('tile_m', maximum)}
    ${staging !== 'shared' ? '' : `${subgroups ? 'workgroupBarrier();' : ''}\n    ${stageValues}`}
    ${I.map(softmax).join('')}
    workgroupBarrier();
    // Component n of P's vector q * ${colThreads} + x is key x + (4 q + n) * ${colThreads}: a thread writes whole
    // vectors.
    for (var at = 0u; at < ${keys / 4}u; at++) {
      let first_key = at / ${colThreads}u * ${4 * colThreads}u + at % ${colThreads}u;
      ${I.map((i) => `let p_${i} = tile_p[${row(i)} * ${probabilityStride}u + at];`).join('\n      ')}
      ${range(4)
        .map(
          (n) => `{ let key = first_key + ${n * colThreads}u;
        ${V.map((v) => `{ let x = ${float(value(v))}; ${I.map((i) => `o_${i}_${v} = fma(vec4<f32>(p_${i}.${'xyzw'[n]}), x, o_${i}_${v});`).join(' ')} }`).join('\n        ')} }`,
        )
        .join('\n      ')}
    }
  }
  ${subgroups ? '' : 'workgroupBarrier();'}
  ${exchange('l', (a, b) => `${a} + ${b}`)}
${I.map(finish).join('')}
}`;
}
