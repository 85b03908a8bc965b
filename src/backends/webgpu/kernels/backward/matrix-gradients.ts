/**
 * Gradients of attention with subgroup matrices: scores from the codes of the forward pass in INT8, all other products in float16 with
 * sums in float32. What is computed, and who owns what, is as without matrices (gradients.ts).
 *
 * Rows of Q, dO, K and V are in float16, each divided by a power of two of its own (prepare.ts). Those powers meet in the lanes' part, in
 * float32: a pair's weight for dV is P times dO's power, that for dQ and dK is dS times K's or Q's. A row of weights is
 * multiplied by one more power of two, so that its largest lies well inside float16; a row that outgrows it has its sums stored, scaled
 * and loaded again. So no row loses accuracy to another one.
 *
 * A step: codes and rows of the tokens that pass by lie in workgroup memory | matrices multiply: scores and dP | lanes make weights of
 * them | matrices multiply: sums. The next step's are read from storage a whole step before. Scores and weights are rows of own tokens,
 * in the kernel of own keys too, so that no matrix of them is transposed; rows of Q, dO and K are right matrices both ways.
 */
import { FLAG_UNSMOOTHED, OWN_TILE, SEQUENCE } from '../layout.ts';
import { grid, type MatrixMemory, type MatrixOperations, unitsOf, workgroupUnits } from '../matrix-operations.ts';
import { throughMemory } from '../matrix-results.ts';
import { SUM_ORIGIN } from '../matrix-softmax.ts';
import type { MatrixProducts } from '../matrix-tiling.ts';
import { scoresAreFloat } from '../scores.ts';
import { range } from '../storage.ts';
import {
  GRADIENT_PARAMS,
  type GradientConfig,
  keyNumbers,
  type Parts,
  packer,
  partsOf,
  rowNumbers,
  scoreGradientDeclarations,
  store,
  weigh,
} from './gradients.ts';
import { BAD_SCORES, PLACE, PLACES, ROW_FLAGS } from './layout.ts';
import { type MatrixGradientShape, type MatrixGradientTiling, matrixGradientTiling } from './matrix-gradient-tiling.ts';

export interface MatrixGradientConfig
  extends Omit<GradientConfig, 'ownThreads' | 'passingThreads' | 'half' | 'packedDot'>,
    MatrixGradientShape,
    MatrixProducts {
  readonly operations: MatrixOperations;
  readonly lanes: number;
}

const SCORES: MatrixMemory = { name: 'scores', element: 'vec4<f32>' };
const WEIGHTS: MatrixMemory = { name: 'weights', element: 'vec4<u32>' };
const CODES: MatrixMemory = { name: 'code_stage', element: 'vec4<u32>' };
const ROWS: MatrixMemory = { name: 'row_stage', element: 'vec4<u32>' };

/** A row of weights is scaled so that its largest is between 2^4 and 2^5, and may outgrow that up to this. */
const LARGEST_WEIGHT = '16384.0';
const SCALED_FIELD = 127 + 127 + 4;

/** Weights above this power of 2, with dO's power, come from a logsumexp of other inputs. */
const LARGEST_EXPONENT = '120.0';

/** A gradient that the kernel sums up: its matrices, its channels, its operand in a row of the stage, its weights' place. */
interface Sum {
  readonly names: readonly (readonly string[])[];
  readonly tiles: number;
  readonly operandAt: number;
  /** Which set of weights: 0 for those of dQ and dK, 1 for those of dV. */
  readonly set: number;
}

/** What the parts of a kernel share. */
interface Kernel {
  readonly config: MatrixGradientConfig;
  readonly gradient: GradientConfig;
  readonly parts: Parts;
  readonly tiling: MatrixGradientTiling;
  readonly sums: readonly Sum[];
  readonly codes: readonly (readonly string[])[];
  readonly values: readonly (readonly string[])[];
  readonly weightMemory: MatrixMemory;
}

const weightsAt = ({ config: { own }, tiling }: Kernel, set: number) => set * own * tiling.weightStride;

