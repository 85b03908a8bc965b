/**
 * Which blocks of scores a call computes: means of blocks of rows, how much alike their rows are, and the choice.
 *
 * A pooled line is the mean of a block's rows, then a vector of its own facts: the mean cosine of all pairs of its rows, and 1 where
 * some element was not finite. Such a block's scores say nothing, and it is computed in any case.
 *
 * @see SpargeAttn, arXiv 2502.18137, section 3; `chooseBlocks` of src/attention/block-choice.ts says the same in TypeScript
 */
import type { DType, MaskDType } from '../../../tensor/dtype.ts';
import { MASK_PARAMS, OWN_TILE, padDim, params, SEQUENCE, SEQUENCE_WORDS, tables } from './layout.ts';
import { type Access, decoder, maskLoader, NONFINITE, operandLoader, range } from './storage.ts';
import { HIDDEN_BELOW } from './visible-keys.ts';

/** Vectors of a pooled line. */
export const pooledVectors = (headDim: number): number => padDim(headDim) / 4 + 1;

const THREADS = 128;

export interface PoolConfig {
  readonly dtype: DType;
  readonly access: Access;
  readonly headDim: number;
  readonly operand: 'q' | 'k';
  readonly similarities: boolean;
  /** Rows are compared after a mean was subtracted: a second pass, over means that a first one left. */
  readonly shifted: boolean;
}

export const POOL_PARAMS = [
  'tileStart',
  'headStart',
  'sequencesAt',
  'tilesAt',
  'headStride',
  'tokenStride',
  'sourceBase',
  'sequences',
  'blocks',
  'blockRows',
  'pooledBase',
  'meanBase',
] as const;

