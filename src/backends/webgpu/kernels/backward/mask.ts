/**
 * The gradient of an additive mask: that of the scores it is added to, `P o (dP - D)`, summed over what the mask broadcasts over.
 *
 * A workgroup owns a tile of the mask, and the tiles of scores that it is added to pass by: those of every sequence, head, row or key that
 * share an element, always in the same order. No scores are stored, and the same inputs give the same bits.
 */
import { CODE_ROW_PARAMS, MASK_PARAMS, SEQUENCE } from '../layout.ts';
import { NAN_WORD } from '../storage.ts';
import {
  type GradientConfig,
  keyNumbers,
  partsOf,
  products,
  rowNumbers,
  scoreGradientDeclarations,
  weigh,
} from './gradients.ts';
import { BAD_SCORES } from './layout.ts';

export interface MaskGradientConfig extends Omit<GradientConfig, 'owner' | 'dtypes'> {
  /** All rows, or all keys, share an element. */
  readonly sumsRows: boolean;
  readonly sumsKeys: boolean;
}

export const MASK_GRADIENT_PARAMS = [
  'rowTileStart',
  'laneStart',
  'keyTileStart',
  'groupSize',
  'sequences',
  'heads',
  // Of the mask's gradient: its sizes, 1 where it broadcasts.
  'maskBatches',
  'maskHeads',
  'maskRows',
  'maskKeys',
  'gradientBase',
  'sequencesAt',
  ...CODE_ROW_PARAMS,
  'gradientRowBase',
  'gradientKeyBase',
  ...MASK_PARAMS,
  'softcap',
  'inverseQuarterSoftcap',
  'codeVectors',
  'valueVectors',
] as const;

/** Bytes of workgroup memory that the kernel takes. */
export const maskGradientWorkgroupBytes = ({
  own,
  passing,
  sumsRows,
  sumsKeys,
}: Pick<MaskGradientConfig, 'own' | 'passing' | 'sumsRows' | 'sumsKeys'>): number =>
  sumsRows || sumsKeys ? own * passing * 8 : 0;

export function maskGradientKernel(given: MaskGradientConfig): string {
  const { sumsRows, sumsKeys, own, passing, passingThreads } = given;
  const config: GradientConfig = { ...given, owner: 'query', dtypes: ['float32', 'float32'] };
  const parts = partsOf(config);
  const { threads, I, N, ownToken, passingToken } = parts;
  const pairs = (f: (i: number, n: number) => string, separator = ' ') =>
    I.flatMap((i) => N.map((n) => f(i, n))).join(separator);
  const [rowsOut, keysOut] = [sumsRows ? 1 : own, sumsKeys ? 1 : passing];
  /** An element's word, of a sum and its flags. */
  const word = (sum: string, flags: string) =>
    `select(bitcast<u32>(${sum}), ${NAN_WORD.float32}, (${flags} & ${BAD_SCORES}u) != 0u)`;
  const write = (row: string, key: string, value: string) => `
    { let row = ${row}; let key = ${key};
      if (row < P.maskRows && key < P.maskKeys) { mask_gradient[place + row * P.maskKeys + key] = ${value}; } }`;
  const alone = pairs(
    (i, n) =>
      write(`row_first + ${ownToken(i)}`, `key_first + ${passingToken(n)}`, word(`sum_${i}_${n}`, `flags_${i}_${n}`)),
    '',
  );
  const joined = `
  ${pairs((i, n) => `{ let at = ${ownToken(i)} * ${passing}u + ${passingToken(n)}; tile_sums[at] = sum_${i}_${n}; tile_flags[at] = flags_${i}_${n}; }`, '\n  ')}
  workgroupBarrier();
  for (var element = lid; element < ${rowsOut * keysOut}u; element += ${threads}u) {
    var sum = 0.0; var flags = 0u;
    for (var i = 0u; i < ${own / rowsOut}u; i++) {
      for (var n = 0u; n < ${passing / keysOut}u; n++) {
        let at = (element / ${keysOut}u + i) * ${passing}u + element % ${keysOut}u + n;
        sum += tile_sums[at]; flags |= tile_flags[at];
      }
    }
    ${write(`row_first + element / ${keysOut}u`, `key_first + element % ${keysOut}u`, word('sum', 'flags'))}
  }`;
  const isJoined = sumsRows || sumsKeys;
  return `${scoreGradientDeclarations(config, MASK_GRADIENT_PARAMS)}
@group(0) @binding(7) var<storage, read_write> mask_gradient: array<u32>;
${isJoined ? `var<workgroup> tile_sums: array<f32, ${own * passing}>;\nvar<workgroup> tile_flags: array<u32, ${own * passing}>;` : ''}

@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
  let r = lid / ${passingThreads}u;
  let c = lid % ${passingThreads}u;
  let row_first = (P.rowTileStart + group.x) * ${own}u;
  let key_first = (P.keyTileStart + group.z) * ${passing}u;
  let lane = P.laneStart + group.y;
  let mask_head = lane / P.maskBatches;
  let mask_batch = lane % P.maskBatches;
  ${pairs((i, n) => `var sum_${i}_${n} = 0.0; var flags_${i}_${n} = 0u;`)}
  let sequence_end = select(P.sequences, mask_batch + 1u, P.maskBatches > 1u);
  let head_end = select(P.heads, mask_head + 1u, P.maskHeads > 1u);
  for (var sequence = mask_batch; sequence < sequence_end; sequence++) {
    let query_length = sequence_field(sequence, ${SEQUENCE.queryLength}u);
    let key_length = i32(sequence_field(sequence, ${SEQUENCE.keyLength}u));
    let lower = i32(sequence_field(sequence, ${SEQUENCE.lower}u));
    let upper = i32(sequence_field(sequence, ${SEQUENCE.upper}u));
    let row_end = ${sumsRows ? 'query_length' : `min(query_length, row_first + ${own}u)`};
    let key_end = ${sumsKeys ? 'key_length' : `min(key_length, i32(key_first + ${passing}u))`};
    for (var query_head = mask_head; query_head < head_end; query_head++) {
      for (var first = row_first; first < row_end; first += ${own}u) {
        let own_at = query_head * P.queryRowsPerHead + sequence_field(sequence, ${SEQUENCE.queryRow}u) + first;
        ${I.map((i) => rowNumbers(config, parts, i, `own_at + ${ownToken(i)}`, `(first + ${ownToken(i)})`)).join('')}
        for (var start = i32(key_first); start < key_end; start += ${passing}) {
          // None of these rows sees one of these keys.
          if (start + ${passing - 1} < lower + i32(first) || start > upper + i32(first + ${own - 1}u)) { continue; }
          let passing_at = query_head / P.groupSize * P.keyRowsPerHead + sequence_field(sequence, ${SEQUENCE.keyRow}u) + u32(start);
          ${products(parts)}
          ${N.map((n) => keyNumbers(parts, n, `passing_at + ${passingToken(n)}`, `(u32(start) + ${passingToken(n)})`)).join('')}
          var poison = 0u;
          ${pairs((i, n) => `${weigh(config, parts, i, n, true)} sum_${i}_${n} += ds_${i}_${n};`, '')}
        }
      }
    }
  }
  let place = (mask_batch * P.maskHeads + mask_head) * P.maskRows * P.maskKeys - P.gradientBase;
  ${isJoined ? joined : alone}
}`;
}
