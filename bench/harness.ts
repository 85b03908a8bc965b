/**
 * Runs a bench's tasks one after another in a worker process, most important first. A task that faults the device or
 * hangs costs only its own result: the next worker goes on with the rest, and finished results are kept.
 */

import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { messageOf } from '../src/errors.ts';

const SILENCE_SECONDS = 45;

/** What the worker tells its parent, a line of JSON each. */
interface Message<Outcome, Facts> {
  /** Found out once, when a worker starts. */
  readonly facts?: Facts;
  /** Index of a task. */
  readonly started?: number;
  readonly finished?: number;
  readonly outcome?: Outcome | { readonly error: string };
}

const say = (message: object) => process.stdout.write(`${JSON.stringify(message)}\n`);

/** The worker's side: performs tasks from `first` on, and ends the process. */
export function work<Task, Outcome>(
  tasks: readonly Task[],
  first: number,
  facts: object,
  perform: (task: Task) => Outcome,
  /** Nothing more can be computed in this process. */
  lost: () => boolean,
): never {
  say({ facts });
  for (let i = first; i < tasks.length; i++) {
    say({ started: i });
    try {
      say({ finished: i, outcome: perform(tasks[i] as Task) });
    } catch (error) {
      say({ finished: i, outcome: { error: messageOf(error) } });
      if (lost()) process.exit(3);
    }
  }
  process.exit(0);
}

interface Run<Outcome, Facts> {
  /** Arguments with which this program starts a worker at a task. */
  readonly argumentsFor: (first: number) => readonly string[];
  readonly tasks: number;
  /** `Date.now()` after which no task runs. */
  readonly deadline: number;
  /** A task that says nothing for so long hangs; default 45. */
  readonly silenceSeconds?: number;
  readonly onFacts: (facts: Facts) => void;
  readonly onOutcome: (task: number, outcome: Outcome | { readonly error: string }) => void;
}

/** The parent's side: all tasks, in as many workers as it takes. */
export async function runInWorkers<Outcome, Facts>(run: Run<Outcome, Facts>): Promise<void> {
  for (let next = 0; next < run.tasks && Date.now() < run.deadline; ) next = await runWorker(run, next);
}

/** Runs tasks from `first` on in one worker; gives the index of the next task to try. */
function runWorker<Outcome, Facts>(run: Run<Outcome, Facts>, first: number): Promise<number> {
  const child = spawn(process.execPath, [process.argv[1] as string, ...run.argumentsFor(first)], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const { silenceSeconds = SILENCE_SECONDS } = run;
  let current = first;
  let next = first;
  let why = 'the process ended';
  let last = Date.now();
  const watch = setInterval(() => {
    const silent = Date.now() - last > silenceSeconds * 1000;
    if (!silent && Date.now() < run.deadline) return;
    why = silent ? `hung for ${silenceSeconds} s` : 'out of time';
    child.kill('SIGKILL');
  }, 500);
  createInterface({ input: child.stdout }).on('line', (line) => {
    last = Date.now();
    if (!line.startsWith('{')) return;
    const { facts, started, finished, outcome } = JSON.parse(line) as Message<Outcome, Facts>;
    if (facts !== undefined) run.onFacts(facts);
    if (started !== undefined) current = started;
    if (finished === undefined) return;
    next = finished + 1;
    if (outcome !== undefined) run.onOutcome(finished, outcome);
  });
  return new Promise((resolve) => {
    child.on('close', () => {
      clearInterval(watch);
      if (next > current || next >= run.tasks) return resolve(next);
      run.onOutcome(current, { error: why });
      resolve(current + 1);
    });
  });
}
