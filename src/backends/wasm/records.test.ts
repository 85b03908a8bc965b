import { expect, test } from 'vitest';
import { JOB_FIELDS, SEQUENCE_FIELDS, UNIT_FIELDS } from './fields.ts';
import * as offsetsOf from './generated/fields.ts';

test.each([
  ['JOB', JOB_FIELDS],
  ['SEQUENCE', SEQUENCE_FIELDS],
  ['UNIT', UNIT_FIELDS],
] as const)('%s: kernels read each field where it is written', (record, names) => {
  const constants = offsetsOf as unknown as Record<string, number>;
  const offsets = names.map((name) => constants[`${record}_${name.replaceAll(/[A-Z]/g, '_$&').toUpperCase()}`]);
  expect(offsets).toEqual(names.map((_, i) => 4 * i));
  expect(constants[`${record}_BYTES`]).toBe(4 * names.length);
  // The kernels have no others.
  const known = Object.keys(constants).filter((name) => name.startsWith(`${record}_`));
  expect(known).toHaveLength(names.length + 1);
});
