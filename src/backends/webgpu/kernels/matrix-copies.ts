/**
 * Q, K and V on their way into the matrix kernel's workgroup memory. Matrices are never loaded from storage: that costs
 * ten times as much as a load from workgroup memory (36 clocks against 4, measured on an H200), and each would be loaded
 * by several subgroups.
 *
 * K and V lie in storage as in workgroup memory (KEY_TILE in layout.ts), so that where the products take INT8 and
 * FP16 a thread copies units of 16 bytes as they are. Where they do not, it converts.
 */
import { KEY_TILE, rowVectors } from './layout.ts';
import { componentBytes, type MatrixMemory, type MatrixOperations, UNIT_BYTES } from './matrix-operations.ts';
import type { MatrixProducts, MatrixShape, MatrixTiling } from './matrix-tiling.ts';
import { range } from './storage.ts';

export interface CopyConfig extends MatrixShape, MatrixProducts {
  readonly headDimPadded: number;
  readonly valueDimPadded: number;
}

/** Units of a tile of K, with its facts, and of V in storage; and of a tile of K where the facts begin. */
export const keyTileUnits = (headDimPadded: number): number => KEY_TILE * rowVectors(headDimPadded);
export const valueTileUnits = (valueDimPadded: number): number => (KEY_TILE * valueDimPadded) / 8;
export const factsUnit = (headDimPadded: number): number => (KEY_TILE * headDimPadded) / 16;

/** A unit of INT8 values as `component`s, out of a vector of 16 of them; `c`: the first one's place in it. */
function converted(component: string, vector: string, c: string): string {
  if (component === 'i8') return vector;
  const word = (i: number) => `${vector}[${c} / 4u + ${i}u]`;
  const floats = (w: string) =>
    `vec4<f32>(${range(4)
      .map((e) => `f32(extractBits(bitcast<i32>(${w}), ${8 * e}u, 8u))`)
      .join(', ')})`;
  if (component === 'f32') return `bitcast<vec4<u32>>(${floats(word(0))})`;
  const half = (i: number) => `let x${i} = ${floats(word(i))};`;
  return `{ ${half(0)} ${half(1)} }`;
}

/** A statement that assigns `converted` to a place. */
function store(component: string, place: string, vector: string, c: string, as: (units: string) => string): string {
  if (component !== 'f16') return `${place} = ${as(converted(component, vector, c))};`;
  const halves = range(2).flatMap((i) => ['xy', 'zw'].map((part) => `pack2x16float(x${i}.${part})`));
  return `${converted(component, vector, c).slice(0, -1)} ${place} = ${as(`vec4<u32>(${halves.join(', ')})`)}; }`;
}

/** Statements over variables that the caller declares. */
export interface Copies {
  readonly declare: string;
  /** From storage into the variables, the step whose first key is the expression `key`. */
  load(key: string): string;
  /** From the variables into workgroup memory. */
  readonly store: string;
}

/**
 * @param from the unit of storage in the step's tile that a unit of workgroup memory comes from, and the statement that
 *   writes one
 */
function copiesOf(
  { threads }: MatrixTiling,
  name: string,
  units: number,
  from: (key: string, unit: string) => string,
  write: (unit: string, value: string) => string,
): Copies {
  const items = range(Math.ceil(units / threads));
  const at = (item: number) => (item === 0 ? 't' : `(t + ${item * threads}u)`);
  const within = (item: number, statement: string) =>
    (item + 1) * threads <= units ? statement : `if (${at(item)} < ${units}u) { ${statement} }`;
  return {
    declare: items.map((item) => `var ${name}_${item}: vec4<u32>;`).join(' '),
    load: (key) => items.map((item) => within(item, `${name}_${item} = ${from(key, at(item))};`)).join(' '),
    store: items.map((item) => within(item, write(at(item), `${name}_${item}`))).join(' '),
  };
}