/** Bindings: 1 tables, 2 the operand, 3 pooled lines, 4 the mean to subtract. */
export function poolKernel({ dtype, access, headDim, operand, similarities, shifted }: PoolConfig): string {
  const padded = padDim(headDim);
  const lanes = 2 ** Math.ceil(Math.log2(padded / 16));
  const rows = THREADS / lanes;
  const vectors = pooledVectors(headDim);
  const source = operand === 'q' ? SEQUENCE.qSource : SEQUENCE.kSource;
  // The threads of a column add up what the others left: a vector after the other, as all four take more memory than every device has.
  const joined = (array: string) => `
  for (var i = 0u; i < 4u; i++) {
    red[lid] = ${array}[i];
    workgroupBarrier();
    for (var step = ${rows / 2}u; step > 0u; step >>= 1u) {
      if (row < step) { red[lid] += red[lid + step * ${lanes}u]; }
      workgroupBarrier();
    }
    ${array}[i] = red[lid];
    workgroupBarrier();
  }`;
  const inside = `row == 0u && lane < ${padded / 16}u`;
  return `
${params(0, POOL_PARAMS)}
${tables(1)}
${NONFINITE}
${decoder(dtype)}
${operandLoader(operand, 2, dtype, access)}
@group(0) @binding(3) var<storage, read_write> pooled: array<vec4<f32>>;
${shifted ? '@group(0) @binding(4) var<storage, read> mean: array<vec4<f32>>;' : ''}
var<workgroup> red: array<vec4<f32>, ${THREADS}>;
var<workgroup> squares: array<f32, ${THREADS}>;
var<workgroup> bad: array<u32, ${THREADS}>;

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
${OWN_TILE}
  let lane = lid % ${lanes}u;
  let row = lid / ${lanes}u;
  let channel = lane * 16u;
  let base = sequence_field(sequence, ${source}u) - P.sourceBase + head * P.headStride + channel;
  let line = ((head * P.sequences + sequence) * P.blocks + first / P.blockRows) * ${vectors}u - P.pooledBase;
  ${shifted ? `let mean_at = (head * P.sequences + sequence) * ${vectors}u - P.meanBase;` : ''}
  let inverse_count = 1.0 / f32(count);
  var sums: array<vec4<f32>, 4>;
  var directions: array<vec4<f32>, 4>;
  // As many turns for all threads: they add up the squares of a row together.
  for (var turn = 0u; turn < (P.blockRows + ${rows - 1}u) / ${rows}u; turn++) {
    let own = turn * ${rows}u + row;
    let width = select(0u, min(16u, ${headDim}u - min(${headDim}u, channel)), own < count);
    var x = load_${operand}(base + (first + own) * P.tokenStride, width);
    ${shifted ? '' : 'for (var i = 0u; i < 4u; i++) { sums[i] += x[i] * inverse_count; }'}
    ${
      similarities
        ? `${shifted ? `if (own < count && lane < ${padded / 16}u) { for (var i = 0u; i < 4u; i++) { x[i] -= mean[mean_at + lane * 4u + i]; } }` : ''}
    squares[lid] = dot(x[0], x[0]) + dot(x[1], x[1]) + dot(x[2], x[2]) + dot(x[3], x[3]);
    workgroupBarrier();
    var length = 0.0;
    for (var i = 0u; i < ${lanes}u; i++) { length += squares[row * ${lanes}u + i]; }
    workgroupBarrier();
    // A row of zeros has no direction.
    let inverse = select(inverseSqrt(max(length, 1.2e-38f)), 0.0, length == 0.0);
    for (var i = 0u; i < 4u; i++) { directions[i] += x[i] * inverse; }`
        : ''
    }
  }
${shifted ? '' : joined('sums')}
${shifted ? '' : `  if (${inside}) { for (var i = 0u; i < 4u; i++) { pooled[line + lane * 4u + i] = sums[i]; } }`}
  bad[lid] = nonfinite;
  squares[lid] = 0.0;
  workgroupBarrier();
${similarities ? joined('directions') : ''}
  ${similarities ? `if (${inside}) { for (var i = 0u; i < 4u; i++) { squares[lane] += dot(directions[i], directions[i]); } }` : ''}
  workgroupBarrier();
  if (lid == 0u) {
    var similarity = 0.0;
    var any_bad = 0u;
    for (var i = 0u; i < ${lanes}u; i++) { similarity += squares[i]; }
    for (var i = 0u; i < ${THREADS}u; i++) { any_bad |= bad[i]; }
    similarity *= inverse_count * inverse_count;
    ${shifted ? `if (mean[mean_at + ${vectors - 1}u].y != 0.0) { similarity = -2.0; }` : ''}
    pooled[line + ${vectors - 1}u] = vec4<f32>(similarity, f32(any_bad != 0u), 0.0, 0.0);
  }
}`;
}

export const MEAN_PARAMS = [
  'tileStart',
  'headStart',
  'sequencesAt',
  'sequences',
  'blocks',
  'blockKeys',
  'pooledBase',
  'meanBase',
] as const;

/** The mean of a sequence's keys, of one head: a pooled line from those of its blocks. Bindings: 1 tables, 3 pooled lines, 4 the mean. */
export function meanKernel(headDim: number): string {
  const vectors = pooledVectors(headDim);
  return `
${params(0, MEAN_PARAMS)}
@group(0) @binding(1) var<storage, read> tables: array<u32>;
@group(0) @binding(3) var<storage, read> pooled: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> mean: array<vec4<f32>>;

@compute @workgroup_size(${Math.ceil(vectors / 32) * 32})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) vector: u32) {
  let sequence = P.tileStart + group.x;
  let head = P.headStart + group.y;
  if (vector >= ${vectors}u) { return; }
  let length = tables[P.sequencesAt + sequence * ${SEQUENCE_WORDS}u + ${SEQUENCE.keyLength}u];
  let at = (head * P.sequences + sequence) * P.blocks * ${vectors}u + vector - P.pooledBase;
  var sum = vec4<f32>();
  for (var first = 0u; first < length; first += P.blockKeys) {
    // Divided first, so that the sum of large values stays finite.
    let share = f32(min(P.blockKeys, length - first)) / f32(length);
    sum += pooled[at + first / P.blockKeys * ${vectors}u] * share;
  }
  mean[(head * P.sequences + sequence) * ${vectors}u + vector - P.meanBase] = sum;
}`;
}

