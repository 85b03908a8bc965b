/**
 * Dispatches and the ranges of buffers that they bind. A stage of the computation covers ranges of heads, tiles and key
 * splits; where a range asks for more than one binding or one dispatch dimension may have, it is halved until it fits.
 */
import type { OutputName } from '../../../attention/outputs.ts';
import { SageAttentionError } from '../../../errors.ts';
import type { Capabilities } from '../capabilities.ts';

/** The buffers of a run: the caller's and the plan's. */
export type BufferName =
  | 'q'
  | 'k'
  | 'v'
  | 'mask'
  | 'sinks'
  | 'blockMap'
  | OutputName
  | 'tables'
  | 'queryRows'
  | 'queryMeans'
  | 'meanScores'
  | 'keys'
  | 'values'
  | 'partials'
  | 'newPartials'
  | 'rawKeys'
  | 'rawValues'
  | 'visible'
  | 'maskMaxima'
  | 'visibleBlocks'
  | 'records'
  | 'pooledQueries'
  | 'pooledKeys'
  | 'keyMean'
  | 'blockWeights'
  | 'dOutput'
  | 'gradientRows'
  | 'gradientKeys'
  | 'dqWide'
  | 'dkWide'
  | 'dvWide';

/** A range of a buffer in bytes, `end` exclusive. */
export interface Span {
  readonly start: number;
  readonly end: number;
}

export interface Binding extends Span {
  readonly slot: number;
  readonly buffer: BufferName;
}

export interface Launch {
  readonly label: string;
  readonly code: string;
  /** The uniform parameters. */
  readonly params: ArrayBuffer;
  readonly bindings: readonly Binding[];
  readonly groups: readonly [x: number, y: number, z: number];
}

/** Part of a stage: half-open ranges along its three dimensions, `[start, end]`. */
export interface Unit {
  readonly tiles: readonly [number, number];
  readonly heads: readonly [number, number];
  readonly splits: readonly [number, number];
}

/** A stage's bindings for a unit: unaligned spans in bytes. `undefined` spans are not bound. */
export type SpansOf = (unit: Unit) => readonly Binding[];

/** Rounds a span outwards: its start to the device's alignment, its end to whole vectors. */
export function aligned<S extends Span>(span: S, alignment: number): S {
  const start = Math.floor(span.start / alignment) * alignment;
  return { ...span, start, end: Math.max(start + 16, Math.ceil(span.end / 4) * 4) };
}

const size = ([start, end]: readonly [number, number]) => end - start;

/** Halves a stage's whole range until each part fits the device. */
export function unitsOf(whole: Unit, spansOf: SpansOf, capabilities: Capabilities): Unit[] {
  const { bindingBytes, bindingAlignment, dispatch } = capabilities;
  if (size(whole.tiles) === 0 || size(whole.heads) === 0 || size(whole.splits) === 0) return [];
  const largest = (unit: Unit) =>
    spansOf(unit).reduce((most, span) => {
      const { start, end } = aligned(span, bindingAlignment);
      return Math.max(most, end - start);
    }, 0);
  const bytes = largest(whole);
  const dispatchable = (['tiles', 'heads', 'splits'] as const).every((axis) => size(whole[axis]) <= dispatch);
  if (bytes <= bindingBytes && dispatchable) return [whole];

  const halves = (['heads', 'tiles', 'splits'] as const)
    .filter((axis) => size(whole[axis]) > 1)
    .map((axis) => {
      const [start, end] = whole[axis];
      const middle = start + Math.ceil((end - start) / 2);
      const first: Unit = { ...whole, [axis]: [start, middle] };
      const second: Unit = { ...whole, [axis]: [middle, end] };
      // Dimensions that are too long for a dispatch are halved first.
      const score = size(whole[axis]) > dispatch ? -1 : Math.max(largest(first), largest(second));
      return { first, second, score };
    })
    .sort((a, b) => a.score - b.score);
  const best = halves[0];
  if (best === undefined) {
    throw new SageAttentionError(
      'unsupported-size',
      `a single tile of one head needs a binding of ${bytes} bytes, more than this device's maxStorageBufferBindingSize of ${bindingBytes}`,
      { expected: `at most ${bindingBytes} bytes`, received: `${bytes} bytes` },
    );
  }
  return [...unitsOf(best.first, spansOf, capabilities), ...unitsOf(best.second, spansOf, capabilities)];
}
