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
  /** What came instead. */
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

/** The caller passed something that no kernel accepts. */
export class InvalidArgumentError extends SageAttentionError {
  override readonly name = 'InvalidArgumentError';

  constructor(code: ErrorCode, argument: string, expected: string, received: string) {
    super(code, `${argument}: expected ${expected}, received ${received}`, { argument, expected, received });
  }
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
