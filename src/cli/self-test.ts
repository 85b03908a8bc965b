/**
 * `sageattention doctor --self-test`: every kernel that this device has, in at most twenty seconds: its error, its speed, and a code to
 * send in.
 */
import { createHash } from 'node:crypto';
import { performance } from 'node:perf_hooks';
import { type InputShape, randomInputs } from '../measure/inputs.ts';
import { thisMachine } from '../measure/machine.ts';
import { attentionOperations } from '../measure/operations.ts';
import { availableBackends } from './backends.ts';
import { isRefusal, UserError } from './errors.ts';
import {
  attentionExact,
  type Backend,
  compare,
  createAttention,
  createProblem,
  type KernelName,
  messageOf,
  SageAttentionError,
  sageattn,
  type Tensor,
  toFloat32,
} from './library.ts';
import { type Place, placeOf, release } from './place.ts';
import { type BackendFindings, encodeFindings, type Findings, type KernelFindings } from './self-test-code.ts';
import { bold, dim, duration, paragraph, print, printFacts, progress, rateCell, small, table } from './terminal.ts';

/** Problems whose error is taken: both common head dims, a mask, shared heads, lengths that fill no tile. */
export const SELF_TEST_PROBLEMS: readonly { readonly shape: InputShape; readonly isCausal: boolean }[] = [
  { shape: { batch: 1, heads: 4, kvHeads: 2, length: 200, headDim: 64 }, isCausal: true },
  { shape: { batch: 1, heads: 2, kvHeads: 2, length: 333, headDim: 128 }, isCausal: false },
];

/** Tokens of the calls that are timed, 8 heads of D = 128. */
export const SELF_TEST_LENGTHS = [256, 1024, 4096, 16_384] as const;
const TIMED_SHAPE = { batch: 1, heads: 8, kvHeads: 8, headDim: 128 } as const;
/** A longer length is timed only where it will take no more than this. */
const LONGEST_CALL = 300;
const TIMED_CALLS = 5;

const BUDGET_SECONDS = 20;

/** What kernels may lose on these problems, by the formats in their names: half as much again as was measured. */
const LARGEST_ERRORS: readonly (readonly [part: string, largest: number])[] = [
  ['qk-fp4-pv-fp4', 0.27],
  ['fp4', 0.2],
  ['int4', 0.2],
  ['fp8', 0.08],
  ['pv-int8', 0.08],
  ['', 0.04],
];

/** What codes say of a kernel that the device cannot run. */
const ABSENT = 'not on this device';

const largestError = (kernel: KernelName): number =>
  (LARGEST_ERRORS.find(([part]) => kernel.includes(part)) as readonly [string, number])[1];

/** Problems with their exact outputs. */
const problemsOf = () =>
  SELF_TEST_PROBLEMS.map(({ shape, isCausal }) => {
    const { q, k, v } = randomInputs(shape, 'float16', 1);
    const exact = attentionExact(createProblem(q, k, v, { isCausal }), { q, k, v, attnMask: undefined }).output;
    return { q, k, v, isCausal, exact };
  });

async function errorsOf(backend: Backend, kernel: KernelName, problems: ReturnType<typeof problemsOf>) {
  const errors: number[] = [];
  const digest = createHash('sha256');
  for (const { q, k, v, isCausal, exact } of problems) {
    const output = (await sageattn(q, k, v, { backend: backend.name, kernel, isCausal })) as Tensor;
    const values = toFloat32(output);
    errors.push(compare(values, exact).relativeL1);
    digest.update(new Uint8Array(values.buffer, values.byteOffset, values.byteLength));
  }
  return { errors, digest: digest.digest('hex').slice(0, 8) };
}

/** The rate of whole calls at the longest length that the time allows. */
async function speedOf(backend: Backend, place: Place, kernel: KernelName, deadline: number) {
  let found: { gflops: number; length: number } | undefined;
  for (const length of SELF_TEST_LENGTHS) {
    const began = performance.now();
    const shape = { ...TIMED_SHAPE, length };
    const { q, k, v } = randomInputs(shape, 'float16', 1);
    const inputs = { q: place.put(q), k: place.put(k), v: place.put(v) } as Record<'q' | 'k' | 'v', Tensor>;
    const attention = await createAttention(inputs, { backend: backend.name, kernel });
    const timed = async (calls: number) => {
      await place.settle();
      const start = performance.now();
      for (let i = 0; i < calls; i++) release((await attention.run(inputs)).output);
      await place.settle();
      return (performance.now() - start) / calls;
    };
    try {
      // The first call compiles.
      await timed(1);
      const once = await timed(1);
      const calls = Math.max(1, Math.min(TIMED_CALLS, Math.floor(LONGEST_CALL / once)));
      const milliseconds = calls > 1 ? await timed(calls) : once;
      found = { gflops: attentionOperations({ ...shape, tokens: length }) / milliseconds / 1e6, length };
      // Four times the tokens: sixteen times the work in three calls at least, and four times as long for the rest.
      const next = 16 * milliseconds;
      const whole = 3 * next + 4 * (performance.now() - began);
      if (next > LONGEST_CALL || performance.now() + whole > deadline) break;
    } finally {
      attention.dispose();
      for (const view of Object.values(inputs)) release(view);
    }
  }
  return found;
}