export const VISIBLE_BLOCKS_PARAMS = [
  'tileStart',
  'headStart',
  'sequencesAt',
  'tilesAt',
  ...MASK_PARAMS,
  'maskHeads',
  'rowBlocks',
  'keyBlocks',
  'blockRows',
  'blockKeys',
  'rowsPerHead',
  'maximaStep',
  'maximaBase',
  'visibleBase',
] as const;

/**
 * What a mask leaves of the blocks of a line: 0 where no row sees a key of it, 1 where some row does, 2 where it is computed in any case
 * (`visibleBlocksOf` of src/attention/visible-blocks.ts says the same in TypeScript). One workgroup takes a block of rows, each thread
 * blocks of keys of its own.
 *
 * Bindings: 1 tables, 4 the largest entries of an additive mask's rows, 5 the mask, 6 a word of each block.
 */
export function visibleBlocksKernel({ mask }: { readonly mask: MaskDType }): string {
  const each = `var j = lid; j < P.keyBlocks; j += ${THREADS}u`;
  const isHidden = (bits: string) =>
    mask === 'bool'
      ? `${bits} == 0u`
      : `select(bitcast<f32>(${bits}) < least, ${bits} == 0xff800000u, (${bits} & 0x7f800000u) == 0x7f800000u)`;
  return `
${params(0, VISIBLE_BLOCKS_PARAMS)}
${tables(1)}
${mask === 'bool' ? '' : '@group(0) @binding(4) var<storage, read> maxima: array<f32>;'}
${maskLoader(5, mask)}
@group(0) @binding(6) var<storage, read_write> visible: array<u32>;
// One more than the last block that each row sees.
var<workgroup> last: array<atomic<u32>, ${THREADS}>;
var<workgroup> seeing: atomic<u32>;
var<workgroup> unlike: atomic<u32>;

fn sees(start: u32, from_key: u32, end_key: u32, least: f32) -> bool {
  for (var key = from_key; key < end_key; key++) {
    let bits = mask_at(start + key * P.maskKeyStride);
    if (!(${isHidden('bits')})) { return true; }
  }
  return false;
}

@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
${OWN_TILE}
  let length = sequence_field(sequence, ${SEQUENCE.keyLength}u);
  let lower = bitcast<i32>(sequence_field(sequence, ${SEQUENCE.lower}u));
  let upper = bitcast<i32>(sequence_field(sequence, ${SEQUENCE.upper}u));
  let mask_start = sequence_field(sequence, ${SEQUENCE.mask}u) - P.maskBase + head * P.maskHeadStride;
  let line = ((sequence * P.maskHeads + head) * P.rowBlocks + first / P.blockRows) * P.keyBlocks - P.visibleBase;
  for (${each}) { visible[line + j] = 0u; }
  for (var start = 0u; start < count; start += ${THREADS}u) {
    let rows = min(${THREADS}u, count - start);
    atomicStore(&last[lid], 0u);
    workgroupBarrier();
    // Twice the rows that see a block, and 1 more where one of them sees nothing behind it.
    for (${each}) {
      var found = 0u;
      for (var r = 0u; r < rows; r++) {
        let row = first + start + r;
        let from_key = max(max(0, i32(row) + lower), i32(j * P.blockKeys));
        let end_key = min(min(i32(length), i32(row) + upper + 1), i32((j + 1u) * P.blockKeys));
        if (from_key >= end_key) { continue; }
        let least = ${
          mask === 'bool'
            ? '0.0'
            : `max(maxima[head * P.rowsPerHead + sequence_field(sequence, ${SEQUENCE.queryRow}u) + row * P.maximaStep - P.maximaBase] - ${HIDDEN_BELOW}, -3.4028234e38f)`
        };
        if (sees(mask_start + row * P.maskQueryStride, u32(from_key), u32(end_key), least)) {
          found += 2u;
          atomicMax(&last[r], j + 1u);
        }
      }
      visible[line + j] += found;
    }
    workgroupBarrier();
    for (${each}) {
      for (var r = 0u; r < rows; r++) {
        if (atomicLoad(&last[r]) == j + 1u) { visible[line + j] |= 1u; }
      }
    }
    if (lid < rows && atomicLoad(&last[lid]) != 0u) { atomicAdd(&seeing, 1u); }
    workgroupBarrier();
  }
  let all = atomicLoad(&seeing);
  for (${each}) {
    let rows = visible[line + j] >> 1u;
    if (rows != 0u && rows != all) { atomicStore(&unlike, 1u); }
  }
  workgroupBarrier();
  let is_unlike = atomicLoad(&unlike) != 0u;
  for (${each}) {
    let found = visible[line + j];
    visible[line + j] = select(min(found, 1u), 2u, is_unlike && (found & 1u) != 0u);
  }
}`;
}