function kernelOf(config: MatrixGradientConfig): Kernel {
  const { owner, own, passing, lanes, headDimPadded } = config;
  const tiling = matrixGradientTiling(config, config, lanes, owner, config);
  if (tiling === undefined) throw new Error('the products do not divide the tiles of this variant');
  const gradient: GradientConfig = {
    ...config,
    half: true,
    packedDot: false,
    ownThreads: own,
    passingThreads: passing / 4,
  };
  const sum = (name: string, tiles: number, operandAt: number, set: number): Sum => ({
    names: grid(name, tiling.sumRows, tiles),
    tiles,
    operandAt,
    set,
  });
  return {
    config,
    gradient,
    parts: partsOf(gradient),
    tiling,
    sums: [
      sum('a', tiling.headTiles, 0, 0),
      ...(owner === 'key' ? [sum('b', tiling.valueTiles, headDimPadded / 8, 1)] : []),
    ],
    codes: grid('code', tiling.scoreRows, tiling.codeSteps),
    values: grid('value', tiling.scoreRows, tiling.valueSteps),
    weightMemory: config.memory === 'place' ? SCORES : WEIGHTS,
  };
}

/** Codes and values of own tokens into matrices that are held, through the scores' memory. */
function heldRows({ config, parts, tiling, codes, values }: Kernel): string {
  const { operations, qk, pv, own, headDimPadded, valueDimPadded } = config;
  const { ownsQueries, ownAt, row, key } = parts;
  const [codeBuffer, floatBuffer] = ownsQueries ? ['query_rows', 'gradient_rows'] : ['key_rows', 'gradient_keys'];
  const valuesAt = ownsQueries ? row.dOutput : key.value;
  const stepUnits = unitsOf(qk.componentType, qk.K);
  const atOnce = Math.floor((2 * tiling.scoreStride) / stepUnits);
  const batches = (
    product: typeof qk,
    names: readonly (readonly string[])[],
    units: number,
    source: (unit: string) => string,
  ) => {
    const steps = range(units / stepUnits);
    return range(Math.ceil(steps.length / atOnce))
      .map((batch) => {
        const some = steps.slice(batch * atOnce, (batch + 1) * atOnce);
        const stride = some.length * stepUnits;
        const loads = names.flatMap((own, rt) =>
          some.map((step, x) =>
            operations.holdLeft(
              product,
              own[step] as string,
              SCORES,
              `(score_rows * ${tiling.scoreRows}u + ${rt}u) * ${product.M * stride}u + ${x * stepUnits}u`,
              stride,
            ),
          ),
        );
        return `for (var i = t; i < ${own * stride}u; i += ${tiling.threads}u) {
      let row = i / ${stride}u;
      var x = vec4<u32>();
      if (row < count) { x = ${source(`${(some[0] as number) * stepUnits}u + i % ${stride}u`)}; }
      scores[i] = bitcast<vec4<f32>>(x);
    }
    workgroupBarrier();
    ${loads.join(' ')}
    workgroupBarrier();`;
      })
      .join('\n    ');
  };
  return [
    batches(
      qk,
      codes,
      unitsOf(qk.componentType, headDimPadded),
      (unit) => `${codeBuffer}[${ownAt.codes('own_at + row')} + ${unit}]`,
    ),
    batches(
      pv,
      values,
      unitsOf(pv.componentType, valueDimPadded),
      (unit) => `${floatBuffer}[${ownAt.floats('own_at + row')} + ${valuesAt}u + ${unit}]`,
    ),
  ].join('\n    ');
}

