/** What `bench` prints: a table for each shape, then a sentence on what is fastest there. */
import type { Machine } from '../measure/machine.ts';
import type { BenchPeer, BenchResult } from './bench-report.ts';
import type { Accuracy } from './library.ts';
import { bold, cosine, dim, duration, paragraph, print, rateCell, small, table } from './terminal.ts';

const shapeText = ({ length, headDim, isCausal }: Pick<BenchResult, 'length' | 'headDim' | 'isCausal'>) =>
  `${length} tokens, head dim ${headDim}${isCausal ? ', causal' : ''}`;

const peerShape = (peer: BenchPeer) => shapeText({ ...peer, isCausal: peer.isCausal ?? false });

/** @param remote there is a column for the time with copies */
function row(result: BenchResult, remote: boolean): string[] {
  const { backend, kernel, medianMs, withCopiesMs, gflops, accuracy, failed } = result;
  if (medianMs === undefined || gflops === undefined || accuracy === undefined) {
    return [backend, kernel, failed === undefined ? 'refused' : 'failed'];
  }
  return [
    backend,
    kernel,
    duration(medianMs),
    ...(remote ? [withCopiesMs === undefined ? '' : duration(withCopiesMs)] : []),
    rateCell(gflops),
    cosine(accuracy.cosineSimilarity),
    small(accuracy.relativeL1),
  ];
}

const peerRow = ({ name, medianMs }: BenchPeer): string[] => [
  '',
  name,
  medianMs === undefined ? 'failed' : duration(medianMs),
];

/** Above this relative L1 a kernel is for where four bits are wanted, and no answer to "is it faster?". */
const CLOSE_ENOUGH = 0.1;

/** The fastest kernel that quantizes and is close, beside exact attention of this package and the other engine. */
function verdict(shape: string, results: readonly BenchResult[], peers: readonly BenchPeer[]): string[] {
  const measured = results.filter(({ medianMs }) => medianMs !== undefined);
  const byTime = measured.sort((a, b) => (a.medianMs as number) - (b.medianMs as number));
  const quantized = byTime.filter(({ kernel }) => kernel !== 'exact');
  const best = quantized.find(({ accuracy }) => (accuracy?.relativeL1 ?? 1) <= CLOSE_ENOUGH) ?? quantized[0];
  if (best === undefined) return [];
  const exact = byTime.find(({ kernel }) => kernel === 'exact');
  const against = (name: string, time: number | undefined) =>
    time === undefined ? [] : [`${(time / (best.medianMs as number)).toFixed(1)} times as fast as ${name}`];
  const ratios = [
    ...against(`exact float32 of this package on ${exact?.backend}`, exact?.medianMs),
    ...peers.flatMap(({ name, medianMs }) => against(name, medianMs)),
  ];
  const times = [exact?.medianMs, ...peers.map(({ medianMs }) => medianMs)].filter((time) => time !== undefined);
  const gains = times.every((time) => time >= (best.medianMs as number));
  return [
    `${shape}: ${best.kernel} on ${best.backend} is ${gains ? 'fastest' : 'the fastest that quantizes, and gains nothing here'}, ${duration(best.medianMs as number)}` +
      `${ratios.length === 0 ? '' : `, ${ratios.join(' and ')}`}; relative L1 ${small((best.accuracy as Accuracy).relativeL1)}.`,
  ];
}

export function printBench(
  title: string,
  machine: Machine,
  { repetitions, seed }: { readonly repetitions: number; readonly seed: number },
  results: readonly BenchResult[],
  peers: readonly BenchPeer[],
): void {
  const remote = results.some(({ withCopiesMs }) => withCopiesMs !== undefined);
  const rows = results.find((result) => result.rows !== undefined)?.rows;
  print(bold(title));
  print(dim(`${machine.runtime}, ${machine.cpu}, ${machine.cores} cores`));
  print(
    dim(
      paragraph(
        `time: median of ${repetitions}, tensors where the backend computes.${remote ? ' copies: from the CPU and back to it, too.' : ''} ` +
          `rel. L1 and cosine: against exact attention in float64${rows === undefined ? '' : `, ${rows} rows of each head`}. Seed ${seed}.`,
      ),
    ),
  );
  const shapes = [...new Set(results.map(shapeText))];
  const parts = shapes.map((shape) => ({
    shape,
    results: results.filter((result) => shapeText(result) === shape),
    peers: peers.filter((peer) => peerShape(peer) === shape),
  }));
  for (const part of parts) {
    print();
    print(bold(part.shape));
    print(
      table(
        ['backend', 'kernel', '>time', ...(remote ? ['>copies'] : []), '>FLOP/s', '>cosine', '>rel. L1'],
        [...part.results.map((result) => row(result, remote)), ...part.peers.map(peerRow)],
      ),
    );
    for (const { kernel, refused, failed } of part.results) {
      const reason = refused ?? failed;
      if (reason !== undefined) print(paragraph(`${kernel}: ${reason}`));
    }
    for (const { name, failed } of part.peers) if (failed !== undefined) print(paragraph(`${name}: ${failed}`));
  }
  const lines = parts.flatMap((part) => verdict(part.shape, part.results, part.peers));
  if (lines.length > 0) print(`\n${bold('Verdict')}`);
  for (const line of lines) print(paragraph(line));
}