export interface ChooseConfig {
  readonly headDim: number;
  /** A fraction of the blocks is kept (top-k), or a share of their weights (top-p). */
  readonly by: 'count' | 'mass';
  readonly similarities: boolean;
  /** A mask hides blocks. */
  readonly masked: boolean;
}

export const CHOOSE_PARAMS = [
  'tileStart',
  'headStart',
  'sequencesAt',
  'tilesAt',
  'sequences',
  'heads',
  'headsPerKeyHead',
  'rowBlocks',
  'keyBlocks',
  'blockRows',
  'blockKeys',
  'sinkBlocks',
  'queryBase',
  'keyBase',
  'weightBase',
  'lineBase',
  'maskHeads',
  'visibleBase',
  'scoreScale',
  'wanted',
  'leastSimilarity',
] as const;

const CHOOSE_THREADS = 64;

/**
 * One workgroup takes one block of rows, a line of the map. Leaves 1 for a block that is computed and 0 for others as weights, and what
 * the line comes to (`BLOCK_LINE`). Nothing is sorted: the least weight that is kept is found bit by bit, as bits of floats that are
 * not negative are in the order of their values.
 *
 * Bindings: 1 tables, 2 pooled lines of Q, 3 of K, 4 a weight of each block, 5 lines, 6 what a mask leaves of each block.
 */