/** Codes, rows and facts of a step's tokens: out of storage into registers, and from there into workgroup memory. */
function copies(kernel: Kernel) {
  const { config, parts, tiling } = kernel;
  const { passing, headDimPadded, valueDimPadded } = config;
  const { ownsQueries, passingAt, codes, row, key } = parts;
  const { threads, codeStride, rowStride } = tiling;
  const [codeBuffer, floatBuffer] = ownsQueries ? ['key_rows', 'gradient_keys'] : ['query_rows', 'gradient_rows'];
  const vectors = ownsQueries ? key.vectors : row.vectors;
  const ready = ownsQueries ? key.ready : row.ready;
  const items = (name: string, rowUnits: number, source: (row: string, unit: string) => string) =>
    range(Math.ceil((passing * rowUnits) / threads)).map((item) => {
      const at = item === 0 ? 't' : `(t + ${item * threads}u)`;
      const [token, unit] = [`${at} / ${rowUnits}u`, `${at} % ${rowUnits}u`];
      const whole = (item + 1) * threads <= passing * rowUnits;
      const within = (statement: string) =>
        whole ? statement : `if (${at} < ${passing * rowUnits}u) { ${statement} }`;
      return { name: `${name}_${item}`, token, unit, within, source: source(token, unit) };
    });
  const codeItems = items(
    'copied_code',
    headDimPadded / 16,
    (token, unit) => `${codeBuffer}[codes_from + ${token} * ${codes}u + ${unit}]`,
  );
  const rowItems = items(
    'copied_row',
    (headDimPadded + valueDimPadded) / 8,
    (token, unit) => `${floatBuffer}[rows_from + ${token} * ${vectors}u + ${unit}]`,
  );
  const all = [...codeItems, ...rowItems];
  return {
    declare: `${all.map(({ name }) => `var ${name}: vec4<u32>;`).join(' ')} var copied_facts: vec4<u32>;`,
    /** The kernel has `passing_at`, the row of the step's first token. */
    load: `{ let codes_from = ${passingAt.codes('passing_at')}; let rows_from = ${passingAt.floats('passing_at')};
      ${all.map(({ name, within, source }) => within(`${name} = ${source};`)).join('\n      ')}
      if (t < ${passing}u) { copied_facts = ${floatBuffer}[rows_from + t * ${vectors}u + ${ready}u]; } }`,
    store: `
      ${codeItems.map(({ name, token, unit, within }) => within(`code_stage[${token} * ${codeStride}u + ${unit}] = ${name};`)).join(' ')}
      ${rowItems.map(({ name, token, unit, within }) => within(`row_stage[${token} * ${rowStride}u + ${unit}] = ${name};`)).join(' ')}
      if (t < ${passing}u) { fact_stage[t + t / 8u] = copied_facts; }`,
  };
}

/** Scores and dP of the staged tokens, stored as rows of own tokens. */
function multiplyPairs(kernel: Kernel): string {
  const { config, tiling, codes, values } = kernel;
  const { operations, qk, pv, own, headDimPadded } = config;
  const { scoreRows, scoreColumns, codeStride, rowStride, scoreStride } = tiling;
  const [R, N] = [range(scoreRows), range(scoreColumns)];
  const each = (f: (rt: number, n: number) => string) => N.flatMap((n) => R.map((rt) => f(rt, n))).join(' ');
  const product = (
    matrices: typeof qk,
    name: string,
    lefts: readonly (readonly string[])[],
    start: string,
    load: (n: number, s: number) => string,
    first: number,
  ) => `{
      ${each((rt, n) => `${operations.declareResult(matrices, `${name}_${rt}_${n}`)} ${operations.fill(matrices, `${name}_${rt}_${n}`, start)}`)}
      ${range((lefts[0] as readonly string[]).length)
        .map(
          (s) =>
            `{ ${N.map((n) => load(n, s)).join(' ')} ${each((rt, n) => operations.multiplyAccumulate(matrices, lefts[rt]?.[s] as string, `right_${n}_${s}`, `${name}_${rt}_${n}`))} }`,
        )
        .join('\n      ')}
      ${each((rt, n) =>
        operations.storeResult(
          matrices,
          `${name}_${rt}_${n}`,
          SCORES,
          `(score_rows * ${scoreRows * matrices.M}u + ${rt * matrices.M}u) * ${scoreStride}u + score_columns * ${(scoreColumns * matrices.N) / 4}u + ${first + (n * matrices.N) / 4}u`,
          scoreStride,
        ),
      )}
    }`;
  return `${product(
    qk,
    's',
    codes,
    `${SUM_ORIGIN.bits}i`,
    (n, s) =>
      operations.loadRight(
        qk,
        `right_${n}_${s}`,
        CODES,
        `score_columns * ${scoreColumns * qk.N * codeStride}u + ${n * qk.N * codeStride + unitsOf(qk.componentType, s * qk.K)}u`,
        codeStride,
      ),
    0,
  )}
    ${product(
      pv,
      'd',
      values,
      '0.0',
      (n, s) =>
        operations.loadRight(
          pv,
          `right_${n}_${s}`,
          ROWS,
          `score_columns * ${scoreColumns * pv.N * rowStride}u + ${n * pv.N * rowStride + headDimPadded / 8 + unitsOf(pv.componentType, s * pv.K)}u`,
          rowStride,
        ),
      own * scoreStride,
    )}`;
}

