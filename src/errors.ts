/** Stable identifiers of what went wrong; programs may switch on them, messages may change. */
export type ErrorCode =
  | 'invalid-rank'
  | 'invalid-shape'
  | 'invalid-strides'
  | 'invalid-dtype'
  | 'invalid-option'
  | 'invalid-mask'
  | 'invalid-cu-seqlens'
  | 'invalid-file'
  | 'unknown-option'
  | 'unsupported-option'
  | 'unsupported-size'
  | 'buffer-too-small'
  | 'mixed-locations'
  | 'already-installed'
  | 'backend-unavailable'
  | 'missing-package'
  | 'device-lost'
  | 'out-of-memory'
  | 'execution-failed'
  | 'disposed';

/** What every error of this package carries besides its message. */
export interface ErrorDetails {
  /** The argument at fault, in the caller's spelling: `q`, `options.attnMask`, ... */
  readonly argument?: string;
  /** What would have been accepted. */
  readonly expected?: string;
  /** What was received instead. */
  readonly received?: string;
  readonly cause?: unknown;
}

/** Base of all errors thrown by this package. */
export class SageAttentionError extends Error {
  override readonly name: string = 'SageAttentionError';
  readonly code: ErrorCode;
  readonly argument: string | undefined;
  readonly expected: string | undefined;
  readonly received: string | undefined;

  constructor(code: ErrorCode, message: string, details: ErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.code = code;
    this.argument = details.argument;
    this.expected = details.expected;
    this.received = details.received;
  }
}

/** Longest text of a value in an error. */
const LONGEST_TEXT = 200;
/** Elements of an array that an error shows. */
const SHOWN_ELEMENTS = 8;

const shortened = (text: string) => (text.length > LONGEST_TEXT ? `${text.slice(0, LONGEST_TEXT - 3)}...` : text);

/**
 * Text of a caller's that is safe on a terminal: control characters, those that reorder text among them, are escaped.
 */
export const escaped = (text: string): string =>
  shortened(text).replace(
    /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu,
    (character) => `\\u{${(character.codePointAt(0) as number).toString(16)}}`,
  );

/** Name of a typed array's class, whichever realm it is from; undefined for all else. */
export const typedArrayName = Object.getOwnPropertyDescriptor(
  Object.getPrototypeOf(Uint8Array.prototype),
  Symbol.toStringTag,
)?.get as (this: unknown) => string | undefined;

function textOfObject(value: object): string {
  const typed = typedArrayName.call(value);
  if (typed !== undefined) return `${typed} of ${(value as Uint8Array).length} elements`;
  if (Array.isArray(value)) {
    const shown = value.slice(0, SHOWN_ELEMENTS).map((element) => textOf(element));
    return `[${shown.join(',')}${value.length > SHOWN_ELEMENTS ? ',...' : ''}]`;
  }
  return Object.prototype.toString.call(value);
}

/** Any value in a few words, for errors: it never throws, is short, and takes no longer for a large value. */
export function textOf(value: unknown): string {
  try {
    if (typeof value === 'function') return 'a function';
    return escaped(typeof value === 'object' && value !== null ? textOfObject(value) : String(value));
  } catch {
    // A proxy, or a getter that throws.
    return 'an object that cannot be read';
  }
}

/** The name of a value's class, for errors, under the terms of {@link textOf}. */
export function classOf(value: unknown): string {
  try {
    return escaped(Object.prototype.toString.call(value).slice(8, -1));
  } catch {
    return 'an object that cannot be read';
  }
}

/** The caller passed something that no kernel accepts. */
export class InvalidArgumentError extends SageAttentionError {
  override readonly name = 'InvalidArgumentError';

  /** @param received in full; the error has its first 200 characters */
  constructor(code: ErrorCode, argument: string, expected: string, received: string, cause?: unknown) {
    const short = shortened(received);
    super(code, `${argument}: expected ${expected}, received ${short}`, { argument, expected, received: short, cause });
  }
}

/**
 * Reads what a caller passed. What only a getter or a proxy of theirs can throw becomes an error of this package, and
 * so does what no check foresaw.
 */
