/** The table of a batch's sequences, as launches write and kernels read it. */
import type { KernelBuilder } from '../../ptx/builder.ts';
import type { Reg } from '../../ptx/types.ts';
import { offset } from './addresses.ts';

/**
 * One row of the table of sequences (constant buffer `sequences`), eight int32: where a sequence lies in the caller's
 * tensors (`queryStart`, `keyStart`: tokens) and in the padded quantized ones (`paddedQueryStart`, `paddedKeyStart`:
 * rows); and the interval of its keys, from the first on, outside of which no row sees any (`loadVisibleRange` of the
 * quantizers).
 */
export const SEQUENCE_INTS = 8;

export interface SequenceRegisters {
  readonly queryStart: Reg<'u32'>;
  readonly queryLength: Reg<'u32'>;
  readonly keyStart: Reg<'u32'>;
  readonly keyLength: Reg<'u32'>;
  readonly paddedQueryStart: Reg<'u32'>;
  readonly paddedKeyStart: Reg<'u32'>;
}

/** Reads a sequence's row of the table. */
export function loadSequence(b: KernelBuilder, table: Reg<'global'>, sequence: Reg<'u32'>): SequenceRegisters {
  const row = offset(b, table, sequence, SEQUENCE_INTS * 4);
  const [queryStart, queryLength, keyStart, keyLength] = b.ldVector('u32', 4, row, 0, { readOnly: true }) as [
    Reg<'u32'>,
    Reg<'u32'>,
    Reg<'u32'>,
    Reg<'u32'>,
  ];
  const [paddedQueryStart, paddedKeyStart] = b.ldVector('u32', 2, row, 16, { readOnly: true }) as [
    Reg<'u32'>,
    Reg<'u32'>,
  ];
  return { queryStart, queryLength, keyStart, keyLength, paddedQueryStart, paddedKeyStart };
}

/** Reads how many keys a sequence has. */
export function loadKeyLength(
  b: KernelBuilder,
  table: Reg<'global'>,
  sequence: Reg<'u32'>,
  into: Reg<'u32'>,
): Reg<'u32'> {
  return b.ld('u32', offset(b, table, sequence, SEQUENCE_INTS * 4), 12, { into, readOnly: true });
}