async function testKernel(
  backend: Backend,
  place: Place,
  kernel: KernelName,
  problems: ReturnType<typeof problemsOf>,
  deadline: number,
): Promise<KernelFindings> {
  try {
    const errors = await errorsOf(backend, kernel, problems);
    const speed = performance.now() < deadline ? await speedOf(backend, place, kernel, deadline) : undefined;
    return { kernel, ...errors, ...speed };
  } catch (error) {
    if (!(error instanceof SageAttentionError)) throw error;
    if (!isRefusal(error)) print(`${kernel} on ${backend.name}: ${messageOf(error)}`);
    return { kernel, failure: isRefusal(error) ? ABSENT : error.code };
  }
}

async function runSelfTest(version: string): Promise<Findings> {
  const started = performance.now();
  const found = await availableBackends();
  const total = found.reduce((sum, { backend }) => sum + backend.kernels.length, 0);
  const bar = progress(`${total} kernels`, total);
  const backends: BackendFindings[] = [];
  const problems = problemsOf();
  let tested = 0;
  try {
    for (const { backend } of found) {
      const place = await placeOf(backend);
      const kernels: KernelFindings[] = [];
      for (const { name } of backend.kernels) {
        const now = performance.now();
        // The kernels that are left share the time that is left.
        const share = (started + 1000 * BUDGET_SECONDS - now) / (total - tested);
        kernels.push(await testKernel(backend, place, name, problems, now + share));
        tested++;
        bar.advance();
      }
      backends.push({ backend: backend.name, device: place.device, kernels });
    }
  } finally {
    bar.stop();
  }
  const { runtime, platform, cpu, cores } = thisMachine();
  const seconds = (performance.now() - started) / 1000;
  return { version, machine: `${runtime}, ${platform}, ${cpu}, ${cores} cores`, seconds, backends };
}

/** Whether a kernel computed what it should, in a word. */
function verdictOf({ kernel, errors, failure }: KernelFindings): 'right' | 'WRONG' | 'absent' | 'failed' | '' {
  if (errors === undefined) return failure === undefined ? '' : failure === ABSENT ? 'absent' : 'failed';
  return errors.every((error) => error <= largestError(kernel)) ? 'right' : 'WRONG';
}

/** Prints findings, of this machine or out of a code. @throws {UserError} a kernel is wrong or failed */
export function printFindings({ version, machine, seconds, backends }: Findings): void {
  print(bold(`sageattention ${version}: every kernel in ${duration(1000 * seconds)}`));
  print(dim(machine));
  const problems = SELF_TEST_PROBLEMS.map(
    ({ shape: { length, headDim }, isCausal }) =>
      `${length} tokens, head dim ${headDim}${isCausal ? ', causal' : ''}: relative L1 against float64`,
  );
  printFacts({
    ...Object.fromEntries(problems.map((text, i) => [`error ${i + 1}`, text])),
    'FLOP/s': 'whole calls over so many tokens, 8 heads of 128, tensors on the device',
    outputs: 'first bits of their hash: equal where devices give the same bits',
  });
  const wrong: string[] = [];
  for (const { backend, device, kernels } of backends) {
    print();
    print(`${bold(backend)}  ${dim(device)}`);
    print(
      table(
        ['kernel', ...problems.map((_, i) => `>error ${i + 1}`), '', '>FLOP/s', '>tokens', 'outputs'],
        kernels.map((found) => [
          found.kernel,
          ...problems.map((_, i) => (found.errors?.[i] === undefined ? '' : small(found.errors[i]))),
          verdictOf(found),
          found.gflops === undefined ? '' : rateCell(found.gflops),
          found.length === undefined ? '' : `${found.length}`,
          found.digest ?? '',
        ]),
      ),
    );
    for (const found of kernels) {
      const { kernel, failure } = found;
      if (failure !== undefined && failure !== ABSENT) print(`${kernel}: ${failure}`);
      if (!['right', 'absent'].includes(verdictOf(found))) wrong.push(kernel);
    }
  }
  if (wrong.length > 0) throw new UserError(`not right: ${wrong.join(', ')}`);
}

export async function selfTest(version: string): Promise<void> {
  const findings = await runSelfTest(version);
  print();
  print(paragraph('To send in what was found (nothing else leaves this machine, and this only if you send it):'));
  print(encodeFindings(findings));
  print();
  printFindings(findings);
}