/** Weights times the staged rows, added to the sums. */
function addSums(kernel: Kernel): string {
  const { config, tiling, sums, weightMemory } = kernel;
  const { operations, pv, passing } = config;
  const { sumRows, rowStride, weightStride } = tiling;
  const channelUnits = unitsOf(pv.componentType, pv.N);
  return range(passing / pv.K)
    .flatMap((step) =>
      sums.map(({ names, tiles, operandAt, set }) => {
        const rights = range(tiles).map((j) =>
          operations.loadRightRows(
            pv,
            `from_${set}_${step}_${j}`,
            ROWS,
            `sum_channels * ${tiles * channelUnits}u + ${step * pv.K * rowStride + operandAt + j * channelUnits}u`,
            rowStride,
          ),
        );
        const rows = range(sumRows).map((rt) => {
          const left = `weight_${set}_${step}_${rt}`;
          const load = operations.loadLeft(
            pv,
            left,
            weightMemory,
            `(sum_rows * ${sumRows * pv.M}u + ${rt * pv.M}u) * ${weightStride}u + ${weightsAt(kernel, set) + unitsOf(pv.componentType, step * pv.K)}u`,
            weightStride,
          );
          return `{ ${load} ${range(tiles)
            .map((j) => operations.multiplyAccumulate(pv, left, `from_${set}_${step}_${j}`, names[rt]?.[j] as string))
            .join(' ')} }`;
        });
        return `{ ${rights.join(' ')} ${rows.join(' ')} }`;
      }),
    )
    .join('\n      ');
}

/** Four pairs of a row in every case: `x` and `y` from score and dP to the weights of dV, and of dQ or dK. */
function anyPairs({ gradient, parts }: Kernel, r: number, q: number, x: string, y: string): string {
  const { ownsQueries, row } = parts;
  const E = range(4);
  const own: Parts = { ...parts, ownToken: () => `row_${r}`, passingToken: (e) => `(token_${q} + ${e}u)` };
  const passing = E.map((e) => [`passing_at + token_${q} + ${e}u`, `(u32(start) + token_${q} + ${e}u)`] as const);
  const ownAt = [`own_at + row_${r}`, `(first + row_${r})`] as const;
  const numbers = ownsQueries
    ? [rowNumbers(gradient, parts, 0, ...ownAt), ...passing.map((at, e) => keyNumbers(parts, e, ...at))]
    : [keyNumbers(parts, 0, ...ownAt), ...passing.map((at, e) => rowNumbers(gradient, parts, e, ...at))];
  const rowsPower = (n: number, token: string) =>
    `let power_${n} = bitcast<f32>(gradient_rows[(${token}) * ${row.vectors}u + ${row.scales}u - P.gradientRowBase].y);`;
  const powers = ownsQueries ? [rowsPower(0, ownAt[0])] : passing.map(([token], e) => rowsPower(e, token));
  const c = (e: number) => 'xyzw'[e] as string;
  const powerOf = (e: number) => `power_${ownsQueries ? 0 : e}`;
  const valuePower = (e: number) => (ownsQueries ? `facts_of_${q}_${e}.y` : `own_${r}.y`);
  const pairs = E.map(
    (e) => `
        let s_0_${e} = bitcast<i32>(${x}.${c(e)}) - ${SUM_ORIGIN.bits}i; let d_0_${e} = ${y}.${c(e)} * (${powerOf(e)} * ${valuePower(e)});
        ${weigh(gradient, own, 0, e)}`,
  );
  return `{ var poison = 0u; ${ownsQueries ? '' : 'var bad_0 = 0u;'}
        ${numbers.join('')}
        ${powers.join(' ')}
        ${pairs.join('')}
        ${ownsQueries ? '' : `${x} = vec4<f32>(${E.map((e) => `p_0_${e} * power_${e}`).join(', ')});\n        if (bad_0 != 0u) { atomicOr(&bad[row_${r}], bad_0); }`}
        ${y} = vec4<f32>(${E.map((e) => `ds_0_${e} * abs(facts_of_${q}_${e}.z)`).join(', ')}); }`;
}

