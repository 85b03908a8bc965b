/** A process as a rank of a group that NCCL connects. */
import type { CudaBackend } from '../../backends/cuda/backend.ts';
import { InvalidArgumentError, textOf } from '../../errors.ts';
import { CudaPlace } from '../cuda-place.ts';
import { rankOfEnvironment } from '../environment.ts';
import { loadNccl, NCCL_ID_BYTES, type NcclApi } from './api.ts';
import { NcclTransport, newNcclId } from './transport.ts';

export { loadNccl } from './api.ts';
export { newNcclId } from './transport.ts';

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

/** Settles what was asked for against what the launcher says. */
function settle(given: ProcessOptions) {
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
  if (id !== undefined && !(id instanceof Uint8Array && id.length === NCCL_ID_BYTES)) {
    throw new InvalidArgumentError(
      'invalid-option',
      'options.id',
      `${NCCL_ID_BYTES} bytes of createNcclId`,
      textOf(id),
    );
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

/** @param load tests put another library in NCCL's place */
export async function connectProcess(
  backend: CudaBackend,
  given: ProcessOptions,
  load: () => Promise<NcclApi> = loadNccl,
): Promise<NcclTransport> {
  const { localRank, ...options } = settle(given);
  const cuda = await backend.cuda();
  // A launcher may let each process see only its own device.
  const device = cuda.device(given.device ?? (cuda.deviceCount === 1 ? 0 : localRank));
  const api = await load();
  const own = options.size === 1 && options.id === undefined && options.address === undefined;
  return NcclTransport.connect(api, new CudaPlace(backend, device), own ? { ...options, id: newNcclId(api) } : options);
}
