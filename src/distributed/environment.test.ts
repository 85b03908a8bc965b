import { describe, expect, it } from 'vitest';
import { rankOfEnvironment } from './environment.ts';

describe('rankOfEnvironment', () => {
  it.each([
    [
      'torchrun',
      { RANK: '3', WORLD_SIZE: '8', LOCAL_RANK: '1', MASTER_ADDR: 'a', MASTER_PORT: '12' },
      [3, 8, 1, 'a:12'],
    ],
    [
      'torchrun whose store has taken the port',
      {
        RANK: '0',
        WORLD_SIZE: '2',
        LOCAL_RANK: '0',
        MASTER_ADDR: 'a',
        MASTER_PORT: '12',
        TORCHELASTIC_USE_AGENT_STORE: 'True',
      },
      [0, 2, 0, 'a:13'],
    ],
    [
      'Open MPI',
      { OMPI_COMM_WORLD_RANK: '5', OMPI_COMM_WORLD_SIZE: '6', OMPI_COMM_WORLD_LOCAL_RANK: '2', MASTER_ADDR: 'b' },
      [5, 6, 2, 'b:29500'],
    ],
    ['MPICH', { PMI_RANK: '1', PMI_SIZE: '2', MPI_LOCALRANKID: '1' }, [1, 2, 1, undefined]],
    ['Slurm', { SLURM_PROCID: '7', SLURM_NTASKS: '16', SLURM_LOCALID: '3', MASTER_ADDR: 'n1' }, [7, 16, 3, 'n1:29500']],
  ])('understands %s', (_, environment, [rank, worldSize, localRank, address]) => {
    expect(rankOfEnvironment(environment as never)).toEqual({ rank, worldSize, localRank, address });
  });

  it('says nothing of a process that no launcher started', () => {
    expect(rankOfEnvironment({ RANK: 'one', WORLD_SIZE: '2' })).toBeUndefined();
    expect(rankOfEnvironment({})).toBeUndefined();
  });
});