/** Copies of a step's K. The kernel has `key_tile`, the sequence's first tile in the binding. */
export function keyCopies(config: CopyConfig, tiling: MatrixTiling, to: MatrixMemory): Copies {
  const { keys, qk, headDimPadded } = config;
  const component = qk.componentType;
  // Units of workgroup memory for each 16 values, and for the step's keys of 32 channels.
  const parts = tiling.keyUnits / 2;
  const chunk = keys * tiling.keyUnits;
  return copiesOf(
    tiling,
    'copied_k',
    tiling.keyStage,
    (key, unit) =>
      `key_tiles[(key_tile + ${key} / ${KEY_TILE}u) * ${keyTileUnits(headDimPadded)}u + ${key} % ${KEY_TILE}u * 2u + ${unit} / ${chunk}u * ${KEY_TILE * 2}u + ${unit} % ${chunk}u${parts === 1 ? '' : ` / ${parts}u`}]`,
    (unit, value) =>
      store(component, `${to.name}[${unit}]`, value, `(${unit} % ${parts}u * ${16 / parts}u)`, (units) => units),
  );
}

/** Copies of a step's V. */
export function valueCopies(config: CopyConfig, tiling: MatrixTiling, to: MatrixMemory): Copies {
  const { pv, valueDimPadded } = config;
  const float32 = pv.componentType === 'f32';
  return copiesOf(
    tiling,
    'copied_v',
    tiling.valueStage,
    (key, unit) =>
      `value_tiles[(key_tile + ${key} / ${KEY_TILE}u) * ${valueTileUnits(valueDimPadded)}u + ${key} % ${KEY_TILE}u * ${valueDimPadded / 8}u + ${unit}${float32 ? ' / 2u' : ''}]`,
    (unit, value) => {
      if (!float32) return `${to.name}[${unit}] = ${value};`;
      const words = `select(${value}.xy, ${value}.zw, ${unit} % 2u == 1u)`;
      return `{ let words = ${words}; ${to.name}[${unit}] = bitcast<vec4<u32>>(vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y))); }`;
    },
  );
}

/**
 * Q into matrices that are held: as many of its steps at a time as fit into the scores' memory, each row's part of a
 * step in units that follow one another.
 */
export function heldQueries(
  config: CopyConfig & { readonly operations: MatrixOperations },
  tiling: MatrixTiling,
  scores: MatrixMemory,
  names: readonly (readonly string[])[],
): string {
  const { operations, qk, rows, headDimPadded } = config;
  const { queryUnits, keySteps, queryTiles, threads, scoreStride } = tiling;
  const perUnit = UNIT_BYTES / componentBytes(qk.componentType);
  const atOnce = Math.min(keySteps, Math.floor(scoreStride / queryUnits));
  return range(Math.ceil(keySteps / atOnce))
    .map((batch) => {
      const steps = range(keySteps).slice(batch * atOnce, (batch + 1) * atOnce);
      const tile = steps.length * qk.M * queryUnits;
      const copy = store(
        qk.componentType,
        `${scores.name}[i]`,
        `query_rows[(query_row + row) * ${rowVectors(headDimPadded)}u + c / 16u - P.queryRowBase]`,
        '(c % 16u)',
        (units) => `bitcast<vec4<f32>>(${units})`,
      );
      const loads = names.map((own, rt) =>
        steps
          .map((step, x) =>
            operations.holdLeft(
              qk,
              own[step] as string,
              scores,
              `(qk_rows * ${queryTiles}u + ${rt}u) * ${tile}u + ${x * qk.M * queryUnits}u`,
              queryUnits,
            ),
          )
          .join(' '),
      );
      return `for (var i = t; i < ${(rows / qk.M) * tile}u; i += ${threads}u) {
      let row = i / ${tile}u * ${qk.M}u + i / ${queryUnits}u % ${qk.M}u;
      let c = (i / ${qk.M * queryUnits}u % ${steps.length}u + ${steps[0]}u) * ${qk.K}u + i % ${queryUnits}u * ${perUnit}u;
      ${copy}
    }
    workgroupBarrier();
    ${loads.join('\n    ')}
    workgroupBarrier();`;
    })
    .join('\n    ');
}
