/**
 * What can be said of a value from what can be said of the values that it is computed from. Every value is looked at once, without
 * recursion: graphs share values (each squaring of a chain doubles the paths through it), are thousands of nodes deep, and may
 * have cycles before onnxruntime has refused them.
 */
import type { GraphIndex } from './graph.ts';

export interface GraphFunction<T> {
  /** Values whose results `result` asks for. */
  dependencies(index: GraphIndex, value: string): readonly string[];
  result(index: GraphIndex, value: string, of: (dependency: string) => T): T;
  /** The result for a value that depends on itself. */
  readonly cyclic: T;
}

/** The function, whose results are kept as long as the graph. */
export function graphFunction<T>({ dependencies, result, cyclic }: GraphFunction<T>) {
  const known = new WeakMap<GraphIndex, Map<string, T>>();
  return (index: GraphIndex, value: string): T => {
    let results = known.get(index);
    if (results === undefined) {
      results = new Map();
      known.set(index, results);
    }
    const found = results;
    const of = (name: string) => (found.has(name) ? (found.get(name) as T) : cyclic);
    // Values between `value` and the top of the stack are waiting for the values above them.
    const waiting = new Set<string>();
    const stack = [value];
    for (let name = stack.at(-1); name !== undefined; name = stack.at(-1)) {
      if (!found.has(name) && !waiting.has(name)) {
        waiting.add(name);
        for (const dependency of dependencies(index, name)) {
          if (!found.has(dependency) && !waiting.has(dependency)) stack.push(dependency);
        }
        if (stack.at(-1) !== name) continue;
      }
      if (!found.has(name)) found.set(name, result(index, name, of));
      stack.pop();
    }
    return found.get(value) as T;
  };
}
