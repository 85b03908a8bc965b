import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type GraphProto, graph as makeGraph, type NodeProto, node, tensorProto, untypedValue } from '../onnx/codec.ts';
import { constantScalar } from './constants.ts';
import { type GraphIndex, indexGraph, isAcyclic, nestedNodes } from './graph.ts';
import { elementKind } from './types.ts';
import { graphFunction } from './walk.ts';

const DEEP = 20_000;
const one = tensorProto('one', 'float32', [], Float32Array.of(1));

const indexOf = (nodes: readonly NodeProto[]): GraphIndex =>
  indexGraph(makeGraph({ name: 'g', nodes, inputs: [], outputs: [], initializers: [one] }), 17);

/** `v0` is computed from the others named by its list, and so on. */
const edges = (maximum: number) =>
  fc.array(fc.array(fc.integer({ min: 0, max: maximum - 1 }), { maxLength: 4 }), {
    minLength: maximum,
    maxLength: maximum,
  });
const nodesOf = (lists: readonly (readonly number[])[]) =>
  lists.map((list, i) =>
    node(
      'Sum',
      list.map((j) => `v${j}`),
      [`v${i}`],
    ),
  );

describe('graphFunction', () => {
  it('agrees with its definition on every graph without cycles, and asks once for each value', () => {
    fc.assert(
      fc.property(edges(12), (lists) => {
        const forward = lists.map((list, i) => list.filter((j) => j > i));
        const index = indexOf(nodesOf(forward));
        const asked: string[] = [];
        const paths = graphFunction<number>({
          cyclic: Number.NaN,
          dependencies: (of, value) => of.producer(value)?.input ?? [],
          result: (of, value, known) => {
            asked.push(value);
            return (of.producer(value)?.input ?? []).reduce((sum, name) => sum + known(name), 1);
          },
        });
        const expected = (i: number): number => (forward[i] as number[]).reduce((sum, j) => sum + expected(j), 1);
        for (let i = 0; i < forward.length; i++) expect(paths(index, `v${i}`)).toBe(expected(i));
        expect(new Set(asked).size).toBe(asked.length);
      }),
    );
  });

  it('ends on every graph with cycles', () => {
    fc.assert(
      fc.property(edges(8), (lists) => {
        const index = indexOf(nodesOf(lists));
        for (let i = 0; i < lists.length; i++) {
          expect(constantScalar(index, `v${i}`)).toBeUndefined();
          expect(elementKind(index, `v${i}`)).toBe('float');
        }
      }),
    );
  });

  it('follows deep chains and the 2^n paths of n squarings', () => {
    const chain = (opType: string, inputs: (of: string) => string[]) =>
      Array.from({ length: DEEP }, (_, i) => node(opType, inputs(i === 0 ? 'one' : `v${i - 1}`), [`v${i}`]));
    expect(constantScalar(indexOf(chain('Mul', (of) => [of, of])), `v${DEEP - 1}`)).toBe(1);
    expect(constantScalar(indexOf(chain('Identity', (of) => [of])), `v${DEEP - 1}`)).toBe(1);
    expect(elementKind(indexOf(chain('Add', (of) => [of, of])), `v${DEEP - 1}`)).toBe('float');
  });
});

describe('isAcyclic', () => {
  it('is true where an order exists, whichever order the nodes are written in', () => {
    fc.assert(
      fc.property(edges(10), (lists) => {
        const reaches = (from: number, to: number, seen = new Set<number>()): boolean =>
          (lists[from] as number[]).some(
            (next) => next === to || (!seen.has(next) && reaches(next, to, seen.add(next))),
          );
        expect(isAcyclic(indexOf(nodesOf(lists)))).toBe(!lists.some((_, i) => reaches(i, i)));
      }),
    );
  });
});

describe('subgraphs', () => {
  interface Nested {
    readonly locals: readonly string[];
    readonly reads: readonly string[];
    readonly inner: readonly Nested[];
    readonly output: string;
  }
  const name = fc.constantFrom('a', 'b', 'c', 'd', 'e');
  // Two graphs in each without a bound on the depth are sometimes a million.
  const nested: (depth: number) => fc.Arbitrary<Nested> = fc.memo((depth) =>
    fc.record({
      locals: fc.uniqueArray(name, { maxLength: 2 }),
      reads: fc.array(name, { maxLength: 2 }),
      inner: depth > 1 ? fc.array(nested(depth - 1), { maxLength: 2 }) : fc.constant([]),
      output: name,
    }),
  );
  const toGraph = ({ locals, reads, inner, output }: Nested): GraphProto =>
    makeGraph({
      name: 'inner',
      nodes: [
        node('Sum', [...reads], [...locals]),
        ...inner.map((each) => node('If', ['cond'], [], { attributes: { then_branch: toGraph(each) } })),
      ],
      inputs: [],
      outputs: [untypedValue(output)],
      initializers: [],
    });
  /** What a graph reads of those around it, by the definition. */
  const captured = ({ locals, reads, inner, output }: Nested): string[] =>
    [...reads, ...inner.flatMap((each) => ['cond', ...captured(each)]), output].filter(
      (read) => !locals.includes(read),
    );
  const size = ({ inner }: Nested): number => 1 + inner.reduce((sum, each) => sum + 1 + size(each), 0);

  it('are read as they are defined, at any depth', () => {
    fc.assert(
      fc.property(nested(5), (made) => {
        const outer = node('If', ['cond'], ['y'], { attributes: { then_branch: toGraph(made) } });
        const index = indexOf([outer]);
        expect([...index.readsOf(outer)].sort()).toEqual([...new Set(['cond', ...captured(made)])].sort());
        expect(nestedNodes(outer)).toHaveLength(size(made));
      }),
    );
  });

  it('are followed deeper than a call stack', () => {
    let inner = node('Identity', ['x'], ['v']);
    for (let depth = 0; depth < DEEP; depth++) {
      const branch = makeGraph({ name: 'g', nodes: [inner], inputs: [], outputs: [], initializers: [] });
      inner = node('If', ['cond'], [], { attributes: { then_branch: branch } });
    }
    expect(nestedNodes(inner)).toHaveLength(DEEP);
    expect(indexOf([inner]).readsOf(inner)).toEqual(['cond', 'x']);
  });
});
