/**
 * What ranks must give to the last bit, whoever they are: the blocks of their schedule one after another at one place, each waited for,
 * with tensors of its own. Nothing is sent, nothing overlaps, no memory is used twice, and keys and values are held by the cache of
 * `prepareKeyValue` instead of a rank's slots.
 */
import { bandOf } from '../../src/attention/band.ts';
import type { AttentionOptions } from '../../src/attention/options.ts';
import { createProblem } from '../../src/attention/problem.ts';
import { chooseKernel } from '../../src/backends/choice.ts';
import type { Partial, Place } from '../../src/distributed/place.ts';
import { scheduleOf, type Topology } from '../../src/distributed/schedule.ts';
import { lengthOf, type Span, type TokenOrder, totalOf } from '../../src/distributed/shards.ts';
import { toFloat32, writeValues } from '../../src/tensor/access.ts';
import type { DType } from '../../src/tensor/dtype.ts';
import { emptyTensor, slice, type Tensor, type TensorView } from '../../src/tensor/tensor.ts';

const [HEADS, TOKENS] = [1, 2];

/** Some heads' tokens of spans, one after another, in memory of their own. */
function pieceOf(view: Tensor, heads: Span, spans: readonly Span[]): Tensor {
  const [batch, , , dim] = view.shape as [number, number, number, number];
  const piece = emptyTensor([batch, lengthOf(heads), totalOf(spans), dim], view.dtype as DType);
  let at = 0;
  for (const { start, end } of spans) {
    const from = slice(slice(view, HEADS, heads.start, heads.end), TOKENS, start, end);
    writeValues(toFloat32(from), slice(piece, TOKENS, at, at + end - start));
    at += end - start;
  }
  return piece;
}

/** The way back: a piece of all heads given and the tokens of spans. */
function putBack(piece: Tensor, whole: Tensor, heads: Span, spans: readonly Span[]): void {
  let at = 0;
  for (const { start, end } of spans) {
    const into = slice(slice(whole, HEADS, heads.start, heads.end), TOKENS, start, end);
    writeValues(toFloat32(slice(piece, TOKENS, at, at + end - start)), into);
    at += end - start;
  }
}

/**
 * @param inputs `[B,H,L,D]` in this process's memory
 * @param options of the call, which has no mask and no joint tokens
 * @returns `[B,Hq,Lq,Dv]` and `[B,Hq,Lq,1]`
 */
export async function blockByBlock(
  place: Place,
  { q, k, v }: Readonly<Record<'q' | 'k' | 'v', Tensor>>,
  order: TokenOrder,
  { ulysses, ring, ...options }: Topology & AttentionOptions,
): Promise<{ readonly output: Float32Array; readonly lse: Float32Array }> {
  const { backend } = place;
  const problem = createProblem(q, k, v, { ...options, tensorLayout: 'HND' });
  const kernel = await chooseKernel(backend, problem, options, true);
  const { batch, queryHeads, queryLength, valueDim } = problem;
  const limits = bandOf(problem, problem);
  const shape = { ...problem, queryOrder: order, keyOrder: order, limits, masked: false } as const;
  const { smScale, softcap } = problem;
  const blockOptions = { smScale, softcap, tensorLayout: 'HND', returnLse: true } as const;
  const output = emptyTensor([batch, queryHeads, queryLength, valueDim], q.dtype as DType);
  const lse = emptyTensor([batch, queryHeads, queryLength, 1], 'float32');
  const made: TensorView[] = [];
  const keep = <T extends TensorView>(view: T): T => {
    made.push(view);
    return view;
  };
  for (let rank = 0; rank < ulysses * ring; rank++) {
    const { rounds, rowQueries, heads } = scheduleOf(shape, { ulysses, ring }, rank);
    if (totalOf(rowQueries) === 0) continue;
    const queries = pieceOf(q, heads.query, rowQueries);
    const parts: Partial[] = [];
    for (const { keys, blocks } of rounds.flat()) {
      if (blocks.length === 0) continue;
      const [ownK, ownV] = [k, v].map((each) => keep(place.upload(pieceOf(each, heads.kv, [keys])))) as [
        TensorView,
        TensorView,
      ];
      const held = createProblem(ownK, ownK, ownV, blockOptions);
      const prepared = await backend.prepareKeyValue(held, kernel, ownK, ownV, {});
      for (const { queries: span, band } of blocks) {
        const all = { start: 0, end: lengthOf(heads.query) };
        const own = keep(place.upload(pieceOf(queries, all, [span])));
        const block = { ...createProblem(own, ownK, ownV, blockOptions), band };
        const part = await prepared.attend(own, block, {}, {});
        await place.download(keep(part.output));
        parts.push({ queries: span, output: part.output, lse: keep(part.lse as TensorView) });
      }
      prepared.dispose();
    }
    const rankRows = [batch, lengthOf(heads.query), totalOf(rowQueries)];
    const rankOutput = keep(place.empty([...rankRows, valueDim], q.dtype as DType));
    const rankLse = keep(place.empty([...rankRows, 1], 'float32'));
    const merge = place.merge();
    merge.run(parts, rankOutput, rankLse);
    putBack((await place.download(rankOutput)) as Tensor, output, heads.query, rowQueries);
    putBack((await place.download(rankLse)) as Tensor, lse, heads.query, rowQueries);
    merge.dispose();
    for (const view of made.splice(0)) place.free(view);
  }
  return { output: toFloat32(output), lse: toFloat32(lse) };
}
