/** Reading of numbers and lists from the command line, and of the files that it names. */
import { readFile } from 'node:fs/promises';
import { InvalidArgumentError, Option } from 'commander';
import { UserError } from './errors.ts';
import { KERNEL_NAMES, messageOf } from './library.ts';

export const BACKEND_NAMES = ['wasm', 'webgpu', 'cuda'] as const;

/** An integer within bounds, as a parser for commander. */
export const integer =
  (least: number, most = Number.MAX_SAFE_INTEGER) =>
  (text: string): number => {
    const value = /^\d+$/.test(text.trim()) ? Number(text) : Number.NaN;
    if (Number.isNaN(value) || value < least || value > most) {
      const bounds = most === Number.MAX_SAFE_INTEGER ? `of at least ${least}` : `from ${least} to ${most}`;
      throw new InvalidArgumentError(`Expected an integer ${bounds}.`);
    }
    return value;
  };

/** A finite number, as a parser for commander. */
export function finite(text: string): number {
  const value = text.trim() === '' ? Number.NaN : Number(text);
  if (!Number.isFinite(value)) throw new InvalidArgumentError('Expected a number.');
  return value;
}

/** Comma-separated values, each read by `parse`. */
export const list =
  <T>(parse: (text: string) => T) =>
  (text: string): T[] =>
    text.split(',').map((part) => parse(part.trim()));

/** One of some words. */
export const choice =
  <T extends string>(choices: readonly T[]) =>
  (text: string): T => {
    const found = choices.find((value) => value === text);
    if (found === undefined) throw new InvalidArgumentError(`Allowed choices are ${choices.join(', ')}.`);
    return found;
  };

export const backendOption = (description: string) =>
  new Option('-b, --backend <name>', description).choices(['auto', ...BACKEND_NAMES]).default('auto');

export const kernelOption = (description: string) =>
  new Option('-k, --kernel <name>', description).choices(['auto', ...KERNEL_NAMES]).default('auto');

/** The bytes of a file that the user named. */
export async function readUserFile(file: string): Promise<Uint8Array> {
  try {
    return await readFile(file);
  } catch (error) {
    throw new UserError(`cannot read ${file}: ${messageOf(error)}`);
  }
}