/** Four pairs of a row that sees all tokens of the step, without flags, mask and softcap. */
function plainPairs({ parts: { ownsQueries } }: Kernel, r: number, q: number, x: string, y: string): string {
  const of = (field: string) =>
    `vec4<f32>(${range(4)
      .map((e) => `facts_of_${q}_${e}.${field}`)
      .join(', ')})`;
  const own = (field: string) => `vec4<f32>(own_${r}.${field})`;
  const [query, key] = ownsQueries ? [own, of] : [of, own];
  return `{ let f = (${x} - vec4<f32>(${SUM_ORIGIN.value}.0)) * (${query('x')} * ${key('x')}) - ${query('y')};
        let p = exp2(min(f, vec4<f32>(${LARGEST_EXPONENT})));
        let s = p * ${of('z')} * (${y} * ${key('y')} - ${query('w')});
        ${x} = p; ${y} = select(vec4<f32>(), s, p > vec4<f32>()); }`;
}

/** The lanes' part: a row's scores and dP to its weights, and how they are scaled; `write` puts them into memory. */
function weighPairs(kernel: Kernel): { readonly weigh: string; readonly write: string } {
  const { config, gradient, parts, tiling, sums, weightMemory } = kernel;
  const { own, operations } = config;
  const { rowsInTurn, scoreStride, weightStride, lanesPerRow } = tiling;
  const R = range(rowsInTurn);
  const half = own * scoreStride;
  const read = (r: number) =>
    [0, 1]
      .map((q) => {
        const at = `row_${r} * ${scoreStride}u + part * 2u + (swap_${r} ^ ${q}u)`;
        return `var x_${r}_${q} = scores[${at}]; var y_${r}_${q} = scores[${at} + ${half}u];`;
      })
      .join(' ');
  const flagged = (q: number) =>
    parts.ownsQueries
      ? `((${range(4)
          .map((e) => `bitcast<u32>(facts_of_${q}_${e}.w)`)
          .join(' | ')}) & ${FLAG_UNSMOOTHED}u) != 0u`
      : `min(min(facts_of_${q}_0.z, facts_of_${q}_1.z), min(facts_of_${q}_2.z, facts_of_${q}_3.z)) < 0.0`;
  const ownFlagged = (r: number) =>
    parts.ownsQueries ? `own_${r}.z < 0.0` : `(bitcast<u32>(own_${r}.w) & ${FLAG_UNSMOOTHED}u) != 0u`;
  const pairs = (r: number, q: number) => {
    const [x, y] = [`x_${r}_${q}`, `y_${r}_${q}`];
    const any = anyPairs(kernel, r, q, x, y);
    return `{ let token_${q} = part * 8u + (swap_${r} ^ ${q}u) * 4u;
        ${range(4)
          .map((e) => `let facts_of_${q}_${e} = bitcast<vec4<f32>>(fact_stage[token_${q} + part + ${e}u]);`)
          .join(' ')}
        ${scoresAreFloat(gradient) || gradient.mask !== undefined ? any : `if (edge || ${ownFlagged(r)} || ${flagged(q)}) ${any} else ${plainPairs(kernel, r, q, x, y)}`} }`;
  };
  const halves = (p: string) => `vec2<u32>(pack2x16float(${p}.xy), pack2x16float(${p}.zw))`;
  const write = (r: number, set: number) => {
    const [w, g] = [set === 0 ? 'y' : 'x', `scale_${set}_${r}`];
    const packed = `vec4<u32>(${[0, 1].map((q) => halves(`(${w}_${r}_${q} * ${g})`)).join(', ')})`;
    const value = `select(w, w.zwxy, swap_${r} == 1u)`;
    const place = `${weightMemory.name}[row_${r} * ${weightStride}u + part + ${weightsAt(kernel, set)}u]`;
    return `{ let w = ${packed}; ${place} = ${weightMemory === SCORES ? `bitcast<vec4<f32>>(${value})` : value}; }`;
  };
  const scale = (r: number, set: number) => {
    const w = set === 0 ? 'y' : 'x';
    const top = `top_${set}_${r}`;
    const g = `scale_${set}_${r}`;
    return `var ${top}: f32; { let w = max(abs(${w}_${r}_0), abs(${w}_${r}_1)); ${top} = max(max(w.x, w.y), max(w.z, w.w)); }
      ${range(Math.log2(lanesPerRow))
        .map((s) => operations.shuffleMax(top, 1 << s))
        .join(' ')}
      if (${top} > limit_${set}_${r}) {
        let next = bitcast<f32>(clamp(${SCALED_FIELD}u - min(bitcast<u32>(${top}) >> 23u, ${SCALED_FIELD - 1}u), 1u, 253u) << 23u);
        if (limit_${set}_${r} > 0.0) { row_factor[row_${r} + ${set * own}u] = next / ${g}; atomicStore(&moved[step % 2u], 1u); }
        ${g} = next; limit_${set}_${r} = ${LARGEST_WEIGHT} / max(next, 1.0e-30f);
      }`;
  };
  const each = (f: (r: number) => string) => R.map(f).join('\n      ');
  return {
    weigh: `${each(read)}
      ${each((r) => [0, 1].map((q) => pairs(r, q)).join('\n      '))}
      ${each((r) => sums.map(({ set }) => scale(r, set)).join('\n      '))}`,
    write: each((r) => sums.map(({ set }) => write(r, set)).join(' ')),
  };
}

