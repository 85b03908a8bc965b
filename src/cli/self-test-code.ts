/**
 * What `doctor --self-test` found as a line that can be sent in: JSON, deflated, in base64url, and the first bytes of its SHA-256, so
 * that a line that lost a character is told from a fault of a kernel.
 */
import { createHash } from 'node:crypto';
import { deflateRawSync, inflateRawSync } from 'node:zlib';
import { UserError } from './errors.ts';
import type { BackendName, KernelName } from './library.ts';

/** One kernel on one device. */
export interface KernelFindings {
  readonly kernel: KernelName;
  /** Relative L1 against float64, in the order of `SELF_TEST_PROBLEMS`. Absent where the kernel cannot run. */
  readonly errors?: readonly number[];
  /** First 32 bits of the SHA-256 of the outputs: equal on devices that give the same bits. */
  readonly digest?: string;
  /** GFLOP/s of whole calls, quantization included, at the longest of `SELF_TEST_LENGTHS` that there was time for. */
  readonly gflops?: number;
  readonly length?: number;
  /** The code of the error that it ended with. */
  readonly failure?: string;
}

export interface BackendFindings {
  readonly backend: BackendName;
  readonly device: string;
  readonly kernels: readonly KernelFindings[];
}

export interface Findings {
  readonly version: string;
  readonly machine: string;
  readonly seconds: number;
  readonly backends: readonly BackendFindings[];
}

/** Changes when {@link Findings} do. */
const PREFIX = 'SA1';
/** Far more than any device has to say; what inflates further is no code. */
const LONGEST = 100_000;

const checksum = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('base64url').slice(0, 8);

/** Figures keep three digits. */
const shortened = (_: string, value: unknown) =>
  typeof value === 'number' && !Number.isInteger(value) ? Number(value.toPrecision(3)) : value;

export function encodeFindings(findings: Findings): string {
  const bytes = deflateRawSync(JSON.stringify(findings, shortened), { level: 9 });
  return `${PREFIX}.${bytes.toString('base64url')}.${checksum(bytes)}`;
}

const isNumber = (value: unknown): value is number => typeof value === 'number' && Number.isFinite(value);
const isText = (value: unknown): value is string => typeof value === 'string';
const isAbsentOr = (is: (value: unknown) => boolean, value: unknown) => value === undefined || is(value);
const isListOf = (is: (value: unknown) => boolean, value: unknown) => Array.isArray(value) && value.every(is);
const isRecord = (value: unknown): value is Record<string, unknown> => typeof value === 'object' && value !== null;

const isKernel = (value: unknown): boolean =>
  isRecord(value) &&
  isText(value.kernel) &&
  isAbsentOr((errors) => isListOf(isNumber, errors), value.errors) &&
  isAbsentOr(isText, value.digest) &&
  isAbsentOr(isNumber, value.gflops) &&
  isAbsentOr(isNumber, value.length) &&
  isAbsentOr(isText, value.failure);

const isFindings = (value: unknown): value is Findings =>
  isRecord(value) &&
  isText(value.version) &&
  isText(value.machine) &&
  isNumber(value.seconds) &&
  isListOf(
    (backend) =>
      isRecord(backend) && isText(backend.backend) && isText(backend.device) && isListOf(isKernel, backend.kernels),
    value.backends,
  );

/** @throws {UserError} a line that is no code, or not whole */
export function decodeFindings(code: string): Findings {
  // Mail breaks long lines.
  const [prefix, body = '', sum = '', ...rest] = code.replaceAll(/\s/g, '').split('.');
  if (prefix !== PREFIX || body === '' || rest.length > 0) {
    throw new UserError(
      `not a code of this version's doctor --self-test: those begin with '${PREFIX}.' and have two dots`,
    );
  }
  const bytes = Buffer.from(body, 'base64url');
  // Beside what it ignores, base64 reads some last characters alike.
  if (checksum(bytes) !== sum || bytes.toString('base64url') !== body)
    throw new UserError('characters of the code are missing or wrong: its checksum differs');
  let findings: unknown;
  try {
    findings = JSON.parse(inflateRawSync(bytes, { maxOutputLength: LONGEST }).toString());
  } catch {
    findings = undefined;
  }
  if (!isFindings(findings)) throw new UserError('the code holds nothing that doctor --self-test writes');
  return findings;
}
