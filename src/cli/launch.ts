/** `sageattention launch`: the processes of one machine that attend together, each of which is a rank. */
import { type ChildProcess, spawn } from 'node:child_process';
import { createServer } from 'node:net';
import { UserError } from './errors.ts';
import { messageOf } from './library.ts';

export interface LaunchOptions {
  /** Number of processes. */
  readonly processes: number;
  /** Port of 127.0.0.1 at which rank 0 listens; default one that is free. */
  readonly port?: number;
}

/** Milliseconds that processes get to end by themselves, once one of them has failed. */
const GRACE = 3000;

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve, reject) => server.once('error', reject).listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as { port: number };
  await new Promise((resolve) => server.close(resolve));
  return port;
}

const textOf = (code: number | null, signal: NodeJS.Signals | null) =>
  signal === null ? `with exit code ${code}` : `by ${signal}`;

/**
 * Starts a script once for each rank, with the variables that torchrun sets. Where one fails the others get a few seconds to say so,
 * and are ended.
 *
 * @param args behind the script's name
 * @throws {UserError} naming the rank that failed first
 */
export async function launch(
  script: string,
  args: readonly string[],
  { processes, port }: LaunchOptions,
): Promise<void> {
  const rendezvous = port ?? (await freePort());
  const running = new Set<ChildProcess>();
  let failed: string | undefined;
  let grace: NodeJS.Timeout | undefined;
  const endAll = (signal: NodeJS.Signals) => {
    for (const child of running) child.kill(signal);
  };
  const fail = (text: string) => {
    failed ??= text;
    grace ??= setTimeout(() => {
      endAll('SIGTERM');
      grace = setTimeout(() => endAll('SIGKILL'), GRACE);
    }, GRACE);
  };
  const interrupt = (signal: NodeJS.Signals) => endAll(signal);
  process.on('SIGINT', interrupt).on('SIGTERM', interrupt);
  try {
    await Promise.all(
      Array.from({ length: processes }, (_, rank) => {
        const child = spawn(process.execPath, [...process.execArgv, script, ...args], {
          stdio: 'inherit',
          env: {
            ...process.env,
            RANK: `${rank}`,
            LOCAL_RANK: `${rank}`,
            WORLD_SIZE: `${processes}`,
            MASTER_ADDR: '127.0.0.1',
            MASTER_PORT: `${rendezvous}`,
          },
        });
        running.add(child);
        return new Promise<void>((resolve) => {
          child.once('error', (error) => {
            running.delete(child);
            fail(`rank ${rank} could not be started: ${messageOf(error)}`);
            resolve();
          });
          child.once('exit', (code, signal) => {
            running.delete(child);
            if (code !== 0) fail(`rank ${rank} of ${processes} ended ${textOf(code, signal)}`);
            resolve();
          });
        });
      }),
    );
  } finally {
    clearTimeout(grace);
    process.off('SIGINT', interrupt).off('SIGTERM', interrupt);
  }
  if (failed !== undefined) throw new UserError(failed);
}