const factorAt = ({ config: { own } }: Kernel, set: number) => `row_factor[row + ${set * own}u]`;

const passSums = (kernel: Kernel, { names, tiles }: Sum, each: string, loadAgain: boolean) => {
  const { config, tiling } = kernel;
  return throughMemory(
    {
      ...{ operations: config.operations, product: config.pv, lanes: config.lanes, memory: SCORES, names },
      rows: `sum_rows * ${tiling.sumRows * config.pv.M}u`,
      channels: `sum_channels * ${tiles * config.pv.N}u`,
      atOnce: Math.min(tiles, tiling.atOnce),
    },
    { each, loadAgain },
  );
};

/** Rows that outgrew their weights' scale: their sums in the new one. */
const rescale = (kernel: Kernel) =>
  kernel.sums
    .map((sum) => passSums(kernel, sum, `scores[place] = scores[place] * ${factorAt(kernel, sum.set)};`, true))
    .join('\n      ');

/** The sums to the gradients. */
function storeGradients(kernel: Kernel): string {
  const { config, parts, sums } = kernel;
  const { dtypes, headDim, valueDim } = config;
  const { ownsQueries, row } = parts;
  const place = (field: number, name: string) =>
    `(place_of(sequence, ${field}u) - P.${name}Base + head * P.${name}HeadStride + (first + row) * P.${name}TokenStride)`;
  const flags = ownsQueries
    ? `gradient_rows[(own_at + row) * ${row.vectors}u + ${row.facts}u - P.gradientRowBase].w`
    : 'atomicLoad(&bad[row])';
  return sums
    .map((sum) => {
      const gradient = sum.set === 0;
      const stored = gradient
        ? store('first_gradient', 'at', dtypes[0], headDim, 'channel', 'x_of', () => 'is_bad')
        : store(
            'value_gradient',
            'at',
            dtypes[1],
            valueDim,
            'channel',
            'x_of',
            (e) =>
              `(is_bad || ((atomicLoad(&channels[row * ${row.channelWords}u + channel / 32u]) >> (channel % 32u + ${e}u)) & 1u) != 0u)`,
          );
      const at = gradient ? place(ownsQueries ? PLACE.dq : PLACE.dk, 'first') : place(PLACE.dv, 'value');
      const each = `if (row < count) {
          let x_of = scores[place] * (${factorAt(kernel, sum.set)}${gradient ? ' * P.smScale' : ''});
          let is_bad = (${flags} & ${gradient ? BAD_SCORES : ROW_FLAGS.weights}u) != 0u; let at = ${at};
          ${stored} }`;
      return passSums(kernel, sum, each, false);
    })
    .join('\n  ');
}

