/** The graph of a GraphModel's JSON. */

export interface TopologyNode {
  readonly name: string;
  readonly op: string;
  readonly input?: readonly string[];
  readonly attr?: Readonly<
    Record<
      string,
      { readonly b?: boolean; readonly s?: unknown; readonly type?: unknown; readonly [key: string]: unknown }
    >
  >;
}

/** What the `modelTopology` of a GraphModel's JSON holds. */
export interface ModelTopology {
  readonly node: readonly TopologyNode[];
  readonly [key: string]: unknown;
}

/** `name:0` and `^name` mean `name`; another output of a node is a value of its own. */
export const nodeName = (input: string): string => input.replace(/^\^/, '').replace(/:\d+$/, '');

/** What control flow and calls run: functions of a topology's library, with inputs by the names of their nodes. */
export function functionsOf({ library }: ModelTopology): { readonly name: string; readonly node: TopologyNode[] }[] {
  const functions = (library as { function?: unknown } | undefined)?.function;
  if (!Array.isArray(functions)) return [];
  return functions.map(({ signature, nodeDef }) => ({
    name: String(signature?.name),
    // `name:output:0` and `^name` mean `name` there.
    node: ((nodeDef ?? []) as TopologyNode[]).map((node) => ({
      ...node,
      input: (node.input ?? []).map((input) => input.replace(/^\^/, '').replace(/:.*$/s, '')),
    })),
  }));
}

/** Nodes by their name. */
export type Nodes = ReadonlyMap<string, TopologyNode>;

/** Nodes that read any output of a node, by its name. */
export type Readers = ReadonlyMap<string, readonly TopologyNode[]>;

export function readersOf(node: readonly TopologyNode[]): Readers {
  const readers = new Map<string, TopologyNode[]>();
  for (const reader of node) {
    for (const input of reader.input ?? []) {
      const name = nodeName(input);
      const known = readers.get(name);
      if (known === undefined) readers.set(name, [reader]);
      else known.push(reader);
    }
  }
  return readers;
}

/** Everything that some nodes are computed from, and they themselves. */
export function reaches(names: readonly string[], nodes: Nodes): Set<string> {
  const found = new Set<string>();
  const stack = [...names];
  for (let name = stack.pop(); name !== undefined; name = stack.pop()) {
    if (found.has(name)) continue;
    found.add(name);
    stack.push(...(nodes.get(name)?.input ?? []).map(nodeName));
  }
  return found;
}
