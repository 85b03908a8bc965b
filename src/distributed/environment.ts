/** Which rank a process is, as launchers say it. */

/** A process's place in a group of several. */
export interface RankEnvironment {
  readonly rank: number;
  readonly worldSize: number;
  /** Among the processes of this machine. */
  readonly localRank: number;
  /** Where rank 0 listens, `host:port`; undefined: the launcher does not say. */
  readonly address: string | undefined;
}

type Environment = Readonly<Record<string, string | undefined>>;

/** Variables of rank, number of ranks and rank on the machine, by launcher. */
const LAUNCHERS = [
  // torchrun, and `sageattention launch`
  ['RANK', 'WORLD_SIZE', 'LOCAL_RANK'],
  // Open MPI
  ['OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'],
  // MPICH and Intel MPI (Hydra)
  ['PMI_RANK', 'PMI_SIZE', 'MPI_LOCALRANKID'],
  // Slurm's srun
  ['SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'],
] as const;

/** As torchrun's, where the launcher names no port. */
const DEFAULT_PORT = 29500;

const whole = (text: string | undefined) => (text !== undefined && /^\d+$/.test(text) ? Number(text) : undefined);

/** Undefined where no launcher started this process. */
export function rankOfEnvironment(environment: Environment): RankEnvironment | undefined {
  for (const [rankName, sizeName, localName] of LAUNCHERS) {
    const [rank, worldSize] = [whole(environment[rankName]), whole(environment[sizeName])];
    if (rank === undefined || worldSize === undefined) continue;
    const { MASTER_ADDR: host, MASTER_PORT: port } = environment;
    // torchrun's own store may have taken the port that it names.
    const taken = environment.TORCHELASTIC_USE_AGENT_STORE === 'True' ? 1 : 0;
    const address = host === undefined ? undefined : `${host}:${(whole(port) ?? DEFAULT_PORT) + taken}`;
    return { rank, worldSize, localRank: whole(environment[localName]) ?? rank, address };
  }
  return undefined;
}
