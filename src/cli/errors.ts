/** A mistake of the person at the terminal: printed as one message, without a stack trace. */
export class UserError extends Error {
  override readonly name = 'UserError';
}

export const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));
