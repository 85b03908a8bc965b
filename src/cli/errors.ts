import { SageAttentionError } from './library.ts';

/** A mistake of the person at the terminal: printed as one message, without a stack trace. */
export class UserError extends Error {
  override readonly name = 'UserError';
}

/** True when a kernel said that it does not take a problem, as opposed to failing at it. */
export const isRefusal = (error: unknown): boolean =>
  error instanceof SageAttentionError && ['unsupported-option', 'unsupported-size'].includes(error.code);