function declarations({ config, gradient, parts, tiling, weightMemory }: Kernel): string {
  const { own, operations, qk, pv, dtypes } = config;
  const { ownsQueries, row } = parts;
  const sets = ownsQueries ? 1 : 2;
  const usesF16 = [qk, pv].some(({ componentType }) => componentType === 'f16');
  return `
enable subgroups;
${usesF16 && operations.enable !== '' ? 'enable f16;' : ''}
${operations.enable}
${scoreGradientDeclarations(gradient, GRADIENT_PARAMS)}
${PLACES}
@group(0) @binding(7) var<storage, read_write> first_gradient: array<u32>;
${ownsQueries ? '' : '@group(0) @binding(8) var<storage, read_write> value_gradient: array<u32>;'}
${packer(ownsQueries ? dtypes.slice(0, 1) : dtypes)}
${workgroupUnits(SCORES, tiling.scores)}
${weightMemory === SCORES ? '' : workgroupUnits(WEIGHTS, tiling.weights)}
${workgroupUnits(CODES, tiling.codeStage)}
${workgroupUnits(ROWS, tiling.rowStage)}
var<workgroup> fact_stage: array<vec4<u32>, ${tiling.factStage}>;
var<workgroup> row_factor: array<f32, ${sets * own}>;
var<workgroup> moved: array<atomic<u32>, 4>;
${
  ownsQueries
    ? ''
    : `var<workgroup> bad: array<atomic<u32>, ${own}>;
var<workgroup> channels: array<atomic<u32>, ${own * row.channelWords}>;`
}
${operations.declarations(tiling.threads)}`;
}

/** Where the passing tokens of step `step` are: `member`, `query_head`, `start`, `passing_at`. */
const stepPlace = ({ parts: { ownsQueries }, config: { passing } }: Kernel, step: string) => `
      let member = ${step} / per; let start = begin + i32(${step} % per) * ${passing};
      ${
        ownsQueries
          ? 'let query_head = head; let passing_at = key_first + u32(start);'
          : `let query_head = head * P.groupSize + member; let passing_at = query_head * P.queryRowsPerHead + sequence_field(sequence, ${SEQUENCE.queryRow}u) + u32(start);`
      }`;

/** Whether each of the queries from `query` on sees each of the keys from `key` on. */
const sawAll = (query: string, queries: number, key: string, keys: number) =>
  `${query} + ${queries} <= i32(query_length) && ${key} + ${keys} <= key_length && ${key} + ${keys - 1} <= upper + ${query} && ${key} >= lower + ${query} + ${queries - 1}`;

