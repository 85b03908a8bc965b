/** Shapes of inputs with which a model runs in one piece because it has no attention that is worth replacing. */

export interface InputShape {
  /** How many sizes each input has. */
  readonly ranks: string;
  /** The sizes of all inputs. */
  readonly sizes: readonly number[];
}

export function inputShapeOf(dims: readonly (readonly number[])[]): InputShape {
  return { ranks: dims.map((sizes) => sizes.length).join(), sizes: dims.flat() };
}

/** The same text for the same sizes. */
export const keyOf = ({ ranks, sizes }: InputShape): string => `${ranks} ${sizes}`;

interface Known extends InputShape {
  readonly queryLengths: string | undefined;
}

const REMEMBERED = 256;

/**
 * Each step of a decoder has shapes that were not seen before: its cache grows. Two shapes with the same query lengths, too short
 * both times, show that the sizes in which they differ do not matter, and further shapes that differ in those alone are known.
 */
export class WholeShapes {
  #known: Known[] = [];
  /** Places of sizes that query lengths do not depend on, by ranks. */
  readonly #irrelevant = new Map<string, Set<number>>();

  has(shape: InputShape): boolean {
    return this.#known.some((known) => this.#isLike(known, shape));
  }

  /** True where short queries alone are the reason. */
  isShort(shape: InputShape): boolean {
    return this.#known.find((known) => this.#isLike(known, shape))?.queryLengths !== undefined;
  }

  /** @param queryLengths of all attentions, where they alone are the reason; undefined for any other reason */
  add(shape: InputShape, queryLengths: string | undefined): void {
    const irrelevant = this.#irrelevant.get(shape.ranks) ?? new Set();
    this.#irrelevant.set(shape.ranks, irrelevant);
    for (const known of this.#known) {
      if (queryLengths === undefined || known.queryLengths !== queryLengths || known.ranks !== shape.ranks) continue;
      for (const [at, size] of shape.sizes.entries()) if (size !== known.sizes[at]) irrelevant.add(at);
    }
    this.#known = [...this.#known.filter((known) => !this.#isLike(known, shape)), { ...shape, queryLengths }].slice(
      -REMEMBERED,
    );
  }

  #isLike(known: Known, { ranks, sizes }: InputShape): boolean {
    if (known.ranks !== ranks) return false;
    const irrelevant = known.queryLengths === undefined ? undefined : this.#irrelevant.get(ranks);
    return sizes.every((size, at) => size === known.sizes[at] || irrelevant?.has(at) === true);
  }
}
