/** Which rank a process is, and where the ranks meet: what the caller says comes before what the launcher says. */
import { InvalidArgumentError, textOf } from '../errors.ts';
import { rankOfEnvironment } from './environment.ts';

export interface ProcessOptions {
  readonly rank?: number;
  readonly worldSize?: number;
  readonly address?: string;
  readonly id?: Uint8Array;
  readonly device?: number;
  readonly timeout: number;
}

const MAX_RANKS = 2 ** 16;

function takeWhole(option: string, value: unknown, least: number, most: number): number {
  if (Number.isInteger(value) && (value as number) >= least && (value as number) <= most) return value as number;
  const expected = `a whole number from ${least} to ${most}`;
  throw new InvalidArgumentError('invalid-option', `options.${option}`, expected, textOf(value));
}

function takeAddress(address: string): { host: string; port: number } {
  const [, host, port] = /^(.+):(\d{1,5})$/.exec(address) ?? [];
  if (host !== undefined && Number(port) > 0 && Number(port) < 65536) {
    return { host: host.replace(/^\[(.*)\]$/, '$1'), port: Number(port) };
  }
  throw new InvalidArgumentError('invalid-option', 'options.address', 'host:port of rank 0', textOf(address));
}

/**
 * Settles what was asked for against what the launcher says.
 *
 * @param idBytes of an id, where the transport takes one instead of an address
 */
export function settleProcess(given: ProcessOptions, idBytes = 0) {
  const launched = rankOfEnvironment(process.env);
  if (given.worldSize === undefined && launched === undefined) {
    const expected =
      'the number of processes (or a launcher that says it: npx sageattention launch, torchrun, MPI, Slurm)';
    throw new InvalidArgumentError('invalid-option', 'options.worldSize', expected, 'none');
  }
  const worldSize = takeWhole('worldSize', given.worldSize ?? launched?.worldSize, 1, MAX_RANKS);
  const rank = takeWhole('rank', given.rank ?? launched?.rank, 0, worldSize - 1);
  const timeout = takeWhole('timeout', given.timeout, 1, 2 ** 31 - 1);
  const { id } = given;
  if (id !== undefined && !(id instanceof Uint8Array && id.length === idBytes)) {
    throw new InvalidArgumentError('invalid-option', 'options.id', `${idBytes} bytes of createNcclId`, textOf(id));
  }
  const found = given.address ?? (id === undefined ? launched?.address : undefined);
  if (found === undefined && id === undefined && worldSize > 1) {
    const expected = 'host:port of rank 0 (or MASTER_ADDR in the environment)';
    throw new InvalidArgumentError('invalid-option', 'options.address', expected, 'none');
  }
  const address = found === undefined ? undefined : takeAddress(found);
  return {
    rank,
    size: worldSize,
    timeout,
    localRank: launched?.localRank ?? rank,
    ...(id && { id }),
    ...(address && { address }),
  };
}