export function matrixGradientKernel(config: MatrixGradientConfig): string {
  const kernel = kernelOf(config);
  const { parts, tiling, sums } = kernel;
  const { operations, pv, lanes, own, passing, memory } = config;
  const { ownsQueries } = parts;
  const { threads, rowsInTurn, lanesPerRow, rowsAtOnce, rowsEach } = tiling;
  const R = range(rowsInTurn);
  const copy = copies(kernel);
  const keyFirst = `P.keyRowsPerHead + sequence_field(sequence, ${SEQUENCE.keyRow}u)`;
  const [ready, buffer] = ownsQueries ? [parts.row.ready, 'gradient_rows'] : [parts.key.ready, 'gradient_keys'];
  const rows = R.map(
    (r) => `
  let row_${r} = subgroup * ${rowsEach}u + lane / ${lanesPerRow}u + ${r * rowsAtOnce}u;
  let swap_${r} = row_${r} % 2u;
  let own_${r} = bitcast<vec4<f32>>(${buffer}[${parts.ownAt.floats(`own_at + row_${r}`)} + ${ready}u]);
  ${sums.map(({ set }) => `var scale_${set}_${r} = 1.0; var limit_${set}_${r} = 0.0; row_factor[row_${r} + ${set * own}u] = 1.0;`).join(' ')}`,
  );
  const range_ = ownsQueries
    ? `let own_at = head * P.queryRowsPerHead + sequence_field(sequence, ${SEQUENCE.queryRow}u) + first;
  let key_first = head / P.groupSize * ${keyFirst};
  let begin = max(0, lower + i32(first)) / ${passing} * ${passing};
  let end = min(key_length, upper + i32(first + count));`
    : `let own_at = head * ${keyFirst} + first;
  let begin = max(0, i32(first) - upper) / ${passing} * ${passing};
  let end = min(i32(query_length), i32(first + count) - lower);`;
  const saw = ownsQueries ? sawAll('i32(first)', own, 'start', passing) : sawAll('start', passing, 'i32(first)', own);
  const loadStep = (step: string) =>
    `{ let next = min(${step}, steps - 1u); ${stepPlace(kernel, 'next')} ${copy.load} }`;
  const held = heldRows(kernel);
  const scored = multiplyPairs(kernel);
  const reset = R.flatMap((r) => sums.map(({ set }) => `row_factor[row_${r} + ${set * own}u] = 1.0;`)).join(' ');
  const lanesPart = weighPairs(kernel);
  // Over the scores, weights can be written when all lanes have read, and the scores' memory is free again.
  const inPlace = memory === 'place';
  const weighed = `
      ${stepPlace(kernel, 'step')}
      let edge = !(${saw});
      if (t == 0u) { atomicStore(&moved[(step + 1u) % 2u], 0u); }
      ${lanesPart.weigh}
      ${inPlace ? '' : lanesPart.write}`;
  const moved = `if (workgroupUniformLoad(&moved[step % 2u]) != 0u) {
      ${rescale(kernel)}
      ${reset}
      }
      ${inPlace ? `${lanesPart.write}\n      workgroupBarrier();` : ''}`;
  const loop = `
    for (var step = 0u; step < steps; step++) {
      ${scored}
      workgroupBarrier();
      ${weighed}
      ${moved}
      ${addSums(kernel)}
      workgroupBarrier();
      ${copy.store}
      ${loadStep('step + 2u')}
      workgroupBarrier();
    }`;
  const stored = storeGradients(kernel);
  const main = `
@compute @workgroup_size(${threads})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let subgroup = t / ${lanes}u;
  let lane = t % ${lanes}u;
  let part = lane % ${lanesPerRow}u;
  let score_rows = subgroup / ${tiling.columnGroups}u;
  let score_columns = subgroup % ${tiling.columnGroups}u;
  let sum_rows = subgroup / ${tiling.channelGroups}u;
  let sum_channels = subgroup % ${tiling.channelGroups}u;
${OWN_TILE}
  let query_length = sequence_field(sequence, ${SEQUENCE.queryLength}u);
  let key_length = i32(sequence_field(sequence, ${SEQUENCE.keyLength}u));
  let lower = i32(sequence_field(sequence, ${SEQUENCE.lower}u));
  let upper = i32(sequence_field(sequence, ${SEQUENCE.upper}u));
  ${range_}
  let per = u32(max(0, end - begin + ${passing - 1}) / ${passing});
  let steps = per${ownsQueries ? '' : ' * P.groupSize'};
  ${rows.join('')}
  ${sums.flatMap(({ names }) => names.flatMap((list) => list.map((name) => operations.declareResult(pv, name)))).join(' ')}
  if (steps > 0u) {
    ${held}
    ${copy.declare}
    ${loadStep('0u')}
    ${copy.store}
    ${loadStep('1u')}
    workgroupBarrier();
    ${loop}
  }
  workgroupBarrier();
  if (part == 0u) { ${R.flatMap((r) => sums.map(({ set }) => `row_factor[row_${r} + ${set * own}u] = 1.0 / scale_${set}_${r};`)).join(' ')} }
  workgroupBarrier();
  ${stored}
}`;
  return `${declarations(kernel)}
${main}`;
}