export function reading<R>(argument: string, read: () => R, code: ErrorCode = 'invalid-shape'): R {
  try {
    return read();
  } catch (error) {
    if (error instanceof SageAttentionError) throw error;
    const received = error instanceof Error ? escaped(error.message) : textOf(error);
    throw new InvalidArgumentError(code, argument, 'values that can be read', received, error);
  }
}

/** Steps from one word to another: letters that are left out, added or changed. */
function distanceOf(from: string, to: string): number {
  let row = Array.from({ length: to.length + 1 }, (_, j) => j);
  for (let i = 1; i <= from.length; i++) {
    const next = [i];
    for (let j = 1; j <= to.length; j++) {
      const changed = (row[j - 1] as number) + (from[i - 1] === to[j - 1] ? 0 : 1);
      next.push(Math.min(changed, (row[j] as number) + 1, (next[j - 1] as number) + 1));
    }
    row = next;
  }
  return row[to.length] as number;
}

/** The name that was probably meant: the same but for case and `_`, or but for a few letters. */
function nearest(name: string, names: readonly string[]): string | undefined {
  if (name.length > 40) return undefined;
  const plain = (text: string) => text.replaceAll('_', '').toLowerCase();
  const near = names
    .map((other) => ({ other, distance: distanceOf(plain(name), plain(other)) }))
    .sort((a, b) => a.distance - b.distance)[0];
  return near !== undefined && near.distance <= Math.max(1, Math.floor(name.length / 3)) ? near.other : undefined;
}

/** What a caught value says: anything may be thrown. */
export const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));

/**
 * A copy of the options given, inherited ones included, each read once. One that is `undefined` counts as absent.
 *
 * @param taken names of the options that there are
 * @throws {InvalidArgumentError} `invalid-option`: no object; `unknown-option`: a name that is not among `taken`
 */
export function takeOptions<T extends object>(options: T, taken: readonly string[], argument = 'options'): T {
  if (typeof options !== 'object' || options === null || Array.isArray(options)) {
    throw new InvalidArgumentError('invalid-option', argument, 'an object', textOf(options));
  }
  const copyOf = () => {
    const copy: Record<string, unknown> = {};
    for (const name in options) {
      if (!taken.includes(name)) {
        const near = nearest(name, taken);
        const expected = `one of ${taken.join(', ')}${near === undefined ? '' : ` (perhaps ${near})`}`;
        throw new InvalidArgumentError(
          'unknown-option',
          `${argument}.${escaped(name)}`,
          expected,
          `'${escaped(name)}'`,
        );
      }
      const value = options[name];
      if (value !== undefined) copy[name] = value;
    }
    return copy as T;
  };
  return reading(argument, copyOf, 'invalid-option');
}

/** A valid option that the chosen kernel does not honour. */
export class UnsupportedOptionError extends SageAttentionError {
  override readonly name = 'UnsupportedOptionError';

  constructor(kernel: string, argument: string, expected: string, received: string) {
    super('unsupported-option', `${argument}: kernel '${kernel}' takes ${expected}, received ${received}`, {
      argument,
      expected,
      received,
    });
  }
}

/** A backend cannot run here. The message names what to install or enable. */
export class BackendUnavailableError extends SageAttentionError {
  override readonly name = 'BackendUnavailableError';
  readonly backend: string;

  constructor(backend: string, reason: string, remedy: string, cause?: unknown) {
    super('backend-unavailable', `backend '${backend}' is not available: ${reason}. ${remedy}`, {
      argument: 'options.backend',
      expected: remedy,
      received: reason,
      cause,
    });
    this.backend = backend;
  }
}

/** An optional package is needed for what was asked, and is not installed. */
export class MissingPackageError extends SageAttentionError {
  override readonly name = 'MissingPackageError';
  readonly packageName: string;

  constructor(packageName: string, purpose: string, cause?: unknown) {
    super('missing-package', `${purpose} needs the npm package ${packageName}: npm install ${packageName}`, {
      expected: `the npm package ${packageName}`,
      received: 'none',
      cause,
    });
    this.packageName = packageName;
  }
}

/** A device, driver or worker failed while it ran a call. No output was produced. */
export class ExecutionError extends SageAttentionError {
  override readonly name = 'ExecutionError';

  constructor(
    code: 'device-lost' | 'out-of-memory' | 'execution-failed' | 'disposed',
    message: string,
    cause?: unknown,
  ) {
    super(code, message, { cause });
  }
}