export function chooseKernel({ headDim, by, similarities, masked }: ChooseConfig): string {
  const vectors = pooledVectors(headDim);
  const fact = vectors - 1;
  const each = `var j = from_block + lid; j < to_block; j += ${CHOOSE_THREADS}u`;
  const share = by === 'count' ? '1.0' : 'w';
  return `
${params(0, CHOOSE_PARAMS)}
${tables(1)}
@group(0) @binding(2) var<storage, read> queries: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> keys: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> weights: array<f32>;
@group(0) @binding(5) var<storage, read_write> lines: array<vec4<f32>>;
${masked ? '@group(0) @binding(6) var<storage, read> visible: array<u32>;' : ''}
var<workgroup> red: array<vec4<f32>, ${CHOOSE_THREADS}>;
var<workgroup> flags: array<u32, ${CHOOSE_THREADS}>;

fn sums(lid: u32, own: vec4<f32>) -> vec4<f32> {
  workgroupBarrier();
  red[lid] = own;
  workgroupBarrier();
  for (var step = ${CHOOSE_THREADS / 2}u; step > 0u; step >>= 1u) {
    if (lid < step) { red[lid] += red[lid + step]; }
    workgroupBarrier();
  }
  return red[0];
}

@compute @workgroup_size(${CHOOSE_THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let tile = P.tileStart + group.x;
  let head = P.headStart + group.y;
  let sequence = tile_field(tile, 0u);
  let first_row = i32(tile_field(tile, 1u));
  let count = tile_field(tile, 2u);
  let last_row = first_row + i32(count) - 1;
  let length = sequence_field(sequence, ${SEQUENCE.keyLength}u);
  let lower = bitcast<i32>(sequence_field(sequence, ${SEQUENCE.lower}u));
  let upper = bitcast<i32>(sequence_field(sequence, ${SEQUENCE.upper}u));
  let block = u32(first_row) / P.blockRows;
  let line = (sequence * P.heads + head) * P.rowBlocks + block;
  let query = ((head * P.sequences + sequence) * P.rowBlocks + block) * ${vectors}u - P.queryBase;
  let key = (head / P.headsPerKeyHead * P.sequences + sequence) * P.keyBlocks * ${vectors}u - P.keyBase;
  let at = line * P.keyBlocks - P.weightBase;
  ${masked ? 'let facts = ((sequence * P.maskHeads + min(head, P.maskHeads - 1u)) * P.rowBlocks + block) * P.keyBlocks - P.visibleBase;' : ''}

  // Blocks that some row sees, and those that hold the last key that a row sees, of each: where the rows see different blocks.
  let first_key = max(0, first_row + lower);
  let end_key = min(i32(length), last_row + 1 + upper);
  let some = count > 0u && first_key < end_key;
  let from_block = select(0u, u32(max(first_key, 0)) / P.blockKeys, some);
  let to_block = select(0u, u32(max(end_key - 1, 0)) / P.blockKeys + 1u, some);
  let edge_key = first_row + upper;
  let is_cut = some && u32(max(0, last_row + lower)) / P.blockKeys > from_block;
  let edge = select(u32(max(edge_key, 0)) / P.blockKeys, to_block - select(0u, 1u, is_cut), edge_key >= i32(length));

  // Only what nothing else writes: a block that is weighed belongs to another thread, which may have come first.
  for (var j = lid; j < P.keyBlocks; j += ${CHOOSE_THREADS}u) {
    if (j < from_block || j >= to_block) { weights[at + j] = 0.0; }
  }
  var largest = -3.0e38f;
  let query_fact = select(vec4<f32>(), queries[query + ${fact}u], count > 0u);
  for (${each}) {
    var dots = vec4<f32>();
    let own = key + j * ${vectors}u;
    for (var c = 0u; c < ${fact}u; c++) { dots += queries[query + c] * keys[own + c]; }
    let tokens = min(P.blockKeys, length - j * P.blockKeys);
    let score = clamp((dots.x + dots.y + dots.z + dots.w) * P.scoreScale + log2(f32(tokens)), -3.0e38f, 3.0e38f);
    weights[at + j] = score;
    if (keys[own + ${fact}u].y == 0.0${masked ? ' && visible[facts + j] != 0u' : ''}) { largest = max(largest, score); }
  }
  red[lid] = vec4<f32>(largest);
  workgroupBarrier();
  for (var step = ${CHOOSE_THREADS / 2}u; step > 0u; step >>= 1u) {
    if (lid < step) { red[lid] = max(red[lid], red[lid + step]); }
    workgroupBarrier();
  }
  largest = red[0].x;

  // -1 marks a block that is computed in any case, -2 one that is hidden.
  var own_sums = vec4<f32>();
  for (${each}) {
    ${
      masked
        ? `let visibility = visible[facts + j];
    if (visibility == 0u) {
      weights[at + j] = -2.0;
      continue;
    }`
        : ''
    }
    own_sums.w += 1.0;
    let key_fact = keys[key + j * ${vectors}u + ${fact}u];
    let is_bad = query_fact.y != 0.0 || key_fact.y != 0.0;
    var weight = select(exp2(max(weights[at + j] - largest, -200.0)), 0.0, is_bad);
    own_sums.z += weight;
    var forced = is_bad || j < P.sinkBlocks || j >= edge;
    ${similarities ? 'forced = forced || query_fact.x < P.leastSimilarity || key_fact.x < P.leastSimilarity;' : ''}
    ${masked ? 'forced = forced || visibility == 2u;' : ''}
    if (forced) {
      own_sums.x += 1.0;
      own_sums.y += weight;
      weight = -1.0;
    }
    weights[at + j] = weight;
  }
  let forced = sums(lid, own_sums);
  let base = forced.${by === 'count' ? 'x' : 'y'};
  ${
    by === 'count'
      ? 'let goal = max(1.0, ceil(P.wanted * forced.w));'
      : `// At least one block of each row.
  let goal = max(P.wanted * forced.z, select(0.0, 1.0e-37f, forced.x == 0.0));`
  }

  // The least weight that is kept, as bits.
  var least = 0u;
  for (var bit = 1u << 29u; bit > 0u; bit >>= 1u) {
    let candidate = least | bit;
    var own = 0.0;
    for (${each}) {
      let w = weights[at + j];
      if (w >= 0.0 && bitcast<u32>(w) >= candidate) { own += ${share}; }
    }
    if (base + sums(lid, vec4<f32>(own)).x >= goal) { least = candidate; }
  }
  var own_above = 0.0;
  for (${each}) {
    let w = weights[at + j];
    if (w >= 0.0 && bitcast<u32>(w) > least) { own_above += ${share}; }
  }
  let above = base + sums(lid, vec4<f32>(own_above)).x;

  // Of equal ones the first.
  var equals = 0u;
  var kept = vec4<f32>();
  for (var start = from_block; start < to_block; start += ${CHOOSE_THREADS}u) {
    let j = start + lid;
    var w = -2.0;
    if (j < to_block) { w = weights[at + j]; }
    let is_equal = w >= 0.0 && bitcast<u32>(w) == least;
    flags[lid] = u32(is_equal);
    workgroupBarrier();
    var before = equals;
    for (var i = 0u; i < ${CHOOSE_THREADS}u; i++) {
      before += select(0u, flags[i], i < lid);
      equals += flags[i];
    }
    workgroupBarrier();
    let reached = above + f32(before) * ${by === 'count' ? '1.0' : 'bitcast<f32>(least)'};
    let is_kept = (w >= 0.0 && bitcast<u32>(w) > least) || (is_equal && reached < goal);
    if (is_kept) { kept += vec4<f32>(1.0, w, 0.0, 0.0); }
    if (j < to_block) { weights[at + j] = select(0.0, 1.0, is_kept || w == -1.0); }
  }
  let all = forced + sums(lid, kept);
  if (lid == 0u) {
    let lost = select(max(0.0, 1.0 - all.y / max(all.z, 1.0e-37f)), 0.0, all.z == 0.0);
    lines[line - P.lineBase] = vec4<f32>(forced.w, all.x, f32(count), lost * f32(count));
  }
}`;
}

export const PACK_PARAMS = ['wordStart', 'wordEnd', 'elements', 'weightBase', 'mapBase'] as const;
export const PACK_THREADS = 64;

/** Bytes of the map, four a word, from floats. Bindings: 4 weights, 6 the map. */
export const packKernel = (): string => `
${params(0, PACK_PARAMS)}
@group(0) @binding(4) var<storage, read> weights: array<f32>;
@group(0) @binding(6) var<storage, read_write> map: array<u32>;

@compute @workgroup_size(${PACK_THREADS})
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let word = P.wordStart + id.x;
  if (word >= P.wordEnd) { return; }
  var bytes = 0u;
  ${range(4)
    .map(
      (i) =>
        `if (word * 4u + ${i}u < P.elements) { bytes |= u32(weights[word * 4u + ${i}u - P.weightBase]) << ${8 * i}u; }`,
    )
    .join('\n  ')}
  map[word - P.mapBase] = bytes;
}`;
