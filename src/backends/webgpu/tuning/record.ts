/**
 * What was measured on a device: times of the tables' candidates for kinds of problems. A record only says what to prefer: a
 * variant that the device or this version does not have is passed over, so that no record is wrong for being old.
 */
import { KERNEL_NAMES, type KernelName } from '../../../attention/kernels.ts';
import type { AttentionProblem } from '../../../attention/problem.ts';
import { VERSION } from '../../../version.ts';
import { FAMILIES, type Family } from '../families/names.ts';
import { padDim } from '../kernels/layout.ts';

/** Lengths of the longest query that are measured apart. */
export const QUERY_CLASSES = { few: 32, short: 1024, long: Number.POSITIVE_INFINITY } as const;

export type QueryClass = keyof typeof QUERY_CLASSES;

/** A candidate and its time. */
export interface TunedTime {
  readonly kernel: KernelName;
  readonly family: Family;
  readonly variant: string;
  /** Of a call, quantization included. */
  readonly milliseconds: number;
}

/** One kind of problem. */
export interface TunedEntry {
  /** The larger of D and Dv, as the kernels pad it. */
  readonly headDim: number;
  readonly queries: QueryClass;
  /** What was measured: `heads` heads of so many queries and keys. */
  readonly measured: { readonly heads: number; readonly queries: number; readonly keys: number };
  /** What the tables choose without this. */
  readonly table: { readonly family: Family; readonly variant: string };
  /** Fastest first. */
  readonly times: readonly TunedTime[];
}

/** Everything measured on one device. */
export interface Tuning {
  readonly schema: 'sageattention-webgpu-tuning/1';
  readonly version: string;
  readonly adapter: string;
  /** The browser or runtime. */
  readonly engine: string;
  /** ISO 8601. */
  readonly date: string;
  readonly entries: readonly TunedEntry[];
}

export type TunedProblem = Pick<AttentionProblem, 'headDim' | 'valueDim' | 'queryLength'>;

/** The kind that a problem is of. */
export function kindOf({ headDim, valueDim, queryLength }: TunedProblem): Pick<TunedEntry, 'headDim' | 'queries'> {
  const [queries] = Object.entries(QUERY_CLASSES).find(([, most]) => queryLength <= most) as [QueryClass, number];
  return { headDim: padDim(Math.max(headDim, valueDim)), queries };
}

/** What was measured for a problem's kind. */
export function entryFor(entries: readonly TunedEntry[], problem: TunedProblem): TunedEntry | undefined {
  const kind = kindOf(problem);
  return entries.find(({ headDim, queries }) => headDim === kind.headDim && queries === kind.queries);
}

/** Entries with new ones in the place of those for the same kinds. */
export const joined = (entries: readonly TunedEntry[], added: readonly TunedEntry[]): readonly TunedEntry[] => [
  ...entries.filter(
    ({ headDim, queries }) => !added.some((entry) => entry.headDim === headDim && entry.queries === queries),
  ),
  ...added,
];

export const tuningOf = (adapter: string, engine: string, entries: readonly TunedEntry[]): Tuning => ({
  schema: 'sageattention-webgpu-tuning/1',
  version: VERSION,
  adapter,
  engine,
  date: new Date().toISOString(),
  entries,
});

const isNumber = (value: unknown): value is number => typeof value === 'number' && Number.isFinite(value);

function isTime(value: unknown): value is TunedTime {
  const { kernel, family, variant, milliseconds } = (value ?? {}) as Partial<TunedTime>;
  return (
    KERNEL_NAMES.some((name) => name === kernel) &&
    FAMILIES.some((name) => name === family) &&
    typeof variant === 'string' &&
    isNumber(milliseconds)
  );
}

function isEntry(value: unknown): value is TunedEntry {
  const { headDim, queries, measured, table, times } = (value ?? {}) as Partial<TunedEntry>;
  return (
    isNumber(headDim) &&
    queries !== undefined &&
    Object.hasOwn(QUERY_CLASSES, queries) &&
    [measured?.heads, measured?.queries, measured?.keys].every(isNumber) &&
    typeof table?.family === 'string' &&
    typeof table.variant === 'string' &&
    Array.isArray(times) &&
    times.every(isTime)
  );
}

/** A stored record; undefined where it is none of this version, this device and this engine. */
export function parseTuning(text: string | undefined, adapter: string, engine: string): Tuning | undefined {
  try {
    const found = JSON.parse(text ?? '') as Tuning;
    const { schema, version, entries } = found;
    const own = schema === 'sageattention-webgpu-tuning/1' && version === VERSION;
    return own && found.adapter === adapter && found.engine === engine && entries.every(isEntry) ? found : undefined;
  } catch {
    return undefined;
  }
}

const lengths = (queries: QueryClass) => {
  const most = QUERY_CLASSES[queries];
  return Number.isFinite(most) ? `up to ${most} queries` : 'more queries';
};

/** What was chosen by which measurement, a line for each kind. */
export const tuningText = ({ date, entries }: Pick<Tuning, 'date' | 'entries'>): string =>
  entries
    .map(({ headDim, queries, measured, table, times }) => {
      const [best] = times;
      const usual = times.find(({ family, variant }) => family === table.family && variant === table.variant);
      const size = `${measured.heads} heads of ${measured.queries} x ${measured.keys}`;
      const than =
        usual === undefined || usual === best
          ? ''
          : `, ${usual.family} ${usual.variant} ${usual.milliseconds.toPrecision(3)} ms`;
      return `D ${headDim}, ${lengths(queries)}: ${best?.kernel} ${best?.family} ${best?.variant} ${best?.milliseconds.toPrecision(3)} ms${than} (${size}, ${date.slice(0, 10)})`;
    })
    .join('\n');
